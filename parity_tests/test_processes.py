"""Claim: several processes train as one process of all their devices, and stop and resume as one.

Real processes that meet over the loopback, float64, ResNet-8 on the digits. The logged loss is a
float32 sum, so it is compared to one rounding of float32 (equal to the bit when measured); the
parameters to 1e-12 of each tensor's largest value, as in test_parallel.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from faults import bad_images
from flax_resnet.config import Parallel
from flax_resnet.errors import ConfigError, DatasetError
from flax_resnet.parallel import processes, sharding
from flax_resnet.step import init
from flax_resnet.training.checkpoint import load_state
from flax_resnet.training.loop import fit
from flax_resnet.training.workdir import read_config

ROOT = Path(__file__).parent.parent
STEPS = 8
SEVERAL = 8 if (os.cpu_count() or 1) >= 8 else 2  # eight take 5 GB, and minutes on two cores
SECONDS_TO_STOP = 30  # when another process is gone


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    workdir: Path,
    port: int,
    process_id: int,
    *more: str,
    at: Path | None = None,
    num_processes: int = 2,
    devices: int = 2,
) -> subprocess.Popen[str]:
    flags = [
        f"--config={ROOT / 'configs/quickstart.py'}",
        f"--config.train.steps={STEPS}",
        "--config.train.batch_size=16",
        "--config.train.log_every=1",
        f"--config.train.evaluate_every={STEPS}",
        f"--config.train.checkpoint_every={STEPS}",
        "--config.train.eval_batch_size=360",
        "--config.model.dtype=float64",
        f"--workdir={workdir}",
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={process_id}",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train_flax.py"), *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=at,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)},
    )


def rows(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def fit_on(num_devices: int, workdir: Path, like: Path) -> None:
    """Trains in this process what `like` trains, on the first devices of the eight there are."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "data_mesh", lambda: mesh)
        fit(read_config(like), workdir)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[str]]:
    """A run of two processes of which the second alone is told to stop; exit codes and messages."""
    return stop_second(tmp_path_factory.mktemp("two") / "run", at=2)


def stop_second(workdir: Path, at: int, *more: str) -> tuple[Path, list[int], list[str]]:
    """Trains in two processes, and tells the second to stop when the log has `at` lines."""
    port = free_port()
    both = [start(workdir, port, i, *more) for i in range(2)]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(p.poll() is None for p in both):
        if len(rows(workdir)) >= at:
            both[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    errors = [process.communicate(timeout=120)[1] for process in both]
    return workdir, [process.returncode for process in both], errors


@pytest.fixture(scope="module")
def one_process(stopped: tuple[Path, list[int], list[str]]) -> Path:
    workdir = stopped[0].parent / "one"
    fit_on(4, workdir, like=stopped[0])
    return workdir


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in rows(workdir)]


@pytest.mark.slow
def test_the_two_lose_what_the_one_loses(
    stopped: tuple[Path, list[int], list[str]], one_process: Path
) -> None:
    ours, theirs = losses(stopped[0]), losses(one_process)
    assert 2 <= len(ours) < STEPS
    np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=np.finfo(np.float32).eps)


