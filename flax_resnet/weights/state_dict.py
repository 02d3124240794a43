"""PyTorch state dicts, as NumPy arrays, to Flax parameters and back, for every known layout.

`layouts.py` knows the names, `files.py` the files; this never imports torch.
"""

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
    ResNetConfig,
    Shortcut,
)
from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree, unstack
from flax_resnet.resnet import Projection1x1, ResNet, ZeroPad, abstract, split
from flax_resnet.weights.layouts import (
    Layout,
    StateDict,
    by_name,
    check_layout,
    infer_config,
    key_of,
    last_block,
    listed,
    recognize,
    to_key,
    unused_projections,
)

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
    if layout is Layout.TANJEFFREYZ:
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

    tanjeffreyz has projections that no network of shortcut A uses; they are left out, and
    `to_state_dict` writes them as they were first filled, so that only they are lost on the way
    there and back.

    Args:
        shortcut: for where the keys cannot tell: plain and option A have the same, and in the
            tanjeffreyz's layout B too. Without it the likeliest is assumed and said in `choices`.
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
    unused = unused if layout is Layout.TANJEFFREYZ else {}
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
    return {_name(path): _to_torch(np.asarray(leaf)) for path, leaf in _leaves(unstack(tree))}


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
