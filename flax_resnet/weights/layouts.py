"""Whose keys a state dict has: one table for each layout, read from left to right and back.

A *name* is the twin's, as `torch_ref.ResNet` calls a tensor: `stages.1.0.conv1.weight`. A *key* is
what a layout calls the same tensor: `layer2.0.conv1.weight`. Every layout is a renaming of modules,
so that what reads one reads all.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import (
    TABLE_1,
    TANJEFFREYZ_STEMS,
    WIDTHS,
    Architecture,
    Block,
    Projection,
    Shortcut,
    Stages,
    Stem,
)
from flax_resnet.errors import WeightsError
from flax_resnet.weights.templates import fill, parse

StateDict = Mapping[str, np.ndarray]


class Layout(enum.Enum):
    """Whose keys a state dict has."""

    TWIN = "twin"  # torch_ref
    TORCHVISION = "torchvision"  # also timm and chenyaofo/pytorch-cifar-models
    AKAMASTER = "akamaster"  # akamaster/pytorch_resnet_cifar10
    KUANGLIU = "kuangliu"  # kuangliu/pytorch-cifar: akamaster's keys, of networks with four stages
    AKAMASTER_FC = "akamaster_fc"  # those of the many who call akamaster's classifier `fc`
    HUGGINGFACE = "huggingface"  # transformers' ResNetForImageClassification
    TANJEFFREYZ = "tanjeffreyz"  # the system that this project reimplements


def same_but(classifier: str, shortcut: str) -> tuple[tuple[str, str], ...]:
    """The table of those who have torchvision's names but for two: most of them."""
    return (
        ("conv1", "conv1"),
        ("bn1", "bn1"),
        ("stages.{s}.{b}.conv{n}", "layer{s+1}.{b}.conv{n}"),
        ("stages.{s}.{b}.bn{n}", "layer{s+1}.{b}.bn{n}"),
        ("stages.{s}.{b}.shortcut.conv", f"layer{{s+1}}.{{b}}.{shortcut}.0"),
        ("stages.{s}.{b}.shortcut.bn", f"layer{{s+1}}.{{b}}.{shortcut}.1"),
        ("fc", classifier),
    )


# Pairs of templates for a module, (ours, theirs); `templates.py` says how to read one. The numbers:
# s is the stage, b the block in its stage, both from 0; n is the layer in its block, from 1. Where
# all blocks stand in one list, `place` is where a block stands there, and `last` the classifier.
TABLES: dict[Layout, tuple[tuple[str, str], ...]] = {
    Layout.TWIN: (
        ("conv1", "conv1"),
        ("bn1", "bn1"),
        ("stages.{s}.{b}.conv{n}", "stages.{s}.{b}.conv{n}"),
        ("stages.{s}.{b}.bn{n}", "stages.{s}.{b}.bn{n}"),
        ("stages.{s}.{b}.shortcut.conv", "stages.{s}.{b}.shortcut.conv"),
        ("stages.{s}.{b}.shortcut.bn", "stages.{s}.{b}.shortcut.bn"),
        ("fc", "fc"),
    ),
    Layout.TORCHVISION: same_but("fc", "downsample"),
    Layout.AKAMASTER: same_but("linear", "shortcut"),
    Layout.KUANGLIU: same_but("linear", "shortcut"),
    Layout.AKAMASTER_FC: same_but("fc", "shortcut"),
    Layout.HUGGINGFACE: (
        ("conv1", "resnet.embedder.embedder.convolution"),
        ("bn1", "resnet.embedder.embedder.normalization"),
        ("stages.{s}.{b}.conv{n}", "resnet.encoder.stages.{s}.layers.{b}.layer.{n-1}.convolution"),
        ("stages.{s}.{b}.bn{n}", "resnet.encoder.stages.{s}.layers.{b}.layer.{n-1}.normalization"),
        (
            "stages.{s}.{b}.shortcut.conv",
            "resnet.encoder.stages.{s}.layers.{b}.shortcut.convolution",
        ),
        (
            "stages.{s}.{b}.shortcut.bn",
            "resnet.encoder.stages.{s}.layers.{b}.shortcut.normalization",
        ),
        ("fc", "classifier.1"),
    ),
    # One list: the stem, with four stages a max-pool, the blocks of all stages, the classifier.
    Layout.TANJEFFREYZ: (
        ("conv1", "model.0"),
        ("stages.{s}.{b}.conv1", "model.{place}.model.0"),
        ("stages.{s}.{b}.bn1", "model.{place}.model.1"),
        ("stages.{s}.{b}.conv2", "model.{place}.model.3"),
        ("stages.{s}.{b}.bn2", "model.{place}.model.4"),
        ("stages.{s}.{b}.shortcut.conv", "model.{place}.conv_downsample"),
        ("fc", "model.{last}.model.2"),
    ),
}
WRAPPER = "module."  # DataParallel puts it before every key


