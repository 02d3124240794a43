"""Claim: with config.wandb the log goes to Weights & Biases as well, in one run however often the
training is interrupted, and nothing that happens there ends or delays the training.

The slow test has the real package, in its offline mode; it reads the files that `wandb sync` would
send. No server has been tried.
"""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.training import wandb_log
from flax_resnet.training.bucket import is_mirrored
from flax_resnet.training.metrics_log import MetricsLog
from flax_resnet.training.wandb_log import Follower

ROOT = Path(__file__).parent.parent


def test_a_missing_package_is_a_line_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wandb_log.check(None)
    with pytest.raises(ConfigError, match=r"pip install 'flax-resnet\[wandb\]'"):
        wandb_log.check("project")


def test_a_project_has_a_name() -> None:
    with pytest.raises(ConfigError, match="wandb must be a project's name, or none, got ''"):
        Experiment(wandb="").validate()


def test_a_run_keeps_its_name_there(tmp_path: Path) -> None:
    path, names = tmp_path / "wandb.json", []
    for project in ("a", "a", "b", "a"):
        wandb_log.name_run(path, project)
        names.append(json.loads(path.read_text())["id"])
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert is_mirrored(path.name)  # so that it keeps it on another machine, from a bucket


def put_in_place(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another program in the place of the process that sends."""

    def start(self: Follower, workdir: Path) -> subprocess.Popen[bytes]:
        with self.messages.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stderr=output
            )

    monkeypatch.setattr(Follower, "start", start)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == wandb_log.__name__]


def test_a_failure_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_in_place(monkeypatch, "raise RuntimeError('no key')")
    with MetricsLog(tmp_path, 0, "project") as metrics_log:
        assert metrics_log.follower is not None
        assert metrics_log.follower.process is not None
        metrics_log.follower.process.wait()
        for step in (1, 2):
            metrics_log.append({"step": step, "split": "train", "loss": 0.5})
    told = "no more is sent to Weights & Biases: RuntimeError: no key; training goes on"
    assert warnings(caplog) == [told]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_failure_at_the_very_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_in_place(monkeypatch, "import sys; sys.stdin.read(); sys.exit('no disk')")
    Follower(tmp_path, "project").close()
    assert warnings(caplog) == ["no more is sent to Weights & Biases: no disk; training goes on"]


def test_nobody_waits_for_a_process_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_in_place(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(wandb_log, "SECONDS_TO_FINISH", 0.05)
    follower = Follower(tmp_path, "project")
    process = follower.process
    assert process is not None
    with caplog.at_level(logging.INFO, "flax_resnet"):
        follower.close()
    assert process.poll() is None
    process.kill()
    assert warnings(caplog)[0].startswith("the rest is still being sent to Weights & Biases")


def test_a_damaged_file_of_ours_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb.json").write_text("[")
    follower = Follower(tmp_path, "project")
    follower.check()
    follower.close()
    (told,) = warnings(caplog)
    assert told.startswith("nothing is sent to Weights & Biases: ")


class Pretender(SimpleNamespace):
    """A package `wandb` that keeps what it is told."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.inits: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **settings: Any) -> "Pretender":
        self.inits.append(settings)
        return self

    def Settings(self, **settings: Any) -> None:
        pass

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.sent.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def append(workdir: Path, *rows: dict[str, Any], end: str = "\n") -> None:
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, rows)) + end)


def test_a_run_that_goes_on_sends_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretender = Pretender()
    monkeypatch.setitem(sys.modules, "wandb", pretender)
    monkeypatch.setattr(wandb_log, "SECONDS_BETWEEN", 0)
    (tmp_path / "config.json").write_text('{"seed": 3}')
    wandb_log.name_run(tmp_path / "wandb.json", "project")
    append(tmp_path, {"step": 2, "split": "train", "loss": 1.0})
    append(tmp_path, {"step": 4, "split": "train", "loss": 0.5, "seconds": 9.0})
    append(tmp_path, {"step": 4, "split": "test", "error": 0.25}, end="")  # being written
    for session in (1, 2):
        with open(os.devnull) as ended:
            monkeypatch.setattr(sys, "stdin", ended)
            wandb_log.follow(tmp_path)
        assert pretender.finished == session
        append(tmp_path, end="\n")
    assert pretender.sent == [
        (2, {"train/loss": 1.0}),
        (4, {"train/loss": 0.5, "train/seconds": 9.0}),
        # The last step again: only now it is known to be whole.
        (4, {"train/loss": 0.5, "train/seconds": 9.0}),
        (4, {"test/error": 0.25}),
    ]
    first, second = pretender.inits
    assert first == second
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert first["name"] == tmp_path.name


# The real package.


def read(path: Path) -> list[Any]:
    """The records of W&B's own file: chunks as LevelDB's log has them, in blocks of 32 KB."""
    from wandb.proto import wandb_internal_pb2

    data, position, records, partial = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32_768 - position % 32_768 < 7:
            position += 32_768 - position % 32_768
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        partial += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or a last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


def steps_sent(records: list[Any]) -> dict[int, set[str]]:
    """By step, the names of the numbers that were sent."""
    found: dict[int, set[str]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            found.setdefault(record.history.step.num, set()).update(items)
    return {k: {n for n in v if not n.startswith("_")} for k, v in found.items()}


@pytest.mark.slow
def test_offline_a_run_that_goes_on_is_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")

    def train(times: int) -> str:
        command = [
            sys.executable,
            str(ROOT / "scripts/train_flax.py"),
            f"--config={ROOT / 'configs/quickstart.py'}",
            "--config.train.steps=8",
            "--config.train.batch_size=8",
            "--config.train.log_every=2",
            "--config.train.evaluate_every=4",
            "--config.train.checkpoint_every=4",
            "--config.wandb=parity",
            "--workdir=run",
        ]
        environment = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 120
        while "still being sent" in done.stderr and not all_sent(times):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return done.stderr

    def all_sent(times: int) -> bool:
        """Whether there are so many files, and each can be read and has the last step."""
        files = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
        try:
            return len(files) == times and all(8 in steps_sent(read(file)) for file in files)
        except Exception:  # whatever reading half a file gives
            return False

    assert "no more is sent" not in train(1)
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    (tmp_path / "run/summary.json").unlink()
    assert "going on from step 4" in train(2)
    name = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    first, second = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    numbers = {f"train/{x}" for x in ("loss", "error", "learning_rate", "seconds")}
    sent = steps_sent(read(first))
    assert list(sent) == [2, 4, 6, 8]
    assert all(numbers <= names for names in sent.values())
    assert {"test/loss", "test/error"} <= sent[4] & sent[8]
    assert list(steps_sent(read(second))) == [8]  # the last step again
    (run,) = [x.run for x in read(first) if x.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_id, run.display_name) == ("parity", name, "run")
    config = {x.key: json.loads(x.value_json) for x in run.config.update}
    assert config["model"]["depth"] == 8
