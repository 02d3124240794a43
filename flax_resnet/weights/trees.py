"""The leaves of a Flax tree as PyTorch has them: by its names, and with the axes in its order."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree, unstack
from flax_resnet.weights.layouts import StateDict

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
