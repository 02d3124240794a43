"""The paper's optimizer: SGD with momentum, coupled weight decay and a piecewise constant rate."""

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, MultiStepLR, SequentialLR

from flax_resnet.config import OptimConfig


def make_schedule(config: OptimConfig, optimizer: SGD) -> LRScheduler:
    """`MultiStepLR` after a constant warm-up, stepped once per training step."""
    config.validate()
    milestones = [step - config.warmup_steps for step in config.boundaries]
    decay = MultiStepLR(optimizer, milestones, config.decay_factor)
    if not config.warmup_steps:
        return decay
    factor = config.warmup_lr / config.peak_lr
    warmup = ConstantLR(optimizer, factor, total_iters=config.warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimConfig, params: Iterable[nn.Parameter]) -> SGD:
    """SGD: g += decay p; v = momentum v + g; p -= lr v."""
    return SGD(
        params, lr=config.peak_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
