"""Claim: what a command's surroundings do to it is one line; a mistake of ours keeps its traceback.

Surroundings are the disk, the locale, memory, devices and the standard streams. The quick tests ask
the functions; the slow ones start real commands in such surroundings.
"""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet import __main__ as commands
from flax_resnet import cli, streams, surroundings
from flax_resnet.errors import CheckpointError, ConfigError
from flax_resnet.surroundings import explain

ROOT = Path(__file__).parent.parent


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as e:
        return e
    raise AssertionError("nothing was raised")


def refused_by_encoding() -> object:
    return "a\udcc3".encode()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (lambda: jnp.zeros((10**13,)), "out of memory (RESOURCE_EXHAUSTED: Out of memory allocat"),
        (lambda: np.empty(10**15), "out of memory (Unable to allocate "),
        (lambda: bytearray(2**62), "out of memory (of the host): take a smaller train.batch_size"),
        (lambda: os.stat("/no/such"), "[Errno 2] No such file or directory: '/no/such'"),
        (refused_by_encoding, r"'a\udcc3' cannot be spelled in this locale (utf-8): name it in UT"),
    ],
)
def test_a_fault_of_the_surroundings_is_a_line(fault: Callable[[], object], line: str) -> None:
    told = explain(raised(fault))
    assert told is not None
    assert told.startswith(line)
    assert "\n" not in told
    assert ("model.remat=True" in told) == told.startswith("out of memory")


def test_a_users_mistake_is_a_line() -> None:
    assert explain(ConfigError("depth\n  must be")) == "depth must be"
    assert explain(BrokenPipeError(32, "Broken pipe")) == (
        "nobody reads the output any more ([Errno 32] Broken pipe)"
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a shape"),
        KeyError("loss"),
        AttributeError("step"),
        TypeError("3 arguments"),
        RuntimeError("a donated array"),
        AssertionError(""),
        RecursionError("too deep"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),  # this locale can spell it
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        jax.errors.JaxRuntimeError("INTERNAL: a bug of the compiler"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as seen:
        cli.guarded(fail)
    assert seen.value is error


@pytest.mark.parametrize(
    ("error", "platforms", "line"),
    [
        (
            RuntimeError("Unable to initialize backend 'foo': no. (set JAX_PLATFORMS='' to ...)"),
            "foo",
            "JAX_PLATFORMS=foo cannot be had: Unable to initialize backend 'foo': no.; install",
        ),
        (AssertionError(), "cuda", "JAX_PLATFORMS=cuda cannot be had: there is no such device; "),
        (RuntimeError("Unable\nto (set x)"), "", "Unable to (set x)"),
    ],
)
def test_no_device_is_a_line(
    error: Exception, platforms: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(jax, "devices", devices)
    told = explain(error)
    assert told is not None
    assert told.startswith(line)
    assert explain(KeyError("loss")) is None


def test_a_checkpoint_that_memory_is_too_small_for_is_not_called_damaged() -> None:
    error = CheckpointError("cannot be read: JaxRuntimeError: RESOURCE_EXHAUSTED: no")
    assert surroundings.is_out_of_memory(error)
    assert not surroundings.is_out_of_memory(CheckpointError("its digest differs"))


@pytest.mark.parametrize(
    ("text", "encoding", "misspelt"),
    [
        ("runs/ö", "utf-8", False),
        ("runs/a", "ascii", False),
        ("runs/\udcf6", "utf-8", True),  # another encoding's byte
        ("runs/\udcc3\udcb6", "ascii", True),
        ("runs/ö", "iso8859-1", True),  # which TensorStore would write as UTF-8, elsewhere
    ],
)
def test_a_name_that_the_locale_cannot_spell_is_refused(
    text: str, encoding: str, misspelt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    for arguments, home in (([f"--workdir={text}"], "/root"), ([], text)):
        monkeypatch.setenv("HOME", home)
        if not misspelt:
            surroundings.check_spelling(arguments)
            continue
        with pytest.raises(ConfigError, match=rf"cannot be spelled in this locale \({encoding}\)"):
            surroundings.check_spelling(arguments)


class Full(io.StringIO):
    """A stream to a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_messages_to_nobody_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", None)
        streams.prepare_streams()
        print("progress", file=sys.stderr, flush=True)
        print("a result", flush=True)
        assert sys.stderr.isatty() is False
        sys.stdout.close()


def test_a_character_that_stdout_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    streams.prepare_streams()
    cli.guarded(lambda: print("runs/ö: 8.75 ± 0.1"))
    assert written.getvalue() == b"runs/\\xf6: 8.75 \\xb1 0.1\n"


def test_output_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in (lambda: cli.guarded(lambda: print("a")), commands.main):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            monkeypatch.setattr(sys, "argv", ["flax-resnet", "--help"])
            with pytest.raises(SystemExit) as end:
                command()
            assert end.value.code == 2
        assert capfd.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_what_jax_says_of_devices_is_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("Outdated driver:\n version 1 found")
    record = logging.LogRecord("jax", 40, "", 0, "Plugin %s:", ("x",), (RuntimeError, error, None))
    assert surroundings.shorten(record)
    assert logging.Formatter().format(record) == "Plugin x:: Outdated driver: version 1 found"


# Real commands.

TRAIN = [
    sys.executable,
    str(ROOT / "scripts/train_flax.py"),
    f"--config={ROOT / 'configs/quickstart.py'}",
    "--config.train.steps=2",
    "--config.train.batch_size=8",
]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def train(home: Path, *flags: str, memory: str = "", **environment: str) -> tuple[int, list[str]]:
    command = ["bash", "-c", f'{memory} exec "$@"', "-", *TRAIN, *flags]
    done = subprocess.run(
        command,
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stderr.replace("\r", "\n").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment", "line"),
    [
        ([], {"JAX_PLATFORMS": "cuda"}, "error: JAX_PLATFORMS=cuda cannot be had"),
        ([], {"JAX_PLATFORMS": "foo"}, "error: JAX_PLATFORMS=foo cannot be had: Unable to init"),
        (["--workdir=ö"], ASCII, r"error: '--workdir=\udcc3\udcb6' cannot be spelled in this loc"),
        (["--workdir=\udcf6"], {}, r"error: '--workdir=\udcf6' cannot be spelled in this locale"),
    ],
)
def test_a_command_ends_with_a_line(
    flags: list[str], environment: dict[str, str], line: str, tmp_path: Path
) -> None:
    code, lines = train(tmp_path, *flags, **environment)
    assert code == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.slow
def test_a_batch_too_large_for_memory_says_what_to_change(tmp_path: Path) -> None:
    code, lines = train(tmp_path, "--config.train.batch_size=30000", memory="ulimit -v 6000000;")
    assert code == 2, lines
    assert lines[-1].startswith("error: out of memory (RESOURCE_EXHAUSTED")
    assert lines[-1].endswith(surroundings.LESS_MEMORY)


@pytest.mark.slow
def test_a_plugin_that_cannot_start_is_told_and_nobody_hears_it_twice(tmp_path: Path) -> None:
    plugin = tmp_path / "plugins/jax_plugins/xla_old"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "def initialize():\n    raise RuntimeError('Outdated CUDA driver:\\n1 found, 2 needed')\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path / "plugins")])
    code, lines = train(tmp_path, PYTHONPATH=path)
    assert code == 0, lines
    told = [line for line in lines if "Outdated" in line]
    assert len(told) == 1
    assert told[0].endswith("Outdated CUDA driver: 1 found, 2 needed")
    assert not any("Traceback" in line for line in lines)