# --- The two directions ---------------------------------------------------------------------------


def to_key(name: str, layout: Layout, blocks: tuple[int, ...]) -> str:
    """The key of a name, in a network of so many blocks in each stage.

    Raises:
        WeightsError: the layout has no such module.
    """
    module, _, leaf = name.rpartition(".")
    first = place_of_first(blocks)
    for ours, theirs in TABLES[layout]:
        numbers = parse(ours, module)
        if numbers is not None:
            if "s" in numbers:
                numbers["place"] = first + sum(blocks[: numbers["s"]]) + numbers["b"]
            return f"{fill(theirs, numbers | {'last': first + sum(blocks)})}.{leaf}"
    raise WeightsError(f"the {layout.value} layout has no key for {name}")


def to_name(key: str, layout: Layout, blocks: tuple[int, ...]) -> str | None:
    """Inverse of `to_key`, with DataParallel's prefix or without; None if no name has that key."""
    found = find(key, layout)
    if found is None:
        return None
    numbers, first = dict(found.numbers), place_of_first(blocks)
    if numbers.get("last", first + sum(blocks)) != first + sum(blocks):
        return None
    if "place" in numbers:
        b = numbers["place"] - first
        if not 0 <= b < sum(blocks):
            return None
        s = 0
        while b >= blocks[s]:
            b -= blocks[s]
            s += 1
        numbers |= {"s": s, "b": b}
    return f"{fill(found.ours, numbers)}.{key.rpartition('.')[2]}"


def place_of_first(blocks: tuple[int, ...]) -> int:
    """Where the first block stands in one list of everything: a max-pool goes with four stages."""
    return 2 if len(blocks) == len(WIDTHS[Stages.IMAGENET]) else 1


def by_name(state_dict: StateDict, layout: Layout) -> dict[str, str]:
    """The key of each name, without the keys that no name has.

    Raises:
        WeightsError: two keys have the same name.
    """
    blocks = cut_into_stages(state_dict, layout)
    keys: dict[str, str] = {}
    for key in state_dict:
        name = to_name(key, layout, blocks)
        if name in keys:
            raise WeightsError(f"{keys[name]} and {key} are two keys for one tensor")
        if name is not None:
            keys[name] = key
    return keys


def recognize(state_dict: StateDict) -> Layout:
    """The layout that has most of the keys. Raises WeightsError if none has those of a block.

    Of several with the same keys it is the first in `Layout`, but kuangliu's if there is a fourth
    stage.
    """

    def known(layout: Layout) -> int:
        rows = [row for key in state_dict if (row := find(key, layout))]
        return len(rows) if any(row.ours.startswith("stages.") for row in rows) else 0

    layout = max(Layout, key=known)
    if known(layout) == 0:
        names = ", ".join(layout.value for layout in Layout)
        found = listed(sorted(state_dict)) or "none"
        raise WeightsError(f"the keys must be of a known layout ({names}), got {found}")
    if layout is Layout.AKAMASTER:
        rows = [row for key in state_dict if (row := find(key, layout))]
        if max(row.numbers.get("s", 0) for row in rows) >= len(WIDTHS[Stages.CIFAR]):
            return Layout.KUANGLIU
    return layout


