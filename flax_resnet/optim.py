"""The paper's optimizer: SGD with momentum and coupled weight decay; and its learning rate."""

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from flax_resnet.config import OptimConfig, Schedule, Warmup
from flax_resnet.nn import modules
from flax_resnet.nn.scan import Tree


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step t, of T `steps` in all and W of warm-up: PyTorch's schedulers.

    Warm-up, t < W (`ConstantLR` or `LinearLR`): warmup_lr, or
    warmup_lr + (peak_lr - warmup_lr) t / W.

    Then piecewise (`MultiStepLR`): peak_lr, times decay_factor for each boundary <= t. Boundaries
    count from step 0, warm-up included. Or cosine (`CosineAnnealingLR` over the T - W steps that
    are left): final_lr + (peak_lr - final_lr) (1 + cos(pi (t - W) / (T - W))) / 2.

    Raises ConfigError for rates that make no schedule.
    """
    config.validate(steps)
    left = steps - config.warmup_steps
    if config.schedule is Schedule.COSINE:
        main = cosine(config.peak_lr, config.final_lr, left)
    else:
        decays = {step - config.warmup_steps: config.decay_factor for step in config.boundaries}
        main = optax.piecewise_constant_schedule(config.peak_lr, decays)
    if not config.warmup_steps:
        return main
    if config.warmup is Warmup.LINEAR:
        warmup = linear(config.warmup_lr, config.peak_lr, config.warmup_steps)
    else:
        warmup = optax.constant_schedule(config.warmup_lr)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def linear(first: float, last: float, steps: int) -> optax.Schedule:
    """A straight line from `first`, to reach `last` after so many steps."""
    return lambda step: first + (last - first) * fraction(step, steps)


def cosine(peak: float, final: float, steps: int) -> optax.Schedule:
    """Half a cosine from `peak`, to reach `final` after so many steps.

    Written as sin^2 of what is left, which is the same and keeps every digit down to the last
    step: 1 + cos near -1 loses half of them.
    """

    def rate(step: ArrayLike) -> Array:
        left = fraction(jnp.maximum(steps - step, 0), steps)
        return final + (peak - final) * jnp.sin(jnp.pi / 2 * left) ** 2

    return rate


def fraction(step: ArrayLike, steps: int) -> Array:
    """step / steps, in float64 where that is on: JAX's own quotient of int32 is a float32."""
    return jnp.asarray(step, float) / steps


def make_optimizer(
    config: OptimConfig, steps: int, frozen: modules.Names = ()
) -> optax.GradientTransformation:
    """`torch.optim.SGD(momentum, weight_decay)`: g += decay p; v = momentum v + g; p -= lr v.

    Not to be confused with decoupled decay (`optax.adamw`), which adds it after the momentum. As
    in PyTorch everything decays, BatchNorm's scale and bias included, but for what is frozen.

    Args:
        steps: of the whole run, for the learning rate.
        frozen: modules whose gradients are zero. Without decay they stay where they are.
    """

    def trains(tree: Tree) -> Tree:
        return modules.where(tree, lambda path: not modules.is_within(path, frozen))

    def is_body(tree: Tree) -> Tree:
        return modules.where(tree, lambda path: not modules.is_within(path, (modules.HEAD,)))

    parts = [
        optax.add_decayed_weights(config.weight_decay, trains if frozen else None),
        optax.trace(config.momentum),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    if config.body_lr_factor != 1:
        parts.append(optax.masked(optax.scale(config.body_lr_factor), is_body))
    return optax.chain(*parts)
