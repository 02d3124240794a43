"""Whose keys a state dict has: one table for each layout, read from left to right and back.

A *name* is the twin's, as `torch_ref.ResNet` calls a tensor: `stages.1.0.conv1.weight`. A *key* is
what a layout calls the same tensor: `layer2.0.conv1.weight`. Every layout is a renaming of modules,
so that what reads one reads all.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import Architecture, ResNetConfig, Shortcut
from flax_resnet.errors import WeightsError
from flax_resnet.weights.templates import fill, parse

StateDict = Mapping[str, np.ndarray]


class Layout(enum.Enum):
    """Whose keys a state dict has."""

    TWIN = "twin"  # torch_ref
    TORCHVISION = "torchvision"  # also chenyaofo/pytorch-cifar-models
    AKAMASTER = "akamaster"  # akamaster/pytorch_resnet_cifar10, saved from within DataParallel
    TANJEFFREYZ = "tanjeffreyz"  # the system that this project reimplements


# Pairs of templates for a module, (ours, theirs); `templates.py` says how to read one. The numbers:
# s is the stage, b the block in its stage, i the block among those of all stages, all from 0;
# n is the layer in its block, from 1; `all` is how many blocks there are.
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
    Layout.TORCHVISION: (
        ("conv1", "conv1"),
        ("bn1", "bn1"),
        ("stages.{s}.{b}.conv{n}", "layer{s+1}.{b}.conv{n}"),
        ("stages.{s}.{b}.bn{n}", "layer{s+1}.{b}.bn{n}"),
        ("stages.{s}.{b}.shortcut.conv", "layer{s+1}.{b}.downsample.0"),
        ("stages.{s}.{b}.shortcut.bn", "layer{s+1}.{b}.downsample.1"),
        ("fc", "fc"),
    ),
    Layout.AKAMASTER: (
        ("conv1", "module.conv1"),
        ("bn1", "module.bn1"),
        ("stages.{s}.{b}.conv{n}", "module.layer{s+1}.{b}.conv{n}"),
        ("stages.{s}.{b}.bn{n}", "module.layer{s+1}.{b}.bn{n}"),
        ("stages.{s}.{b}.shortcut.conv", "module.layer{s+1}.{b}.shortcut.0"),
        ("stages.{s}.{b}.shortcut.bn", "module.layer{s+1}.{b}.shortcut.1"),
        ("fc", "module.linear"),
    ),
    Layout.TANJEFFREYZ: (  # one list: the stem, the blocks of all stages, the classifier
        ("conv1", "model.0"),
        ("stages.{s}.{b}.conv1", "model.{i+1}.model.0"),
        ("stages.{s}.{b}.bn1", "model.{i+1}.model.1"),
        ("stages.{s}.{b}.conv2", "model.{i+1}.model.3"),
        ("stages.{s}.{b}.bn2", "model.{i+1}.model.4"),
        ("stages.{s}.{b}.shortcut.conv", "model.{i+1}.conv_downsample"),
        ("fc", "model.{all+1}.model.2"),
    ),
}
# DataParallel puts it before every key. It is written where a table has it, and read everywhere.
WRAPPER = "module."


# --- The two directions ---------------------------------------------------------------------------


def to_key(name: str, layout: Layout, blocks: tuple[int, ...]) -> str:
    """The key of a name, in a network of so many blocks in each stage.

    Raises:
        WeightsError: the layout has no such module.
    """
    module, _, leaf = name.rpartition(".")
    for ours, theirs in TABLES[layout]:
        numbers = parse(ours, module)
        if numbers is not None:
            if "s" in numbers:
                numbers["i"] = sum(blocks[: numbers["s"]]) + numbers["b"]
            return f"{fill(theirs, numbers | {'all': sum(blocks)})}.{leaf}"
    raise WeightsError(f"the {layout.value} layout has no key for {name}")


def to_name(key: str, layout: Layout, blocks: tuple[int, ...]) -> str | None:
    """Inverse of `to_key`, with DataParallel's prefix or without; None if no name has that key."""
    found = find(key, layout)
    if found is None or found.numbers.get("all", sum(blocks)) != sum(blocks):
        return None
    numbers = dict(found.numbers)
    if "i" in numbers:
        if numbers["i"] >= sum(blocks):
            return None
        numbers["s"], numbers["b"] = 0, numbers["i"]
        while numbers["b"] >= blocks[numbers["s"]]:
            numbers["b"] -= blocks[numbers["s"]]
            numbers["s"] += 1
    return f"{fill(found.ours, numbers)}.{key.rpartition('.')[2]}"


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
    """The layout that has most of the keys. Raises WeightsError if none has those of a block."""

    def known(layout: Layout) -> int:
        rows = [row for key in state_dict if (row := find(key, layout))]
        return len(rows) if any(row.ours.startswith("stages.") for row in rows) else 0

    layout = max(Layout, key=known)
    if known(layout) == 0:
        names = ", ".join(layout.value for layout in Layout)
        found = listed(sorted(state_dict)) or "none"
        raise WeightsError(f"the keys must be of a known layout ({names}), got {found}")
    return layout


def cut_into_stages(keys: Iterable[str], layout: Layout) -> tuple[int, ...]:
    """How many blocks each stage has, where the keys count them in one list; else nothing.

    The networks of such a layout have three equal stages. Blocks that are too many become the
    last stage's, so that every key has a name.
    """
    rows = [row for key in keys if (row := find(key, layout))]
    lengths = [row.numbers["all"] for row in rows if "all" in row.numbers]
    lengths = lengths or [row.numbers["i"] + 1 for row in rows if "i" in row.numbers]
    if not lengths:
        return ()
    n = max(lengths) // 3
    return n, n, max(lengths) - 2 * n


class Found(NamedTuple):
    """The row of a table that a key is of."""

    ours: str
    numbers: dict[str, int]


def find(key: str, layout: Layout) -> Found | None:
    """The row that a key is of, if there is one."""
    module = key.removeprefix(WRAPPER).rpartition(".")[0]
    for ours, theirs in TABLES[layout]:
        numbers = parse(theirs.removeprefix(WRAPPER), module)
        if numbers is not None:
            return Found(ours, numbers)
    return None


# --- What else a layout asks for ------------------------------------------------------------------


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Raises WeightsError unless networks of that layout can be such."""
    if layout is not Layout.TANJEFFREYZ:
        return
    fields = ["stem", "conv_bias"]
    if architecture.shortcut in (Shortcut.B, Shortcut.C):
        fields.append("projection")
    found = {name: getattr(architecture, name) for name in fields}
    usual = ResNetConfig.tanjeffreyz().architecture
    if any(value is not getattr(usual, name) for name, value in found.items()):
        values = (f"{name} {getattr(value, 'value', value)}" for name, value in found.items())
        raise WeightsError(
            "tanjeffreyz's layout has a bare convolution as stem, biases, and projections "
            f"without BatchNorm, got {', '.join(values)}"
        )


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
