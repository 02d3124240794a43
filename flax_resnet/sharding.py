"""Data parallelism: one mesh axis, `data`, over all devices; the compiler does the rest."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_resnet.config import require
from flax_resnet.cpu import compiler_options


def data_mesh() -> Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis dealt out over the devices."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(mesh: Mesh | AbstractMesh, name: str, batch_size: int) -> None:
    """Raises ConfigError unless every device gets the same number of examples."""
    rule = f"divisible by the number of devices ({mesh.size})"
    require(batch_size % mesh.size == 0, name, rule, batch_size)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """`tree` on the devices, not sharing memory with the host's arrays."""
    return jax.device_put(tree, sharding, may_alias=False)


def compile_step(step: Callable[..., Any], mesh: Mesh, *, donate: bool) -> Callable[..., Any]:
    """`step` compiled for the mesh, its results on every device.

    Arguments come as `put` laid them out. With `donate` the first one, the state, is overwritten.
    """
    return jax.jit(
        step,
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate else (),
        compiler_options=compiler_options(),
    )
