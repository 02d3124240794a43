"""One training step and one evaluation step, on a TrainState that they change in place."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from flax_resnet.config import Experiment
from flax_resnet.settings import require
from torch_ref.optim import make_optimizer, make_schedule
from torch_ref.pixels import Batch
from torch_ref.resnet import ResNet


class Metrics(NamedTuple):
    """Sums over examples, so that they add up across batches."""

    loss: Tensor
    errors: Tensor
    examples: int


class TrainState(NamedTuple):
    """A network, its optimizer and its schedule."""

    model: ResNet
    optimizer: SGD
    schedule: LRScheduler


def init(config: Experiment) -> TrainState:
    """A network and its optimizer at step 0, a function of `config.seed` alone.

    Raises ConfigError for a seed of more than 32 bits: on a CPU PyTorch uses no more.
    """
    require(config.seed < 2**32, "seed", "below 2^32 for PyTorch", config.seed)
    torch.manual_seed(config.seed)
    model = ResNet(config.model)
    optimizer = make_optimizer(config.optim, model.parameters())
    return TrainState(model, optimizer, make_schedule(config.optim, config.train.steps, optimizer))


def train_step(state: TrainState, batch: Batch) -> Metrics:
    """One SGD step; the metrics are those of `batch` before the step."""
    state.model.train()
    metrics = measure(state.model(batch.image), batch.label)
    state.optimizer.zero_grad()
    (metrics.loss / metrics.examples).backward()
    state.optimizer.step()
    state.schedule.step()
    return Metrics(metrics.loss.detach(), metrics.errors, metrics.examples)


@torch.no_grad()
def eval_step(model: ResNet, batch: Batch) -> Metrics:
    """Loss and errors of `batch` under the running statistics."""
    model.eval()
    return measure(model(batch.image), batch.label)


def measure(logits: Tensor, label: Tensor) -> Metrics:
    """Summed cross-entropy and errors."""
    loss = F.cross_entropy(logits, label, reduction="sum")
    return Metrics(loss, (logits.argmax(1) != label).sum(), len(label))
