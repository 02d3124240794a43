"""Claim: one command brings an experiment to its end: told to stop it saves, run again it goes on
and skips what is finished, and a run that fails is named and keeps no other from running.

Real processes, real signals: ResNet-8 and plain-8 on the digits, 300 steps of 16.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import pytest

ROOT = Path(__file__).parent.parent
STEPS = 300


class Outcome(NamedTuple):
    """What a command came to."""

    code: int
    errors: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs: runs/ and results/ appear here."""
    return tmp_path_factory.mktemp("home")


def start(home: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), "plain-vs-residual"]
    settings = ["--out=results/tiny", f"--steps={STEPS}", "--config.data.name=digits"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(home / "cache")}
    return subprocess.Popen(
        [*command, *settings, "--config.train.batch_size=16", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | cache,
    )


def finish(home: Path, *flags: str) -> Outcome:
    process = start(home, *flags)
    _, errors = process.communicate(timeout=300)
    return Outcome(process.returncode, errors)


def log(home: Path, job: str) -> str:
    return (home / "runs/tiny" / job / "train.log").read_text()


@pytest.fixture(scope="module")
def stopped(home: Path) -> Outcome:
    """SIGTERM once the second of two runs has begun to train."""
    process = start(home, "--networks=A-8,plain-8")
    metrics = home / "runs/tiny/plain-8-s0/metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    _, errors = process.communicate(timeout=120)
    return Outcome(process.returncode, errors)


@pytest.fixture(scope="module")
def rerun(home: Path, stopped: Outcome) -> Outcome:
    """The same command and a third run, between the two, that cannot start."""
    other = home / "runs/tiny/B-8-s0"
    other.mkdir(parents=True)
    with filelock.FileLock(other / ".lock"):
        return finish(home, "--networks=A-8,B-8,plain-8")


def test_told_to_stop_it_keeps_what_is_done_and_saves_the_rest(
    home: Path, stopped: Outcome
) -> None:
    assert stopped.code == 128 + signal.SIGTERM, stopped.errors
    assert (home / "results/tiny/A-8-s0/summary.json").exists()
    assert not (home / "results/tiny/plain-8-s0").exists()
    assert "stopped by signal 15 at step" in log(home, "plain-8-s0")


def test_run_again_it_goes_on_where_it_was(home: Path, rerun: Outcome) -> None:
    step = int(log(home, "plain-8-s0").split("stopped by signal 15 at step ")[1].split(",")[0])
    assert 0 < step < STEPS
    assert f"going on from step {step}" in log(home, "plain-8-s0")
    assert "1 of 3 runs are finished already" in rerun.errors
    assert log(home, "A-8-s0").count("test error") == 1


def test_a_failure_is_named_and_keeps_no_other_from_running(home: Path, rerun: Outcome) -> None:
    assert rerun.code == 1, rerun.errors
    last = rerun.errors.splitlines()[-2:]
    assert last[0].startswith("failed: B-8-s0: runs/tiny/B-8-s0 is in use by another run")
    assert last[1] == "1 of 3 runs failed; run it again"
    assert (home / "results/tiny/plain-8-s0/summary.json").exists()


def test_the_small_files_are_kept_and_the_table_is_theirs(home: Path, rerun: Outcome) -> None:
    readme = (home / "results/tiny/README.md").read_text()
    for job in ("A-8-s0", "plain-8-s0"):
        kept, workdir = home / "results/tiny" / job, home / "runs/tiny" / job
        names = {"config.json", "metrics.jsonl", "layer_responses.json", "summary.json"}
        assert {path.name for path in kept.iterdir()} == names
        for name in names:
            assert (kept / name).read_bytes() == (workdir / name).read_bytes()
        summary = json.loads((kept / "summary.json").read_text())
        assert (summary["train_examples"], summary["test_examples"]) == (1437, 360)
        assert f"| **{100 * summary['test_error']:.2f}** |" in readme
    for name in ("plain_vs_residual", "side_by_side", "layer_responses"):
        assert (home / "results/tiny" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in readme
    assert "tiny/README.md" in (home / "results/README.md").read_text()


def test_finished_it_trains_nothing(home: Path, rerun: Outcome) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.*")}
    done = finish(home, "--networks=A-8,plain-8")
    assert done.code == 0, done.errors
    assert "2 of 2 runs are finished already" in done.errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.seed=3", "--config.seed is --seeds here"),
        ("--steps=200", "holds another run (optim.boundaries"),
    ],
)
def test_what_would_spoil_it_is_refused_before_any_work(
    home: Path, rerun: Outcome, flag: str, message: str
) -> None:
    refused = finish(home, "--networks=A-8,plain-8", flag)
    assert refused.code == 2
    assert refused.errors.startswith("error: ")
    assert refused.errors.count("\n") == 1
    assert message in refused.errors
