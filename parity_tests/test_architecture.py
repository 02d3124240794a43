"""Claim: a config, both networks and their arrays tell one architecture, and it gives them back."""

import dataclasses
from typing import Any

import pytest
from flax import nnx

from flax_resnet.config import DType, ResNetConfig, Shortcut
from flax_resnet.errors import ConfigError
from flax_resnet.resnet import ResNet
from flax_resnet.weights.state_dict import from_state_dict
from torch_ref.resnet import ResNet as TorchResNet

FAMILIES = [ResNetConfig.paper, ResNetConfig.tanjeffreyz, ResNetConfig.akamaster]


@pytest.mark.parametrize("shortcut", Shortcut, ids=lambda s: s.value)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_who_keeps_it(family: Any, shortcut: Shortcut) -> None:
    config: ResNetConfig = family(14, shortcut, num_classes=7, dtype=DType.FLOAT64)
    architecture = config.architecture
    ours = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    theirs = TorchResNet(config)
    assert ours.architecture == theirs.architecture == architecture
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    told = {"shortcut": shortcut, "channel_pad": config.channel_pad}
    assert from_state_dict(state, **told).config.architecture == architecture
    assert ResNetConfig.of(architecture, dtype=DType.FLOAT64) == config


def test_a_config_says_how_too() -> None:
    config = ResNetConfig.paper(20, Shortcut.B, scan_blocks=True, remat=True)
    how = {"scan_blocks": True, "remat": True}
    assert ResNetConfig.of(config.architecture, **how) == config
    assert ResNetConfig.of(config.architecture) == config.block_by_block()


@pytest.mark.parametrize(
    "stages",
    [
        {"blocks": (3, 3, 2)},
        {"blocks": (3, 4, 3)},
        {"blocks": (2, 2)},
        {"blocks": ()},
        {"blocks": (2, 2, 2, 2), "widths": (64, 128, 256, 512)},
        {"widths": (64, 128, 256)},
    ],
    ids=str,
)
def test_stages_that_no_config_has(stages: dict[str, Any]) -> None:
    other = dataclasses.replace(ResNetConfig.paper(20).architecture, **stages)
    with pytest.raises(ConfigError, match="equally many blocks in three stages of"):
        ResNetConfig.of(other)
