"""Claim: `flax-resnet COMMAND` runs the script of that name, wherever it is started."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from flax_resnet import __main__ as commands
from flax_resnet import cli
from flax_resnet.shipped import COMMANDS

ROOT = Path(__file__).parent.parent


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `flax-resnet ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["flax-resnet", *arguments])
    try:
        commands.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def test_every_script_but_the_projects_own_tools_is_a_command() -> None:
    scripts = {path.stem for path in ROOT.glob("scripts/*.py")}
    assert {"torture", "mutation", *COMMANDS.values()} == scripts  # both try the project itself


def test_help_has_one_line_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 2 and "scripts/" not in line for line in lines)
    assert "  train          Trains a network" in lines


@pytest.mark.parametrize(
    ("arguments", "message"), [(["trian"], "no such command: 'trian'"), ([], "missing command")]
)
def test_a_command_that_there_is_not(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == f"error: {message}; there are {', '.join(COMMANDS)}\n"


def test_without_torch_a_command_that_needs_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_torch(path: str, run_name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(runpy, "run_path", no_torch)
    monkeypatch.setattr(cli, "started_by_command", False)
    monkeypatch.setenv("PYTHONPATH", "")  # `main` puts the checkout there
    assert run(monkeypatch, "convert", "a.pt", "b") == 2
    needed = "error: convert needs PyTorch: pip install 'flax-resnet[torch]'\n"
    assert capsys.readouterr().err == needed


def test_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """The script's own error, one line, in the command's words."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "flax_resnet", "train", "--config=resnet21"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config must be a file or one of finetune, ")
    assert done.stderr.count("\n") == 1


def test_texts_name_the_command_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "`python scripts/train_flax.py --config configs/resnet20.py`, scripts/torture.py"
    assert cli.as_typed(text) == text
    monkeypatch.setattr(cli, "started_by_command", True)
    assert cli.as_typed(text) == "`flax-resnet train --config resnet20`, scripts/torture.py"
