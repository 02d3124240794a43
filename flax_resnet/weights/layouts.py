"""Whose keys a state dict has, and what network they tell.

A *name* is the twin's, as `torch_ref.ResNet` calls it: `stages.1.0.conv1.weight`. Every other
layout is a renaming of it, so that what reads one reads all.
"""

import enum
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_resnet.config import (
    ChannelPad,
    DType,
    Preprocess,
    Projection,
    ProjectionInit,
    ResNetConfig,
    Shortcut,
    Stem,
)
from flax_resnet.errors import WeightsError

StateDict = Mapping[str, np.ndarray]


class Layout(enum.Enum):
    """Whose keys a state dict has."""

    TWIN = "twin"  # torch_ref
    TORCHVISION = "torchvision"  # also chenyaofo/pytorch-cifar-models
    AKAMASTER = "akamaster"  # akamaster/pytorch_resnet_cifar10, saved from within DataParallel
    TANJEFFREYZ = "tanjeffreyz"  # the system that this project reimplements


USUAL_PREPROCESS = {  # what networks of each layout are usually fed; no key tells
    Layout.TWIN: Preprocess.MEAN_IMAGE,
    Layout.TORCHVISION: Preprocess.STANDARDIZE,
    Layout.AKAMASTER: Preprocess.IMAGENET,
    Layout.TANJEFFREYZ: Preprocess.OWN_MEAN,
}

TANJEFFREYZ_MODULES = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
PROJECTION_NAMES = {Layout.TORCHVISION: "downsample", Layout.AKAMASTER: "shortcut"}


def recognize(state_dict: StateDict) -> Layout:
    """The layout that has such keys. Raises WeightsError if none has."""
    keys = {key.removeprefix("module.") for key in state_dict}

    def some(start: str) -> bool:
        return any(re.match(start, key) for key in keys)

    if some(r"stages\.\d\."):
        return Layout.TWIN
    if some(r"layer\d\."):
        return Layout.AKAMASTER if some(r"linear\.") else Layout.TORCHVISION
    if some(r"model\.\d+\.model\."):
        return Layout.TANJEFFREYZ
    known = ", ".join(layout.value for layout in Layout)
    raise WeightsError(
        f"the keys must be of a known layout ({known}), got {listed(sorted(keys)) or 'none'}"
    )


def by_name(state_dict: StateDict, layout: Layout) -> dict[str, str]:
    """The key of each name. Raises WeightsError if two keys have the same."""
    keys: dict[str, str] = {}
    for key in state_dict:
        name = to_name(key, layout, state_dict)
        if name in keys:
            raise WeightsError(f"{keys[name]} and {key} are two keys for one tensor")
        keys[name] = key
    return keys


def to_key(name: str, layout: Layout, blocks_per_stage: int) -> str:
    """A name as `layout` has it."""
    if layout is Layout.TWIN:
        return name
    if layout is Layout.TANJEFFREYZ:
        if name.startswith("conv1."):
            return name.replace("conv1", "model.0")
        if name.startswith("fc."):
            return name.replace("fc", f"model.{3 * blocks_per_stage + 1}.model.2")
        stage, block, module, rest = name.removeprefix("stages.").split(".", 3)
        index = 1 + int(stage) * blocks_per_stage + int(block)
        if module == "shortcut":
            return f"model.{index}.{rest.replace('conv', 'conv_downsample')}"
        return f"model.{index}.model.{TANJEFFREYZ_MODULES[module]}.{rest}"
    name = re.sub(r"^stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", name)
    for i, part in enumerate(("conv", "bn")):
        name = name.replace(f"shortcut.{part}.", f"{PROJECTION_NAMES[layout]}.{i}.")
    if layout is Layout.AKAMASTER:  # saved from within DataParallel
        name = "module." + re.sub(r"^fc\.", "linear.", name)
    return name


def to_name(key: str, layout: Layout, keys: Mapping[str, Any]) -> str:
    """Inverse of `to_key`; `keys` are all of them. An unknown key is its own name."""
    key = key.removeprefix("module.")
    if layout is Layout.TANJEFFREYZ:
        return _tanjeffreyz_name(key, keys)
    if layout is not Layout.TWIN:
        key = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", key)
        key = re.sub(r"^linear\.", "fc.", key) if layout is Layout.AKAMASTER else key
        for i, part in enumerate(("conv", "bn")):
            key = key.replace(f".{PROJECTION_NAMES[layout]}.{i}.", f".shortcut.{part}.")
    return key


