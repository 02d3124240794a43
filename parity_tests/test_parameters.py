"""Claim: the networks have the paper's numbers of parameters (table 6), and a closed formula's."""

import pytest
from flax.traverse_util import flatten_dict

from flax_resnet.config import Projection, ResNetConfig, Shortcut, Stem, Stride
from flax_resnet.errors import ConfigError
from flax_resnet.resnet import abstract


def count(config: ResNetConfig) -> int:
    _, params, _ = abstract(config)
    return sum(leaf.size for leaf in flatten_dict(params).values())


def formula(config: ResNetConfig) -> int:
    """Weights of every convolution, BatchNorm (2 per channel) and the classifier."""
    n = (config.depth - 2) // 6
    bias = int(config.conv_bias)
    total = 16 * (9 * 3 + bias) + 2 * 16 * (config.stem is Stem.CONV_BN_RELU)
    c_in = 16
    for c_out in (16, 32, 64):
        for i in range(n):
            total += c_out * (9 * c_in + bias) + c_out * (9 * c_out + bias) + 2 * 2 * c_out
            downsamples = i == 0 and c_out > 16
            if config.shortcut is Shortcut.C or (config.shortcut is Shortcut.B and downsamples):
                extra = 1 if config.projection is Projection.CONV_BIAS else 2
                total += c_out * (c_in + extra)
            c_in = c_out
    return total + config.num_classes * (64 + 1)


@pytest.mark.parametrize("shortcut", Shortcut, ids=lambda s: s.value)
@pytest.mark.parametrize("family", ["paper", "tanjeffreyz", "akamaster"])
@pytest.mark.parametrize("depth", [8, 20, pytest.param(110, marks=pytest.mark.slow)])
def test_the_number_of_parameters_follows_the_formula(
    depth: int, family: str, shortcut: Shortcut
) -> None:
    config = getattr(ResNetConfig, family)(depth, shortcut, num_classes=7)
    assert count(config) == formula(config)


@pytest.mark.parametrize(
    ("depth", "millions"),
    [
        (20, "0.27"),
        (32, "0.46"),
        (44, "0.66"),
        (56, "0.85"),
        (110, "1.7"),
        pytest.param(1202, "19.4", marks=pytest.mark.slow),
    ],
)
def test_the_number_of_parameters_is_the_papers(depth: int, millions: str) -> None:
    digits = len(millions.partition(".")[2])
    config = ResNetConfig.paper(depth)
    number = count(config)
    assert number == formula(config)
    assert f"{number / 1e6:.{digits}f}" == millions


def test_of_1202_layers_the_formula_gives_the_papers_number() -> None:
    assert f"{formula(ResNetConfig.paper(1202)) / 1e6:.1f}" == "19.4"


@pytest.mark.parametrize("depth", [20, 32, 44, 56, pytest.param(110, marks=pytest.mark.slow)])
def test_plain_and_zero_padded_networks_are_equally_large(depth: int) -> None:
    assert count(ResNetConfig.paper(depth, Shortcut.PLAIN)) == count(ResNetConfig.paper(depth))


@pytest.mark.parametrize("depth", [-4, 2, 7, 21, 109])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"6n\+2 .*got {depth}"):
        abstract(ResNetConfig(depth=depth))


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        pytest.param(101, 44_549_160, marks=pytest.mark.slow),
        pytest.param(152, 60_192_808, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stride", Stride)
def test_the_large_networks_have_torchvisions_number(
    depth: int, parameters: int, stride: Stride
) -> None:
    """Those that torchvision's documentation gives for its resnet18 to resnet152."""
    assert count(ResNetConfig.imagenet(depth, stride=stride)) == parameters


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (50, 23_520_842)])
def test_kuangliu_has_torchvisions_less_a_smaller_stem_and_classifier(
    depth: int, parameters: int
) -> None:
    assert count(ResNetConfig.kuangliu(depth)) == parameters


@pytest.mark.parametrize("depth", [20, 19, 35, 200])
def test_a_depth_that_table_1_has_not_is_an_error(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"must be 18, 34, 50, 101 or 152, got {depth}"):
        ResNetConfig.imagenet(depth).validate()
