"""Claim: `--help` tells every setting with its default, its allowed values and its meaning."""

import ast
import dataclasses
import enum
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from flax_resnet import cli, help, setting_flags
from flax_resnet.config import Experiment, ResNetConfig, Shortcut
from flax_resnet.setting_flags import SettingParser
from flax_resnet.shipped import COMMANDS

ROOT = Path(__file__).parent.parent
WITHOUT_FLAGS = ("check_data.py",)  # of its own
WITH_SETTINGS = [
    "benchmark.py",
    "check_data.py",
    "compile_for.py",
    "convert.py",
    "describe.py",
    "evaluate.py",
    "identify.py",
    "parity_report.py",
    "predict.py",
    "reproduce.py",
    "train_flax.py",
]
HELP = {"train_flax.py": ["--config", "resnet110", "--help"]}  # elsewhere: --help
LINE = re.compile(r"^  --config\.(\S+?)=(\S+) \(default: (.*)\)$", re.MULTILINE)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting that is no group, by path."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = prefix + field.name
        found |= leaves(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return found


def parsed(path: str, value: str) -> Any:
    """What the command line makes of `--config.path=value`."""
    return SettingParser(path, setting_flags.settings()[path]).parse(value)


def test_every_setting_is_listed_once_with_its_default() -> None:
    config = Experiment(ResNetConfig(56, Shortcut.B), seed=7)
    shown = LINE.findall(help.about_settings(config, leaves(config)))
    assert sorted(path for path, _, _ in shown) == sorted(leaves(config))
    for path, _, default in shown:
        assert parsed(path, default) == leaves(config)[path]


def test_settings_that_a_script_does_not_take_are_not_listed() -> None:
    page = help.about_settings(Experiment(), ["model.depth"])
    assert [path for path, _, _ in LINE.findall(page)] == ["model.depth"]
    assert "data:" not in page


def test_every_allowed_value_of_a_choice_is_listed_and_accepted() -> None:
    for path, allowed, _ in LINE.findall(help.about_settings(Experiment(), leaves(Experiment()))):
        default = leaves(Experiment())[path]
        if isinstance(default, enum.Enum | bool):
            choices = list(type(default)) if isinstance(default, enum.Enum) else [True, False]
            assert [parsed(path, word) for word in allowed.split("|")] == choices


def test_every_number_has_its_rule_in_the_words_of_its_error() -> None:
    rules = {
        setting.path: setting.meaning[-1]
        for name, group in help.groups(Experiment()).items()
        for setting in help.settings(Experiment(), name, group)
        if setting.allowed.partition(",")[0] in ("INTEGER", "NUMBER")
    }
    assert all(rule.startswith("must ") for rule in rules.values()), rules
    assert rules["model.depth"] == "must be 6n+2 (8, 20, 32, 44, 56, 110, 1202, ...)"
    assert rules["optim.momentum"] == "must be in [0, 1)"
    assert rules["optim.boundaries"] == "must rise, all after optim.warmup_steps (0)"


def test_meanings_are_the_comments_of_the_source() -> None:
    class Level(enum.Enum):
        """How much."""

        LOW = "low"  # a little
        # A lot, which
        # takes two lines.
        HIGH = "high"
        NONE = "none"

    assert help.comments(Level) == {"LOW": "a little", "HIGH": "A lot, which takes two lines."}
    page = help.about_settings(Experiment(), leaves(Experiment()))
    assert "zeros around a training image before the random crop; 0: no crop" in page
    assert "      B: identity; a 1x1 projection where the shape changes\n" in page


def test_without_a_source_there_is_a_help_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(cls: type) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)
    help.comments.cache_clear()
    shown = LINE.findall(help.about_settings(Experiment(), leaves(Experiment())))
    help.comments.cache_clear()
    assert len(shown) == len(leaves(Experiment()))


def test_the_scripts_that_take_settings() -> None:
    names = sorted(
        path.name
        for path in ROOT.glob("scripts/*.py")
        if re.search(r"cli\.define_(config|overrides)\(", path.read_text())
    )
    assert names == WITH_SETTINGS


def help_of(*names: str) -> dict[str, str]:
    """What the scripts print, all started at once, since each costs seconds of importing."""
    running = {
        name: subprocess.Popen(
            [sys.executable, f"scripts/{name}", *HELP.get(name, ["--help"])],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    pages = {name: process.communicate()[0] for name, process in running.items()}
    assert {name: process.returncode for name, process in running.items()} == dict.fromkeys(
        names, 0
    )
    for name, page in pages.items():
        doc = ast.get_docstring(ast.parse((ROOT / "scripts" / name).read_text()))
        flags = "" if name in WITHOUT_FLAGS else "Flags:\n  --"
        assert page.startswith(f"{doc}\n\n{flags}")
        shown = [path for path, _, _ in LINE.findall(page)]
        assert set(shown) <= leaves(Experiment()).keys()
        assert len(shown) == len(set(shown))
        assert bool(shown) == (name in WITH_SETTINGS)
    return pages


def test_help_of_training_has_the_defaults_of_its_config() -> None:
    page = help_of("train_flax.py")["train_flax.py"]
    shown = {path: default for path, _, default in LINE.findall(page)}
    assert sorted(shown) == sorted(leaves(Experiment()))
    assert "  --config: the experiment: a file that ends in .py, or one of finetune, " in page
    assert shown["model.depth"] == "110"
    assert shown["optim.warmup_steps"] == "400"
    workdir = (
        "where the run lives, a directory or the URL of a bucket; default: runs/<config's name>"
    )
    assert f"  --workdir: {workdir}\n" in page


@pytest.mark.slow
def test_help_of_the_other_scripts() -> None:
    names = [f"{script}.py" for script in COMMANDS.values() if script != "train_flax"]
    pages = help_of(*names)
    assert all(" --help" not in page and "(default: None)" not in page for page in pages.values())
    shown = {name: {path for path, _, _ in LINE.findall(page)} for name, page in pages.items()}
    assert "optim.peak_lr" not in shown["evaluate.py"]
    assert "seed" not in shown["reproduce.py"]  # it has --seeds


def test_help_of_a_config_that_cannot_be_used_is_a_help_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    (tmp_path / "mine.py").write_text("get_config = 3\n")
    cli.define_config("quickstart")
    with pytest.raises(SystemExit) as stop:
        cli.parse_flags(["train_flax.py", f"--config={tmp_path / 'mine.py'}", "--helpfull"])
    assert not stop.value.code
    page = capsys.readouterr().out
    assert "The defaults are the paper's: " in page
    assert "mine.py cannot be used (" in page
    assert "--config.model.depth=INTEGER (default: 20)" in page
