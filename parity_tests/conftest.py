"""Parity is proven in float64: JAX's 64-bit types are on for every test in this process."""

import contextlib
import ctypes
import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads spin while they wait for JAX's

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker uses what its parent made
    CACHE = tempfile.TemporaryDirectory(prefix="flax-resnet-test-")  # removed when the tests end
    os.environ["XDG_CACHE_HOME"] = CACHE.name
    # What one process of the tests compiles, the others read. Without it each of them would spend
    # 9 seconds on the first weights of a network.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(CACHE.name, "flax-resnet", "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # after the lines above: it reads the environment

from faults import bad_images

logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # as in `cli.run`

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for the tests of data parallelism

MOST_WORKERS = 4  # each takes some 3 GB


def cores() -> int:
    """That this process may use."""
    is_told = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes share the tests.

    None but this one with -s or --trace, since a debugger needs the terminal (--pdb: xdist sees to
    it), and none where a single file is asked for, since a file is never shared.
    """
    files = {argument.partition("::")[0] for argument in config.args}
    is_one_file = len(files) == 1 and files.pop().endswith(".py")
    if is_one_file or config.option.capture == "no" or config.option.trace:
        return 0
    return min(cores(), MOST_WORKERS)


@pytest.fixture(autouse=True)
def types_of_64_bits() -> Iterator[None]:
    """On again after a test that called a command, which switches them off for float32."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def memory_of_a_file_is_given_back() -> Iterator[None]:
    """What a training run in this process keeps for its next step: `keep_memory`, once called."""
    yield
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of good images by class, and a cache of its own for what is known of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bad_images.write(tmp_path / "images")
    return tmp_path / "images"
