"""Blocks of one shape: run as one program by a scan, or computed again for their gradient.

Both change the memory and the time that a step takes, and nothing of its numbers. Only a network
in memory is ever stacked (`ResNetConfig.scan_blocks`); checkpoints and PyTorch's files hold it
block by block, and `stack` and `unstack` go from one view of the weights to the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Tree = Any  # a parameter tree, or anything that holds some: momentum, a TrainState


class Scan(nnx.Module):
    """Blocks of one shape as one program that is run again and again, by `jax.lax.scan`.

    The program no longer grows with their number, nor does the time to compile it.

    Args:
        blocks: whose parameters and statistics are stacked along a new first axis.
        remat: compute a block's inside again for its gradient, instead of storing it.
    """

    def __init__(self, blocks: Sequence[nnx.Module], *, remat: bool = False):
        graphdef, *_ = nnx.split(blocks[0], ...)
        states = [nnx.state(block) for block in blocks]
        self.blocks = nnx.merge(graphdef, jax.tree.map(lambda *x: jnp.stack(x), *states))
        self.remat = remat

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        run, weights = as_function(self.blocks)
        x, stats = lax.scan(jax.checkpoint(run) if self.remat else run, x, weights)
        if writes_statistics(self.blocks):
            nnx.update(self.blocks, stats)
        return x


def rematerialized(layer: nnx.Module, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    """layer(x), whose inside is computed again for its gradient, instead of being stored."""
    if isinstance(layer, Scan):  # which does it block by block
        return layer(x)
    run, weights = as_function(layer)
    x, stats = jax.checkpoint(run)(x, weights)
    if writes_statistics(layer):
        nnx.update(layer, stats)
    return x


def writes_statistics(layer: nnx.Module) -> bool:
    """Whether anything in it is in training mode. Else a transformation may close over it."""
    return not all(getattr(x, "use_running_average", True) for _, x in nnx.iter_modules(layer))


def as_function(layer: nnx.Module) -> tuple[Callable[..., tuple[Array, nnx.State]], tuple]:
    """`run(x, weights)`, which gives layer(x) and the new statistics, and the weights."""
    graphdef, *weights = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def run(x: Array, weights: tuple[nnx.State, nnx.State]) -> tuple[Array, nnx.State]:
        inner = nnx.merge(graphdef, *weights, copy=True)
        return inner(x), nnx.state(inner, nnx.BatchStat)

    return run, tuple(weights)


def stack(tree: Tree) -> Tree:
    """Every parameter tree in `tree` with its stages' later blocks stacked along a new first axis.

    A stage of fewer than two blocks stays as it is, and so does one that is stacked.
    """
    return _map_stages(_stack_stage, tree)


def unstack(tree: Tree) -> Tree:
    """Inverse of `stack`; what is not stacked stays as it is."""
    return _map_stages(_unstack_stage, tree)


def _map_stages(function: Any, tree: Tree) -> Tree:
    def convert(node: Any) -> Any:
        if not _has_stages(node):
            return node
        return node | {"stages": {s: function(stage) for s, stage in node["stages"].items()}}

    return jax.tree.map(convert, tree, is_leaf=_has_stages)


def _has_stages(node: Any) -> bool:
    return isinstance(node, dict) and "stages" in node


def _is_stacked(stage: dict[int, Tree]) -> bool:
    return "blocks" in stage.get(1, {})


def _stack_stage(stage: dict[int, Tree]) -> dict[int, Tree]:
    if len(stage) < 2 or _is_stacked(stage):
        return stage
    first, *rest = (stage[i] for i in range(len(stage)))
    return {0: first, 1: {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)}}


def _unstack_stage(stage: dict[int, Tree]) -> dict[int, Tree]:
    if not _is_stacked(stage):
        return stage
    blocks = stage[1]["blocks"]
    size = len(jax.tree.leaves(blocks)[0])
    rest = {i + 1: jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(size)}
    return {0: stage[0]} | rest
