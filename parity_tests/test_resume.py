"""Claim: a run that is killed and started again ends as if it had never stopped, to the bit.

Real processes, real signals: `scripts/train_flax.py` on the digits, ResNet-8, 24 steps of 16.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 24
COMMAND = [
    sys.executable,
    str(ROOT / "scripts/train_flax.py"),
    f"--config={ROOT / 'configs/quickstart.py'}",
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=16",
    "--config.train.log_every=4",
    "--config.train.evaluate_every=12",
    "--config.train.checkpoint_every=5",  # not a multiple of log_every: a lap is resumed too
]


def start(workdir: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(workdir: Path, *flags: str) -> tuple[int, str]:
    """Exit code and standard error of a whole run."""
    process = start(workdir, *flags)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def stop_after(workdir: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Starts a run and sends it a signal as soon as `step` is in its log."""
    process = start(workdir)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in rows(workdir)):
            process.send_signal(number)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def rows(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(workdir: Path) -> list[tuple[float, ...]]:
    keys = ("step", "split", "loss", "error", "learning_rate")
    return [tuple(row.get(key) for key in keys) for row in rows(workdir)]


def digest(workdir: Path) -> str:
    """Of every number in the last checkpoint, as it was stored with it."""
    path = workdir / "checkpoints" / str(STEPS) / "meta" / "metadata"
    return json.loads(path.read_text())["digest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, errors = finish(workdir)
    assert code == 0, errors
    return workdir


def test_the_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["test_error"] == rows(uninterrupted)[-1]["error"]
    assert summary["parameters"] == 75_290
    assert (uninterrupted / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((uninterrupted / "tensorboard").glob("events*"))
    steps = [(row["step"], row["split"]) for row in rows(uninterrupted)]
    assert steps == [
        (s, split) for s in range(4, 25, 4) for split in ("train", "test")[: 1 + (s % 12 == 0)]
    ]


def test_killed_and_rerun_it_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    code, _ = stop_after(workdir, 12, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, errors = finish(workdir)
    assert code == 0, errors
    assert "going on from step" in errors
    assert digest(workdir) == digest(uninterrupted)
    assert losses(workdir) == losses(uninterrupted)


def test_told_to_stop_it_saves_the_step_and_loses_none(uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "stopped"
    code, errors = stop_after(workdir, 8, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, errors
    step = int(errors.split("at step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    code, errors = finish(workdir)
    assert code == 0, errors
    assert f"going on from step {step}" in errors
    assert digest(workdir) == digest(uninterrupted)
    assert losses(workdir) == losses(uninterrupted)


def test_a_finished_run_does_nothing(uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.*")}
    code, errors = finish(uninterrupted)
    assert code == 0
    assert f"finished at step {STEPS}, nothing to do" in errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_config_is_refused_and_the_difference_shown(uninterrupted: Path) -> None:
    code, errors = finish(uninterrupted, "--config.model.depth=14", "--config.seed=3")
    assert code == 2
    assert errors.count("\n") == 1
    assert "model.depth: 8 there, 14 here" in errors
    assert "seed: 0 there, 3 here" in errors


def test_the_checkpoint_evaluates_to_the_runs_own_error(uninterrupted: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/evaluate.py"), f"--checkpoint={uninterrupted}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert result == {
        "test_error": summary["test_error"],
        "test_loss": summary["test_loss"],
        "examples": 360,
    }
