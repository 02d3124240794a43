"""Claim: a setting has a known name and a value of its own type, wherever it comes from.

What can mean one thing only is converted, and all else is refused where it is assigned.
"""

import copy
import dataclasses
import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flax_resnet.config import (
    ChannelPad,
    DataConfig,
    Dataset,
    DType,
    Experiment,
    ResNetConfig,
    Shortcut,
)
from flax_resnet.errors import ConfigError
from flax_resnet.settings import Settings, accepted, from_mapping


def assign(config: Any, path: str, value: object) -> Any:
    """What the setting holds afterwards."""
    *groups, name = path.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, name, value)
    return getattr(config, name)


@pytest.mark.parametrize(
    ("path", "value", "held"),
    [
        ("model.channel_pad", "centre", ChannelPad.CENTRE),
        ("model.shortcut", "b", Shortcut.B),
        ("model.dtype", "BFLOAT16", DType.BFLOAT16),
        ("data.name", Dataset.DIGITS, Dataset.DIGITS),
        ("optim.peak_lr", 1, 1.0),
        ("optim.momentum", Fraction(1, 2), 0.5),
        ("optim.weight_decay", np.float32(0.5), 0.5),
        ("optim.boundaries", [1, np.int64(2)], (1, 2)),
        ("optim.boundaries", np.array([1, 2]), (1, 2)),
        ("optim.boundaries", range(1, 7, 3), (1, 4)),
        ("optim.boundaries", [], ()),
        ("train.steps", np.uint8(4), 4),
        ("train.steps", jnp.array(4), 4),
        ("train.steps_per_call", None, None),
        ("data.flip", np.bool_(False), False),
        ("data.dir", Path("a/b"), "a/b"),
        ("data.dir", None, None),
        ("model", {"depth": 8, "shortcut": "B"}, ResNetConfig(8, Shortcut.B)),
        ("model", ConfigDict({"depth": 8}), ResNetConfig(8)),
    ],
)
def test_what_can_mean_one_thing_only_is_converted(path: str, value: object, held: object) -> None:
    config = Experiment()
    found = assign(config, path, value)
    assert found == held
    assert type(found) is type(held)
    assert Experiment.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.channel_pad", "center", "must be one of 'end', 'centre', got 'center'"),
        ("model.shortcut", ChannelPad.END, "must be one of 'plain', 'A', 'B', 'C', got <Chan"),
        ("train.steps", "4", "must be an integer, got '4'"),
        ("train.steps", 4.0, "must be an integer, got 4.0"),
        ("train.steps", True, "must be an integer, got True"),
        ("train.steps", None, "must be an integer, got None"),
        ("train.steps_per_call", 0.5, "must be an integer or None, got 0.5"),
        ("optim.peak_lr", "0.1", "must be a finite number, got '0.1'"),
        ("optim.peak_lr", float("nan"), "must be a finite number, got nan"),
        ("optim.weight_decay", np.float32("inf"), "must be a finite number, got "),
        ("optim.momentum", True, "must be a finite number, got True"),
        ("optim.momentum", 10**400, "must be a finite number, got 1000"),
        ("optim.boundaries", (0.5, 1), "must be a list of integers, got (0.5, 1)"),
        ("optim.boundaries", "12", "must be a list of integers, got '12'"),
        ("optim.boundaries", b"12", "must be a list of integers, got b'12'"),
        ("optim.boundaries", 3, "must be a list of integers, got 3"),
        ("data.flip", 0, "must be true or false, got 0"),
        ("data.flip", "false", "must be true or false, got 'false'"),
        ("data.dir", 3, "must be a text or None, got 3"),
        ("model", 8, "must be a ResNetConfig or a dictionary of its settings, got 8"),
        ("model", DataConfig(), "must be a ResNetConfig or a dictionary of its settings, got a D"),
        ("model", ResNetConfig, "must be a ResNetConfig or a dictionary of its settings, got <cl"),
        ("seed", np.zeros(2), "must be an integer, got array([0., 0.])"),
    ],
)
def test_a_value_of_another_type_is_refused(path: str, value: object, message: str) -> None:
    config = Experiment()
    with pytest.raises(ConfigError) as error:
        assign(config, path, value)
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value)
    assert config == Experiment()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("model.dpeth", "no such setting: model.dpeth; did you mean model.depth?"),
        ("optim.peak_Lr", "no such setting: optim.peak_Lr; did you mean optim.peak_lr?"),
        ("modle", "no such setting: modle; did you mean model?"),
        ("steps", "no such setting: steps; did you mean train.steps?"),
        ("train.zzz", "no such setting: train.zzz; there are train.steps, train.steps_per_call, "),
        ("model.label", "no such setting: model.label; "),  # a property
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(path: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        assign(Experiment(), path, 20)
    assert str(error.value).startswith(told)


def test_every_way_in_is_the_same_gate() -> None:
    assert ResNetConfig(shortcut="B").shortcut is Shortcut.B  # as a caller without types
    config = Experiment(model={"shortcut": "B"}, seed=np.int64(3))
    assert config == Experiment(model=ResNetConfig(shortcut=Shortcut.B), seed=3)
    assert dataclasses.replace(config.model, dtype="float64").dtype is DType.FLOAT64
    for make in (
        lambda: ResNetConfig(channel_pad="center"),
        lambda: ResNetConfig.paper(channel_pad="center"),
        lambda: dataclasses.replace(ResNetConfig(), channel_pad="center"),
        lambda: Experiment(model={"channel_pad": "center"}),
        lambda: Experiment.from_dict({"model": {"channel_pad": "center"}}),
        lambda: from_mapping(Experiment, ConfigDict({"model": {"channel_pad": "center"}})),
    ):
        with pytest.raises(ConfigError, match=r"^model\.channel_pad must be one of"):
            make()
    for tree in ({"model": {"dpeth": 8}}, {"modl": {}}, {"model": None}, [], None):
        with pytest.raises(ConfigError):
            Experiment.from_dict(tree)
    with pytest.raises(ConfigError, match="no such setting: 1; there are model, data, "):
        from_mapping(Experiment, {1: 2})


def test_copies_are_equal_and_pass_the_gate_too() -> None:
    config = Experiment(seed=7)
    copies = [copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))]
    for other in copies:
        assert other == config
        with pytest.raises(ConfigError):
            other.seed = "7"


