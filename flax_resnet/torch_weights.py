"""PyTorch state dicts, as NumPy arrays, to Flax parameters and back, for every known layout.

A *name* is the twin's, as `torch_ref.ResNet` calls it: `stages.1.0.conv1.weight`. Every other
layout is a renaming of it, so that what reads one reads all. Never imports torch.
"""

import enum
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.config import (
    ChannelPad,
    DType,
    Projection,
    ProjectionInit,
    ResNetConfig,
    Shortcut,
    Stem,
)
from flax_resnet.errors import WeightsError
from flax_resnet.resnet import ResNet
from flax_resnet.train import Tree, split

StateDict = Mapping[str, np.ndarray]


class Layout(enum.Enum):
    """Whose keys a state dict has."""

    TWIN = "twin"  # torch_ref
    TORCHVISION = "torchvision"  # also chenyaofo/pytorch-cifar-models
    AKAMASTER = "akamaster"  # akamaster/pytorch_resnet_cifar10
    REFERENCE = "reference"  # the system that this project reimplements


class Row(NamedTuple):
    """What became of one key."""

    key: str
    name: str  # or, in brackets, why it has none
    shape: tuple[int, ...]


class Imported(NamedTuple):
    """A network read from a state dict, and how it was read."""

    config: ResNetConfig
    params: Tree
    batch_stats: Tree
    step: int  # training steps it has seen, by BatchNorm's counter; 0 without one
    layout: Layout
    rows: list[Row]
    choices: list[str]  # what no key tells, and what was assumed


def to_state_dict(
    config: ResNetConfig,
    params: Tree,
    batch_stats: Tree,
    *,
    step: int = 0,
    layout: Layout = Layout.TWIN,
) -> dict[str, np.ndarray]:
    """The state dict of the same network in PyTorch.

    Args:
        step: what BatchNorm's `num_batches_tracked` is to say.

    Raises:
        WeightsError: no network of that layout has such a stem, bias or projection.
    """
    check_layout(config, layout)
    state = tree_to_torch(params) | tree_to_torch(batch_stats)
    state |= {name: np.array(step, np.int64) for name in counters(state)}
    if layout is Layout.REFERENCE:
        state = unused_projections(config, state["fc.weight"].dtype) | state
    return {to_key(name, layout, config.blocks_per_stage): state[name] for name in state}


def from_state_dict(
    state_dict: StateDict,
    *,
    shortcut: Shortcut | None = None,
    channel_pad: ChannelPad | None = None,
) -> Imported:
    """The Flax network of a PyTorch state dict, whose layout and options its keys tell.

    Args:
        shortcut: for where the keys cannot tell: plain and option A have the same, and in the
            reference's layout B too. Without it the likeliest is assumed and said in `choices`.
        channel_pad: the same for option A's padding, which no key tells.

    Raises:
        WeightsError: a key is missing, unknown or misshapen, or a number is not finite; the
            message names the key and what was expected.
    """
    layout = recognize(state_dict)
    keys = {to_name(key, layout, state_dict): key for key in state_dict}
    state = {name: np.asarray(state_dict[key]) for name, key in keys.items()}
    config, choices = infer_config(state, layout, shortcut, channel_pad)
    network = f"a {config.depth}-layer network with shortcut {config.shortcut.value}"

    _, params, batch_stats = abstract(config)
    shapes = torch_shapes(params) | torch_shapes(batch_stats)
    unused = unused_projections(config) if layout is Layout.REFERENCE else {}
    tracked = counters(shapes)
    rows: list[Row] = []
    for name, array in state.items():
        key = keys[name]
        if name not in shapes and name not in tracked and name not in unused:
            raise WeightsError(f"unknown key {key}: {network} has none such")
        expected = shapes.get(name, () if name in tracked else array.shape)
        if array.shape != expected:
            raise WeightsError(f"{key} must have shape {expected} in {network}, got {array.shape}")
        if not np.isfinite(array).all():
            raise WeightsError(f"{key} must be finite, got {array[~np.isfinite(array)][0]}")
        why = "(counter: Flax needs none)" if name in tracked else "(unused projection)"
        rows.append(Row(key, name if name in shapes else why, array.shape))
    for name in shapes.keys() - state.keys():
        key = to_key(name, layout, config.blocks_per_stage)
        raise WeightsError(f"missing key {key}: {network} has it, of shape {shapes[name]}")

    steps = [int(state[name]) for name in tracked if name in state]
    return Imported(
        config,
        tree_from_torch(state, params),
        tree_from_torch(state, batch_stats),
        max(steps, default=0),
        layout,
        rows,
        choices,
    )


