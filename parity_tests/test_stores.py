"""Claim: a run in a bucket is used like one on the disk, in S3 and in Google's Cloud Storage.

The stores are real servers on the loopback, scripts/faults/store_server.py. What happens when one
of them, or a run, is gone is in test_survival.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.fault import Unavailable
from faults.run import ROOT, STEPS, Run, environment, newest, numbers, uninterrupted
from faults.store import SCHEMES, Store, free_port
from flax_resnet.errors import CheckpointError
from flax_resnet.places import Url
from flax_resnet.training import mirror
from flax_resnet.training.bucket import Bucket
from flax_resnet.training.mirror import Mirror

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SCHEMES)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    try:
        found = Store(request.param)
    except Unavailable as e:
        pytest.skip(str(e))
    with found:
        yield found


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "faults"


@pytest.fixture
def url(store: Store, at: Path) -> Url:
    """A finished run's."""
    session = Mirror(store.url("finished"), uninterrupted(at))
    session.begin()
    session.end()
    return session.url


def test_what_a_bucket_does(store: Store) -> None:
    bucket, neighbour = Bucket(store.url("a run/1")), Bucket(store.url("a run/10"))
    neighbour.write("x", b"another's")
    assert bucket.names() == []
    assert bucket.read("x") is None
    bucket.write("deep/er/x", b"old", new=True)
    with pytest.raises(FileExistsError):
        bucket.write("deep/er/x", b"new", new=True)
    assert bucket.read("deep/er/x") == b"old"
    bucket.write("deep/er/x", b"new")
    bucket.write("empty", b"")
    assert bucket.read("deep/er/x") == b"new"
    assert bucket.read("empty") == b""
    assert bucket.names() == ["deep/er/x", "empty"]
    assert bucket.names("deep") == ["deep/er/x"]
    assert 0 <= bucket.age("empty") < 60
    bucket.remove("deep/er/x")
    bucket.remove("deep/er/x")
    assert bucket.names() == ["empty"]
    assert neighbour.read("x") == b"another's"


def test_a_bucket_that_there_is_not(store: Store, tmp_path: Path) -> None:
    nowhere = Url(store.scheme, "no-such-bucket/run")
    with pytest.raises(CheckpointError, match=rf"^{nowhere} cannot be used: FileNotFoundError: "):
        Mirror(nowhere, tmp_path).begin()
    with pytest.raises(CheckpointError, match="no-such-bucket/run"):
        mirror.fetch(nowhere)


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # Google's emulator asks for none
def test_without_credentials(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else it looks further
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be used: NoCredentialsError: Unable to loc"):
        Mirror(store.url("run"), tmp_path).begin()


def command(script: str, *arguments: object, at: Path) -> str:
    """What a script prints."""
    line = [sys.executable, str(ROOT / f"scripts/{script}.py"), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(at), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_run_in_a_bucket_is_evaluated(url: Url, at: Path) -> None:
    there = command("evaluate", f"--checkpoint={url}/checkpoints/24", at=at).splitlines()
    summary = json.loads((uninterrupted(at) / "summary.json").read_text())
    assert json.loads(there[-1])["test_error"] == summary["test_error"]


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_a_run_in_a_bucket_is_exported_and_listed(url: Url, at: Path, tmp_path: Path) -> None:
    printed = command("export", url, tmp_path / "net.safetensors", at=at)
    assert json.loads(printed.splitlines()[-1])["step"] == 24
    Bucket(url.parent).write("net.safetensors", (tmp_path / "net.safetensors").read_bytes())
    printed = command("convert", f"{url.parent}/net.safetensors", tmp_path / "net", at=at)
    assert f"written: {tmp_path / 'net'}" in printed
    assert "ResNet-8 A" in command("plot", url, at=at)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_finished_run_is_filled_in_and_does_nothing(url: Url, at: Path, tmp_path: Path) -> None:
    run = Run(at, tmp_path / "new", url=url)
    assert run.wait() == 0, run
    assert run.said("filled from")
    assert run.said("nothing to do")
    assert numbers(tmp_path / "new") == numbers(uninterrupted(at))


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_run_that_is_told_to_stop_uploads_first(store: Store, at: Path, tmp_path: Path) -> None:
    run = Run(at, tmp_path / "run", {"train.checkpoint_every": 1000}, url=store.url("stopped"))
    assert run.until_logged(4), run
    assert run.send(signal.SIGTERM) == 128 + signal.SIGTERM, run
    step = newest(run.workdir)
    assert 4 <= step < STEPS
    assert run.said(f"{store.url('stopped')}: step {step} is there")
    assert newest(mirror.fetch(store.url("stopped"))) == step


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_of_several_processes_the_first_mirrors(store: Store, at: Path, tmp_path: Path) -> None:
    port, url = free_port(), store.url("two")
    flags = {
        "config": "quickstart",
        "config.train.steps": 4,
        "config.train.batch_size": 32,
        "config.train.checkpoint_every": 2,
        "workdir": url,
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": 2,
    }
    both = []
    for i in range(2):
        own = flags | {"process_id": i, "local": tmp_path / str(i)}
        line = [sys.executable, str(ROOT / "scripts/train_flax.py")]
        line += [f"--{name}={value}" for name, value in own.items()]
        env = environment(at) | {"JAX_NUM_CPU_DEVICES": "2"}
        both.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env))
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert f"{url}: step 4 is there" in errors[0]
    assert not [line for line in errors[1].splitlines() if "[Gloo]" not in line]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert os.listdir(mirror.fetch(url) / "checkpoints") == ["4"]
