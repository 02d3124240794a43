"""What XLA's CPU backend must be told to be fast; on other backends all of it is inert.

Both cures change neither the values nor the parameters, only how XLA schedules them.
"""

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

CompilerOptions = dict[str, str | bool]


def add_relu(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """relu(x + y), the end of a residual block.

    XLA's CPU fusion copies the whole chain of earlier additions into every consumer, so that a
    step's cost grows faster than the depth. A call that is not inlined stops the copying.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.relu(x + y)
    with set_xla_metadata(inlineable="false"):
        return _add_relu(x, y)


@jax.jit
def _add_relu(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.relu(x + y)  # whose gradient at 0 is 0, as PyTorch's; jnp.maximum's is 1/2


def compiler_options() -> CompilerOptions:
    """Options for the outermost `jax.jit` around a network.

    jax 0.10 gives convolutions to a library that runs on one thread; kept for reductions only,
    it leaves them to the faster one. jax 0.12 needs it no more.
    """
    if jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 11):
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
