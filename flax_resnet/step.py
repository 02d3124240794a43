"""One training step and one evaluation step: pure functions, state in, state out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_resnet.config import Experiment, Parallel, Statistics
from flax_resnet.data.pixels import Batch
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.scan import Tree
from flax_resnet.optim import make_optimizer
from flax_resnet.parallel.sharding import AXIS
from flax_resnet.resnet import ResNet, split


class Metrics(NamedTuple):
    """Sums over examples, so that they add up across batches."""

    loss: Float[Array, ""]
    errors: Int[Array, ""]
    examples: Int[Array, ""]

    @classmethod
    def zeros(cls) -> "Metrics":
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def plus(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), self, other)

    def mean(self) -> dict[str, float]:
        """Loss per example and fraction of errors, fetched to the host."""
        loss, errors, examples = jax.device_get(self)
        return {"loss": float(loss / examples), "error": float(errors / examples)}


class TrainState(NamedTuple):
    """All that a run is: nothing else must survive for it to go on as if never stopped."""

    step: Int[Array, ""]
    params: Tree
    batch_stats: Tree
    opt_state: optax.OptState
    metrics: Metrics  # since the last line of the log


class Program(NamedTuple):
    """The static half of training: what is compiled, not saved."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    axis_name: str | None  # of the `pmap` that train_step runs under


def init(config: Experiment, num_devices: int = 1) -> tuple[Program, TrainState]:
    """A network and its optimizer at step 0, a function of `config.seed` alone.

    Args:
        num_devices: that share a batch, for BatchNorm's statistics.
    """
    model = ResNet(config.model, rngs=nnx.Rngs(key_of(config.seed)))
    is_pmap = config.parallel is Parallel.PMAP
    is_global = config.batch_norm is Statistics.GLOBAL
    model.set_attributes(
        BatchNorm,
        axis_name=AXIS if is_pmap and is_global else None,
        replicas=1 if is_pmap or is_global else num_devices,
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, params, batch_stats = split(model)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        metrics=Metrics.zeros(),
    )
    return Program(graphdef, optimizer, AXIS if is_pmap else None), state


def key_of(seed: int) -> Array:
    """`jax.random.key(seed)`, and its like for seeds of more than 32 bits, which it would cut.

    It does so where 64-bit types are off. Where they are on, the two are the same.
    """
    words = jnp.array(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def train_step(program: Program, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One SGD step; the metrics are those of `batch` before the step.

    Under `pmap`, `batch` is the device's share, all shares being equal; everything else, results
    included, is the same on every device.
    """

    def loss_fn(params: Tree) -> tuple[Float[Array, ""], tuple[Tree, Metrics]]:
        # copy: BatchNorm writes its statistics, and `state` is not ours to write.
        model = nnx.merge(program.graphdef, params, state.batch_stats, copy=True)
        metrics = measure(model(batch.image), batch.label)
        batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return metrics.loss / metrics.examples, (batch_stats, metrics)

    grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    if program.axis_name is not None:
        grads, batch_stats = jax.lax.pmean((grads, batch_stats), program.axis_name)
        metrics = jax.lax.psum(metrics, program.axis_name)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=state.metrics.plus(metrics),
    )
    return state, metrics


def eval_step(program: Program, params: Tree, batch_stats: Tree, batch: Batch) -> Metrics:
    """Loss and errors of `batch` under the running statistics."""
    model = nnx.merge(program.graphdef, params, batch_stats, copy=True)
    model.eval()
    return measure(model(batch.image), batch.label)


def measure(logits: Float[Array, "b classes"], label: Int[Array, " b"]) -> Metrics:
    """Summed cross-entropy and errors of the examples that are not padding."""
    valid = label >= 0
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    wrong = logits.argmax(-1) != label
    return Metrics(
        jnp.where(valid, loss, 0).sum(),
        (valid & wrong).sum(dtype=jnp.int32),
        valid.sum(dtype=jnp.int32),
    )