# --- Trees and names ------------------------------------------------------------------------------

PARAM_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
STAT_NAMES = {"mean": "running_mean", "var": "running_var"}


def tree_to_torch(tree: Tree) -> dict[str, np.ndarray]:
    """Parameters, statistics, or anything of their structure (momentum, gradients), by name."""
    return {_name(path): _to_torch(np.asarray(leaf)) for path, leaf in _leaves(tree)}


def tree_from_torch(state: StateDict, like: Tree) -> Tree:
    """Inverse of `tree_to_torch`: a tree of the structure and types of `like`."""
    leaves = {
        path: _from_torch(state[_name(path)]).astype(leaf.dtype) for path, leaf in _leaves(like)
    }
    return unflatten_dict(leaves)


def torch_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """PyTorch's shape of each leaf, by name."""
    return {
        _name(path): _to_torch(np.empty(leaf.shape, bool)).shape for path, leaf in _leaves(tree)
    }


def counters(names: Mapping[str, Any]) -> list[str]:
    """Names of the BatchNorm counters that go with the running variances among `names`."""
    tail = "running_var"
    return [n.removesuffix(tail) + "num_batches_tracked" for n in names if n.endswith(tail)]


def abstract(config: ResNetConfig) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A network's structure, with shapes and types in the place of arrays."""
    return split(nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0))))


def _leaves(tree: Tree) -> list[tuple[tuple[Any, ...], Any]]:
    return list(flatten_dict(tree).items())


def _name(path: tuple[Any, ...]) -> str:
    *module, leaf = path
    return ".".join(map(str, [*module, (PARAM_NAMES | STAT_NAMES)[leaf]]))


