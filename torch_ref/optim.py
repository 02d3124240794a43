"""The paper's optimizer: SGD with momentum and coupled weight decay; and its learning rate."""

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from flax_resnet.config import OptimConfig, Schedule, Warmup


def make_schedule(config: OptimConfig, steps: int, optimizer: SGD) -> LRScheduler:
    """PyTorch's own schedulers, one after the other, stepped once per training step."""
    config.validate(steps)
    left = steps - config.warmup_steps
    if config.schedule is Schedule.COSINE:
        main = CosineAnnealingLR(optimizer, T_max=left, eta_min=config.final_lr)
    else:
        milestones = [step - config.warmup_steps for step in config.boundaries]
        main = MultiStepLR(optimizer, milestones, config.decay_factor)
    if not config.warmup_steps:
        return main
    factor = config.warmup_lr / config.peak_lr
    if config.warmup is Warmup.LINEAR:
        warmup = LinearLR(optimizer, factor, total_iters=config.warmup_steps)
    else:
        warmup = ConstantLR(optimizer, factor, total_iters=config.warmup_steps)
    return SequentialLR(optimizer, [warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimConfig, params: Iterable[nn.Parameter]) -> SGD:
    """SGD: g += decay p; v = momentum v + g; p -= lr v."""
    return SGD(
        params, lr=config.peak_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
