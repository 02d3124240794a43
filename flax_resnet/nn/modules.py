"""A network's modules by name, such as fc or stages.2.0, and which leaves of a tree are theirs."""

import difflib
from collections.abc import Callable
from typing import Any

import jax

from flax_resnet.config import STEM, written_out
from flax_resnet.errors import ConfigError
from flax_resnet.nn.scan import Tree

HEAD = "fc"  # the classifier; all else is the body

Path = tuple[Any, ...]  # of a leaf or a module: JAX's keys, or plain names and numbers
Names = tuple[str, ...]


def parts(path: Path) -> Names:
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def is_within(path: Path, names: Names) -> bool:
    """Whether a leaf or a module is one of these modules, or inside of one.

    Args:
        path: from the network on.
    """
    whole = ".".join(parts(path)) + "."
    return any(whole.startswith(f"{name}.") for name in written_out(names))


def where(tree: Tree, holds: Callable[[Path], bool]) -> Tree:
    """For each leaf, whether `holds` says so of its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: holds(path), tree)


def check(setting: str, names: Names, params: Tree) -> None:
    """Raises ConfigError unless each is a module of the network, block by block.

    Args:
        setting: that has the names.
    """
    known: dict[str, None] = {STEM: None}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        known |= {".".join(parts(path)[:end]): None for end in range(1, len(path))}
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ConfigError(
                f"{setting} must name modules of the network, such as fc, got {name!r}; the "
                f"nearest is {nearest}"
            )