def test_what_an_earlier_version_stored_is_still_read() -> None:
    """It kept 4.0 steps as they were given, and went on from its config.json."""
    stored = Experiment().to_dict()
    stored["train"]["steps"], stored["optim"]["boundaries"] = 300.0, [100.0, 200.0]
    stored["optim"]["peak_lr"], stored["data"]["dir"] = 1, ""
    config = Experiment.from_dict(json.loads(json.dumps(stored)))
    assert (config.train.steps, config.optim.boundaries) == (300, (100, 200))
    assert repr(config.optim.peak_lr) == "1.0"
    assert config.data.dir is None
    stored["optim"]["boundaries"] = [100.5]
    with pytest.raises(ConfigError, match=r"optim\.boundaries must be a list of integers"):
        Experiment.from_dict(stored)


def test_every_type_that_a_setting_may_have() -> None:
    """Those that the fields of `config.py` have, and those that later ones may."""

    @dataclasses.dataclass
    class Group(Settings, group="group"):
        name: str | None = None
        rate: float | None = 0.5
        names: tuple[str, ...] = ()
        rates: tuple[float, ...] | None = None
        shortcut: Shortcut | None = None

    made = Group(name="a", rate=1, names=["a"], rates=[1], shortcut="C")
    assert made == Group("a", 1.0, ("a",), (1.0,), Shortcut.C)
    assert Group(None, None, (), None, None) == Group(rate=None)
    for path, value, rule in [
        ("name", 1, "a text or None"),
        ("rate", float("inf"), "a finite number or None"),
        ("names", ("a", 1), "a list of texts"),
        ("names", "ab", "a list of texts"),
        ("rates", (1, None), "a list of finite numbers or None"),
        ("shortcut", "D", "one of 'plain', 'A', 'B', 'C' or None"),
    ]:
        with pytest.raises(ConfigError, match=rf"^group\.{path} must be {rule}, got "):
            assign(made, path, value)


def test_a_refused_value_is_shown_on_one_short_line() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value, shown in [
        ("a\n" * 200, "'a\\na"),
        (Broken(), "something of type Broken"),
        ([10**5000], "something of type list"),  # Python does not print so long an integer
    ]:
        with pytest.raises(ConfigError) as error:
            accepted("seed", int, value)
        message = str(error.value)
        assert message.startswith(f"seed must be an integer, got {shown}")
        assert len(message) < 150
