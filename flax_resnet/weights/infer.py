"""Which network a state dict by name holds, and what has to be assumed where it does not tell."""

import re
from typing import NamedTuple

import numpy as np

from flax_resnet.config import (
    WIDTHS,
    Architecture,
    ChannelPad,
    DType,
    Preprocess,
    Projection,
    Shortcut,
    Stem,
)
from flax_resnet.errors import WeightsError
from flax_resnet.weights.layouts import Layout, StateDict, to_key

USUAL_PREPROCESS = {  # what networks of each layout are usually fed: their files do not tell
    Layout.TWIN: Preprocess.MEAN_IMAGE,
    Layout.TORCHVISION: Preprocess.STANDARDIZE,
    Layout.AKAMASTER: Preprocess.IMAGENET,
    Layout.TANJEFFREYZ: Preprocess.OWN_MEAN,
}


class Inferred(NamedTuple):
    """What a state dict tells of its network."""

    architecture: Architecture
    dtype: DType  # float64 if any array is
    assumed: list[str]  # one sentence or two for each choice that it does not tell


def infer(
    state: StateDict,
    layout: Layout,
    *,
    shortcut: Shortcut | None = None,
    channel_pad: ChannelPad | None = None,
    projection: Projection | None = None,
) -> Inferred:
    """The network of a state dict by name.

    Args:
        state: may lack arrays or have too many: what follows is to compare it with the network's.
        layout: the one it was read from, which settles what is usual.
        shortcut, channel_pad, projection: if known; else told by the names, or assumed.

    Raises:
        WeightsError: it has no stem, no classifier or not three stages.
    """
    blocks = tell_blocks(state, layout)
    assumed: list[str] = []
    if shortcut is None:
        shortcut = tell_shortcut(state, layout, sum(blocks))
    if shortcut is None:
        shortcut = Shortcut.A
        others = "Plain networks"
        if layout is Layout.TANJEFFREYZ:
            others += " and those of shortcut B"
        assumed.append(
            f"shortcut A. {others} have the same keys in the {layout.value} layout; set shortcut "
            "if this is one"
        )
    if channel_pad is None:
        channel_pad = ChannelPad.CENTRE if layout is Layout.AKAMASTER else ChannelPad.END
        if shortcut is Shortcut.A:
            assumed.append(
                f"channel_pad {channel_pad.value}, as is usual in the {layout.value} layout. The "
                "keys do not show where shortcut A pads; set channel_pad if it is elsewhere"
            )
    architecture = Architecture(
        stem=Stem.CONV_BN_RELU if has_norm(state) else Stem.CONV,
        widths=WIDTHS,
        blocks=blocks,
        shortcut=shortcut,
        channel_pad=channel_pad,
        projection=projection or tell_projection(state),
        conv_bias="conv1.bias" in state,
        num_classes=len(state["fc.weight"]),
    )
    is_double = any(array.dtype == np.float64 for array in state.values())
    return Inferred(architecture, DType.FLOAT64 if is_double else DType.FLOAT32, assumed)


def tell_blocks(state: StateDict, layout: Layout) -> tuple[int, ...]:
    """How many blocks each stage has: equally many, so that of 3, 3 and 2 the 2 is the mistake.

    Raises:
        WeightsError: most stages have none, or the stem or the classifier is missing.
    """
    found = [
        len({match[1] for name in state if (match := re.match(rf"stages\.{s}\.(\d+)\.", name))})
        for s in range(len(WIDTHS))
    ]
    blocks = (sorted(found)[len(found) // 2],) * len(WIDTHS)
    for name, dims in (("conv1.weight", 4), ("fc.weight", 2)):
        key = to_key(name, layout, blocks)
        if name not in state or 0 in blocks:
            missing = "of a second stage" if 0 in blocks else key
            *most, last = map(str, found)
            raise WeightsError(
                f"missing key {missing}, or the number of blocks is wrong: the keys make stages "
                f"of {', '.join(most)} and {last} blocks"
            )
        if state[name].ndim != dims:
            raise WeightsError(f"{key} must have {dims} dimensions, got {state[name].shape}")
    return blocks


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
