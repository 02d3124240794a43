"""Claim: a debugger finds the tests in the process that has the terminal; else workers share them.

(With --pdb xdist itself starts no workers for `-n auto`.)
"""

from types import SimpleNamespace

import pytest

from parity_tests import conftest

ALL = ("parity_tests",)


@pytest.mark.parametrize(
    ("arguments", "options", "cores", "workers"),
    [
        (ALL, {}, 2, 2),
        (ALL, {}, 1, 1),
        (ALL, {}, 64, conftest.MOST_WORKERS),
        (ALL, {"capture": "no"}, 2, 0),
        (ALL, {"trace": True}, 2, 0),
        (("parity_tests/test_scan.py",), {}, 2, 0),
        (("parity_tests/test_scan.py::test_a", "parity_tests/test_scan.py::test_b[1]"), {}, 2, 0),
        (("parity_tests/test_scan.py", "parity_tests/test_help.py"), {}, 2, 2),
    ],
)
def test_how_many_workers(
    arguments: tuple[str, ...],
    options: dict[str, object],
    cores: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "cores", lambda: cores)
    option = SimpleNamespace(**{"capture": "fd", "trace": False} | options)
    config = SimpleNamespace(args=list(arguments), option=option)
    assert conftest.pytest_xdist_auto_num_workers(config) == workers


def test_the_default_lets_the_conftest_say(pytestconfig: pytest.Config) -> None:
    assert "-n auto" in " ".join(pytestconfig.getini("addopts"))
