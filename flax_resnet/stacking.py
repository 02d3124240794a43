"""Two views of the same weights: block by block, or the blocks of one shape stacked for a scan.

Only a network in memory is ever stacked (`ResNetConfig.scan_blocks`); checkpoints and PyTorch's
files hold it block by block.
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # a parameter tree, or anything that holds some: momentum, a TrainState


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
