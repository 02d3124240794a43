"""PyTorch state dicts, as NumPy arrays, to Flax parameters and back, for every known layout.

A *name* is the twin's, as `torch_ref.ResNet` calls it: `stages.1.0.conv1.weight`. Every other
layout is a renaming of it, so that what reads one reads all. Never imports torch;
`torch_files.py` reads and writes the files.
"""

import enum
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

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
from flax_resnet.resnet import Projection1x1, ResNet, ZeroPad
from flax_resnet.train import Tree, split

StateDict = Mapping[str, np.ndarray]


class Layout(enum.Enum):
    """Whose keys a state dict has."""

    TWIN = "twin"  # torch_ref
    TORCHVISION = "torchvision"  # also chenyaofo/pytorch-cifar-models
    AKAMASTER = "akamaster"  # akamaster/pytorch_resnet_cifar10, saved from within DataParallel
    REFERENCE = "reference"  # the system that this project reimplements


USUAL_PREPROCESS = {  # what networks of each layout are usually fed; no key tells
    Layout.TWIN: Preprocess.PAPER,
    Layout.TORCHVISION: Preprocess.STANDARDIZE,
    Layout.AKAMASTER: Preprocess.AKAMASTER,
    Layout.REFERENCE: Preprocess.REFERENCE,
}
COUNTER = "(training step)"
UNUSED = "(unused projection)"
MAX_STEP = 2**31 - 1  # of TrainState.step


class Row(NamedTuple):
    """What became of one key."""

    key: str
    name: str  # or COUNTER, or UNUSED
    shape: tuple[int, ...]


class Imported(NamedTuple):
    """A network read from a state dict, and how it was read."""

    config: ResNetConfig
    params: Tree
    batch_stats: Tree
    step: int  # training steps it has seen, by BatchNorm's counters; 0 unless they agree
    layout: Layout
    rows: list[Row]
    choices: list[str]  # what no key tells, and what was assumed

    def model(self) -> ResNet:
        """The network itself, in evaluation mode."""
        graphdef, _, _ = abstract(self.config)
        # A copy: on the CPU jnp.asarray may share memory with an array that is not ours.
        model = nnx.merge(graphdef, *jax.tree.map(jnp.array, (self.params, self.batch_stats)))
        model.eval()
        return model


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
    depth: int | None = None,
) -> Imported:
    """The Flax network of a PyTorch state dict, whose layout and options its keys tell.

    The reference has projections that no network of shortcut A uses; they are left out, and
    `to_state_dict` writes them as they were first filled, so that only they are lost on the way
    there and back.

    Args:
        shortcut: for where the keys cannot tell: plain and option A have the same, and in the
            reference's layout B too. Without it the likeliest is assumed and said in `choices`.
        channel_pad: the same for option A's padding, which no key tells.
        depth: what it must be, if that is known; the keys tell.

    Raises:
        WeightsError: a key is missing, unknown or misshapen, or a number is not finite; the
            message names the key and what was expected.
    """
    layout = recognize(state_dict)
    keys = by_name(state_dict, layout)
    state = {name: np.asarray(state_dict[key]) for name, key in keys.items()}
    config, choices = infer_config(state, layout, shortcut, channel_pad)
    network = f"a network of depth {config.depth} and shortcut {config.shortcut.value}"
    if depth is not None and depth != config.depth:
        raise WeightsError(
            f"depth must be {depth}, got the state dict of {network}: its last block is "
            f"{last_block(keys)}"
        )
    if config.dtype is DType.FLOAT64 and jax.dtypes.canonicalize_dtype(float) != np.float64:
        raise WeightsError(
            "float64 weights need JAX's 64-bit types: jax.config.update('jax_enable_x64', True)"
        )

    _, params, batch_stats = abstract(config)
    shapes = torch_shapes(params) | torch_shapes(batch_stats)
    unused = {name: x.shape for name, x in unused_projections(config).items()}
    unused = unused if layout is Layout.REFERENCE else {}
    tracked = dict.fromkeys(counters(shapes), ())
    known: dict[str, tuple[int, ...]] = shapes | unused | tracked
    check_names(network, keys, {n: key_of(n, layout, config, keys) for n in shapes}, known)
    rows: list[Row] = []
    for name, array in state.items():
        check_array(keys[name], name, array, known[name], network)
        where = COUNTER if name in tracked else UNUSED if name in unused else name
        rows.append(Row(keys[name], where, array.shape))

    narrow = sorted(
        {x.dtype.name for n, x in state.items() if n in shapes} - {"float32", "float64"}
    )
    if narrow:
        choices.append(f"{' and '.join(narrow)} numbers widened to {config.dtype.value}")
    steps = {int(state[name]) for name in tracked if name in state}
    if len(steps) > 1:
        choices.append(f"step 0 (BatchNorm's counters disagree: {min(steps)} to {max(steps)})")
    return Imported(
        config,
        tree_from_torch(state, params),
        tree_from_torch(state, batch_stats),
        steps.pop() if len(steps) == 1 else 0,
        layout,
        rows,
        choices,
    )


def config_of(model: ResNet) -> ResNetConfig:
    """The config that builds such a model, but for how a projection was initialised."""
    block = model.stages[1][0]
    shortcut = Shortcut.PLAIN if block.shortcut is None else Shortcut.B
    channel_pad = ChannelPad.END
    if isinstance(block.shortcut, ZeroPad):
        shortcut = Shortcut.A
        channel_pad = ChannelPad.CENTRE if block.shortcut.pad[0] else ChannelPad.END
    elif isinstance(model.stages[0][0].shortcut, Projection1x1):
        shortcut = Shortcut.C
    _, params, batch_stats = split(model)
    state = tree_to_torch(params) | tree_to_torch(batch_stats)
    config, _ = infer_config(state, Layout.TWIN, shortcut, channel_pad)
    if model.conv1.dtype == jnp.bfloat16:
        config.dtype = DType.BFLOAT16
    return config


