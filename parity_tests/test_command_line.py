"""Claim: a user's mistake becomes one line that says the rule and the value, before any work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags

from flax_resnet import cli, config_file, setting_flags
from flax_resnet.config import (
    DataConfig,
    Dataset,
    Experiment,
    ResNetConfig,
    Schedule,
    Shortcut,
    TrainConfig,
)
from flax_resnet.data import source
from flax_resnet.errors import CheckpointError, ConfigError
from flax_resnet.parallel import sharding
from flax_resnet.training.workdir import claimed, difference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.depth", 21, "model.depth must be 6n+2 (8, 20, 32, 44, 56, 110, 1202, ...), got 21"),
        ("model.num_classes", 0, "model.num_classes must be at least 1, got 0"),
        ("data.pad", -1, "data.pad must be 0 to 32 pixels, got -1"),
        ("optim.momentum", 1.0, "optim.momentum must be in [0, 1), got 1.0"),
        (
            "optim.boundaries",
            (5, 3),
            "optim.boundaries must rise, all after optim.warmup_steps (0)",
        ),
        ("optim.final_lr", 0.2, "optim.final_lr must be 0 to optim.peak_lr (0.1), got 0.2"),
        (
            "optim.final_lr",
            0.01,
            "optim.final_lr must be 0 without optim.schedule=cosine, got 0.01",
        ),
        ("train.steps", 0, "train.steps must be at least 1, got 0"),
        (
            "train.accumulate",
            3,
            "train.accumulate must be a divisor of train.batch_size (128), got 3",
        ),
        ("train.label_smoothing", 1.0, "train.label_smoothing must be in [0, 1), got 1.0"),
        ("data.mixup", -0.1, "data.mixup must be 0, or 0.001 to 1000, got -0.1"),
        ("data.cutmix", 1e4, "data.cutmix must be 0, or 0.001 to 1000, got 10000.0"),
        ("seed", -1, "seed must be 0 to 2^63 - 1, got -1"),
    ],
)
def test_a_setting_that_breaks_a_rule(setting: str, value: object, message: str) -> None:
    config = Experiment()
    *groups, name = setting.split(".")
    holder = config
    for group in groups:
        holder = getattr(holder, group)
    setattr(holder, name, value)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cosine_must_have_steps_after_its_warm_up() -> None:
    config = Experiment(train=TrainConfig(steps=400))
    config.optim.warmup_steps, config.optim.boundaries = 400, ()
    config.validate()
    config.optim.schedule = Schedule.COSINE
    rule = r"optim.warmup_steps must be below train.steps \(400\) with .*=cosine, got 400"
    with pytest.raises(ConfigError, match=rule):
        config.validate()
    config.optim.warmup_steps, config.optim.boundaries = 399, (5, 3)  # which a cosine has not
    config.validate()


@pytest.fixture
def fresh_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has defined none yet."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(setting_flags, "own_flags", {})


def trained(*arguments: str) -> Experiment:
    """What `train_flax.py` would train, with quickstart where the arguments have no --config."""
    config = cli.define_config(default="quickstart")
    assert cli.parse_flags(["train_flax.py", *arguments]) == ["train_flax.py"]
    with jax.enable_x64(True):  # which `cli.checked` switches off
        return cli.guarded(lambda: cli.experiment(config))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that is printed in the place of training."""
    with pytest.raises(SystemExit) as stop:
        trained(*arguments)
    assert stop.value.code == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", line)
    return line.removeprefix("error: ").rstrip("\n")


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize(
    ("arguments", "path", "held"),
    [
        (["--config.data.dir=None"], "data.dir", None),
        (["--config.data.dir=none"], "data.dir", None),
        (["--config.train.steps_per_call", "None"], "train.steps_per_call", None),
        (["--config.train.steps_per_call=4"], "train.steps_per_call", 4),
        (["--config.optim.boundaries=()"], "optim.boundaries", ()),
        (["--config.optim.boundaries="], "optim.boundaries", ()),
        (["--config.optim.boundaries=[]"], "optim.boundaries", ()),
        (["--config.optim.boundaries=5,6"], "optim.boundaries", (5, 6)),
        (["--config.optim.boundaries=( 5, 6, )"], "optim.boundaries", (5, 6)),
        (
            ["--config.optim.boundaries=5", "--config.optim.boundaries=6,7"],
            "optim.boundaries",
            (5, 6, 7),
        ),
        (["--config.optim.peak_lr=1"], "optim.peak_lr", 1.0),
        (["--config.optim.peak_lr=1e-2"], "optim.peak_lr", 0.01),
        (["--config.model.shortcut=b"], "model.shortcut", Shortcut.B),
        (["--config.data.flip"], "data.flip", True),
        (["-config.data.flip=t"], "data.flip", True),
        (["--config=resnet20", "--noconfig.data.flip"], "data.flip", False),
        (["--config.seed=1", "--config", "resnet20", "--config.seed=2"], "seed", 2),
        (["--config.seed=0x10"], "seed", 16),
    ],
)
def test_a_flag_says_what_a_setting_holds(arguments: list[str], path: str, held: object) -> None:
    value: object = trained(*arguments)
    for name in path.split("."):
        value = getattr(value, name)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config.train.steps=none"], "train.steps must be an integer, got 'none'"),
        (["--config.train.steps=1e3"], "train.steps must be an integer, got '1e3'"),
        (["--config.train.steps="], "train.steps must be an integer, got ''"),
        (["--config.optim.boundaries=0.5,1"], "must be a list of integers, got ('0.5', 1)"),
        (["--config.optim.boundaries=1e3"], "must be a list of integers, got ('1e3',)"),
        (["--config.optim.boundaries=1 2"], "must be a list of integers, got ('1 2',)"),
        (["--config.optim.peak_lr=nan"], "optim.peak_lr must be a finite number, got nan"),
        (["--config.data.flip=maybe"], "data.flip must be true or false, got 'maybe'"),
        (["--config.data.dir="], "data.dir must be a directory, or none for the default, got ''"),
        (["--config.model.shortcut=D"], "must be one of 'plain', 'A', 'B', 'C', got 'D'"),
        (["--config.model.dpeth=20"], "no such setting: model.dpeth; did you mean model.depth?"),
        (["--noconfig.data.flop"], "no such setting: data.flop; did you mean data.flip?"),
        (["--config.modl.depth=20"], "no such setting: modl.depth; did you mean model.depth?"),
        (["--config.seed.x=1"], "no such setting: seed.x; there are model, data, optim, "),
        (
            ["--config.model=3"],
            "--config.model is a group of settings; give one of them: --config.model.depth=VALUE",
        ),
        (["--config.model.depth"], "Missing value for flag --config.model.depth"),
        (["--config"], "Missing value for flag --config"),
        (["--workdri=x"], "Unknown command line flag 'workdri'"),
        (
            ["--config=resnet20", "--config.seed=1", "--config", "quickstart"],
            "--config must be given once, got resnet20 and quickstart",
        ),
        (["--config.model.depth=21"], "model.depth must be 6n+2 (8, 20, 32, 44, 56, 110, 1202, "),
        (["--config.optim.warmup_lr=0.1"], "would change nothing: optim.warmup_steps is 0"),
        (["--config.model.projection=conv_bias"], "nothing: shortcut A has no projections"),
        (
            ["--config.model.shortcut=B", "--config.model.channel_pad=centre"],
            "--config.model.channel_pad would change nothing: only shortcut A pads channels",
        ),
        (["--config.data.dir=/x"], "would change nothing: the digits come with scikit-learn"),
        (
            ["--config.optim.boundaries=()", "--config.optim.decay_factor=0.2"],
            "--config.optim.decay_factor would change nothing: there are no optim.boundaries",
        ),
    ],
)
def test_a_flag_that_says_nothing_possible(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, *arguments)


