"""Claim: what asks a run to stop is heard whatever it is at, and ends it where nothing is lost.

What is saved then, and that the run goes on to the same bits, is for test_resume and test_survival.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from flax_resnet.config import Dataset, Experiment, ResNetConfig
from flax_resnet.training.loop import fit
from flax_resnet.training.reporter import Reporter
from flax_resnet.training.signals import SIGNALS, Stopped, stop_signal

ROOT = Path(__file__).parent.parent
OTHERS = [number for number in SIGNALS if number != signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every signal has its default, whatever started the tests, and what it had afterwards."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_they_are_those_of_terminals_and_clusters() -> None:
    assert {number.name for number in SIGNALS} == {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_told_and_the_handlers_are_as_before(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with stop_signal() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_save_it_ends_the_run_at_once(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        with stop_signal() as stop:
            stop.nothing_to_save = True
            os.kill(os.getpid(), number)
            raise AssertionError("it went on")

    with caplog.at_level(logging.INFO, "flax_resnet"), pytest.raises(Stopped) as stopped:
        run()
    assert stopped.value.code == 128 + number
    (record,) = caplog.records
    assert record.getMessage() == f"stopped by signal {number.value} with nothing new to save"


@pytest.mark.parametrize("number", OTHERS)
def test_one_that_is_ignored_stays_so(number: signal.Signals) -> None:
    """As SIGHUP is under nohup."""
    signal.signal(number, signal.SIG_IGN)
    with stop_signal() as stop:
        stop.nothing_to_save = True
        os.kill(os.getpid(), number)
        assert stop.number == 0
    assert signal.getsignal(number) is signal.SIG_IGN


def test_ctrl_c_is_heard_by_what_a_shell_started_in_the_background() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


@pytest.mark.parametrize("number", OTHERS)
def test_a_second_one_does_not_cut_the_save_short(number: signal.Signals) -> None:
    """As Slurm's, which reaches a process directly and once more through srun."""
    with stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)
        assert stop.number == signal.SIGTERM


def test_a_second_ctrl_c_does() -> None:
    def run() -> None:
        with stop_signal():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        run()


def test_in_another_thread_nothing_is_heard_and_nothing_fails() -> None:
    heard: list[int] = []

    def run() -> None:
        with stop_signal() as stop:
            heard.append(stop.number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [0]


IN_FOREIGN_CODE = """
import hashlib, logging, os, signal, sys, threading
from flax_resnet.training import signals

logging.basicConfig(level=logging.INFO, format="%(message)s")
iterations = int(sys.argv[1])
if "notebook" in sys.argv:
    sys.ps1 = "In : "
    signals.SECONDS_TO_LEAVE = 0
try:
    with signals.stop_signal() as stop:
        stop.nothing_to_save = True
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", iterations)  # one call into OpenSSL
finally:
    print("cleaned up")
"""
HALF_AN_HOUR = 2**31 - 1


def in_foreign_code(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IN_FOREIGN_CODE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def test_it_is_heard_in_code_that_is_not_pythons() -> None:
    """As XLA's compiler is not: Python's own handlers wait until it is done."""
    run = in_foreign_code(HALF_AN_HOUR)
    assert run.returncode == 128 + signal.SIGUSR1, run.stderr
    assert run.stderr == f"stopped by signal {signal.SIGUSR1} with nothing new to save\n"
    assert run.stdout == ""


@pytest.mark.slow
def test_a_notebook_is_not_ended_with_the_run() -> None:
    run = in_foreign_code(2_000_000, "notebook")
    assert run.returncode == 128 + signal.SIGUSR1, run.stderr
    assert run.stdout == "cleaned up\n"


@pytest.mark.slow
def test_what_takes_long_to_compile_is_compiled_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later there is a step to save, and no signal is heard in the compiler."""
    compiled: list[str] = []
    monkeypatch.setattr(Reporter, "__call__", reporting(compiled, Reporter.__call__))
    listener = jax.monitoring.register_event_duration_secs_listener
    listener(lambda event, seconds, **facts: compiled.append(str(facts.get("fun_name"))))
    config = Experiment(ResNetConfig(8))
    config.data.name, config.data.validation = Dataset.DIGITS, 100
    train = config.train
    train.steps, train.batch_size, train.eval_batch_size, train.steps_per_call = 7, 16, 90, 3
    train.log_every, train.evaluate_every, train.checkpoint_every = 2, 3, 5
    fit(config, tmp_path / "run")
    first = compiled.index("a call is done")
    large = {"steps", "step", "<lambda>"}  # of the training, the evaluation and the copy
    assert large <= {name.removeprefix("jit(").removesuffix(")") for name in compiled[:first]}
    assert not large & {name.removeprefix("jit(").removesuffix(")") for name in compiled[first:]}


def reporting(told: list[str], report: Callable[..., int]) -> Callable[..., int]:
    def tell(*arguments: object) -> int:
        told.append("a call is done")
        return report(*arguments)

    return tell
