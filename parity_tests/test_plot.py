"""Claim: `scripts/plot.py` draws finished runs, those of version 0.1 too, as a user calls it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "parity_tests/golden"  # two runs of version 0.1


def plot(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does who is in the directory `at`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/plot.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=at,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_a_folder_of_runs_becomes_a_table_and_figures(tmp_path: Path) -> None:
    run = plot(tmp_path, str(GOLDEN), "--out=new/figures")
    assert run.returncode == 0, run.stderr
    head, _, *lines = [[cell.strip() for cell in x.split("|")] for x in run.stdout.splitlines()]
    error = head.index("test error, %")
    assert [(line[1], line[error]) for line in lines] == [
        ("ResNet-8 A", "**83.61**"),
        ("ResNet-8 B (tanjeffreyz)", "**92.22**"),
    ]
    assert run.stderr == "written to new/figures: curves.png, layer_responses.png\n"
    files = {path.name: path.read_bytes() for path in (tmp_path / "new/figures").iterdir()}
    assert sorted(files) == [
        f"{x}.{y}" for x in ("curves", "layer_responses") for y in ("png", "svg")
    ]
    for name, content in files.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


@pytest.mark.slow
def test_only_the_figures_that_are_named(tmp_path: Path) -> None:
    run = plot(tmp_path, str(GOLDEN), "--out=figures", "--only=curves,depth")
    assert run.returncode == 2
    assert run.stderr == (
        "error: --only must name figures that these runs suffice for, got depth\n"
    )
    assert sorted(x.name for x in (tmp_path / "figures").iterdir()) == ["curves.png", "curves.svg"]


def test_a_folder_of_experiments_becomes_an_index(tmp_path: Path) -> None:
    names = ["paper", "reference"]
    for name in names:
        shutil.copytree(GOLDEN / name, tmp_path / "results/version-0.1" / name)
    run = plot(tmp_path, "results", "--index")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    index = (tmp_path / "results/README.md").read_text()
    assert index.startswith("# Results\n")
    assert index.count("\n## ") == 1
    for name in names:
        assert f"[{name}](version-0.1/{name}/metrics.jsonl)" in index


@pytest.mark.parametrize("flag", ["--out=figures", pytest.param("--index", marks=pytest.mark.slow)])
def test_a_folder_without_runs_is_refused_and_nothing_is_written(flag: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("the user's own")
    run = plot(tmp_path, ".", flag)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: . ")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "the user's own"
