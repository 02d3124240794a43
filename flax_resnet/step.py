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
from flax_resnet.errors import ConfigError
from flax_resnet.nn import modules
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.keys import keys
from flax_resnet.nn.scan import Tree, unstack
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
    label_smoothing: float  # of the training loss
    accumulate: int  # micro-batches of a step
    frozen: modules.Names = ()  # modules that do not train


def init(config: Experiment, num_devices: int = 1) -> tuple[Program, TrainState]:
    """A network and its optimizer at step 0, a function of `config.seed` alone.

    Args:
        num_devices: that share a batch, for BatchNorm's statistics.

    Raises:
        ConfigError: there is no such network, or what is to be frozen is no part of it, or all.
    """
    model = ResNet(config.model, rngs=keys(key_of(config.seed)))
    is_pmap = config.parallel is Parallel.PMAP
    is_global = config.batch_norm is Statistics.GLOBAL
    model.set_attributes(
        BatchNorm,
        axis_name=AXIS if is_pmap and is_global else None,
        is_global=is_global,
        shares=1 if is_pmap else num_devices,
    )
    frozen = config.train.frozen
    if frozen:
        check_frozen(frozen, split(model)[1])
        model.set_attributes(
            lambda path, module: isinstance(module, BatchNorm) and modules.is_within(path, frozen),
            use_running_average=True,
            raise_if_not_found=False,
        )
    optimizer = make_optimizer(config.optim, config.train.steps, frozen)
    graphdef, params, batch_stats = split(model)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        metrics=Metrics.zeros(),
    )
    settings = config.train
    program = Program(
        graphdef,
        optimizer,
        AXIS if is_pmap else None,
        settings.label_smoothing,
        settings.accumulate,
        frozen,
    )
    return program, state


def check_frozen(frozen: modules.Names, params: Tree) -> None:
    """Raises ConfigError unless each is a module that can be frozen, and something else is left.

    The blocks of a stage that are scanned over are one program, which trains or does not.
    """
    modules.check("train.frozen", frozen, unstack(params))
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = modules.parts(path)
        if "blocks" not in names:
            continue
        stage, first = ".".join(names[:2]), ".".join((*names[:2], "0"))
        for name in frozen:
            if name.startswith(f"{stage}.") and not f"{name}.".startswith(f"{first}."):
                raise ConfigError(
                    f"train.frozen must have {stage} as a whole, or of its blocks {first} alone, "
                    f"where model.scan_blocks makes one program of the others, got {name!r}"
                )
    if all(jax.tree.leaves(modules.where(params, lambda path: modules.is_within(path, frozen)))):
        raise ConfigError(f"train.frozen must leave a module that trains, got {frozen}")


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
    grads, batch_stats, metrics = accumulated_gradient(program, state, batch)
    if program.axis_name is not None:
        grads, batch_stats = jax.lax.pmean((grads, batch_stats), program.axis_name)
        metrics = jax.lax.psum(metrics, program.axis_name)
    # To the bit: the mean of three equal numbers may be another.
    batch_stats = with_frozen(program, state.batch_stats, batch_stats)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=state.metrics.plus(metrics),
    )
    return state, metrics


def with_frozen(program: Program, frozen: Tree, others: Tree) -> Tree:
    """A tree with the leaves of what is frozen from the one, and the rest from the other."""
    if not program.frozen:
        return others
    return jax.tree_util.tree_map_with_path(
        lambda path, a, b: a if modules.is_within(path, program.frozen) else b, frozen, others
    )


def accumulated_gradient(
    program: Program, state: TrainState, batch: Batch
) -> tuple[Tree, Tree, Metrics]:
    """The gradient of the mean loss (zero for what is frozen), BatchNorm's new statistics, metrics.

    Micro-batches go through the network one after another. Each is normalised by its own
    statistics, and the running ones move a little at each, as in PyTorch's loop of backward passes.
    """

    def gradient(batch_stats: Tree, batch: Batch) -> tuple[Tree, Tree, Metrics]:
        def loss_fn(params: Tree) -> tuple[Float[Array, ""], tuple[Tree, Metrics]]:
            if program.frozen:
                params = with_frozen(program, jax.lax.stop_gradient(params), params)
            # copy: BatchNorm writes its statistics, and `state` is not ours to write.
            model = nnx.merge(program.graphdef, params, batch_stats, copy=True)
            image, label, other, share = batch
            metrics = measure(model(image), label, other, share, program.label_smoothing)
            new_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return metrics.loss / metrics.examples, (new_stats, metrics)

        grads, (new_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        return grads, new_stats, metrics

    if program.accumulate == 1:
        return gradient(state.batch_stats, batch)

    def add(carry: tuple[Tree, Tree], micro_batch: Batch) -> tuple[tuple[Tree, Tree], Metrics]:
        total, batch_stats = carry
        grads, batch_stats, metrics = gradient(batch_stats, micro_batch)
        total = jax.tree.map(lambda a, b: a + b / program.accumulate, total, grads)
        return (total, batch_stats), metrics

    start = jax.tree.map(jnp.zeros_like, state.params), state.batch_stats
    parts = micro_batches(batch, program.accumulate)
    (grads, batch_stats), metrics = jax.lax.scan(add, start, parts)
    return grads, batch_stats, jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), metrics)


def micro_batches(batch: Batch, accumulate: int) -> Batch:
    """So many batches, stacked: the i-th has every so many-th example from the i-th on.

    A device's share of the batch then consists of its shares of them: no example has to move, and
    they are the same however many devices there are.
    """
    return jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)


def eval_step(program: Program, params: Tree, batch_stats: Tree, batch: Batch) -> Metrics:
    """Loss and errors of `batch` under the running statistics."""
    model = nnx.merge(program.graphdef, params, batch_stats, copy=True)
    model.eval()
    return measure(model(batch.image), batch.label)


def measure(
    logits: Float[Array, "b classes"],
    label: Int[Array, " b"],
    other: Int[Array, " b"] | None = None,
    share: Float[Array, " b"] | None = None,
    label_smoothing: float = 0.0,
) -> Metrics:
    """Summed cross-entropy and errors of the examples that are not padding.

    Args:
        other: the second class of mixed images, whose right answer is the class of the larger
            share; of two halves it is `label`.
        share: of `label`.
        label_smoothing: `torch.nn.CrossEntropyLoss`'s; of the loss alone.
    """
    valid = label >= 0
    target = jnp.maximum(label, 0)
    if other is None and not label_smoothing:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    else:
        classes = logits.shape[-1]
        target = jax.nn.one_hot(target, classes, dtype=logits.dtype)
        if other is not None and share is not None:
            part = share[:, None]
            target = part * target + (1 - part) * jax.nn.one_hot(other, classes, dtype=logits.dtype)
            label = jnp.where(share >= 0.5, label, other)
        target = (1 - label_smoothing) * target + label_smoothing / classes
        loss = optax.softmax_cross_entropy(logits, target)
    wrong = logits.argmax(-1) != label
    return Metrics(
        jnp.where(valid, loss, 0).sum(),
        (valid & wrong).sum(dtype=jnp.int32),
        valid.sum(dtype=jnp.int32),
    )
