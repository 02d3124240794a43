"""Claim: the program written for GPUs and TPUs is the CPU's but for the CPU's cures.

No such device is at hand where the tests run. So the library is told that it writes for one: the
program is then run on the CPU, in float64 (tolerance 1e-12 of each tensor's largest value; found
1.1e-14), and lowered for CUDA and for TPU, as far as the hardware's own compiler.
"""

import re
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_resnet import platforms
from flax_resnet.config import Dataset, DType, Experiment, ResNetConfig, Shortcut
from flax_resnet.data import digits, pixels
from flax_resnet.parallel import sharding
from flax_resnet.step import init
from flax_resnet.training import loop
from flax_resnet.training.feed import draw_steps
from flax_resnet.training.loop import compile_steps
from flax_resnet.training.metrics_log import read_metrics
from flax_resnet.training.reporter import Clock, Done
from flax_resnet.training.workdir import open_run

TOLERANCE = 1e-12
CURES = re.compile('inlineable = "false"')
FOR_CPU = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"  # of all convolutions there, gradients too


def prepare(model: ResNetConfig, size: int) -> tuple:
    """`size` training steps in one call, and what to call them with."""
    config = Experiment(model=model)
    config.train.batch_size = 8
    examples = digits.load()["train"]
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    mesh = sharding.data_mesh()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), mesh.axis_names)
    program, state = init(config)
    call = compile_steps(config, program, constants, mesh)
    state, examples = sharding.replicate(mesh, (state, examples))
    drawn = draw_steps(config, 0, size, len(examples.label))
    return call, (state, examples, sharding.split_batch(mesh, drawn, config.parallel, axis=1))


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 lite"])
def test_the_mesh_says_what_a_program_is_for(kind: str) -> None:
    """Wherever in the program it is asked, and also where JAX has no such device."""
    around = sharding.data_mesh().abstract_mesh
    around = around.update(abstract_device=replace(around.abstract_device, device_kind=kind))
    found: list[bool] = []

    def ask(x: jax.Array, *_: object) -> tuple[jax.Array, None]:
        found.append(platforms.on_cpu())
        return x * x, None

    def program(x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(ask), x, None, length=2)[0].sum()

    @partial(jax.shard_map, mesh=around, in_specs=P(), out_specs=P())
    def on_each(x: jax.Array) -> jax.Array:
        return ask(x)[0]

    with jax.sharding.use_abstract_mesh(around):
        jax.eval_shape(jax.jit(jax.grad(program)), np.ones(8))
        ask(np.ones(8))
        assert len(found) >= 2
        jax.eval_shape(jax.jit(on_each), np.ones(8))
    assert set(found) == {kind == "cpu"}
    assert platforms.on_cpu()  # as JAX's own devices are


def test_the_accelerators_program_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNetConfig(8, Shortcut.B, dtype=DType.FLOAT64)
    texts, results = [], []
    for is_cpu in (True, False):
        monkeypatch.setattr(platforms, "on_cpu", lambda mesh=None, is_cpu=is_cpu: is_cpu)
        call, arguments = prepare(model, 3)
        texts.append(call.lower(*arguments).as_text())
        results.append(jax.device_get(call(*arguments)))
    assert [bool(CURES.search(text)) for text in texts] == [True, False]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        if np.issubdtype(ours.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_the_program_lowers(
    platform: str, scan_blocks: bool, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "on_cpu", lambda mesh=None: False)
    depth = 20 if scan_blocks else 8
    model = ResNetConfig(depth, dtype=dtype, scan_blocks=scan_blocks, remat=scan_blocks)
    call, arguments = prepare(model, 2)
    text = jax.export.export(call, platforms=[platform])(*arguments).mlir_module()
    assert not CURES.search(text)
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    in_bfloat16 = [line for line in convolutions if "xbf16" in line]
    assert not all(FOR_CPU in line for line in convolutions)
    assert len(in_bfloat16) == (len(convolutions) if dtype is DType.BFLOAT16 else 0)


def test_the_rate_is_of_the_calls_wherever_the_host_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes a second, as does handing the next one over; an evaluation takes five."""
    monkeypatch.setattr(loop, "wait_for", lambda metrics: metrics)  # here: when it ends
    now, rates, told_at = 0.0, [], []
    clock = Clock([], 0)

    def calls() -> Generator[Done]:
        nonlocal now
        for step in range(1, 9):
            now += 1
            state: Any = object() if step % 4 == 0 else None
            metrics: Any = now
            yield Done(step, 1, metrics, None, state)

    for done in loop.delayed(loop.timed(calls())):
        assert done.ended_at is not None
        clock.tick(10, done.ended_at.result())
        rates.append(clock.lap().get("images_per_second"))
        told_at.append(now)
        if done.to_evaluate is not None:
            now += 5
            clock.restart_lap(now)
    assert rates == [None, *7 * [10]]
    # The mutant looks at its watch when it is told: two calls end at once after each evaluation.
    assert told_at == [2, 3, 4, 4, 11, 12, 13, 13]


@pytest.mark.slow
def test_a_run_there_is_logged_evaluated_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Experiment(model=ResNetConfig(8))
    config.data.name = Dataset.DIGITS
    settings = config.train
    settings.batch_size, settings.steps, settings.eval_batch_size = 8, 8, 360
    settings.log_every = settings.checkpoint_every = 2
    settings.evaluate_every, config.optim.boundaries = 4, ()
    monkeypatch.setattr(platforms, "on_cpu", lambda mesh=None: False)
    summary = loop.fit(config, tmp_path)
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["split"]) for row in rows] == [
        *((2, "train"), (4, "train"), (4, "test")),
        *((6, "train"), (8, "train"), (8, "test")),
    ]
    assert ["images_per_second" in row for row in rows] == [False, True, False, True, True, False]
    assert open_run(tmp_path).step == summary["steps"] == 8
