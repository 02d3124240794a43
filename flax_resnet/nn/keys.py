"""The keys of a network's initial weights."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array


def keys(seed: int | Array) -> nnx.Rngs:
    """`nnx.Rngs(seed)`: the same keys, faster drawn where a network is only traced.

    Args:
        seed: or a key of `jax.random.key`.
    """
    rngs: Any = nnx.Rngs(seed)
    rngs.default = Keys(seed, tag="default")
    return rngs


class Keys(nnx.RngStream):
    """Counts its keys in Python.

    Flax counts them in an array. Under `eval_shape` it asks for the array's sharding at each key,
    and JAX then goes through all that was traced before. For ResNet-1202 (section 4.2) that took 90
    seconds; so it takes 3.
    """

    drawn = 0

    def __call__(self) -> Array:
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key
