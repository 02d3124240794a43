"""Claim: `compile_for.py` compiles, for TPUs that are not there, what a run on them would compile.

It tells what that needs, and which settings need less. Where libtpu is not installed the test that
compiles is skipped. The others read texts such as it writes, cut to size.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from flax_resnet.config import (
    DataConfig,
    Dataset,
    DType,
    Experiment,
    Parallel,
    Placement,
    Preprocess,
    ResNetConfig,
)
from flax_resnet.data import source
from flax_resnet.errors import ConfigError
from flax_resnet.parallel import sharding
from flax_resnet.step import init
from flax_resnet.studies import compiling, topology
from flax_resnet.studies.compiled_text import Collectives, Cost, Portion, read, size
from flax_resnet.studies.compiling import Compiled, Memory, Task, TooLarge
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.feed import make_feed
from flax_resnet.training.loop import compile_steps

ROOT = Path(__file__).parent.parent

# Three steps in a call. A step has a loop of four rounds in it; once a call there is a copy.
TEXT = """\
HloModule jit_steps, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

FileNames
1 "step.py"

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %neg = f32[8]{0:T(128)} negate(%p)
}

%blocks (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %y = f32[8]{0:T(128)S(1)} get-tuple-element(%x), index=1
  %each = f32[8]{0:T(128)} fusion(%y), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"20"}
  %gather = bf16[2,8]{1,0:T(8,128)(2,1)} all-gather(%each), channel_id=1, dimensions={0}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%y, %each)
}

%few (c: (s32[], f32[8])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %four), direction=LT
}

%step (x.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %inner = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x.1), condition=%few, body=%blocks, metadata={op_name="jit(steps)/while/blocks"}
  %w = f32[8]{0:T(128)} get-tuple-element(%inner), index=1
  %begun = f32[8]{0:T(128)} all-reduce-start(%w), channel_id=2, to_apply=%sum
  %work = f32[8]{0:T(128)} fusion(%w), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"300"}
  %ended = f32[8]{0:T(128)} all-reduce-done(%begun)
  %go = (f32[8]{0:T(128)}, f32[16]{0:T(128)}) all-gather-start(%ended), channel_id=3, dimensions={0}
  %went = f32[16]{0:T(128)} all-gather-done(%go)
  %both = (f32[8]{0}, /*index=1*/s32[3]{0}) all-reduce(%work, %went), channel_id=4, to_apply=%sum
  ROOT %t.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%x.1, %work)
}

ENTRY %main (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  %large = u8[9,8]{1,0:T(8,128)(4,1)} copy(%p.1), backend_config={"estimated_cycles":"7000"}
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%large, %p.1)
  %steps = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%some, body=%step, backend_config={"known_trip_count":{"n":"3"}}
  %last = s32[]{:T(128)} all-reduce(%p.1), channel_id=5, to_apply=%sum
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%steps), index=1
}
"""  # noqa: E501


def test_what_is_done_in_a_step_and_what_beside_it() -> None:
    found = read(TEXT, steps=3)
    step = [
        Collectives("all-gather", 5, 4 * 2 * 8 * 2 + 64, 0),
        Collectives("all-reduce", 2, 32 + 32 + 12, 1),
    ]
    assert found.step == Portion(4 * 20 + 300, step)
    assert found.call == Portion(7000, [Collectives("all-reduce", 1, 4, 0)])
    assert found.costliest == [
        Cost(7000, "copy", "u8[9,8]", ""),
        Cost(900, "fusion", "f32[8]", ""),
        Cost(240, "fusion", "f32[8]", "jit(steps)/while/blocks"),
    ]


def test_without_a_loop_over_steps_all_is_in_the_step() -> None:
    found = read(TEXT)
    assert found.step.cycles == 3 * (4 * 20 + 300) + 7000
    assert found.call == Portion(0, [])


def test_an_exchange_that_is_wrapped() -> None:
    """XLA also starts a computation of its own, which holds the exchange."""
    text = """\
%wrapped (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), dimensions={0}
}

