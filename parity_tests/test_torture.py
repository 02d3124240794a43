"""Claim: `scripts/torture.py` says in a table and by its exit code whether every promise held."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADER = [
    "| fault | what must happen | runs | held | worst | minutes |",
    "|---|---|---|---|---|---|",
]
DATASET = [
    "damaged dataset or cache; four first runs at once",
    "prepared again, once, never trained on",
]
# What makes the dataset's promise untrue: a damaged one is not prepared again.
BROKEN = """
from flax_resnet.data import cifar

prepare = cifar._prepare

def prepare_once(which, root, dataset, damage=None):
    if damage is not None:
        raise damage
    prepare(which, root, dataset)

cifar._prepare = prepare_once
"""


def torture(at: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does who is in the directory `at`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/torture.py"), *flags],
        capture_output=True,
        text=True,
        cwd=at,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        check=False,
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_promise_that_holds(tmp_path: Path) -> None:
    run = torture(tmp_path, "--runs=1", "--rows=dataset", "--out=new/table.md", "--keep=kept")
    assert run.returncode == 0, run.stderr
    *header, line = run.stdout.splitlines()
    assert header == HEADER
    *columns, minutes = cells(line)
    assert columns == [*DATASET, "1", "1", ""]
    assert 0 <= float(minutes) < 10
    written = (tmp_path / "new/table.md").read_text().splitlines()
    assert written[0] == "# What training survives"
    assert any("--runs=1 --rows=dataset --out=new/table.md" in line for line in written)
    assert written[-3:] == [*HEADER, line]
    assert (tmp_path / "kept/dataset/0/cifar10").is_dir()


def test_a_promise_that_is_broken(tmp_path: Path) -> None:
    # Python runs a sitecustomize.py on its path before anything else.
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = torture(tmp_path, "--runs=1", "--rows=dataset", PYTHONPATH=path)
    assert run.returncode == 2, run.stderr
    *header, line = run.stdout.splitlines()
    assert header == HEADER
    assert cells(line)[:-1] == [*DATASET, "1", "0", ""]
    failed = "dataset 1: Result(held=False, detail='shorten: not prepared again', figure=None)"
    assert failed in run.stderr
    assert run.stderr.splitlines()[-1] == "error: a row does not hold"
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_a_fault_that_cannot_be_done_is_no_promise_kept(tmp_path: Path) -> None:
    run = torture(tmp_path, "--runs=1", "--rows=full_disk", PATH="")  # there is no `mount`
    assert (run.returncode, run.stderr) == (2, "error: a row does not hold\n")
    _, _, runs, held, worst, _ = cells(run.stdout.splitlines()[-1])
    assert (runs, held) == ("1", "0")
    assert worst.startswith("not done: no small file system can be mounted: ")


@pytest.mark.slow
def test_an_unknown_row_is_refused_before_any_work(tmp_path: Path) -> None:
    run = torture(tmp_path, "--runs=1", "--rows=dataset,comet")
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: --rows must be of kill, stop, full_disk, ")
    assert line.endswith(", got comet")