# --- The optimizer --------------------------------------------------------------------------------


def momentum_to_torch(opt_state: optax.OptState) -> dict[str, np.ndarray]:
    """By name, the `momentum_buffer` of `torch.optim.SGD` that equals optax's trace."""
    return tree_to_torch(optax.tree.get(opt_state, "trace"))


def momentum_from_torch(momentum: StateDict, step: int, like: optax.OptState) -> optax.OptState:
    """Inverse of `momentum_to_torch`, for a training that has done `step` steps.

    Args:
        step: where the learning-rate schedule goes on.
        like: an optimizer state of the same network, such as that of step 0.

    Raises:
        WeightsError: a buffer is missing or misshapen.
    """
    trace = tree_from_torch(momentum, optax.tree.get(like, "trace"))
    return optax.tree.set(like, trace=trace, count=jnp.array(step, jnp.int32))


# --- Trees and names ------------------------------------------------------------------------------

PARAM_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
STAT_NAMES = {"mean": "running_mean", "var": "running_var"}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}  # HWIO to OIHW, (in, out) to (out, in)
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}


def tree_to_torch(tree: Tree) -> dict[str, np.ndarray]:
    """Parameters, statistics, or anything of their structure (momentum, gradients), by name."""
    return {_name(path): _to_torch(np.asarray(leaf)) for path, leaf in _leaves(tree)}


def tree_from_torch(state: StateDict, like: Tree) -> Tree:
    """Inverse of `tree_to_torch`: a tree of the structure and types of `like`.

    Raises:
        WeightsError: an array is missing or misshapen.
    """
    for name, shape in torch_shapes(like).items():
        if name not in state or state[name].shape != shape:
            found = state[name].shape if name in state else "none"
            raise WeightsError(f"{name} must be an array of shape {shape}, got {found}")
    leaves = {
        path: _from_torch(state[_name(path)]).astype(leaf.dtype) for path, leaf in _leaves(like)
    }
    return unflatten_dict(leaves)


def flax_leaves(tree: Tree) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By name, each leaf's path in Flax, such as `stages.0.0.conv1.kernel`, and its shape there."""
    return {_name(path): (".".join(map(str, path)), leaf.shape) for path, leaf in _leaves(tree)}


def torch_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """PyTorch's shape of each leaf, by name."""
    return {
        _name(path): tuple(leaf.shape[axis] for axis in _axes(leaf.ndim, TO_TORCH))
        for path, leaf in _leaves(tree)
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


def _axes(ndim: int, table: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    return table.get(ndim, tuple(range(ndim)))


def _to_torch(array: np.ndarray) -> np.ndarray:
    # A copy, since PyTorch writes in place.
    return np.array(array.transpose(_axes(array.ndim, TO_TORCH)), order="C")


def _from_torch(array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(_axes(array.ndim, FROM_TORCH)), order="C")


# --- Layouts --------------------------------------------------------------------------------------

REFERENCE_MODULES = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
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
        return Layout.REFERENCE
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
    names = {number: name for name, number in REFERENCE_MODULES.items()}
    return f"{block}.{names[match[3]]}.{rest}" if match[3] in names else key


def unused_projections(config: ResNetConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """By name, the projections that the reference has in each downsampling block but does not use.

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


# --- Checks ---------------------------------------------------------------------------------------


def check_names(
    network: str,
    keys: Mapping[str, str],
    expected: Mapping[str, str],
    known: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises WeightsError naming the keys that are missing or unknown.

    Args:
        keys: by name, those that there are.
        expected: by name, those that there must be.
        known: by name, the shapes of those that there may be.
    """
    missing = [f"{key} {known[name]}" for name, key in expected.items() if name not in keys]
    unknown = [key for name, key in keys.items() if name not in known]
    parts = []
    if missing:
        parts.append(f"missing key{'s' * (len(missing) > 1)} {listed(missing)}")
    if unknown:
        parts.append(f"unknown key{'s' * (len(unknown) > 1)} {listed(unknown)}")
    if parts:
        raise WeightsError(f"not the state dict of {network}: {'; '.join(parts)}")


def check_array(
    key: str, name: str, array: np.ndarray, shape: tuple[int, ...], network: str
) -> None:
    """Raises WeightsError unless the array can be what its name says."""
    if array.shape != shape:
        raise WeightsError(f"{key} must have shape {shape} in {network}, got {array.shape}")
    if name.endswith("num_batches_tracked"):
        if not np.issubdtype(array.dtype, np.integer) or not 0 <= array <= MAX_STEP:
            raise WeightsError(f"{key} must be an integer from 0 to {MAX_STEP}, got {array}")
        return
    if array.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise WeightsError(f"{key} must have a type of floating point, got {array.dtype}")
    if not np.isfinite(array).all():
        raise WeightsError(f"{key} must be finite, got {array[~np.isfinite(array)][0]}")
    if name.endswith("running_var") and array.min() < 0:
        raise WeightsError(f"{key} must be a variance, at least 0, got {array.min()}")


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


# --- Options --------------------------------------------------------------------------------------


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
    is_reference = layout is Layout.REFERENCE
    if shortcut is None and projections == 3 * n:
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
