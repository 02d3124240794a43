"""Claim: a user's mistake becomes one line that says the rule and the value, before any work."""

from pathlib import Path

import jax
import pytest

from flax_resnet import cli
from flax_resnet.config import DataConfig, Dataset, Experiment
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
        ("train.steps", 0, "train.steps must be at least 1, got 0"),
        ("seed", -1, "seed must be 0 or more, got -1"),
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


@pytest.mark.parametrize(
    "argument", ["--config.model.deth=20", "--config.modl.depth=20", "--config.seed.x=1"]
)
def test_a_misspelt_setting(argument: str) -> None:
    with pytest.raises(ConfigError, match="no such setting: config"):
        cli.check_setting(argument)


@pytest.mark.parametrize("argument", ["--config.model.depth=20", "--config=a.py", "--workdir=x.y"])
def test_a_setting_that_exists(argument: str) -> None:
    cli.check_setting(argument)


def test_a_config_by_name_is_the_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.find_config("resnet20") == ROOT / "configs/resnet20.py"
    (tmp_path / "resnet20").write_text("a file goes before a name")
    assert cli.find_config("resnet20") == Path("resnet20")


@pytest.mark.parametrize("name", ["resnet21", "configs/resnet21.py"])
def test_a_config_that_there_is_not(name: str) -> None:
    known = ", ".join(sorted(path.stem for path in ROOT.glob("configs/*.py")))
    with pytest.raises(ConfigError) as error:
        cli.find_config(name)
    assert (
        str(error.value) == f"--config must be a file or one of {known}; there is no file {name!r}"
    )


def test_names_are_looked_up_where_configs_are_named_and_nowhere_else() -> None:
    found = str(ROOT / "configs/resnet20.py")
    rest = ["--config.model.depth=56", "--workdir=resnet20", "resnet20", "--", "--config=nothing"]
    for given, expected in [
        (["--config", "resnet20"], ["--config", found]),
        (["--config=resnet20"], [f"--config={found}"]),
        (["-config=resnet20"], [f"-config={found}"]),
        (["--config", found], ["--config", found]),
        ([], []),
    ]:
        assert cli.with_config_found(["script", *given, *rest]) == ["script", *expected, *rest]
    assert cli.with_config_found(["script", "--config"]) == ["script", "--config"]  # absl complains


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
    assert len(paths) == 13
    for path in paths:
        scope: dict[str, object] = {}
        exec(compile(path.read_text(), path, "exec"), scope)
        config = scope["get_config"]()
        config.validate()
        assert f"--config configs/{path.name}" in scope["__doc__"]
        assert Experiment.from_dict(config.to_dict()) == config
        name = path.stem.removeprefix("tanjeffreyz_").removeprefix("resnet").removeprefix("plain")
        assert name == "quickstart" or config.model.depth == int(name)


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