ENTRY main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %a = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%wrapped
  %other = f32[8]{0} async-done(%ab)
  %w = f32[4]{0} convolution(%x, %x), window={size=1}
  ROOT %r = f32[8]{0} async-done(%a), calls=%wrapped
}
"""
    (found,) = read(text).step.collectives
    assert found == Collectives("all-gather", 1, 32, 1)
    between = "  %w = f32[4]{0} convolution(%x, %x), window={size=1}\n"
    (found,) = read(text.replace(between, "")).step.collectives
    assert found.overlapping == 0


def test_an_exchange_in_pieces() -> None:
    """As TPU's compiler cuts one, which runs beside a convolution; a second one is whole."""
    gather = "f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}"
    pieces = "".join(
        f"%piece.{i} (p: f32[4]) -> f32[8] {{\n  ROOT %g.{i} = {gather}\n}}\n" for i in range(3)
    )
    calls = "".join(
        f"  %f.{i} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%piece.{i}\n" for i in range(3)
    )
    other = f"  %other = {gather.replace('=7', '=8')}\n"
    text = f"{pieces}\nENTRY main (x: f32[4]) -> f32[8] {{\n{calls}{other}}}\n"
    assert read(text).step.collectives == [Collectives("all-gather", 2, 64, 1)]


def test_a_text_that_is_none() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        read("HloModule empty")


@pytest.mark.parametrize(
    ("type_", "bytes_"),
    [
        ("f32[2,4,1,16]{3,2,1,0:T(1,128)S(1)}", 512),
        ("bf16[3]{0}", 6),
        ("(pred[5]{0}, /*index=1*/u8[2,2]{1,0})", 9),
        ("s32[]{:T(128)}", 4),
        ("s4[6]", 3),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("f32[0,3]", 0),
        ("token[]", 0),
    ],
)
def test_the_bytes_of_a_type(type_: str, bytes_: int) -> None:
    assert size(type_) == bytes_


# --- What does not fit ---------------------------------------------------------------------------


def config_of(depth: int, batch_size: int, **model: Any) -> Experiment:
    config = Experiment(model=ResNetConfig(depth, **model))
    config.train.batch_size = batch_size
    return config


def task(name: str, images: int) -> Task:
    lowered: Any = None
    return Task(name, lowered, images, 1)


def test_every_setting_that_needs_less_is_named() -> None:
    """Half of what is needed is there: so is half of 100 images a chip."""
    found = compiling.remedies(config_of(20, 400), task("train", 400), 4, 20.0, 10.0)
    assert [line.partition(" ")[0] for line in found] == [
        "model.remat=True",
        "model.scan_blocks=True",
        "model.dtype=bfloat16",
        "train.batch_size=200",
        "train.accumulate=2",
        "more",
    ]


def test_what_is_set_already_or_changes_nothing_is_not_named() -> None:
    model = {"remat": True, "dtype": DType.BFLOAT16}
    config = config_of(8, 4, **model)  # whose stages have one block, and nothing to scan over
    assert compiling.remedies(config, task("train", 4), 4, 2.0, 1.0) == ["more chips"]
    config = config_of(20, 4, scan_blocks=True, **model)
    assert compiling.remedies(config, task("train", 4), 4, 2.0, 1.0) == ["more chips"]


def test_an_evaluation_has_settings_of_its_own() -> None:
    config = config_of(8, 128, dtype=DType.BFLOAT16)
    found = compiling.remedies(config, task("eval", 1000), 1, 4.0, 1.0)
    assert found == ["train.eval_batch_size=250 (250 images a chip)", "more chips"]


def test_micro_batches_stay_equal() -> None:
    """A device has 18 images in 3 micro-batches, of which 7 fit: 6 images, or 6 micro-batches."""
    config = config_of(8, 36, remat=True, dtype=DType.BFLOAT16)
    config.train.accumulate = 3
    found = compiling.remedies(config, task("train", 36), 2, 18.0, 7.0)
    told = [line.partition(" ")[0] for line in found]
    assert told == ["train.batch_size=12", "train.accumulate=6", "more"]