def cut_into_stages(keys: Iterable[str], layout: Layout) -> tuple[int, ...]:
    """How many blocks each stage has, where the keys count them in one list; else nothing.

    The networks of such a layout have three equal stages, or behind a max-pool, which leaves a gap
    in the list, the four of ResNet-18 or 34. Blocks that are too many become the last stage's, so
    that every key has a name.
    """
    numbers = [row.numbers for key in keys if (row := find(key, layout))]
    places = {found["place"] for found in numbers if "place" in found}
    lasts = [found["last"] for found in numbers if "last" in found]
    if not places and not lasts:
        return ()
    first = 1 if 1 in places or not places else 2
    total = max(lasts, default=max(places, default=0) + 1) - first
    if first == 1:
        n = total // 3
        return n, n, total - 2 * n
    known = [row for block, row in TABLE_1.values() if block is Block.BASIC]
    *most, _ = max((row for row in known if sum(row) <= total), key=sum, default=min(known))
    return *most, max(total - sum(most), 0)


class Found(NamedTuple):
    """The row of a table that a key is of."""

    ours: str
    numbers: dict[str, int]


def find(key: str, layout: Layout) -> Found | None:
    """The row that a key is of, if there is one."""
    module = key.removeprefix(WRAPPER).rpartition(".")[0]
    for ours, theirs in TABLES[layout]:
        numbers = parse(theirs, module)
        if numbers is not None:
            return Found(ours, numbers)
    return None


def prefix_to_write(layout: Layout, prefix: str | None) -> str:
    """What is to stand before every key: `prefix`, or if it is None the layout's usual.

    That is `module.` for akamaster, as in the published files, and nothing for all others.

    Raises:
        WeightsError: the prefix is not empty and does not end in a dot.
    """
    if prefix is None:
        return WRAPPER if layout is Layout.AKAMASTER else ""
    if prefix and not prefix.endswith("."):
        raise WeightsError(
            f"prefix must be empty or end in a dot, such as {WRAPPER}, got {prefix!r}"
        )
    return prefix


# --- What else a layout asks for ------------------------------------------------------------------


# What the networks of a layout are. A layout that is not here has keys for every network.
NEEDED: dict[Layout, dict[str, tuple[Any, ...]]] = {
    Layout.AKAMASTER: {"widths": (WIDTHS[Stages.CIFAR],)},
    Layout.KUANGLIU: {"widths": (WIDTHS[Stages.IMAGENET],)},
    Layout.HUGGINGFACE: {
        "stem": (Stem.CONV7_BN_RELU_POOL,),
        "shortcut": (Shortcut.B,),
        "conv_bias": (False,),
        "projection": (Projection.CONV_BN,),
    },
    Layout.TANJEFFREYZ: {
        "stem": TANJEFFREYZ_STEMS,
        "block": (Block.BASIC,),
        "conv_bias": (True,),
        "projection": (Projection.CONV_BIAS,),
    },
}


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Raises WeightsError unless networks of that layout can be such."""
    needed = dict(NEEDED.get(layout, {}))
    if architecture.shortcut not in (Shortcut.B, Shortcut.C):
        needed.pop("projection", None)
    found = {name: getattr(architecture, name) for name in needed}
    if any(found[name] not in values for name, values in needed.items()):
        rules = (f"{name} {' or '.join(map(spell, values))}" for name, values in needed.items())
        raise WeightsError(
            f"{layout.value}'s layout has networks with {', '.join(rules)}, got "
            f"{', '.join(f'{name} {spell(value)}' for name, value in found.items())}; choose "
            "another layout"
        )


def spell(value: Any) -> str:
    return str(getattr(value, "value", value))


def unused_projections(
    architecture: Architecture, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """By name, the projections that tanjeffreyz has in each downsampling block but does not use.

    Filled with 1/C_in, bias 0: no result depends on them. What a file had there is not kept.
    """
    if architecture.shortcut in (Shortcut.B, Shortcut.C):
        return {}
    state: dict[str, np.ndarray] = {}
    for stage, c_out in enumerate(architecture.widths[1:], 1):
        c_in = architecture.widths[stage - 1]
        prefix = f"stages.{stage}.0.shortcut.conv."
        state[prefix + "weight"] = np.full((c_out, c_in, 1, 1), 1 / c_in, dtype)
        state[prefix + "bias"] = np.zeros(c_out, dtype)
    return state


def listed(items: list[str], limit: int = 3) -> str:
    """Such as "a, b, c and 5 more"."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
