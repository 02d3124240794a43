"""Loss and error over a whole split, every example once."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_resnet.config import DataConfig, ResNetConfig
from flax_resnet.data import pixels, stream
from flax_resnet.data.encoded import Images
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Batch, Normalization, Seen
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
        data: how streamed images are cut out of their files.
    """

    def __init__(
        self,
        config: ResNetConfig,
        program: Program,
        constants: Normalization,
        mesh: Mesh,
        batch_size: int,
        data: DataConfig | None = None,
    ):
        self.data = data or DataConfig()
        self.mesh = mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

        def step(
            total: Metrics, constant: tuple[Tree, Tree, Examples], index: jax.Array
        ) -> Metrics:
            params, batch_stats, examples = constant
            batch = pixels.evaluation_batch(examples, index, constants, param_dtype(config))
            return total.plus(eval_step(program, params, batch_stats, batch))

        def streamed(total: Metrics, constant: tuple[Tree, Tree], seen: Seen) -> Metrics:
            image, label = map(jnp.asarray, seen)
            batch = Batch(pixels.normalize(image, constants, param_dtype(config)), label)
            return total.plus(eval_step(program, *constant, batch))

        self.step = sharding.compile_step(step, mesh)
        self.streamed_step = sharding.compile_step(streamed, mesh)
        self.places = sharding.local_places(mesh, self.batch_size)
        self.compiled: dict[int, Callable[..., Metrics]] = {}  # by the number of examples

    def compile(self, params: Tree, batch_stats: Tree, examples: Examples | Images) -> None:
        """Compiles what evaluates so many examples, which else the first evaluation does.

        Args:
            params, batch_stats, examples: on the devices as they will be, or what is like them.
        """
        compiled = self.lower(params, batch_stats, examples).compile()
        if isinstance(examples, Images):
            self.streamed_step = compiled
        else:
            self.compiled[len(examples.label)] = compiled

    def lower(
        self, params: Tree, batch_stats: Tree, examples: Examples | Images
    ) -> jax.stages.Lowered:
        """What `compile` compiles."""
        total = sharding.replicated_like(self.mesh, jax.eval_shape(Metrics.zeros))
        label: Any = jax.ShapeDtypeStruct((self.batch_size,), np.int32)
        if isinstance(examples, Images):
            side = self.data.side
            image: Any = jax.ShapeDtypeStruct((self.batch_size, side, side, 3), np.uint8)
            part = sharding.split_like(self.mesh, Seen(image, label))
            return self.streamed_step.lower(total, (params, batch_stats), part)  # pyright: ignore
        part = sharding.split_like(self.mesh, label)
        return self.step.lower(total, (params, batch_stats, examples), part)  # pyright: ignore

    def __call__(
        self,
        params: Tree,
        batch_stats: Tree,
        examples: Examples | Images,
        between: Callable[[Metrics], None] = lambda total: None,
    ) -> Metrics:
        """Evaluates all examples. Raises DatasetError for a streamed one that cannot be read.

        Args:
            between: is called after each batch with the sums so far, which may not be there yet;
                what it raises ends the evaluation.
        """
        total, size = self.zeros(), len(examples.label)
        if isinstance(examples, Images):
            batches = stream.evaluation(self.data, examples, self.batch_size, self.places)
            with contextlib.closing(batches):
                for number, image in enumerate(batches):
                    part = self.put(image, number, examples)
                    total = self.streamed_step(total, (params, batch_stats), part)
                    between(total)
            return total
        step = self.compiled.get(size, self.step)
        for start in range(0, size, self.batch_size):
            total = step(total, (params, batch_stats, examples), self.index(start, examples))
            between(total)
        return total

    def zeros(self) -> Metrics:
        return sharding.replicate(self.mesh, Metrics.zeros())

    def put(self, image: np.ndarray, number: int, images: Images) -> Seen:
        """The images of a batch, and their labels, on the devices."""
        example = number * self.batch_size + self.places
        label = images.label[np.minimum(example, len(images) - 1)]
        label = np.where(example < len(images), label, -1).astype(np.int32)
        return sharding.split_local(self.mesh, Seen(image, label), self.places)

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
