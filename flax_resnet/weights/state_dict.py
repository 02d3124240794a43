"""A network from a PyTorch state dict of NumPy arrays, and back, in every layout.

`layouts.py` knows the keys, `infer.py` the network, `trees.py` the arrays' axes. None needs torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from flax_resnet.config import (
    LAST_STEP,
    Architecture,
    ChannelPad,
    DType,
    Projection,
    ResNetConfig,
    Shortcut,
    Stride,
)
from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import ResNet, abstract
from flax_resnet.settings import as_given
from flax_resnet.weights.header import Header
from flax_resnet.weights.infer import infer
from flax_resnet.weights.layouts import (
    Layout,
    StateDict,
    by_name,
    check_layout,
    listed,
    prefix_to_write,
    recognize,
    to_key,
    unused_projections,
)
from flax_resnet.weights.nearest import suggesting
from flax_resnet.weights.refusals import refuse_by_keys, refuse_by_shapes, refuse_deep_stem
from flax_resnet.weights.trees import counters, torch_shapes, tree_from_torch, tree_to_torch
from flax_resnet.weights.wrappings import bare

COUNTER = "(training step)"
UNUSED = "(unused projection)"


class Placement(NamedTuple):
    """Where the tensor of one key went."""

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
    placements: list[Placement]
    assumed: dict[str, str]  # by field, what the state dict does not tell, in a sentence or two
    told: Sequence[str] = ()  # in a few words each, what was taken from its keys

    def model(self) -> ResNet:
        """The network itself, in evaluation mode."""
        graphdef, _, _ = abstract(self.config)
        # A copy: on the CPU jnp.asarray may share memory with an array that is not ours.
        model = nnx.merge(graphdef, *jax.tree.map(jnp.array, (self.params, self.batch_stats)))
        model.eval()
        return model


def to_state_dict(
    architecture: Architecture,
    params: Tree,
    batch_stats: Tree,
    *,
    step: int = 0,
    layout: Layout = Layout.TWIN,
    prefix: str | None = None,
) -> dict[str, np.ndarray]:
    """The state dict of the same network in PyTorch.

    Args:
        step: what BatchNorm's `num_batches_tracked` is to say.
        prefix: what stands before every key; without it as in the layout's published files,
            which is `module.` for akamaster's and nothing for all others.

    Raises:
        WeightsError: no network of that layout is like this one, or the prefix lacks its dot.
    """
    check_layout(architecture, layout)
    state = tree_to_torch(params) | tree_to_torch(batch_stats)
    state |= {name: np.array(step, np.int64) for name in counters(state)}
    if layout is Layout.TANJEFFREYZ:
        state = unused_projections(architecture, state["fc.weight"].dtype) | state
    prefix = prefix_to_write(layout, prefix)
    return {prefix + to_key(name, layout, architecture.blocks): state[name] for name in state}


def from_state_dict(
    state_dict: StateDict,
    *,
    shortcut: Shortcut | None = None,
    channel_pad: ChannelPad | None = None,
    stride: Stride | None = None,
    projection: Projection | None = None,
    batch_norm_epsilon: float | None = None,
    depth: int | None = None,
    header: Header | None = None,
    rename: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Imported:
    """The Flax network of a PyTorch state dict, whose layout and options its keys tell.

    tanjeffreyz has projections that no network of shortcut A uses; they are left out, and
    `to_state_dict` writes them as they were first filled, so that only they are lost on the way
    there and back.

    Args:
        shortcut: what it is, if that is known. Plain networks and option A have the same keys, in
            tanjeffreyz's layout B too: without it A is taken, and `assumed` says so.
        channel_pad: where option A pads, which the keys do not show either. Without it the
            layout's usual place is taken, and `assumed` says so.
        stride: which convolution of a bottleneck has it, if that is known; the keys do not show it.
            Without it conv3x3 is taken, as torchvision has it, and `assumed` says so.
        projection: what projections are made of, if that is known: the keys show it where there
            are any. Without it a network that has none is of the family with such a stem.
        batch_norm_epsilon: if that is known. Without it PyTorch's 1e-5 is taken, and `assumed`
            says so.
        depth: what it must be, if that is known; the keys show what it is.
        header: what the file says itself: then nothing is assumed.
        rename, ignore: what to do with keys of other names first; see `wrappings.bare`.

    Raises:
        WeightsError: a key is missing, unknown or misshapen, or a number is not finite; the
            message names the key, as the state dict has it, and what was expected. Or the header
            says something else than the tensors or the arguments.
    """
    unwrapped = bare(state_dict, rename=rename, ignore=ignore)
    refuse_by_keys(unwrapped.keys)
    refuse_deep_stem(unwrapped.state_dict, unwrapped.keys)
    if header is not None:
        header = agreed(header, shortcut=shortcut, channel_pad=channel_pad, stride=stride)
        header = agreed(header, projection=projection, batch_norm_epsilon=batch_norm_epsilon)
        told = header.architecture
        shortcut, channel_pad = told.shortcut, told.channel_pad
        stride, projection = told.stride, told.projection
        batch_norm_epsilon = told.batch_norm_epsilon
    in_file = {key: unwrapped.state_dict[name] for name, key in unwrapped.keys.items()}
    with suggesting(in_file):
        layout = recognize(unwrapped.state_dict)
        bare_keys = by_name(unwrapped.state_dict, layout)
        keys = {name: unwrapped.keys[key] for name, key in bare_keys.items()}
        state = {name: unwrapped.state_dict[key] for name, key in bare_keys.items()}
        refuse_by_shapes(state, keys)
        architecture, dtype, assumed = infer(
            state,
            layout,
            shortcut=shortcut,
            channel_pad=channel_pad,
            stride=stride,
            projection=projection,
            batch_norm_epsilon=batch_norm_epsilon,
            in_file=unwrapped.in_file,
        )
    if header is not None:  # what no key shows is the header's, all else must agree
        if different := differences(header.architecture, architecture):
            raise WeightsError(f"the header says another network than the tensors: {different}")
        assumed |= header.assumed
        momentum = header.batch_norm_momentum
    else:
        momentum = ResNetConfig.batch_norm_momentum
        assumed["batch_norm_momentum"] = (
            f"batch_norm_momentum {momentum}, as in PyTorch; it matters in training alone"
        )
    config = ResNetConfig.of(architecture, dtype=dtype, batch_norm_momentum=momentum)
    network = f"a network of depth {config.depth} and shortcut {config.shortcut.value}"
    if depth is not None and depth != config.depth:
        raise WeightsError(
            f"depth must be {depth}, got the state dict of {network}: its last block is "
            f"{last_block(keys)}"
        )
    if dtype is DType.FLOAT64 and jax.dtypes.canonicalize_dtype(float) != np.float64:
        raise WeightsError(
            "float64 weights need JAX's 64-bit types: jax.config.update('jax_enable_x64', True)"
        )

    _, params, batch_stats = abstract(config)
    shapes = torch_shapes(params) | torch_shapes(batch_stats)
    tracked = dict.fromkeys(counters(shapes), ())
    unused: dict[str, tuple[int, ...]] = {}
    if layout is Layout.TANJEFFREYZ:
        unused = {name: x.shape for name, x in unused_projections(architecture).items()}
    known = shapes | tracked | unused
    names = {key: name for name, key in keys.items()}
    with suggesting(in_file):
        check_keys(
            network,
            missing={
                unwrapped.in_file(to_key(name, layout, architecture.blocks)): shape
                for name, shape in shapes.items()
                if name not in keys
            },
            unknown=[key for key in unwrapped.keys.values() if names.get(key) not in known],
        )
    placements: list[Placement] = []
    for name, array in state.items():
        if name in tracked:
            array = array.reshape(()) if array.size == 1 else array
        check_array(keys[name], name, array, known[name], network)
        where = COUNTER if name in tracked else UNUSED if name in unused else name
        placements.append(Placement(keys[name], where, state[name].shape))

    types = {array.dtype.name for name, array in state.items() if name in shapes}
    if narrow := sorted(types - {"float32", "float64"}):
        assumed["dtype"] = f"{' and '.join(narrow)} numbers widened to {dtype.value}"
    counts = [state[name] for name in tracked if name in state]
    counted = {f"{x.dtype}" + " of one element" * (x.ndim > 0) for x in counts} - {"int64", "int32"}
    wrappings = [*unwrapped.told]
    if counted:
        wrappings.append(f"BatchNorm's counters are {' and '.join(sorted(counted))}")
    steps = {int(count.item()) for count in counts if np.isfinite(count).all()}
    if any(not np.isfinite(count).all() for count in counts):
        assumed["step"] = f"step 0 (BatchNorm's counters are too large for {counts[0].dtype})"
        steps = set()
    if len(steps) > 1:
        assumed["step"] = f"step 0 (BatchNorm's counters disagree: {min(steps)} to {max(steps)})"
    return Imported(
        config,
        tree_from_torch(state, params),
        tree_from_torch(state, batch_stats),
        steps.pop() if len(steps) == 1 else 0,
        layout,
        placements,
        assumed,
        wrappings,
    )


# --- Checks ---------------------------------------------------------------------------------------


def check_keys(
    network: str, missing: Mapping[str, tuple[int, ...]], unknown: Sequence[str]
) -> None:
    """Raises WeightsError naming the keys, if there are any; the missing ones with their shapes."""
    named = {
        "missing": [f"{key} {shape}" for key, shape in missing.items()],
        "unknown": list(unknown),
    }
    parts = [
        f"{kind} key{'s' * (len(keys) > 1)} {listed(keys)}" for kind, keys in named.items() if keys
    ]
    if parts:
        raise WeightsError(f"not the state dict of {network}: {'; '.join(parts)}")


def agreed(header: Header, **told: Any) -> Header:
    """The header, with what the user tells in the place of what it only assumes.

    Raises:
        WeightsError: the user tells something else than the header knows.
    """
    architecture, assumed = header.architecture, dict(header.assumed)
    for name, value in told.items():
        theirs = getattr(architecture, name)
        if None in (value, theirs):
            continue
        if assumed.pop(name, None):
            architecture = dataclasses.replace(architecture, **{name: value})
        elif value != theirs:
            raise WeightsError(
                f"{name} must be {as_given(theirs)}, as the file's header says, got "
                f"{as_given(value)}"
            )
    if architecture.shortcut is not Shortcut.A:  # nothing is padded
        assumed.pop("channel_pad", None)
    return header._replace(architecture=architecture, assumed=assumed)


def differences(theirs: Architecture, ours: Architecture) -> str:
    """Such as "num_classes 10 there, 100 here"; empty if there are none."""
    pairs = {
        field.name: (getattr(theirs, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(Architecture)
    }
    return ", ".join(
        f"{name} {as_given(a)}, not {as_given(b)}" for name, (a, b) in pairs.items() if a != b
    )


def last_block(keys: Mapping[str, str]) -> str:
    """The key of the last block's last convolution."""
    return max(
        (
            (name, key)
            for name, key in keys.items()
            if name.endswith((".conv2.weight", ".conv3.weight"))
        ),
        key=lambda pair: [int(part) for part in pair[0].split(".") if part.isdecimal()],
    )[1]


def check_array(
    key: str, name: str, array: np.ndarray, shape: tuple[int, ...], network: str
) -> None:
    """Raises WeightsError unless the array can be what its name says."""
    if array.shape != shape:
        raise WeightsError(f"{key} must have shape {shape} in {network}, got {array.shape}")
    if name.endswith("num_batches_tracked"):
        is_number = array.dtype.kind in "iuf" or array.dtype == ml_dtypes.bfloat16
        count = float(array) if is_number else np.nan
        # A type of floating point may be too small for the number of steps: infinite.
        if count != np.inf and not (0 <= count <= LAST_STEP and count.is_integer()):
            raise WeightsError(f"{key} must be an integer from 0 to {LAST_STEP}, got {array}")
        return
    if array.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise WeightsError(f"{key} must have a type of floating point, got {array.dtype}")
    if not np.isfinite(array).all():
        raise WeightsError(f"{key} must be finite, got {array[~np.isfinite(array)][0]}")
    if name.endswith("running_var") and array.min() < 0:
        raise WeightsError(f"{key} must be a variance, at least 0, got {array.min()}")
