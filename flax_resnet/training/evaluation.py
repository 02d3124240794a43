"""Loss and error over a whole split, every example once."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_resnet.config import ResNetConfig
from flax_resnet.data import pixels
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.nn.scan import Tree
from flax_resnet.parallel import sharding
from flax_resnet.resnet import abstract, param_dtype
from flax_resnet.step import Metrics, Program, eval_step, measure

Evaluate = Callable[[Tree, Tree, Examples], Metrics]

TANJEFFREYZ_BATCH_SIZE = 128


def make_evaluate(
    config: ResNetConfig, program: Program, constants: Normalization, mesh: Mesh, batch_size: int
) -> Evaluate:
    """A function of (params, batch_stats, examples) that gives their summed Metrics.

    They are on the devices: the host waits only when it calls `Metrics.mean`.

    Args:
        batch_size: examples at a time, rounded up to a multiple of the number of devices; the
            last batch is padded, and the padding counts nowhere.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size

    def step(total: Metrics, constant: tuple[Tree, Tree, Examples], index: jax.Array) -> Metrics:
        params, batch_stats, examples = constant
        batch = pixels.evaluation_batch(examples, index, constants, param_dtype(config))
        return total.plus(eval_step(program, params, batch_stats, batch))

    call = sharding.compile_step(step, mesh)

    def evaluate(params: Tree, batch_stats: Tree, examples: Examples) -> Metrics:
        total = sharding.replicate(mesh, Metrics.zeros())
        size = len(examples.label)
        for start in range(0, size, batch_size):
            index = np.arange(start, start + batch_size, dtype=np.int32)
            index = sharding.split_batch(mesh, np.where(index < size, index, -1))
            total = call(total, (params, batch_stats, examples), index)
        return total

    return evaluate


def make_evaluate_by_batch_statistics(
    config: ResNetConfig, constants: Normalization, mesh: Mesh
) -> Evaluate:
    """Like `make_evaluate`, with tanjeffreyz's slip: BatchNorm stays in training mode.

    It normalises each test batch (128 images in order, the last batch being what is left) by the
    batch's own statistics. tanjeffreyz let the running ones follow them; here they stay.
    """
    graphdef, _, _ = abstract(config)

    def step(total: Metrics, constant: tuple[Tree, Tree, Examples], index: jax.Array) -> Metrics:
        params, batch_stats, examples = constant
        batch = pixels.evaluation_batch(examples, index, constants, param_dtype(config))
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        return total.plus(measure(model(batch.image), batch.label))

    call = sharding.compile_step(step, mesh)

    def evaluate(params: Tree, batch_stats: Tree, examples: Examples) -> Metrics:
        total = sharding.replicate(mesh, Metrics.zeros())
        index = np.arange(len(examples.label), dtype=np.int32)
        for start in range(0, len(index), TANJEFFREYZ_BATCH_SIZE):
            part = sharding.replicate(mesh, index[start : start + TANJEFFREYZ_BATCH_SIZE])
            total = call(total, (params, batch_stats, examples), part)
        return total

    return evaluate
