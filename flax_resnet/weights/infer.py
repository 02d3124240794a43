"""Which network a state dict by name holds, and what has to be assumed where it does not tell."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flax_resnet.config import (
    TABLE_1,
    WIDTHS,
    Architecture,
    Block,
    ChannelPad,
    DType,
    Preprocess,
    Projection,
    ResNetConfig,
    Shortcut,
    Stages,
    Stem,
    Stride,
)
from flax_resnet.errors import WeightsError
from flax_resnet.weights.layouts import Layout, StateDict, to_key

USUAL_PREPROCESS = {  # what CIFAR's networks of each layout are usually fed
    Layout.TWIN: Preprocess.MEAN_IMAGE,
    Layout.TORCHVISION: Preprocess.STANDARDIZE,
    Layout.AKAMASTER: Preprocess.IMAGENET,
    Layout.KUANGLIU: Preprocess.STANDARDIZE,
    Layout.AKAMASTER_FC: Preprocess.IMAGENET,
    Layout.HUGGINGFACE: Preprocess.IMAGENET,
    Layout.TANJEFFREYZ: Preprocess.OWN_MEAN,
}


def usual_preprocess(architecture: Architecture, layout: Layout) -> Preprocess:
    """What such networks are usually fed: their files do not tell."""
    if architecture.widths == WIDTHS[Stages.CIFAR]:
        return USUAL_PREPROCESS[layout]
    is_large = architecture.stem in (Stem.CONV7_BN_RELU_POOL, Stem.CONV7_POOL)
    return Preprocess.IMAGENET if is_large else Preprocess.STANDARDIZE


class Inferred(NamedTuple):
    """What a state dict tells of its network."""

    architecture: Architecture
    dtype: DType  # float64 if any array is
    assumed: dict[str, str]  # by field, what it does not tell, in a sentence or two


def infer(
    state: StateDict,
    layout: Layout,
    *,
    shortcut: Shortcut | None = None,
    channel_pad: ChannelPad | None = None,
    stride: Stride | None = None,
    projection: Projection | None = None,
    batch_norm_epsilon: float | None = None,
    in_file: Callable[[str], str] = str,
) -> Inferred:
    """The network of a state dict by name.

    Args:
        state: may lack arrays or have too many: what follows is to compare it with the network's.
        layout: the one it was read from, which settles what is usual.
        shortcut, channel_pad, stride, projection, batch_norm_epsilon: if known; else told by the
            names, or assumed.
        in_file: what a key of the layout would be called in the file, for messages.

    Raises:
        WeightsError: it has no stem, no classifier, or too few stages.
    """
    block, widths, blocks = tell_stages(state, layout, in_file)
    assumed: dict[str, str] = {}
    if shortcut is None:
        shortcut = tell_shortcut(state, layout, sum(blocks))
    if shortcut is None:
        shortcut = Shortcut.A
        others = "Plain networks"
        if layout is Layout.TANJEFFREYZ:
            others += " and those of shortcut B"
        assumed["shortcut"] = (
            f"shortcut A. {others} have the same keys in the {layout.value} layout; set shortcut "
            "if this is one"
        )
    if channel_pad is None:
        pads_centrally = layout in (Layout.AKAMASTER, Layout.AKAMASTER_FC)
        channel_pad = ChannelPad.CENTRE if pads_centrally else ChannelPad.END
        if shortcut is Shortcut.A:
            assumed["channel_pad"] = (
                f"channel_pad {channel_pad.value}, as is usual in the {layout.value} layout. The "
                "keys do not show where shortcut A pads; set channel_pad if it is elsewhere"
            )
    if block is not Block.BOTTLENECK:
        stride = None
    elif stride is None:
        stride = Stride.CONV3X3
        assumed["stride"] = (
            "stride conv3x3, as is usual. The keys do not show which convolution of a bottleneck "
            "has it; set stride if it is conv1x1, as in the paper"
        )
    if batch_norm_epsilon is None:
        batch_norm_epsilon = ResNetConfig.batch_norm_epsilon
        assumed["batch_norm_epsilon"] = f"batch_norm_epsilon {batch_norm_epsilon}, as in PyTorch"
    architecture = Architecture(
        image_channels=state["conv1.weight"].shape[1],
        stem=tell_stem(state),
        block=block,
        widths=widths,
        blocks=blocks,
        stride=stride,
        shortcut=shortcut,
        channel_pad=channel_pad,
        projection=projection or tell_projection(state),
        conv_bias="conv1.bias" in state,
        batch_norm_epsilon=batch_norm_epsilon,
        num_classes=len(state["fc.weight"]),
    )
    is_double = any(array.dtype == np.float64 for array in state.values())
    return Inferred(architecture, DType.FLOAT64 if is_double else DType.FLOAT32, assumed)


def tell_stages(
    state: StateDict, layout: Layout, in_file: Callable[[str], str] = str
) -> tuple[Block, tuple[int, ...], tuple[int, ...]]:
    """The kind of block, and the widths and numbers of blocks of the stages.

    If no network has just these blocks, it is the nearest: in a network for CIFAR, of 3, 3 and 2
    the 2 is the mistake.

    Raises:
        WeightsError: most stages have none, or the stem or the classifier is missing.
    """
    found = [
        len({match[1] for name in state if (match := re.match(rf"stages\.{s}\.(\d+)\.", name))})
        for s in range(4)
    ]
    is_wide = len(state.get("conv1.weight", ())) == WIDTHS[Stages.IMAGENET][0]
    stages = Stages.IMAGENET if is_wide and found[3] else Stages.CIFAR
    if stages is Stages.CIFAR:
        block, found = Block.BASIC, found[:3]
        blocks = (sorted(found)[1],) * 3
    else:
        is_basic = not any(name.endswith(".conv3.weight") for name in state)
        block = Block.BASIC if is_basic else Block.BOTTLENECK
        rows = [blocks for kind, blocks in TABLE_1.values() if kind is block]
        blocks = min(rows, key=lambda row: sum(abs(a - b) for a, b in zip(row, found, strict=True)))
    for name, dims in (("conv1.weight", 4), ("fc.weight", 2)):
        key = in_file(to_key(name, layout, blocks))
        if name not in state or 0 in blocks:
            missing = "of a second stage" if 0 in blocks else key
            *most, last = map(str, found)
            raise WeightsError(
                f"missing key {missing}, or the number of blocks is wrong: the keys make stages "
                f"of {', '.join(most)} and {last} blocks"
            )
        if state[name].ndim != dims:
            raise WeightsError(f"{key} must have {dims} dimensions, got {state[name].shape}")
    return block, WIDTHS[stages], blocks


def tell_stem(state: StateDict) -> Stem:
    """The stem, by the size of its kernel and whether BatchNorm follows."""
    if state["conv1.weight"].shape[2:] == (7, 7):
        return Stem.CONV7_BN_RELU_POOL if has_norm(state) else Stem.CONV7_POOL
    return Stem.CONV_BN_RELU if has_norm(state) else Stem.CONV


def tell_shortcut(state: StateDict, layout: Layout, blocks: int) -> Shortcut | None:
    """The shortcut, by how many of the blocks have a projection; None if that does not tell."""
    projections = sum(name.endswith("shortcut.conv.weight") for name in state)
    if projections == blocks:
        return Shortcut.C
    # tanjeffreyz has projections where the shape changes, whether they are used or not.
    return Shortcut.B if projections and layout is not Layout.TANJEFFREYZ else None


def tell_projection(state: StateDict) -> Projection:
    """What projections are made of; where no name tells, as in the family with such a stem."""
    if any(".shortcut.bn." in name for name in state):
        return Projection.CONV_BN
    has_bias = any(name.endswith(".shortcut.conv.bias") for name in state)
    return Projection.CONV_BIAS if has_bias or not has_norm(state) else Projection.CONV_BN


def has_norm(state: StateDict) -> bool:
    """Whether BatchNorm follows the first convolution."""
    return any(name.startswith("bn1.") for name in state)
