"""Claim: training survives what `scripts/torture.py` does to it; here each fault a few times."""

from pathlib import Path

import pytest

from faults.fault import Unavailable
from faults.hostile import FILES
from faults.table import TABLE

# Of the others test_resume, test_checkpoint, test_command_line and test_processes have their share.
RUNS = {
    "kill": 1,  # inside a save
    "full_disk": 1,
    "flip": 15,
    "truncate": 5,
    "not_finite": 1,
    "dataset": 10,
    "hostile": len(FILES),
}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all rows work, so that they share the run that is not interrupted."""
    return tmp_path_factory.mktemp("survival")


@pytest.mark.parametrize("name", RUNS)
def test_row(name: str, at: Path) -> None:
    try:
        results = list(TABLE[name].inflict(RUNS[name], at))
    except Unavailable as e:
        pytest.skip(str(e))
    assert len(results) == RUNS[name]
    assert [result for result in results if not result.held] == []