def _to_torch(array: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, (in, out) to (out, in); a copy, since PyTorch writes in place."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.array(array.transpose(axes) if axes else array, order="C")


def _from_torch(array: np.ndarray) -> np.ndarray:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.array(array.transpose(axes) if axes else array, order="C")


# --- Layouts --------------------------------------------------------------------------------------

REFERENCE_MODULES = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
PROJECTION_NAMES = {Layout.TORCHVISION: "downsample", Layout.AKAMASTER: "shortcut"}


def recognize(state_dict: StateDict) -> Layout:
    """The layout that has such keys. Raises WeightsError if none has."""
    keys = {key.removeprefix("module.") for key in state_dict}
    if "stages.0.0.conv1.weight" in keys:
        return Layout.TWIN
    if "model.1.model.0.weight" in keys:
        return Layout.REFERENCE
    if "layer1.0.conv1.weight" in keys:
        return Layout.AKAMASTER if "linear.weight" in keys else Layout.TORCHVISION
    known = ", ".join(layout.value for layout in Layout)
    some = ", ".join(sorted(keys)[:3]) or "no key"
    raise WeightsError(f"the keys must be of a known layout ({known}), got {some}")


def to_key(name: str, layout: Layout, blocks_per_stage: int) -> str:
    """A name as `layout` has it."""
    if layout is Layout.TWIN:
        return name
    if layout is Layout.REFERENCE:
        if name.startswith("conv1."):
            return name.replace("conv1", "model.0")
        if name.startswith("fc."):
            return name.replace("fc", f"model.{3 * blocks_per_stage + 1}.model.2")
        stage, block, module, rest = name.removeprefix("stages.").split(".", 3)
        index = 1 + int(stage) * blocks_per_stage + int(block)
        if module == "shortcut":
            return f"model.{index}.{rest.replace('conv', 'conv_downsample')}"
        return f"model.{index}.model.{REFERENCE_MODULES[module]}.{rest}"
    name = re.sub(r"^stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", name)
    for i, part in enumerate(("conv", "bn")):
        name = name.replace(f"shortcut.{part}.", f"{PROJECTION_NAMES[layout]}.{i}.")
    if layout is Layout.AKAMASTER:  # saved from within DataParallel
        name = "module." + re.sub(r"^fc\.", "linear.", name)
    return name


def to_name(key: str, layout: Layout, keys: Mapping[str, Any]) -> str:
    """Inverse of `to_key`; `keys` are all of them. An unknown key is its own name."""
    key = key.removeprefix("module.")
    if layout is Layout.REFERENCE:
        return _reference_name(key, keys)
    if layout is not Layout.TWIN:
        key = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", key)
        key = re.sub(r"^linear\.", "fc.", key) if layout is Layout.AKAMASTER else key
        for i, part in enumerate(("conv", "bn")):
            key = key.replace(f".{PROJECTION_NAMES[layout]}.{i}.", f".shortcut.{part}.")
    return key


def _reference_name(key: str, keys: Mapping[str, Any]) -> str:
    last = max(int(m[1]) for k in keys if (m := re.match(r"(?:module\.)?model\.(\d+)\.", k)))
    n = max((last - 1) // 3, 1)
    match = re.fullmatch(r"model\.(\d+)\.(?:(model\.(\d)|conv_downsample)\.)?(\w+)", key)
    if not match:
        return key
    index, module, rest = int(match[1]), match[2], match[4]
    if index == 0:
        return f"conv1.{rest}"
    if index == last:
        return f"fc.{rest}"
    block = f"stages.{(index - 1) // n}.{(index - 1) % n}"
    if module == "conv_downsample":
        return f"{block}.shortcut.conv.{rest}"
    names = {number: name for name, number in REFERENCE_MODULES.items()}
    return f"{block}.{names[match[3]]}.{rest}" if match[3] in names else key


def unused_projections(config: ResNetConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """By name, the projections that the reference has in each downsampling block but does not use.

    Filled with 1/C_in, bias 0: no result depends on them.
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
    reference = ResNetConfig.reference()
    is_reference = (config.stem, config.conv_bias) == (reference.stem, reference.conv_bias)
    has_projection = config.shortcut in (Shortcut.B, Shortcut.C)
    if has_projection and config.projection is not reference.projection:
        is_reference = False
    if layout is Layout.REFERENCE and not is_reference:
        raise WeightsError(
            "the reference's layout has a bare convolution as stem, biases, and projections "
            f"without BatchNorm, got {config}"
        )


# --- Options --------------------------------------------------------------------------------------


def infer_config(
    state: StateDict, layout: Layout, shortcut: Shortcut | None, channel_pad: ChannelPad | None
) -> tuple[ResNetConfig, list[str]]:
    """The config of a state dict by name, and what had to be assumed. Raises WeightsError."""
    blocks = [
        len({m[1] for name in state if (m := re.match(rf"stages\.{stage}\.(\d+)\.", name))})
        for stage in range(3)
    ]
    if len(set(blocks)) > 1 or "conv1.weight" not in state or "fc.weight" not in state:
        raise WeightsError(
            "a state dict must have a stem, three stages of as many blocks, and a classifier, got "
            f"stages of {blocks[0]}, {blocks[1]} and {blocks[2]} blocks"
        )
    choices: list[str] = []
    projections = sum(name.endswith("shortcut.conv.weight") for name in state)
    is_reference = layout is Layout.REFERENCE
    if shortcut is None and projections == 3 * blocks[0]:
        shortcut = Shortcut.C
    elif shortcut is None and projections and not is_reference:
        shortcut = Shortcut.B
    elif shortcut is None:
        shortcut = Shortcut.A
        others = "plain and B" if is_reference else "plain"
        choices.append(f"shortcut A (no key tells it from {others} in the {layout.value} layout)")
    if channel_pad is None:
        centre = layout is Layout.AKAMASTER
        channel_pad = ChannelPad.CENTRE if centre else ChannelPad.END
        if shortcut is Shortcut.A:
            choices.append(f"channel_pad {channel_pad.value} (no key tells; the layout's usual)")

    has_bias = any(name.endswith("shortcut.conv.bias") for name in state)
    is_double = state["conv1.weight"].dtype == np.float64
    config = ResNetConfig(
        depth=6 * blocks[0] + 2,
        shortcut=shortcut,
        channel_pad=channel_pad,
        projection=Projection.CONV_BIAS if has_bias else Projection.CONV_BN,
        projection_init=ProjectionInit.AVERAGE if is_reference else ProjectionInit.KAIMING,
        stem=Stem.CONV_BN_RELU if "bn1.weight" in state else Stem.CONV,
        conv_bias="conv1.bias" in state,
        num_classes=len(state["fc.weight"]),
        dtype=DType.FLOAT64 if is_double else DType.FLOAT32,
    )
    return config, choices
