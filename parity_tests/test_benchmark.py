"""Claim: the benchmark measures what it names, and its loop compiles and transfers nothing.

Tiny sizes: what it says about speed is not tested here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "scripts/benchmark.py")]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def test_rows_and_picture(tmp_path: Path) -> None:
    rows_file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    run = subprocess.run(
        [
            *SCRIPT,
            *("--depths=8", "--batch_sizes=4", "--repeats=3", "--seconds=0.01", "--scans=2"),
            *("--frameworks=flax", f"--json={rows_file}", f"--png={picture}"),
            *("--xla_flags=--xla_cpu_enable_fast_math=true", "--xla_flags=--xla_no_such=1"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENV,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(rows_file.read_text())
    assert [(row["phase"], row["variant"]) for row in rows] == [
        ("train", "default"),
        ("train", "--xla_cpu_enable_fast_math=true"),
        ("train", "2 steps per call"),
        ("train", "2 steps per call --xla_cpu_enable_fast_math=true"),
        ("eval", "default"),
        ("eval", "--xla_cpu_enable_fast_math=true"),
    ]
    for row in rows:
        assert (row["framework"], row["depth"], row["batch_size"]) == ("flax", 8, 4)
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        rate = 4 / row["ms_median"] * 1e3
        assert abs(row["images_per_second"] / rate - 1) < 1e-9
        assert row["variant"] in run.stdout
    assert "flax --xla_no_such=1 at depth 8 failed" in run.stdout  # XLA was told of it
    for one, other in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert one["loss_of_first_call"] == pytest.approx(other["loss_of_first_call"], rel=1e-3)
    assert rows[0]["loss_of_first_call"] != rows[2]["loss_of_first_call"]
    for row in rows[:4]:
        assert row["recompilations"] == 0
        assert row["implicit_transfers"] == 0
        assert row["host_ms_per_call"] > 0
        assert 0 < row["compile_seconds"] < row["seconds_to_first_step"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_choice_is_one_line(tmp_path: Path) -> None:
    for flag, message in (
        ("--depths=twenty", "--depths must be numbers such as 20,56, got ['twenty']"),
        ("--depths=21", "model.depth must be 6n+2"),
        ("--dtypes=float16", "--dtypes must be of float32, bfloat16, float64, got 'float16'"),
    ):
        run = subprocess.run([*SCRIPT, flag], capture_output=True, text=True, cwd=ROOT, env=ENV)
        assert run.returncode == 2
        assert message in run.stderr
        assert run.stderr.count("\n") == 1