@pytest.mark.usefixtures("fresh_flags")
def test_a_rule_that_a_file_breaks_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {'model': {'depth': 21}}\n")
    line = refused(capsys, f"--config={path}")
    assert line.startswith(f"{path}: model.depth must be 6n+2")


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize("form", ["{", "ConfigDict("])
def test_a_flag_overrides_what_a_file_says(form: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    end = "})" if "(" in form else "}"
    returned = f"{form}{'{' * form.endswith('(')}'model': {{'depth': 8}}, 'seed': 1{end}"
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return {returned}\n"
    path.write_text(text)
    config = trained(f"--config={path}", "--config.model.shortcut=B", "--config.seed=2")
    assert config == Experiment(model=ResNetConfig(8, Shortcut.B), seed=2)


@pytest.mark.usefixtures("fresh_flags")
def test_the_same_config_twice_is_one() -> None:
    assert trained("--config=resnet56", "--config", "resnet56").model.depth == 56


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--config=x.py", "this takes no --config, got 'x.py'; settings are given one by one"),
        ("--config.seed=1", "--config.seed is --seeds here"),
        (
            "--config.train.steps=1",
            "--config.train.steps would change nothing here, where the settings are: model.depth, ",
        ),
        ("--config.model.remat", "--config.model.remat would change nothing here"),
    ],
)
def test_a_script_takes_the_settings_that_it_uses(
    argument: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.define_overrides("", ("model", "seed"), but=["model.remat"], own={"seed": "--seeds"})
    with pytest.raises(SystemExit):
        cli.parse_flags(["script.py", "--config.model.depth=8", argument])
    assert told in capsys.readouterr().err
    cli.parse_flags(["script.py", "--config.model.depth=8"])
    assert cli.overrides() == {"model.depth": 8}


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize("argument", ["--config=x.py", "--config.data.dir=x"])
def test_a_script_without_settings(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse_flags(["script.py", argument])
    assert capsys.readouterr().err.count("\n") == 1


RUN = ROOT / "parity_tests/golden/paper"
WEIGHTS = ROOT / "parity_tests/golden/weights/paper.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train_flax --config=mine.py", "mine.py:2: no such setting: model.dpeth; did you mean"),
        ("train_flax --config.seed=9223372036854775808", "seed must be 0 to 2^63 - 1, got 9223"),
        ("train_flax --config.model.num_classes=9", "model.num_classes must be 10, the classes"),
        (f"evaluate --checkpoint={RUN} --config=mine.py", "this takes no --config, got 'mine.py'"),
        (f"evaluate --checkpoint={RUN} --config.optim.peak_lr=1", "would change nothing here"),
        (f"evaluate --checkpoint={RUN} --config.data.dir=x", "the digits come with scikit-learn"),
        (
            f"evaluate --checkpoint={RUN} --batch_statistics --config.train.eval_batch_size=9",
            "--config.train.eval_batch_size would change nothing: --batch_statistics has its own",
        ),
        (
            f"evaluate --checkpoint={WEIGHTS} --preprocess=imagenet --config.data.validation=9",
            "--config.data.validation would change nothing: no training image is needed here",
        ),
        (f"evaluate --checkpoint={RUN} --crops=10", "--crops=10 is for photographs: --config.data"),
        (
            f"predict --checkpoint={RUN} none.jpg",
            "1 of 1 images cannot be read: none.jpg (No such file or directory)",
        ),
        (f"convert {WEIGHTS} made --layout=akamaster", "--layout would change nothing: DST is a "),
        (f"convert {RUN} made.pt --preprocess=imagenet", "--preprocess would change nothing: DST"),
        ("parity_report --shortcut=B", "--shortcut would change nothing: it is of a PyTorch file"),
        (
            f"parity_report --checkpoint={RUN} --config.model.depth=8",
            "--config.model.depth would change nothing: --checkpoint says it",
        ),
        ("benchmark --phases=eval --scans=2", "--scans is about flax train, which is not measured"),
        ("benchmark --frameworks=flax --without=x", "--without must be of default, got 'x'"),
        ("benchmark --frameworks=flax --without=default", "--without leaves nothing to measure"),
        ("benchmark --config.model.depth=8", "--config.model.depth is --depths here"),
        ("plot --published=x .", "--published is drawn in --out, which is missing"),
        ("plot --only=depth .", "--only is drawn in --out, which is missing"),
        ("reproduce depth --config.data.dir=x", "--config.data.dir is --data_dir here"),
    ],
)
def test_what_a_script_would_not_use_is_refused_and_nothing_is_made(
    command: str, told: str, tmp_path: Path
) -> None:
    text = (
        "from flax_resnet.config import Experiment; config = Experiment()\nconfig.model.dpeth = 8\n"
    )
    (tmp_path / "mine.py").write_text(text)
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / f"scripts/{script}.py", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch("error: .*\n", done.stderr)
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_batch_that_does_not_divide_over_the_devices() -> None:
    mesh = jax.sharding.AbstractMesh((3,), ("data",))
    rule = r"train.batch_size must be divisible by the number of devices \(3\), got 128"
    with pytest.raises(ConfigError, match=rule):
        sharding.check_batch_size(mesh, "train.batch_size", 128)


