"""Claim: the parity report names the first block at which two networks part, and the weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_resnet.config import ResNetConfig, Shortcut
from parity_tests.pair import make_pair, torch

ROOT = Path(__file__).parent.parent


def report(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/parity_report.py"), f"--out={out}", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ours.pt"
    torch.save(make_pair(ResNetConfig.paper(14, Shortcut.B)).twin.state_dict(), path)
    return path


def test_the_same_weights_differ_by_rounding_alone(weights: Path, tmp_path: Path) -> None:
    run = report(tmp_path, f"--checkpoint={weights}")
    assert run.returncode == 0, run.stderr
    assert "No layer differs by more than rounding" in run.stdout
    page = (tmp_path / "parity.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page  # it needs no other file


def test_a_fault_is_found_at_its_block(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["stages.1.1.conv2.weight"][3, 2, 1, 0] *= 1.01
    torch.save(state, tmp_path / "theirs.pt")
    run = report(tmp_path, f"--checkpoint={weights}", f"--state_dict={tmp_path / 'theirs.pt'}")
    assert run.returncode == 1, run.stderr
    assert "The networks part at stages.1.1: " in run.stdout
    assert "1 of the weights differ: stages.1.1.conv2.weight." in run.stdout


def test_networks_of_other_shapes_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    run = report(tmp_path, f"--state_dict={weights}", "--config.model.depth=20")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "both must be one network" in run.stderr