@pytest.mark.parametrize(
    ("message", "amounts"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (20.65G) exceeds available HBM (15.75G). HLO",
            (20.65 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.5M of 512.0M hbm.",
            (900.5 * 2**20, 512 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
    ],
)
def test_the_compilers_own_refusal(message: str, amounts: tuple[float, float] | None) -> None:
    class Refused:
        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(message)

    refused: Any = Refused()
    given = Task("train", refused, 128, 1)
    if amounts is None:
        with pytest.raises(ConfigError, match="the compiler fails: RESOURCE_EXHAUSTED: Ran out"):
            compiling.compile_task(given)
        return
    found = compiling.compile_task(given)
    assert isinstance(found, TooLarge)
    assert (found.needed, found.available) == pytest.approx(amounts)
    assert compiling.missing(found, None) == (found.needed, found.available)


def test_all_that_is_in_a_chips_memory_counts() -> None:
    chip = topology.CHIPS["TPU v5 lite"]
    part = chip.memory // 4
    memory = Memory(arguments=part, outputs=part, temporaries=part, code=part)
    nothing = Portion(0, [])
    reading = read("ENTRY %main () -> f32[] {\n}")
    fits = Compiled(task("train", 1), 1.0, memory, 197e12, 0.819e9, 2.0, reading)
    assert reading.step == reading.call == nothing
    assert compiling.missing(fits, chip) is None
    assert fits.utilisation(chip) == pytest.approx((0.5, 0.0005))
    fits = fits._replace(memory=memory._replace(code=part + 1))
    assert compiling.missing(fits, chip) == (chip.memory + 1, chip.memory)
    assert compiling.missing(fits, None) is None


@pytest.mark.parametrize(("told", "seconds"), [(0.5, 0.5), (-34.0, None)])
def test_an_estimate_below_zero_is_none(told: float, seconds: float | None) -> None:
    """So it is where libtpu knows no time of an instruction."""
    costs = {"flops": 1.0, "bytes accessed": 2.0, "optimal_seconds": told}
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    compiled = SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(**{f"{size}_size_in_bytes": 0 for size in sizes}),
        cost_analysis=lambda: costs,
        as_text=lambda: "ENTRY %main () -> f32[] {\n}",
    )
    lowered: Any = SimpleNamespace(compile=lambda: compiled)
    found = compiling.compile_task(Task("train", lowered, 1, 1))
    assert isinstance(found, Compiled)
    assert found.optimal_seconds == seconds
    assert (found.utilisation(topology.CHIPS["TPU v5 lite"]) is None) == (seconds is None)


# --- What is compiled ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placement",
    [Placement.RESIDENT, pytest.param(Placement.STREAMED, marks=pytest.mark.slow)],
)
def test_the_programs_are_those_of_a_run(placement: Placement) -> None:
    """To the letter, on two devices that are there, with images and weights as well."""
    data = DataConfig(
        name=Dataset.DIGITS, preprocess=Preprocess.IMAGENET, mixup=0.2, placement=placement
    )
    config = Experiment(model=ResNetConfig(8), data=data)
    config.train.batch_size, config.train.steps_per_call = 8, 3
    config.train.eval_batch_size = 6
    mesh = Mesh(np.array(jax.devices()[:2]), (sharding.AXIS,))
    compiling.check(config, mesh)
    train, evaluation = compiling.tasks(config, mesh)
    assert (train.images, train.steps) == (8, 3)
    assert (evaluation.images, evaluation.steps) == (6, 1)

    splits = source.load(data)
    if placement is Placement.RESIDENT:
        splits = sharding.replicate(mesh, splits)
    constants = source.normalization(data, splits["train"])
    program, state = init(config, 2)
    state = sharding.replicate(mesh, state)
    feed = make_feed(config, mesh, splits["train"])
    steps: Any = compile_steps(config, program, constants, mesh)
    lowered = steps.lower(state, feed.constant, feed.deal(0, 3))
    assert train.lowered.as_text() == lowered.as_text()
    feed.close()
    evaluate = Evaluation(config.model, program, constants, mesh, 6, data)
    lowered = evaluate.lower(state.params, state.batch_stats, splits["test"])
    assert evaluation.lowered.as_text() == lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "parallel", Parallel.PMAP), "parallel must be jit"),
        (lambda c: setattr(c, "init_model", True), "init_model must be false"),
        (lambda c: setattr(c.model, "dtype", DType.FLOAT64), "model.dtype must be float32"),
        (lambda c: setattr(c.model, "num_classes", 7), "model.num_classes must be 10"),
        (
            lambda c: setattr(c.train, "batch_size", 9),
            r"train.batch_size must be divisible by the number of devices \(8\), got 9",
        ),
        (
            lambda c: setattr(c, "data", DataConfig(Dataset.TFDS, placement=Placement.RESIDENT)),
            "data.placement must be streamed",
        ),
    ],
)
def test_what_cannot_be_compiled_for_others(change: Any, message: str) -> None:
    config = Experiment()
    change(config)
    with pytest.raises(ConfigError, match=message):
        compiling.check(config, sharding.data_mesh())