@pytest.mark.slow
def test_of_several_one_is_killed_and_all_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Streamed photographs, of which each process decodes its share, on one device each.

    With mixtures, so that a process also needs the image before its first one.
    """
    more = [*photographs(tmp_path / "images"), "--config.data.placement=streamed"]
    more += ["--config.train.checkpoint_every=2"]
    workdir = tmp_path / "several"

    def start_all() -> list[subprocess.Popen[str]]:
        port = free_port()
        return [
            start(workdir, port, i, *more, num_processes=SEVERAL, devices=1) for i in range(SEVERAL)
        ]

    processes = start_all()
    deadline = time.monotonic() + 240
    while len(rows(workdir)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[SEVERAL // 2].kill()
    deadline = time.monotonic() + SECONDS_TO_STOP
    errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    assert 0 not in [process.returncode for process in processes], errors
    assert 4 <= len(rows(workdir)) < STEPS
    processes = start_all()
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * SEVERAL, errors
    for name in ("confusion.png", "mistakes.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    fit_on(SEVERAL, tmp_path / "one", like=workdir)
    np.testing.assert_allclose(
        losses(workdir), losses(tmp_path / "one"), rtol=np.finfo(np.float32).eps
    )
    check_same_end(workdir, tmp_path / "one")


def photographs(folder: Path) -> list[str]:
    """Writes a folder of small images; the flags of a run on them."""
    bad_images.write(folder)
    settings = {"name": "folder", "dir": folder, "resize": 24, "crop": 20}
    settings |= {"preprocess": "standardize", "mixup": 0.5, "cutmix": 0.5, "threads": 2}
    flags = [f"--config.data.{name}={value}" for name, value in settings.items()]
    return [*flags, "--config.model.num_classes=3"]


def check_same_end(ours: Path, theirs: Path) -> None:
    like = jax.eval_shape(lambda: init(read_config(ours))[1])
    several, one = (load_state(path, like, STEPS) for path in (ours, theirs))
    for a, b in zip(jax.tree.leaves(several.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_saved_step(
    stopped: tuple[Path, list[int], list[str]],
) -> None:
    workdir, codes, errors = stopped
    assert codes == [128 + signal.SIGTERM] * 2, errors
    step = len(rows(workdir))
    assert f"stopped by signal {signal.SIGTERM} at step {step}, which is saved" in errors[0]
    assert (workdir / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
def test_a_signal_to_one_ends_an_evaluation_in_both(tmp_path: Path) -> None:
    """Of one image on each device at a time: 90 batches after the second line of the log."""
    settings = "--config.train.eval_batch_size=4", "--config.train.evaluate_every=2"
    workdir, codes, errors = stop_second(tmp_path / "run", 2, *settings)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert f"stopped by signal {signal.SIGTERM} at step 2, which is saved" in errors[0]
    assert [row["split"] for row in rows(workdir)] == ["train", "train"]
    assert (workdir / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_only_the_first_needs_the_weights_to_begin_with(one_process: Path, tmp_path: Path) -> None:
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    shutil.copytree(one_process, places[0] / "source")
    settings, port = ("--config.init=source", "--config.train.steps=1"), free_port()
    both = [start(tmp_path / "run", port, i, *settings, at=places[i]) for i in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert f"begins with the weights of source, step {STEPS}" in errors[0]
    like = init(read_config(one_process))[1]
    ours, theirs = load_state(tmp_path / "run", like, 0), load_state(one_process, like)
    for a, b in zip(jax.tree.leaves(ours[1:3]), jax.tree.leaves(theirs[1:3]), strict=True):
        assert np.array_equal(a, b)
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.slow
def test_only_the_first_speaks(stopped: tuple[Path, list[int], list[str]]) -> None:
    _, _, errors = stopped
    said = [line for line in errors[1].splitlines() if "[Gloo]" not in line]
    assert not said


@pytest.mark.slow
def test_one_process_on_one_device_goes_on_from_there(
    stopped: tuple[Path, list[int], list[str]], one_process: Path
) -> None:
    workdir = stopped[0]
    fit_on(1, workdir, like=workdir)
    np.testing.assert_allclose(losses(workdir), losses(one_process), rtol=np.finfo(np.float32).eps)
    like = init(read_config(workdir))[1]
    ours, theirs = load_state(workdir, like), load_state(one_process, like)
    assert int(ours.step) == STEPS
    for a, b in zip(jax.tree.leaves(ours[1:4]), jax.tree.leaves(theirs[1:4]), strict=True):
        assert np.abs(a - b).max() <= 1e-12 * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", 2, None), "go together; missing: --process_id"),
        ((None, 2, 0), "go together; missing: --coordinator"),
        (("h", 2, 0), "--coordinator must be HOST:PORT, got 'h'"),
        (("h:99999", 2, 0), "--coordinator must be HOST:PORT, got 'h:99999'"),
        (("h:1", 0, 0), "--num_processes must be at least 1, got 0"),
        (("h:1", 2, 2), r"--process_id must be 0 to 1 \(--num_processes less 1\), got 2"),
    ],
)
def test_flags_that_make_no_sense(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processes.start(*arguments)


def test_devices_that_differ_in_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(process_index=i) for i in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigError, match=r"as many devices .* got 2, 1"):
        sharding.data_mesh()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ConfigError("steps must be less"),
            ConfigError,
            "process 0: steps must be less",
        ),
        (DatasetError("no CIFAR-10"), DatasetError, "process 0: no CIFAR-10"),
        (
            FileNotFoundError(2, "Not there", "a.json"),
            FileNotFoundError,
            "process 0: Not there: 'a",
        ),
        (KeyError("loss"), RuntimeError, "process 0: KeyError: 'loss'"),
    ],
)
def test_a_failure_of_process_0_keeps_its_kind_everywhere(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_broadcast", lambda text: told.append(text) or told[0])

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as first:
        processes.on_first(fail)
    assert first.value is error
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(kind, match=re.escape(message)) as other:
        processes.on_first(fail)
    assert type(other.value) is kind


def test_pmap_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = sharding.data_mesh()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="parallel must be jit when several processes"):
        sharding.compile_step(lambda x: x, mesh, Parallel.PMAP)
