"""Claim: a config, both networks and their arrays tell one architecture, and it gives them back."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import flax_resnet
from flax_resnet.config import ChannelPad, DType, ResNetConfig, Shortcut
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.resnet import ResNet, abstract
from flax_resnet.weights.infer import infer
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict
from parity_tests.pair import LARGE, torch
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


@pytest.mark.parametrize("layout", [Layout.TWIN, Layout.TORCHVISION, Layout.KUANGLIU])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("18-A", marks=pytest.mark.slow),
        pytest.param("18-B", marks=pytest.mark.slow),
        "50-B, stride on 3x3",
        pytest.param("kuangliu-18", marks=pytest.mark.slow),
    ],
)
def test_a_large_network_is_read_by_its_keys_and_what_it_is_told(name: str, layout: Layout) -> None:
    config = LARGE[name]
    architecture = config.architecture
    _, params, batch_stats = abstract(config)
    trees = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), (params, batch_stats))
    state = to_state_dict(architecture, *trees, layout=layout)
    told = {"shortcut": config.shortcut, "channel_pad": config.channel_pad}
    found = from_state_dict(state, **told)
    assert found.config.architecture == architecture
    doubts = [sentence for sentence in found.assumed.values() if "stride conv3x3" in sentence]
    assert len(doubts) == (name == "50-B, stride on 3x3")
    assert ResNetConfig.of(architecture, dtype=DType.FLOAT64) == dataclasses.replace(
        config, stride=config.stride if architecture.stride else ResNetConfig.stride
    )


PLAIN, PLAIN_OR_B, PAD = (
    "Plain networks have",
    "Plain networks and those of shortcut B",
    "channel_pad",
)


@pytest.mark.parametrize(
    ("family", "shortcut", "layout", "pad", "doubts"),
    [
        (ResNetConfig.paper, Shortcut.A, Layout.TWIN, ChannelPad.END, [PLAIN, PAD]),
        (ResNetConfig.paper, Shortcut.A, Layout.AKAMASTER, ChannelPad.CENTRE, [PLAIN, PAD]),
        (ResNetConfig.paper, Shortcut.B, Layout.TWIN, ChannelPad.END, []),
        (ResNetConfig.paper, Shortcut.C, Layout.AKAMASTER, ChannelPad.CENTRE, []),
        (
            ResNetConfig.tanjeffreyz,
            Shortcut.A,
            Layout.TANJEFFREYZ,
            ChannelPad.END,
            [PLAIN_OR_B, PAD],
        ),
        (ResNetConfig.tanjeffreyz, Shortcut.C, Layout.TANJEFFREYZ, ChannelPad.END, []),
    ],
)
def test_what_no_key_tells_is_assumed_and_said(
    family: Any, shortcut: Shortcut, layout: Layout, pad: ChannelPad, doubts: list[str]
) -> None:
    _, params, batch_stats = abstract(family(14, shortcut))
    trees = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), (params, batch_stats))
    state = to_state_dict(family(14, shortcut).architecture, *trees, layout=layout)
    found = from_state_dict(state)
    assert (found.config.shortcut, found.config.channel_pad) == (shortcut, pad)
    doubts = [*doubts, "batch_norm_epsilon 1e-05", "batch_norm_momentum 0.1"]
    assert len(found.assumed) == len(doubts)
    for sentence, doubt in zip(found.assumed.values(), doubts, strict=True):
        assert doubt in sentence
    told = from_state_dict(state, batch_norm_epsilon=1e-3)
    assert told.config.batch_norm_epsilon == 1e-3
    assert found.assumed.keys() - told.assumed.keys() == {"batch_norm_epsilon"}


def test_a_network_without_a_second_stage_is_refused() -> None:
    state = {"conv1.weight": np.ones((16, 3, 3, 3)), "fc.weight": np.ones((10, 64))}
    state |= {"stages.0.0.conv1.weight": np.ones((16, 16, 3, 3))}
    with pytest.raises(WeightsError, match=r"missing key of a second stage.*of 1, 0 and 0 blocks"):
        infer(state, Layout.TWIN)


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
        {"blocks": (2, 2, 2, 3), "widths": (64, 128, 256, 512)},
        {"blocks": (2, 2, 2, 2), "widths": (16, 32, 64, 128)},
        {"blocks": (3, 4, 23, 3), "widths": (64, 128, 256, 512)},  # of bottlenecks alone
        {"widths": (64, 128, 256)},
    ],
    ids=str,
)
def test_stages_that_no_config_has(stages: dict[str, Any]) -> None:
    other = dataclasses.replace(ResNetConfig.paper(20).architecture, **stages)
    with pytest.raises(ConfigError, match="equally many blocks in three stages of"):
        ResNetConfig.of(other)


@pytest.mark.parametrize("layout", [Layout.AKAMASTER, Layout.TANJEFFREYZ], ids=lambda x: x.value)
def test_a_model_is_exported_by_what_it_keeps(layout: Layout) -> None:
    """However it is computed: here with scans, and in bfloat16."""
    how = {"scan_blocks": True, "dtype": DType.BFLOAT16}
    config = ResNetConfig.tanjeffreyz(20, Shortcut.B, channel_pad=ChannelPad.CENTRE, **how)
    graphdef, *trees = abstract(config)
    rng = np.random.default_rng(0)
    trees = jax.tree.map(lambda x: rng.uniform(size=x.shape).astype(x.dtype), trees)
    model = nnx.merge(graphdef, *trees)
    ours = flax_resnet.to_torch(model, layout=layout, step=5)
    expected = to_state_dict(config.architecture, *trees, layout=layout, step=5)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], torch.tensor(expected[key])) for key in expected)
    told = {"shortcut": Shortcut.B, "channel_pad": ChannelPad.CENTRE}
    back = from_state_dict(expected, **told)
    assert (back.config.architecture, back.step) == (config.architecture, 5)
