"""Claim: pictures are drawn whatever backend the environment names, and never cost a number."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_resnet import drawing

ROOT = Path(__file__).parent.parent
DRAW = """
import pathlib
from flax_resnet import drawing
figure = drawing.new_figure(1.0, 1.0)
figure.subplots().plot([0, 1])
drawing.save(figure, pathlib.Path("picture.png"))
import matplotlib
print(matplotlib.rcParams._get("backend"))
"""


@pytest.mark.parametrize(
    ("backend", "is_kept"),
    [
        # Of a notebook's terminal, where the kernel's package is not installed.
        ("module://matplotlib_inline.backend_inline", False),
        ("no such backend", False),
        ("tkagg", True),  # the user's own windows open as the user wants it
    ],
)
def test_the_environments_backend_is_not_ours(backend: str, is_kept: bool, tmp_path: Path) -> None:
    env = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (run.stdout.strip() == backend) == is_kept


def test_a_failure_is_a_warning_and_leaves_no_half_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figure = drawing.new_figure(1.0, 1.0)
    figure.text(0, 0, "$\\nonsense$")  # matplotlib finds out when it draws
    path = tmp_path / "picture.png"
    path.write_text("the one before")
    with caplog.at_level(logging.WARNING, "flax_resnet"), drawing.attempted("a picture"):
        drawing.save(figure, path)
    (record,) = caplog.records
    assert record.getMessage().startswith("a picture could not be drawn: ValueError: ")
    assert "\n" not in record.getMessage()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "the one before")]
