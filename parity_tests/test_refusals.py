"""Claim: a network near ours is refused by what it is, and one of other names by how to rename it.

The networks are made of shapes alone, and of empty arrays. A suggestion is carried out: what it
promises must be read.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest

from flax_resnet.errors import WeightsError
from flax_resnet.weights import files
from flax_resnet.weights.layouts import Layout, to_key
from flax_resnet.weights.nearest import suggest
from flax_resnet.weights.state_dict import from_state_dict

State = dict[str, np.ndarray]
SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)
NORM = ("weight", "bias", "running_mean", "running_var")


def network(
    blocks: tuple[int, ...] = (1, 1, 1),
    widths: tuple[int, ...] = SMALL,
    *,
    layers: int = 2,
    layout: Layout = Layout.TORCHVISION,
    wide: int = 1,
    groups: int = 1,
    preactivates: bool = False,
    projects: bool = True,
) -> State:
    """A state dict with the projections of option B.

    Args:
        wide: how much wider than usual the inner convolutions of bottlenecks are.
    """
    size = 7 if len(blocks) == 4 else 3
    state: State = {"conv1.weight": ones((widths[0], 3, size, size))}
    state |= norm("bn1", widths[0])
    c_in = widths[0]
    for s, n in enumerate(blocks):
        for b in range(n):
            name, inner = f"stages.{s}.{b}", widths[s] * wide
            c_out = widths[s] * (4 if layers == 3 else 1)
            sizes = ((c_in, inner, 1), (inner, inner, 3), (inner, c_out, 1))
            if layers == 2:
                sizes = ((c_in, inner, 3), (inner, c_out, 3))
            for i, (c0, c1, size) in enumerate(sizes, 1):
                parts = groups if i == 2 else 1
                kernel = ones((c1, c0 // parts, size, size))
                state[f"{name}.conv{i}.weight"] = kernel
                state |= norm(f"{name}.bn{i}", c0 if preactivates else c1)
            if projects and c_in != c_out:
                state[f"{name}.shortcut.conv.weight"] = ones((c_out, c_in, 1, 1))
                state |= norm(f"{name}.shortcut.bn", c_out)
            c_in = c_out
    state["fc.weight"] = ones((10, c_in))
    state["fc.bias"] = ones(10)
    return {to_key(name, layout, blocks): array for name, array in state.items()}


def ones(shape: int | tuple[int, ...]) -> np.ndarray:
    """Of no memory."""
    return np.broadcast_to(np.float32(1), shape)


def norm(name: str, channels: int) -> State:
    return {f"{name}.{leaf}": ones(channels) for leaf in NORM}


def deep_stem(channels: int, *, pools: bool) -> State:
    """timm's c, d, s and t: conv1 is a Sequential, and downsample.0 may be an average pool."""
    state = network((2, 2, 2, 2), LARGE)
    del state["conv1.weight"]
    state["conv1.0.weight"] = ones((channels, 3, 3, 3))
    state["conv1.3.weight"] = ones((channels, channels, 3, 3))
    state["conv1.6.weight"] = ones((64, channels, 3, 3))
    if pools:
        for s in (2, 3, 4):
            for leaf in NORM:
                old, new = (f"layer{s}.0.downsample.{i}.{leaf}" for i in (1, 2))
                state[new] = state.pop(old)
            key = f"layer{s}.0.downsample.1.weight"
            state[key] = state.pop(f"layer{s}.0.downsample.0.weight")
    return state


def with_key(key: str) -> State:
    return network() | {key: ones(1)}


def headless(state: State) -> State:
    return {key.removeprefix("resnet."): x for key, x in state.items() if "classifier" not in key}


