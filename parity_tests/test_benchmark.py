"""Claim: the benchmark measures what it names, and its loop compiles and transfers nothing.

Tiny sizes: what it says about speed is not tested here.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flax_resnet.config import DType, Experiment
from flax_resnet.nn.cpu import CURES
from torch_ref.compare import timing_input, timing_table
from torch_ref.compare.timing import (
    Ready,
    Timing,
    Variant,
    flax_variants,
    make_timing,
    torch_variants,
)
from torch_ref.compare.timing_turns import steps_per_round

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "scripts/benchmark.py")]
COMPILED = ["eager", "inductor", "max-autotune"]  # by PyTorch, on a GPU
# No display is needed, and no backend of the user's is looked for.
ENV = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://no_such_backend"}


def measured(at: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of Flax's ResNet-8 at batch size 4, and what was printed."""
    rows_file, picture = at / "rows.json", at / "rows.png"
    sizes = ["--depths=8", "--batch_sizes=4", "--repeats=3", "--seconds=0.01", "--frameworks=flax"]
    run = subprocess.run(
        [*SCRIPT, *sizes, f"--json={rows_file}", f"--png={picture}", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENV,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(rows_file.read_text())
    for row in rows:
        assert (row["framework"], row["depth"], row["batch_size"]) == ("flax", 8, 4)
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        rate = 4 / row["ms_median"] * 1e3
        assert abs(row["images_per_second"] / rate - 1) < 1e-9
        assert row["variant"] in run.stdout
        if row["phase"] == "train":
            assert row["recompilations"] == 0
            assert row["implicit_transfers"] == 0
            assert row["host_ms_per_call"] > 0
            assert 0 < row["compile_seconds"] < row["seconds_to_first_step"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    return rows, run.stdout


@pytest.mark.slow
def test_rows_and_picture(tmp_path: Path) -> None:
    (row,), _ = measured(tmp_path, "--phases=train")
    assert (row["phase"], row["variant"]) == ("train", "default")


@pytest.mark.slow
def test_each_variant_is_what_it_is_called(tmp_path: Path) -> None:
    flags = ["--xla_flags=--xla_cpu_enable_fast_math=true", "--xla_flags=--xla_no_such=1"]
    rows, printed = measured(tmp_path, "--scans=1,2", *flags)
    assert [(row["phase"], row["variant"]) for row in rows] == [
        ("train", "default"),
        ("train", "--xla_cpu_enable_fast_math=true"),
        ("train", "2 steps per call"),
        ("train", "2 steps per call --xla_cpu_enable_fast_math=true"),
        ("eval", "default"),
        ("eval", "--xla_cpu_enable_fast_math=true"),
    ]
    assert "flax --xla_no_such=1 at depth 8 failed" in printed  # XLA was told of it
    for one, other in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert one["loss_of_first_call"] == pytest.approx(other["loss_of_first_call"], rel=1e-3)
    assert rows[0]["loss_of_first_call"] != rows[2]["loss_of_first_call"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        pytest.param(
            "--depths=twenty",
            "--depths must be numbers such as 20,56, got ['twenty']",
            marks=pytest.mark.slow,
        ),
        ("--depths=21", "model.depth must be 6n+2"),
        pytest.param(
            "--dtypes=float16",
            "--dtypes must be of float32, bfloat16, float64, got 'float16'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_choice_is_one_line(flag: str, message: str) -> None:
    run = subprocess.run([*SCRIPT, flag], capture_output=True, text=True, cwd=ROOT, env=ENV)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


# --- Variants -------------------------------------------------------------------------------------


def settings(batch_size: int = 4) -> Experiment:
    config = Experiment()
    config.model.depth, config.train.batch_size = 8, batch_size
    return config


def test_the_variants_of_training() -> None:
    config = settings()
    variants = flax_variants(config, "train", scans=[1, 2], xla_flags=["--a --b=1"])
    assert [(v.name, v.config.train.steps_per_call, v.xla_flags) for v in variants] == [
        ("default", 1, ""),
        ("--a --b=1", 1, "--a --b=1"),
        ("2 steps per call", 2, ""),
        ("2 steps per call --a --b=1", 2, "--a --b=1"),
    ]
    assert config == settings()  # each variant has a config of its own
    variants = flax_variants(config, "train", without_cures=True)[1:]
    assert [v.left_out for v in variants] == [*((cure,) for cure in CURES), CURES]
    assert [v.name for v in variants] == [
        *(f"without {cure}" for cure in CURES),
        "without any cure",
    ]


def test_an_evaluation_has_no_steps_per_call_and_no_cures() -> None:
    variants = flax_variants(settings(), "eval", scans=[2], xla_flags=["--a"], without_cures=True)
    assert [variant.name for variant in variants] == ["default", "--a"]


@pytest.mark.parametrize(
    ("phase", "is_gpu", "names"),
    [
        ("train", False, ["eager", "inductor"]),
        ("eval", True, COMPILED),
        ("train", True, [*COMPILED, "cuda graph", "inductor in a cuda graph"]),
    ],
)
def test_pytorchs_variants(phase: str, is_gpu: bool, names: list[str]) -> None:
    variants = torch_variants(settings(), phase, is_gpu=is_gpu)
    assert [variant.name for variant in variants] == names
    assert {(variant.framework, variant.phase) for variant in variants} == {("torch", phase)}


# --- Rows -----------------------------------------------------------------------------------------


def timing(framework: str, median: float, **changes: object) -> Timing:
    """A row of ResNet-8 in training, whose rounds took a little less and more than `median` ms."""
    config = settings()
    variant = Variant(framework, "some", "train", config)
    ready = Ready("a device", "1.2", {"compile_seconds": 0.123456}, 1)
    seconds = [median * factor / 1e3 for factor in (1.5, 1, 0.9)]
    row = make_timing(variant, ready, seconds, {"peak_host_mib": 9})
    return dataclasses.replace(row, **changes)


def test_a_row_is_the_median_and_the_range() -> None:
    assert timing("flax", 100).to_dict() == {
        "framework": "flax",
        "version": "1.2",
        "device": "a device",
        "depth": 8,
        "batch_size": 4,
        "dtype": DType.FLOAT32.value,
        "phase": "train",
        "variant": "some",
        "ms_median": pytest.approx(100),
        "ms_min": pytest.approx(90),
        "ms_max": pytest.approx(150),
        "images_per_second": pytest.approx(40),
        "compile_seconds": 0.123456,
        "peak_host_mib": 9,
    }


def test_the_table_divides_by_the_best_pytorch_of_the_same_size() -> None:
    others = [
        timing("torch", 1, **{name: value})
        for name, value in {
            "depth": 14,
            "batch_size": 2,
            "dtype": "float64",
            "phase": "eval",
        }.items()
    ]
    rows = [timing("flax", 30), timing("torch", 20), timing("torch", 40), *others]
    lines = timing_table.table(rows).splitlines()[2:]
    assert (
        lines[0]
        == "| ResNet-8 | 4 | float32 | train | flax, some | 30.0 (27.0-45.0) | 133 | 1.50 |"
    )
    ratios = [line.split(" | ")[-1].rstrip(" |") for line in lines]
    assert ratios == ["1.50", "1.00", "2.00", "1.00", "1.00", "1.00", "1.00"]
    assert timing_table.table(rows[:1]).endswith(" | - |")


def test_what_else_was_measured_is_one_line() -> None:
    line = "flax some, ResNet-8 train: compile seconds 0.1235, peak host mib 9"
    assert timing_table.facts_line(timing("flax", 1)) == line
    assert timing_table.facts_line(timing("torch", 1, facts={})) == ""


@pytest.mark.parametrize(
    ("seconds_per_step", "at_once", "steps"), [(0.1, 1, 20), (0.1, 8, 16), (9, 1, 1), (9, 4, 4)]
)
def test_a_round_is_whole_calls(seconds_per_step: float, at_once: int, steps: int) -> None:
    assert steps_per_round(2, seconds_per_step, at_once) == steps


# --- Input ----------------------------------------------------------------------------------------


def test_the_loaders_of_the_input() -> None:
    found = timing_input.loaders("train", ["flax", "torch"], [2, 4], [0, 3])
    assert [loader.name for loader in found] == [
        "ours, one image after the other",
        "ours, 2 threads",
        "ours, 4 threads",
        "ours, 3 workers",
        "DataLoader, 0 workers",
        "DataLoader, 0 workers, uint8",
        "DataLoader, 3 workers",
        "DataLoader, 3 workers, uint8",
    ]
    assert {loader.phase for loader in found} == {"train"}


def test_the_inputs_ratios_are_to_the_best_dataloader_of_the_phase_that_makes_numbers() -> None:
    names = [("flax", "train", False), ("torch", "train", False), ("torch", "train", True)]
    names += [("torch", "train", False), ("torch", "eval", False)]
    rates = [
        timing_input.Rate(
            timing_input.Loader(framework, phase, 1, 2, is_uint8=is_uint8),
            [rate, 3 * rate, 2 * rate],
            [2 << 20, 4 << 20, 5 << 20],
        )
        for (framework, phase, is_uint8), rate in zip(names, [60, 30, 90, 40, 999], strict=True)
    ]
    lines = timing_input.table(rates).splitlines()[2:]
    assert lines[0] == "| train | ours, 2 workers | 120 (60-180) | 1.50 | 5 (+25 %) |"
    ratios = [line.split(" | ")[3] for line in lines]
    assert ratios == ["1.50", "0.75", "2.25", "1.00", "1.00"]
    assert rates[0].to_dict()["images_per_second"] == 120
    assert timing_input.table(rates[:1]).splitlines()[2].split(" | ")[3] == "-"


@pytest.mark.slow
def test_the_input_of_photographs_is_measured(tmp_path: Path) -> None:
    photos, rows_file = tmp_path / "photos", tmp_path / "rows.json"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "photo.png")
    flags = [f"--photos={photos}", "--images=64", "--phases=train", "--repeats=2"]
    flags += ["--seconds=0.01", "--frameworks=flax", "--threads=2", "--workers=0"]
    run = subprocess.run(
        [*SCRIPT, "--input", *flags, f"--json={rows_file}"],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(rows_file.read_text())
    assert [row["variant"] for row in rows] == [
        "ours, one image after the other",
        "ours, 2 threads",
    ]
    for row in rows:
        assert f"| train | {row['variant']} | {row['images_per_second']:.0f} (" in run.stdout
        assert row["peak_mib"] > 10
