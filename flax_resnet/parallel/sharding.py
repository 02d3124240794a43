"""Data parallelism: one mesh axis over all devices, and the jit and the pmap way to use it.

Either way a step's state is on every device and its batch is dealt out over them; what differs is
who does it. Under `jit` the step is written for the whole batch and the compiler splits it; under
`pmap` it is written for one device's share.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from flax_resnet.config import Parallel
from flax_resnet.errors import ConfigError
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.parallel import processes
from flax_resnet.settings import require

AXIS = "data"  # of the devices that share a batch


def data_mesh() -> Mesh:
    """All devices in a row, those of other processes too.

    Raises ConfigError unless every process has the same number.
    """
    processes.check_equal_shares()
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def check_batch_size(mesh: Mesh | AbstractMesh, name: str, batch_size: int) -> None:
    """Raises ConfigError unless every device gets the same number of examples."""
    rule = f"divisible by the number of devices ({mesh.size})"
    require(batch_size % mesh.size == 0, name, rule, batch_size)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """`tree` whole on every device."""
    return _put(tree, NamedSharding(mesh, P()))


def split_batch(mesh: Mesh, tree: Any, parallel: Parallel = Parallel.JIT, axis: int = 0) -> Any:
    """Host arrays dealt out over the devices by one axis, as `compile_step` wants them.

    Every process gives the whole of them, and puts its own devices' share there.
    """
    if parallel is Parallel.PMAP:  # whose first axis is the device
        parts = jax.tree.map(lambda x: np.stack(np.split(x, mesh.size, axis)), tree)
        return _put(parts, NamedSharding(mesh, P(AXIS)))
    return _put(tree, batch_sharding(mesh, axis))


def replicated_like(mesh: Mesh, tree: Any) -> Any:
    """As `replicate`, for the compiler: shapes and places without contents, of arrays or such."""
    return _like(tree, NamedSharding(mesh, P()))


def split_like(mesh: Mesh, tree: Any, parallel: Parallel = Parallel.JIT, axis: int = 0) -> Any:
    """As `split_batch`, for the compiler."""
    if parallel is Parallel.PMAP:

        def parts(x: Any) -> jax.ShapeDtypeStruct:
            shape = mesh.size, *x.shape[:axis], x.shape[axis] // mesh.size, *x.shape[axis + 1 :]
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return _like(jax.tree.map(parts, tree), NamedSharding(mesh, P(AXIS)))
    return _like(tree, batch_sharding(mesh, axis))


def local_places(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which examples of a batch go to the devices of this process, in rising order."""
    found = batch_sharding(mesh, 0).addressable_devices_indices_map((batch_size,))
    places = [np.arange(batch_size)[index] for index in found.values() if index is not None]
    return np.unique(np.concatenate(places))


def split_local(
    mesh: Mesh, tree: Any, places: np.ndarray, parallel: Parallel = Parallel.JIT, axis: int = 0
) -> Any:
    """As `split_batch`, of a batch of which this process has only what `local_places` tells."""
    if jax.process_count() == 1:  # and so has all of it
        return split_batch(mesh, tree, parallel, axis)
    sharding = batch_sharding(mesh, axis)

    def put_local(x: np.ndarray) -> jax.Array:
        size = mesh.size * len(places) // len(mesh.local_devices)
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            start = np.searchsorted(places, index[axis].start or 0)
            stop = start + size // mesh.size
            return x[(slice(None),) * axis + (slice(start, stop),)].copy()

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put_local, tree)


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, P(*[None] * axis, AXIS))


def compile_step(
    step: Callable[..., Any], mesh: Mesh, parallel: Parallel = Parallel.JIT
) -> Callable[..., Any]:
    """`step(state, constants, batch)` compiled for the mesh; its results are on every device.

    The state is donated: its memory is used for the results. Raises ConfigError for `pmap` in
    several processes: its results would be those of one process's devices.
    """
    if parallel is Parallel.PMAP:
        if jax.process_count() > 1:
            raise ConfigError(
                "parallel must be jit when several processes train together, got pmap; "
                "--config.batch_norm=replica gives the same statistics"
            )
        return jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=(0,))

    @functools.wraps(step)
    def on_mesh(*arguments: Any) -> Any:  # so that BatchNorm may say what is to be on every device
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return jax.jit(
        on_mesh,
        out_shardings=NamedSharding(mesh, P()),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def put(x: Any, sharding: Sharding) -> jax.Array:
    """A host array, or one on this process's devices, dealt out as `sharding` says."""
    if sharding.is_fully_addressable:
        # On the CPU a device array can share the host array's memory, which others write to.
        return jax.device_put(x, sharding, may_alias=False)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index].copy())


def _like(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding, may_alias=False)  # all at once, which is faster
    return jax.tree.map(lambda x: put(x, sharding), tree)