def _tanjeffreyz_name(key: str, keys: Mapping[str, Any]) -> str:
    indices = (re.match(r"(?:module\.)?model\.(\d{1,6})\.", k) for k in keys)
    last = max(int(match[1]) for match in indices if match)
    classifier = last if any(f"model.{last}.model.2." in k for k in keys) else last + 1
    n = max((classifier - 1) // 3, 1)
    match = re.fullmatch(r"model\.(\d{1,6})\.(?:(model\.(\d)|conv_downsample)\.)?(\w+)", key)
    if not match:
        return key
    index, module, rest = int(match[1]), match[2], match[4]
    if index == 0:
        return f"conv1.{rest}"
    if index == classifier:
        return f"fc.{rest}" if match[3] == "2" else key
    block = f"stages.{(index - 1) // n}.{(index - 1) % n}"
    if module == "conv_downsample":
        return f"{block}.shortcut.conv.{rest}"
    names = {number: name for name, number in TANJEFFREYZ_MODULES.items()}
    return f"{block}.{names[match[3]]}.{rest}" if match[3] in names else key


def unused_projections(config: ResNetConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """By name, the projections that tanjeffreyz has in each downsampling block but does not use.

    Filled with 1/C_in, bias 0: no result depends on them. What a file had there is not kept.
    """
    if config.shortcut in (Shortcut.B, Shortcut.C):
        return {}
    state: dict[str, np.ndarray] = {}
    for stage, (c_in, c_out) in ((1, (16, 32)), (2, (32, 64))):
        prefix = f"stages.{stage}.0.shortcut.conv."
        state[prefix + "weight"] = np.full((c_out, c_in, 1, 1), 1 / c_in, dtype)
        state[prefix + "bias"] = np.zeros(c_out, dtype)
    return state


def check_layout(config: ResNetConfig, layout: Layout) -> None:
    """Raises WeightsError unless networks of that layout can be such."""
    tanjeffreyz = ResNetConfig.tanjeffreyz()
    is_tanjeffreyz = (config.stem, config.conv_bias) == (tanjeffreyz.stem, tanjeffreyz.conv_bias)
    has_projection = config.shortcut in (Shortcut.B, Shortcut.C)
    if has_projection and config.projection is not tanjeffreyz.projection:
        is_tanjeffreyz = False
    if layout is Layout.TANJEFFREYZ and not is_tanjeffreyz:
        raise WeightsError(
            "tanjeffreyz's layout has a bare convolution as stem, biases, and projections "
            f"without BatchNorm, got {config}"
        )


def infer_config(
    state: StateDict, layout: Layout, shortcut: Shortcut | None, channel_pad: ChannelPad | None
) -> tuple[ResNetConfig, list[str]]:
    """The config of a state dict by name, and what had to be assumed. Raises WeightsError."""
    blocks = [
        len({m[1] for name in state if (m := re.match(rf"stages\.{stage}\.(\d+)\.", name))})
        for stage in range(3)
    ]
    n = sorted(blocks)[1]  # of 3, 3 and 2 blocks the 2 is the mistake, which a later check names
    for name, dims in (("conv1.weight", 4), ("fc.weight", 2)):
        key = to_key(name, layout, n)
        if name not in state or n == 0:
            raise WeightsError(
                f"missing key {key if n else 'of a second stage'}, or the number of blocks is "
                f"wrong: the keys make stages of {blocks[0]}, {blocks[1]} and {blocks[2]} blocks"
            )
        if state[name].ndim != dims:
            raise WeightsError(f"{key} must have {dims} dimensions, got {state[name].shape}")
    choices: list[str] = []
    projections = sum(name.endswith("shortcut.conv.weight") for name in state)
    is_tanjeffreyz = layout is Layout.TANJEFFREYZ
    if shortcut is None and projections == 3 * n:
        shortcut = Shortcut.C
    elif shortcut is None and projections and not is_tanjeffreyz:
        shortcut = Shortcut.B
    elif shortcut is None:
        shortcut = Shortcut.A
        others = "plain and B" if is_tanjeffreyz else "plain"
        choices.append(f"shortcut A (no key tells it from {others} in the {layout.value} layout)")
    if channel_pad is None:
        centre = layout is Layout.AKAMASTER
        channel_pad = ChannelPad.CENTRE if centre else ChannelPad.END
        if shortcut is Shortcut.A:
            choices.append(f"channel_pad {channel_pad.value} (no key tells; the layout's usual)")

    bare = not any(name.startswith("bn1.") for name in state)
    # Without a projection to tell, one of the same family as the stem.
    has_bias = "stages.1.0.shortcut.conv.bias" in state or (bare and not projections)
    is_double = any(x.dtype == np.float64 for x in state.values())
    config = ResNetConfig(
        depth=6 * n + 2,
        shortcut=shortcut,
        channel_pad=channel_pad,
        projection=Projection.CONV_BIAS if has_bias else Projection.CONV_BN,
        projection_init=ProjectionInit.AVERAGE if has_bias else ProjectionInit.KAIMING,
        stem=Stem.CONV if bare else Stem.CONV_BN_RELU,
        conv_bias="conv1.bias" in state,
        num_classes=len(state["fc.weight"]),
        dtype=DType.FLOAT64 if is_double else DType.FLOAT32,
    )
    return config, choices


def listed(items: list[str], limit: int = 3) -> str:
    """Such as "a, b, c and 5 more"."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def key_of(name: str, layout: Layout, config: ResNetConfig, keys: Mapping[str, str]) -> str:
    """`to_key`, with the prefix of DataParallel only if the other keys have it."""
    key = to_key(name, layout, config.blocks_per_stage).removeprefix("module.")
    prefixed = all(other.startswith("module.") for other in keys.values())
    return f"module.{key}" if prefixed else key


def last_block(keys: Mapping[str, str]) -> str:
    """The key of the last block's last convolution."""
    return max(
        ((name, key) for name, key in keys.items() if name.endswith(".conv2.weight")),
        key=lambda pair: [int(part) for part in pair[0].split(".") if part.isdecimal()],
    )[1]
