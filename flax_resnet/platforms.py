"""Which devices a program is written for: they need not be there."""

import jax
from jax.sharding import Mesh


def on_cpu(mesh: Mesh | None = None) -> bool:
    """Whether it is for CPUs that a program is written.

    Args:
        mesh: whose devices it is for; by default those of the mesh around the code that is traced,
            which need not be there, and without one JAX's own.
    """
    around = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    device = around.abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"
