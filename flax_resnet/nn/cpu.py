"""What XLA's CPU backend must be told to be fast; on other backends all of it is inert.

None of it changes what is computed. `scripts/benchmark.py --cures` shows what each is worth.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh

from flax_resnet import platforms

CompilerOptions = dict[str, str | bool]

CURES = ("keep_memory", "materialized", "compiler_options")
left_out: set[str] = set()  # for a benchmark to show what a cure is worth

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def applies(cure: str, mesh: Mesh | None = None) -> bool:
    """Whether the program is for CPUs (see `platforms`) and the cure is not left out."""
    return platforms.on_cpu(mesh) and cure not in left_out


def materialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as a call of its own, so that its result is computed once and stored.

    XLA's CPU fusion copies cheap arithmetic into every consumer: the whole chain of earlier
    residual additions, so that a step's cost grows faster than the depth, and all of batch
    normalisation into the transposition before a weight gradient, which reads memory in the worst
    order. A call that is not inlined stops the copying.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not applies("materialized"):
            return function(*args)
        with set_xla_metadata(inlineable="false"):
            return compiled(*args)

    return call


def compiler_options(mesh: Mesh | None = None) -> CompilerOptions:
    """Options for the outermost `jax.jit` around a network, for the mesh's devices or JAX's own.

    jax 0.10 gives float32 convolutions to a library that runs on one thread; kept for reductions
    only, it leaves them to the faster one. jax 0.12 needs it no more, float64 never did.
    """
    is_needed = jax.__version_info__ < (0, 11) and not jax.config.read("jax_enable_x64")
    if not applies("compiler_options", mesh) or not is_needed:
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def keep_memory() -> None:
    """Tells glibc's allocator, for this whole process, to keep the memory it was once given.

    XLA takes the memory of every step from it anew. By default that much goes back to the kernel
    at once, which hands it out again zeroed, page by page: 75,000 page faults a step of ResNet-20.
    To be called before JAX is first used, whose threads otherwise have arenas of their own, which
    cannot grow so large. Without a use, and without harm, where the network is not on the CPU.
    """
    if "keep_memory" in left_out:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)