OTHERS: dict[str, tuple[Callable[[], State], str]] = {
    "quantised": (lambda: with_key("layer1.0.conv1.scale"), "layer1.0.conv1.scale: this is a quan"),
    "packed": (lambda: with_key("fc._packed_params.dtype"), "fc._packed_params.dtype: this is a q"),
    "SE": (lambda: with_key("layer1.0.se.fc1.weight"), "squeeze-and-excitation"),
    "c": (lambda: deep_stem(32, pools=False), "this is a ResNet-c, a variant of timm's"),
    "d": (lambda: deep_stem(32, pools=True), "this is a ResNet-d, a variant of timm's"),
    "s": (lambda: deep_stem(64, pools=False), "this is a ResNet-s, a variant of timm's"),
    "t": (lambda: deep_stem(24, pools=True), "this is a ResNet-t, a variant of timm's"),
    "ResNeXt": (
        lambda: network((3, 4, 6, 3), LARGE, layers=3, wide=2, groups=32),
        "layer1.0.conv2.weight has 32 groups of channels: this is a ResNeXt",
    ),
    "wide": (
        lambda: network((3, 4, 6, 3), LARGE, layers=3, wide=2),
        "this is a wide (2 times) network, of 128-256-512-1024 channels",
    ),
    "thinned": (
        lambda: network(widths=(8, 16, 32)),
        "layer1.0.conv1.weight and others: this is a thinned network, of 8-16-32 channels in its "
        "stages, not 16-32-64",
    ),
    "thinned of four": (
        lambda: network((2, 2, 2, 2), (16, 32, 64, 128)),
        "a thinned network, of 16-32-64-128 channels in its stages, not 64-128-256-512",
    ),
    "widened": (lambda: network(widths=(32, 64, 128)), "a widened network, of 32-64-128"),
    "pre-activation": (
        lambda: network(preactivates=True),
        "layer2.0.bn1.weight has the 16 channels that the block begins with: this is a pre-act",
    ),
    "bottlenecks in three stages": (
        lambda: network(layers=3),
        "layer1.0.conv3.weight: this is a network of bottlenecks in 3 stages",
    ),
    "ResNet-10": (
        lambda: network((1, 1, 1, 1), LARGE),
        "this is a network of 1-1-1-1 basic blocks in its stages; those of 2-2-2-2, 3-4-6-3 are",
    ),
    "headless": (
        lambda: headless(network((2, 2, 2, 2), LARGE, layout=Layout.HUGGINGFACE)),
        "embedder.embedder.convolution.weight and 4 more: this is Hugging Face's ResNetModel, "
        "which has no classifier",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_is_another_one(name: str) -> None:
    make, message = OTHERS[name]
    for prefix in ("", "module."):
        state = {prefix + key: array for key, array in make().items()}
        with pytest.raises(WeightsError, match=re.escape(message.split(":")[-1])) as error:
            from_state_dict(state)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
        assert message in str(error.value).replace("module.", "")
        # It begins with a key, if it names any, and the file has that key.
        start = re.split(r"[: ]", str(error.value))[0]
        assert start in state or start == "this"


def test_what_is_quantised_is_said_before_what_is_no_tensor() -> None:
    state = network() | {"fc._packed_params._packed_params": (1, 2)}
    with pytest.raises(WeightsError, match=r"fc\._packed_params\._packed_params: this is a quan"):
        files.unwrap(state)


@pytest.mark.parametrize(("blocks", "missing"), [((2, 2, 2, 1), "layer4.1"), ((1, 1, 1), None)])
def test_a_damaged_network_is_not_taken_for_another(
    blocks: tuple[int, ...], missing: str | None
) -> None:
    """One block of ResNet-18 is lost; and one stage of ResNet-8 has other channels."""
    state = network(blocks, LARGE if missing else SMALL)
    if missing is None:
        state["layer3.0.conv1.weight"] = state["layer3.0.conv1.weight"][:8]
    message = rf"missing keys {missing}" if missing else r"layer3.0.conv1.weight must have shape"
    with pytest.raises(WeightsError, match=message):
        from_state_dict(state)


# --- Names of their own ---------------------------------------------------------------------------


def renamed(state: State, *renames: str) -> State:
    """As --rename does it."""
    for rename in renames:
        old, _, new = rename.rpartition("=")
        state = {re.sub(old, new, key): array for key, array in state.items()}
    return state


def akamaster(*renames: str, projects: bool = False) -> State:
    return renamed(network((3, 3, 3), layout=Layout.AKAMASTER, projects=projects), *renames)


def torchvision(*renames: str) -> State:
    return renamed(network((2, 2, 2, 2), LARGE), *renames)


QUICK = ("a CIFAR network's stem", "with shortcut.conv, which is to stay")
NAMES: dict[str, tuple[State, str]] = {
    "a CIFAR network's stem": (
        akamaster("^conv1=conv"),
        r"with --rename 'conv\.=conv1.' it is akamaster's ResNet-20",
    ),
    "prefixed": (
        {f"module.{key}": x for key, x in akamaster("^conv1=conv").items()},
        r"with --rename 'conv\.=conv1.' it is akamaster's ResNet-20",
    ),
    "with shortcut.conv, which is to stay": (
        renamed(network((1, 1, 1), layout=Layout.TWIN), "^conv1=conv"),
        r"with --rename '^conv\.=conv1.' it is twin's ResNet-8",
    ),
    "head": (torchvision("^fc=head"), r"with --rename 'head\.=fc.' it is torchvision's ResNet-18"),
    "a list of stages": (
        akamaster(r"layer(\d)=layers.\1"),
        r"with --rename 'layers\.(\d+)\.=layer\1.' it is akamaster's ResNet-20",
    ),
    "sorted": (
        dict(sorted(torchvision("^conv1=stem.conv", "^bn1=stem.norm").items())),
        r"it is torchvision's ResNet-18",
    ),
    "three of them": (
        torchvision("layer=res", "downsample=skip", "^fc=out"),
        r"with --rename 'res(\d+)\.=layer\1.' --rename 'skip\.=downsample.' "
        r"--rename 'out\.=fc.' it is torchvision's ResNet-18",
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_the_renames_that_are_suggested_are_right(name: str) -> None:
    state, message = NAMES[name]
    suggestion = suggest(state)
    assert suggestion is not None
    assert str(suggestion).endswith(message)
    with pytest.raises(WeightsError, match=re.escape(str(suggestion)) + "$"):
        from_state_dict(state)
    imported = from_state_dict(state, rename=suggestion.renames)
    assert imported.layout is suggestion.layout
    assert imported.config.depth == suggestion.depth


@pytest.mark.parametrize(
    "state",
    [
        akamaster(),  # nothing to rename
        akamaster() | {"another.weight": ones(3)},
        {key: x for key, x in akamaster("^conv1=conv").items() if not key.startswith("layer2.1.")},
        akamaster("^conv1=conv") | {"linear.weight": ones((10, 64, 1))},
        akamaster("^conv1=conv") | {"linear.weird": ones(3)},
        {k: x for k, x in akamaster("^conv1=conv").items() if k != "layer2.1.bn1.bias"},
        {"a.weight": ones((3, 3, 3, 3))},
        {},
    ],
)
def test_nothing_is_suggested_where_renames_do_not_help(state: State) -> None:
    assert suggest(state) is None