def test_photographs_need_not_be_there() -> None:
    config = Experiment(data=DataConfig(Dataset.FOLDER))
    compiling.check(config, sharding.data_mesh())
    split = compiling.split_like(config, "train", sharding.data_mesh())
    assert isinstance(split, compiling.Unseen)


def test_cifars_validation_images_are_no_training_images() -> None:
    config = Experiment(data=DataConfig(validation=5000))
    sizes = {
        name: len(compiling.split_like(config, name, sharding.data_mesh()).label)
        for name in ("train", "test")
    }
    assert sizes == {"train": 45_000, "test": 10_000}


# --- The TPUs that are not there -----------------------------------------------------------------


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flax-resnet\[tpu\]'"):
        topology.mesh("v5e:2x2")


@pytest.mark.parametrize("name", ["", "v5e", "v5e:0x0", "v5e:2", "v5e:2x2x2x2", "v5e:2x2\n"])
def test_a_name_that_is_none_does_not_reach_the_compiler(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ends the process at some of them."""
    monkeypatch.setattr(topology, "is_installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", lambda **_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="--topology must be such as v5e:1x1, v5e:2x4, ") as error:
        topology.mesh(name)
    assert "\n" not in str(error.value)


def test_a_name_that_the_compiler_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU\nexternal name: TPU v9")

    monkeypatch.setattr(topology, "is_installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", refuse)
    rule = "must be such as v5e:1x1, .*, got 'v9:2x2': Invalid TPU external name: TPU v9$"
    with pytest.raises(ConfigError, match=rule):
        topology.mesh("v9:2x2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5e:16x16", {"chips_per_host_bounds": [2, 2, 1]}),
        ("v5e:1x2", {"chips_per_host_bounds": [1, 2, 1]}),  # which libtpu 0.0.42 needs to be told
        ("V4:2x2x4", {"chips_per_host_bounds": [2, 2, 1], "chip_config_name": "megacore"}),
    ],
)
def test_how_the_chips_lie(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def describe(**given: Any) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(devices=jax.devices()[:2])

    monkeypatch.setattr(topology, "is_installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", describe)
    found = topology.mesh(name)
    assert (found.size, found.axis_names) == (2, (sharding.AXIS,))
    assert asked == [{"platform": "tpu", "topology_name": name, **options}]
    assert topology.chip_of(found) is None


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_installed(), reason="libtpu is not installed")
def test_a_network_is_compiled(tmp_path: Path) -> None:
    arguments = (
        "--topology=v5e:1x2",
        "--noevaluation",
        "--config.data.name=digits",
        "--config.model.depth=8",
        "--config.train.batch_size=8",
        "--config.train.log_every=2",  # to which the steps of a call go where it is no CPU
        f"--json={tmp_path / 'found.json'}",
    )
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/compile_for.py", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "DOES NOT FIT" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["programs"]
    assert (found["chips"], row["steps_per_call"], row["fits"]) == (2, 2, True)
    layers = 7
    (gathered, reduced) = row["step"]["collectives"]
    assert (gathered["kind"], gathered["number"]) == ("all-gather", 2 * layers)
    assert (reduced["kind"], reduced["number"]) == ("all-reduce", 2)
    images = 1437 * 32 * 32 * 3
    assert row["memory"]["arguments"] > images