def test_more_validation_examples_than_there_are() -> None:
    config = DataConfig(name=Dataset.DIGITS, validation=1437)
    with pytest.raises(ConfigError, match=r"below 1437.*got 1437"):
        source.load(config)


def test_every_config_file_says_its_own_command_and_is_valid() -> None:
    paths = sorted(ROOT.glob("configs/*.py"))
    assert len(paths) == 25
    for path in paths:
        config = config_file.load(path)
        config.validate()
        assert f"--config configs/{path.name}" in path.read_text()
        assert Experiment.from_dict(config.to_dict()) == config
        name = re.sub("^(tanjeffreyz_)?(resnet|plain|kuangliu|imagenet|torchvision)", "", path.stem)
        assert name in ("quickstart", "finetune") or config.model.depth == int(name)


def test_a_work_directory_in_use_is_refused(tmp_path: Path) -> None:
    def claim() -> None:
        with claimed(tmp_path, Experiment()):
            pass

    with claimed(tmp_path, Experiment()), pytest.raises(CheckpointError, match="is in use"):
        claim()
    claim()


def test_the_difference_of_two_configs_names_every_field() -> None:
    ours = Experiment().to_dict()
    theirs = Experiment(seed=1).to_dict()
    theirs["model"]["depth"] = 56
    assert difference(ours, theirs) == {"model.depth": (20, 56), "seed": (0, 1)}
    assert difference(ours, ours) == {}
