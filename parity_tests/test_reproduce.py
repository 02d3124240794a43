"""Claim: one command brings an experiment to its end: told to stop it saves, run again it goes on
and skips what is finished, and a run that fails is named and keeps no other from running.

Real processes, real signals: ResNet-8 on the digits, 200 steps of 16, with three seeds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pytest

from flax_resnet.config import Dataset
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.studies import sweep
from flax_resnet.studies.recipes import STUDIES, make_jobs

ROOT = Path(__file__).parent.parent
STEPS = 200


class Outcome(NamedTuple):
    """What a command came to."""

    code: int
    errors: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs: runs/ and results/ appear here."""
    return tmp_path_factory.mktemp("home")


def start(home: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), "tanjeffreyz"]
    settings = ["--networks=A-8", "--out=results/tiny", f"--steps={STEPS}"]
    sizes = ["--config.train.batch_size=16", "--config.train.eval_batch_size=360"]
    return subprocess.Popen(
        [*command, *settings, "--config.data.name=digits", *sizes, *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(home: Path, *flags: str) -> Outcome:
    process = start(home, *flags)
    _, errors = process.communicate(timeout=300)
    return Outcome(process.returncode, errors)


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def log(home: Path, job: str) -> str:
    return (home / "runs/tiny" / job / "train.log").read_text()


@pytest.fixture(scope="module")
def stopped(home: Path) -> Outcome:
    """SIGTERM once the second of two runs has begun to train."""
    process = start(home, "--seeds=0,1")
    metrics = home / "runs/tiny/A-8-s1/metrics.jsonl"
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
    other = home / "runs/tiny/A-8-s2"
    other.mkdir(parents=True)
    with filelock.FileLock(other / ".lock"):
        return finish(home, "--seeds=0,2,1")


@pytest.mark.slow
def test_told_to_stop_it_keeps_what_is_done_and_saves_the_rest(
    home: Path, stopped: Outcome
) -> None:
    assert stopped.code == 128 + signal.SIGTERM, stopped.errors
    assert (home / "results/tiny/A-8-s0/summary.json").exists()
    assert not (home / "results/tiny/A-8-s1").exists()
    assert "stopped by signal 15 at step" in log(home, "A-8-s1")


@pytest.mark.slow
def test_run_again_it_goes_on_where_it_was(home: Path, rerun: Outcome) -> None:
    step = int(log(home, "A-8-s1").split("stopped by signal 15 at step ")[1].split(",")[0])
    assert 0 < step < STEPS
    assert f"going on from step {step}" in log(home, "A-8-s1")
    assert "1 of 3 runs are finished already" in rerun.errors
    assert log(home, "A-8-s0").count("test error") == 1


@pytest.mark.slow
def test_a_failure_is_named_and_keeps_no_other_from_running(home: Path, rerun: Outcome) -> None:
    assert rerun.code == 1, rerun.errors
    last = rerun.errors.splitlines()[-2:]
    assert last[0].startswith("failed: A-8-s2: runs/tiny/A-8-s2 is in use by another run")
    assert last[1] == "1 of 3 runs failed; run it again"
    assert (home / "results/tiny/A-8-s1/summary.json").exists()


@pytest.mark.slow
def test_the_small_files_are_kept_and_the_table_is_theirs(home: Path, rerun: Outcome) -> None:
    readme = (home / "results/tiny/README.md").read_text()
    errors, batch_statistics_errors = [], []
    for job in ("A-8-s0", "A-8-s1"):
        kept, workdir = home / "results/tiny" / job, home / "runs/tiny" / job
        names = {"config.json", "metrics.jsonl", "layer_responses.json", "summary.json"}
        names.add("batch_statistics.json")
        assert {path.name for path in kept.iterdir()} == names
        for name in names:
            assert (kept / name).read_bytes() == (workdir / name).read_bytes()
        summary = json.loads((kept / "summary.json").read_text())
        assert (summary["train_examples"], summary["test_examples"]) == (1437, 360)
        errors.append(100 * summary["test_error"])
        by_batch_statistics = json.loads((kept / "batch_statistics.json").read_text())
        batch_statistics_errors.append(100 * by_batch_statistics["test_error"])
    assert f"| **{spread(errors)}** | {spread(batch_statistics_errors)} |" in readme
    assert "(layer_responses.png)" in readme
    png = (home / "results/tiny/layer_responses.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert "tiny/README.md" in (home / "results/README.md").read_text()


@pytest.mark.slow
def test_finished_it_trains_nothing(home: Path, rerun: Outcome) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.*")}
    done = finish(home, "--seeds=0,1")
    assert done.code == 0, done.errors
    assert "2 of 2 runs are finished already" in done.errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.seed=3", "--config.seed is --seeds here"),
        ("--steps=160", "holds another run (optim.boundaries"),
    ],
)
def test_what_would_spoil_it_is_refused_before_any_work(
    flag: str, message: str, tmp_path: Path
) -> None:
    (job,) = make_jobs(STUDIES["tanjeffreyz"], ["A-8"], [0], STEPS)
    job.config.data.name = Dataset.DIGITS
    job.config.train.batch_size, job.config.train.eval_batch_size = 16, 360
    begun = tmp_path / "runs/tiny" / job.name
    (begun / "checkpoints/100").mkdir(parents=True)
    write_json(begun / "config.json", job.config.to_dict())
    refused = finish(tmp_path, "--seeds=0,1", flag)
    assert refused.code == 2
    assert refused.errors.startswith("error: ")
    assert refused.errors.count("\n") == 1
    assert message in refused.errors
    assert {path.name for path in begun.iterdir()} == {"checkpoints", "config.json"}


@pytest.mark.slow
def test_the_tasks_of_an_array_do_a_share_each(tmp_path: Path) -> None:
    """Two tasks of Slurm, by the variables that it would set, at the same time; then one command
    without an array. Not a real Slurm."""
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    flags = ["--seeds=0,1", "--steps=8", "--config.train.checkpoint_every=8"]
    with pytest.MonkeyPatch.context() as patch:
        tasks = []
        for name, value in array.items():
            patch.setenv(name, value)
        for task in ("3", "4"):
            patch.setenv("SLURM_ARRAY_TASK_ID", task)
            tasks.append(start(tmp_path, *flags))
    for i, task in enumerate(tasks):
        errors = task.communicate(timeout=600)[1]
        assert task.returncode == 0, errors
        assert f"share {i}/2: 1 of 2 runs" in errors
        assert "0 of 1 runs are finished already" in errors
    for job in ("A-8-s0", "A-8-s1"):
        assert log(tmp_path, job).count("test error") == 1
    readme = (tmp_path / "results/tiny/README.md").read_text()
    assert re.search(r"\| \*\*\d+\.\d\d ± \d", readme)  # of both runs, though each task had one
    last = finish(tmp_path, *flags)
    assert last.code == 0, last.errors
    assert "2 of 2 runs are finished already" in last.errors
    assert not list((tmp_path / "results").rglob("*.tmp"))


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (ARRAY, (2, 4)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "3"}, (0, 4)),
        (dict.fromkeys(ARRAY, "1"), (0, 1)),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "", "SLURM_ARRAY_TASK_COUNT": "7"}, (4, 7)),
    ],
)
def test_a_task_of_an_array_has_a_share(
    environment: dict[str, str], expected: tuple[int, int]
) -> None:
    assert sweep.array_share(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "6"}, "must be a range, such as --array=0-3, got task 6"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "11"}, "must be a range, such as --array=0-3, got task"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": ""}, "does not tell SLURM_ARRAY_TASK_COUNT and SLURM"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "7_2"}, "SLURM_ARRAY_TASK_ID must be a number, got '7_2"),
    ],
)
def test_an_array_that_makes_no_shares_is_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.array_share(environment)


