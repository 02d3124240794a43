"""The paper's optimizer: SGD with momentum and coupled weight decay; and its learning rate."""

from collections.abc import Iterable
from typing import Any

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
from flax_resnet.settings import require


def make_schedule(config: OptimConfig, steps: int, optimizer: SGD) -> LRScheduler:
    """PyTorch's own schedulers, one after the other, stepped once per training step.

    Raises ConfigError for what they cannot do: two groups of rates, and one last rate above 0.
    """
    config.validate(steps)
    is_one = config.body_lr_factor == 1 or config.final_lr == 0
    rule = "0 with optim.body_lr_factor in PyTorch, whose cosine has one eta_min for all groups"
    require(is_one, "optim.final_lr", rule, config.final_lr)
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


def make_optimizer(
    config: OptimConfig, params: Iterable[nn.Parameter], head: Iterable[nn.Parameter] = ()
) -> SGD:
    """SGD: g += decay p; v = momentum v + g; p -= lr v. What needs no gradient stays as it is.

    Args:
        head: those of the classifier, whose rate is another where config.body_lr_factor is not 1.
    """
    groups: list[dict[str, Any]] = [{"params": list(params)}]
    if config.body_lr_factor != 1:
        heads = list(head)
        known = {id(p) for p in heads}
        body = [p for p in groups[0]["params"] if id(p) not in known]
        groups = [{"params": heads}, {"params": body, "lr": config.peak_lr * config.body_lr_factor}]
    return SGD(
        groups, lr=config.peak_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
