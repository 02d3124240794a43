"""Claim: training survives what `scripts/torture.py` does to it; here each fault a few times."""

from pathlib import Path

import pytest

from faults.fault import Unavailable
from faults.hostile import FILES
from faults.table import TABLE

# Much of it is proven by the default tests as well: test_resume kills and damages no less,
# test_checkpoint flips, truncates and finds no room, test_cifar10 damages the dataset,
# test_command_line has two runs in one directory, test_processes another number of devices,
# test_convert reads hostile files, test_check has bad images, test_workdir has a loss that is not
# finite.
RUNS = {
    "not_finite": 1,
    "hostile": len(FILES),
    "kill": 3,  # inside a save, after a step, at any time
    "stop": 4,  # each signal once, and each moment
    "full_disk": 1,
    "flip": 15,
    "truncate": 5,
    "devices": 1,
    "two_runs": 2,
    "bucket_kill": 3,  # another machine goes on, with s3 and with gs; the same machine
    "bucket_gone": 2,  # for a minute; for good
    "bucket_two_runs": 2,
    "bucket_damage": 4,
    "dataset": 10,
    "bad_image": 9,  # each kind once, as root
    "odd_image": 10,  # each kind once
    "bad_folder": 3,
    "bad_record": 4,
    "lost_image": 2,
    "killed_decoder": 1,
    "compilation_cache": 1,
    "long_run": 1,
}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are, those of test_resume too: the tests share the ones that nobody harms."""
    return tmp_path_factory.getbasetemp() / "faults"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), RUNS.items())
def test_promise_is_kept(name: str, times: int, at: Path) -> None:
    try:
        results = list(TABLE[name].inflict(times, at))
    except Unavailable as e:
        pytest.skip(str(e))
    assert len(results) == times
    assert [result for result in results if not result.held] == []


def test_no_fault_is_left_out() -> None:
    assert sorted(RUNS) == sorted(TABLE)