def test_shares_are_every_job_once_and_much_the_same_work() -> None:
    jobs = make_jobs(STUDIES["depth"], seeds=range(5))
    for count in (1, 3, 10, 60):
        shares = [sweep.share(jobs, i, count) for i in range(count)]
        assert sorted(job.name for share in shares for job in share) == sorted(j.name for j in jobs)
        assert all(share == [job for job in jobs if job in share] for share in shares)
        burdens = [sum(map(sweep.work, share)) for share in shares]
        assert max(burdens) - min(burdens) <= max(map(sweep.work, jobs))
    jobs = make_jobs(STUDIES["depth"], ["A-20", "A-110", "A-32", "A-44"])
    assert [[job.name for job in sweep.share(jobs, i, 2)] for i in range(2)] == [
        ["A-110-s0"],
        ["A-20-s0", "A-32-s0", "A-44-s0"],
    ]


def test_a_share_by_hand() -> None:
    assert sweep.parse_share("2/8") == (2, 8)
    for text in ("8/8", "2", "-1/8", "0/0", "2/8/1"):
        with pytest.raises(ConfigError, match=rf"--share must be I/N .* got '{text}'"):
            sweep.parse_share(text)


def test_every_accelerator_has_one_run_at_a_time(tmp_path: Path) -> None:
    """Each process waits for another one's sign, so one after another they would not end."""
    program = (
        "import os, pathlib, sys, time\n"
        "slot, home = os.environ['SLOT'], pathlib.Path(sys.argv[1]).parent\n"
        "(home / f'{slot}.seen').touch()\n"
        "end = time.monotonic() + 20\n"
        "while len(list(home.glob('*.seen'))) < 2 and time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(time.monotonic() > end)\n"
    )
    jobs = make_jobs(STUDIES["depth"], ["A-8"], range(3), 4)
    done: list[str] = []
    failures = sweep.run(
        jobs,
        tmp_path,
        lambda workdir: [sys.executable, "-c", program, str(workdir)],
        [{"SLOT": "0"}, {"SLOT": "1"}],
        lambda job: False,
        lambda job: done.append(job.name),
    )
    assert failures == {}
    assert sorted(done) == [job.name for job in jobs]
    assert {path.name for path in tmp_path.glob("*.seen")} == {"0.seen", "1.seen"}


@pytest.mark.parametrize(
    ("answer", "visible", "expected"),
    [
        ('["cpu", 8]', None, [{}]),
        ('["gpu", 2]', None, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        ('["gpu", 2]', "5,3", [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "3"}]),
        (
            '["tpu", 1]',
            None,
            [
                {
                    "TPU_PROCESS_BOUNDS": "1,1,1",
                    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
                    "TPU_VISIBLE_CHIPS": "0",
                }
            ],
        ),
    ],
    ids=["cpu", "gpu", "some-gpus", "tpu"],
)
def test_a_process_sees_one_accelerator(
    answer: str,
    visible: str | None,
    expected: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "PROBE", f"print({answer!r})")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep.accelerators() == expected
