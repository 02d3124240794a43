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


class Evaluation:
    """A function of (params, batch_stats, examples) that gives their summed Metrics.

    They are on the devices: the host waits only when it calls `Metrics.mean`.

    Args:
        batch_size: examples at a time, rounded up to a multiple of the number of devices; the
            last batch is padded, and the padding counts nowhere.
    """

    def __init__(
        self,
        config: ResNetConfig,
        program: Program,
        constants: Normalization,
        mesh: Mesh,
        batch_size: int,
    ):
        self.mesh = mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

        def step(
            total: Metrics, constant: tuple[Tree, Tree, Examples], index: jax.Array
        ) -> Metrics:
            params, batch_stats, examples = constant
            batch = pixels.evaluation_batch(examples, index, constants, param_dtype(config))
            return total.plus(eval_step(program, params, batch_stats, batch))

        self.step = sharding.compile_step(step, mesh)
        self.compiled: dict[int, Callable[..., Metrics]] = {}  # by the number of examples

    def compile(self, params: Tree, batch_stats: Tree, examples: Examples) -> None:
        """Compiles what evaluates so many examples, which else the first evaluation does.

        Args:
            params, batch_stats: on the devices as they will be.
        """
        constant = params, batch_stats, examples
        lowered = self.step.lower(self.zeros(), constant, self.index(0, examples))  # pyright: ignore
        self.compiled[len(examples.label)] = lowered.compile()

    def __call__(
        self,
        params: Tree,
        batch_stats: Tree,
        examples: Examples,
        between: Callable[[Metrics], None] = lambda total: None,
    ) -> Metrics:
        """Evaluates all examples.

        Args:
            between: is called after each batch with the sums so far, which may not be there yet;
                what it raises ends the evaluation.
        """
        total, size = self.zeros(), len(examples.label)
        step = self.compiled.get(size, self.step)
        for start in range(0, size, self.batch_size):
            total = step(total, (params, batch_stats, examples), self.index(start, examples))
            between(total)
        return total

    def zeros(self) -> Metrics:
        return sharding.replicate(self.mesh, Metrics.zeros())

    def index(self, start: int, examples: Examples) -> jax.Array:
        """The batch that begins at `start`; -1 is padding."""
        index = np.arange(start, start + self.batch_size, dtype=np.int32)
        index = np.where(index < len(examples.label), index, -1)
        return sharding.split_batch(self.mesh, index)


def make_evaluate_by_batch_statistics(
    config: ResNetConfig, constants: Normalization, mesh: Mesh
) -> Evaluate:
    """Like `Evaluation`, with tanjeffreyz's slip: BatchNorm stays in training mode.

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
