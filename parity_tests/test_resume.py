"""Claim: a run that is killed and started again ends as if it had never stopped, to the bit.

Real processes, real signals: `scripts/train_flax.py` on the digits, ResNet-8, 24 steps of 16.
Checkpoints are not at every logged step, so that a lap of the log is resumed too.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.fault import Result
from faults.run import (
    LOG_EVERY,
    ROOT,
    STEPS,
    Run,
    begun,
    environment,
    finish,
    is_saving,
    last_row,
    newest,
    rows,
    uninterrupted,
)


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are, those of test_survival too: the tests share the ones nobody harms."""
    return tmp_path_factory.getbasetemp() / "faults"


@pytest.fixture(scope="module")
def whole(at: Path) -> Path:
    """The work directory of a run that nothing interrupted."""
    return uninterrupted(at)


def test_the_run_leaves_what_it_promises(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["test_error"] == rows(whole)[-1]["error"]
    assert summary["parameters"] == 75_290
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "tensorboard").glob("events*"))
    assert [(row["step"], row["split"]) for row in rows(whole)] == [
        (step, split)
        for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY)
        for split in ("train", "test")[: 1 + (step % 12 == 0)]
    ]


def test_killed_inside_a_save_it_ends_with_the_same_bits(whole: Path, at: Path) -> None:
    run = Run(at, at / "killed_inside_a_save")
    assert run.until(lambda directory: newest(directory) >= 3 and is_saving(directory)), run
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    assert newest(run.workdir) >= 3
    assert finish(at, run.workdir) == Result(True)  # it goes on from there, to the same numbers


@pytest.mark.slow  # test_signals has what hears the signal
def test_told_to_stop_it_saves_the_step_and_loses_none(whole: Path, at: Path) -> None:
    run = begun(at)
    assert run.process.returncode == 128 + signal.SIGTERM, run
    step = newest(run.workdir)
    assert run.said(f"stopped by signal {signal.SIGTERM} at step {step}, which is saved")
    assert last_row(run.workdir) <= step < STEPS
    directory = at / "stopped"
    shutil.copytree(run.workdir, directory)
    assert finish(at, directory) == Result(True)


def test_a_finished_run_does_nothing(whole: Path, at: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}
    run = Run(at, whole)
    assert run.wait() == 0, run
    assert run.said(f"finished at step {STEPS}, nothing to do")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_config_is_refused_and_the_difference_shown(whole: Path, at: Path) -> None:
    run = Run(at, whole, {"model.depth": 14, "seed": 3})
    run.wait()
    assert run.is_refused, run
    assert len(run.lines) == 1
    assert "model.depth: 8 there, 14 here" in run.lines[0]
    assert "seed: 0 there, 3 here" in run.lines[0]


@pytest.mark.slow  # test_golden evaluates a checkpoint as well
def test_the_checkpoint_evaluates_to_the_runs_own_error(whole: Path, at: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/evaluate.py"), f"--checkpoint={whole}"]
    run = subprocess.run(script, capture_output=True, text=True, env=environment(at), check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 <= result.pop("top5_error") <= result["test_error"]
    assert result == {
        "test_error": summary["test_error"],
        "test_loss": summary["test_loss"],
        "examples": 360,
    }
