"""Networks that are near ours, and are none of them: each is refused by what it is.

Some are known by their keys alone, the others by the shapes of their tensors. A network that is
not here is refused all the same, by the first key that does not fit.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from flax_resnet.config import TABLE_1, WIDTHS, Block, Stages
from flax_resnet.errors import WeightsError
from flax_resnet.weights.layouts import StateDict, listed

# What the keys of a network have, one regular expression for each; and what it is then.
SIGNS = (
    (
        r"_packed_params|(^|\.)(scale|zero_point|qweight|qzeros|SCB)$|\.weight\.(absmax|quant_map)",
        "a quantised network: ask for the weights of before",
    ),
    (
        r"(^|\.)(se|se_module|se_layer|senet)\.",
        "a network with squeeze-and-excitation (SE-ResNet)",
    ),
    (
        r"\.(blocks\.\d+\.norm\d|residual_unit)\.",
        "a pre-activation ResNet (version 2, or BiT)",
    ),
    (r"(^|\.)block[123]\.layer\.\d+\.(bn1|conv1)\.", "a Wide ResNet, whose blocks pre-activate"),
)
# timm's letter for a stem of three convolutions, by the channels of the first.
DEEP_STEMS = {32: ("c", "d"), 64: ("s", "s"), 24: ("t", "t")}  # without average pools, with them


def refuse_by_keys(keys: Mapping[str, str]) -> None:
    """Raises WeightsError for the keys of a network that is another one, which it names.

    Args:
        keys: of each key without what is around it, the file's own, for the message.
    """
    for pattern, what in SIGNS:
        if found := [keys[key] for key in keys if re.search(pattern, key)]:
            raise WeightsError(f"{listed(found, 1)}: this is {what}")
    bare = [
        x for key, x in keys.items() if re.search(r"(^|(?<!resnet)\.)embedder\.embedder\.", key)
    ]
    if bare and not any(re.search(r"(^|\.)classifier\.", key) for key in keys):
        raise WeightsError(
            f"{listed(bare, 1)}: this is Hugging Face's ResNetModel, which has no classifier; give "
            "the file of a ResNetForImageClassification"
        )


def refuse_deep_stem(state_dict: StateDict, keys: Mapping[str, str]) -> None:
    """Raises WeightsError for timm's variants c, d, s and t, whose stem has three convolutions.

    Args:
        keys: as of `refuse_by_keys`.
    """
    stem = [key for key in keys if re.search(r"(^|\.)conv1\.[036]\.weight$", key)]
    if len(stem) != 3:
        return
    has_pool = any(
        re.search(r"\.downsample\.1\.weight$", key) and np.ndim(array) == 4
        for key, array in state_dict.items()
    )
    letters = DEEP_STEMS.get(len(state_dict[stem[0]]), ("c", "d"))
    pools = " and whose shortcuts have an average pool" if has_pool else ""
    raise WeightsError(
        f"{listed([keys[key] for key in stem], 1)}: this is a ResNet-{letters[has_pool]}, a "
        f"variant of timm's whose stem has three convolutions{pools}"
    )


def refuse_by_shapes(state: StateDict, keys: Mapping[str, str]) -> None:
    """Raises WeightsError for the tensors, by name, of a network that is another one.

    Args:
        keys: the key of each name, for the message.
    """
    shapes = {name: np.shape(array) for name, array in state.items()}
    network = Shapes(shapes, keys, tell_blocks(shapes))
    for refuse in (grouped, preactivated, bottlenecks_in_few_stages, other_widths, other_blocks):
        if message := refuse(network):
            raise WeightsError(message)


class Shapes(NamedTuple):
    """A network by the shapes of its tensors."""

    of: dict[str, tuple[int, ...]]  # by name
    keys: Mapping[str, str]  # by name
    blocks: tuple[int, ...]  # of each stage, those that are whole

    @property
    def has_bottlenecks(self) -> bool:
        """Whether every block has a third convolution."""
        return bool(self.blocks) and all(
            f"stages.{s}.{b}.conv3.weight" in self.of
            for s, n in enumerate(self.blocks)
            for b in range(n)
        )

    @property
    def has_four_stages(self) -> bool:
        return len(self.blocks) == len(WIDTHS[Stages.IMAGENET])


def tell_blocks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """How many whole blocks each stage has."""
    count: dict[int, int] = {}
    for name in shapes:
        match = re.fullmatch(r"stages\.(\d+)\.\d+\.conv1\.weight", name)
        others = (name.replace(".conv1.", other) for other in (".bn1.", ".conv2."))
        if match and all(other in shapes for other in others):
            count[int(match[1])] = count.get(int(match[1]), 0) + 1
    return tuple(count[s] for s in sorted(count))


def grouped(network: Shapes) -> str | None:
    for name, shape in network.of.items():
        if name.endswith(".conv2.weight") and len(shape) == 4 and 0 < shape[1] < shape[0]:
            return (
                f"{network.keys[name]} has {shape[0] // shape[1]} groups of channels: this is a "
                "ResNeXt, or another network with grouped convolutions"
            )
    return None


def preactivated(network: Shapes) -> str | None:
    """BatchNorm before the convolution has as many channels as the block begins with."""
    for s in range(1, len(network.blocks)):
        norm, kernel = f"stages.{s}.0.bn1.weight", f"stages.{s}.0.conv1.weight"
        shapes = network.of.get(norm, ()), network.of.get(kernel, ())
        if (len(shapes[0]), len(shapes[1])) != (1, 4):
            continue
        (channels,), (c_out, c_in, *_) = shapes
        if channels == c_in != c_out:
            return (
                f"{network.keys[norm]} has the {channels} channels that the block begins with: "
                "this is a pre-activation ResNet (version 2)"
            )
    return None


def bottlenecks_in_few_stages(network: Shapes) -> str | None:
    if not network.has_bottlenecks or network.has_four_stages:
        return None
    return (
        f"{network.keys['stages.0.0.conv3.weight']}: this is a network of bottlenecks in "
        f"{len(network.blocks)} stages; bottlenecks are read in ResNet-50, 101 and 152 alone"
    )


def other_widths(network: Shapes) -> str | None:
    """Of one stage alone it may be a damaged tensor."""
    usual = WIDTHS[Stages.IMAGENET if network.has_four_stages else Stages.CIFAR]
    names = [f"stages.{s}.0.conv1.weight" for s in range(len(usual))]
    if len(network.blocks) != len(usual) or not all(len(network.of.get(x, ())) == 4 for x in names):
        return None
    widths = [network.of[name][0] for name in names]
    if sum(width != normal for width, normal in zip(widths, usual, strict=True)) < 2:
        return None
    factors = [width / normal for width, normal in zip(widths, usual, strict=True)]
    how = "widened" if min(factors) >= 1 else "thinned"
    if network.has_bottlenecks and min(factors) > 1:
        how = f"wide ({min(factors):g} times)"
    return (
        f"{network.keys[names[0]]} and others: this is a {how} network, of {spelled(widths)} "
        f"channels in its stages, not {spelled(usual)}"
    )


def other_blocks(network: Shapes) -> str | None:
    """One block too few or too many may be a damaged file."""
    if not network.has_four_stages:
        return None
    kind = Block.BOTTLENECK if network.has_bottlenecks else Block.BASIC
    rows = [row for block, row in TABLE_1.values() if block is kind]
    distances = [sum(abs(a - b) for a, b in zip(row, network.blocks, strict=True)) for row in rows]
    if min(distances) <= 1:
        return None
    return (
        f"this is a network of {spelled(network.blocks)} {kind.value} blocks in its stages; those "
        f"of {', '.join(map(spelled, rows))} are read"
    )


def spelled(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))
