"""The paper's optimizer: SGD with momentum, coupled weight decay and a piecewise constant rate."""

import optax

from flax_resnet.config import OptimConfig


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate by step: `torch.optim.lr_scheduler.MultiStepLR` after a constant warm-up.

    Boundaries count from step 0, warm-up included. Raises ConfigError for rates that make no
    schedule.
    """
    config.validate()
    decays = dict.fromkeys(config.boundaries, config.decay_factor)
    if not config.warmup_steps:
        return optax.piecewise_constant_schedule(config.peak_lr, decays)
    after_warmup = {step - config.warmup_steps: factor for step, factor in decays.items()}
    return optax.join_schedules(
        [
            optax.constant_schedule(config.warmup_lr),
            optax.piecewise_constant_schedule(config.peak_lr, after_warmup),
        ],
        [config.warmup_steps],
    )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """`torch.optim.SGD(momentum, weight_decay)`: g += decay p; v = momentum v + g; p -= lr v.

    Not to be confused with decoupled decay (`optax.adamw`), which adds it after the momentum. As
    in PyTorch everything decays, BatchNorm's scale and bias included.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.trace(config.momentum),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
