"""One training step and one evaluation step, on a TrainState that they change in place."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from flax_resnet.config import Experiment, written_out
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
    """A network, its optimizer and its schedule; and the settings of a step."""

    model: ResNet
    optimizer: SGD
    schedule: LRScheduler
    label_smoothing: float = 0.0
    accumulate: int = 1
    frozen: tuple[nn.Module, ...] = ()  # which do not train


def init(config: Experiment) -> TrainState:
    """A network and its optimizer at step 0, a function of `config.seed` alone.

    Raises ConfigError for a seed of more than 32 bits: on a CPU PyTorch uses no more.
    """
    require(config.seed < 2**32, "seed", "below 2^32 for PyTorch", config.seed)
    torch.manual_seed(config.seed)
    model = ResNet(config.model)
    settings = config.train
    names = [
        name for name in written_out(settings.frozen) if name != "bn1" or model.bn1 is not None
    ]
    frozen = tuple(model.get_submodule(name).requires_grad_(False) for name in names)
    optimizer = make_optimizer(config.optim, model.parameters(), model.fc.parameters())
    schedule = make_schedule(config.optim, settings.steps, optimizer)
    rest = settings.label_smoothing, settings.accumulate, frozen
    return TrainState(model, optimizer, schedule, *rest)


def train_step(state: TrainState, batch: Batch) -> Metrics:
    """One SGD step; the metrics are those of `batch` before the step."""
    state.model.train()
    for module in state.frozen:
        module.eval()
    state.optimizer.zero_grad()
    parts: list[Metrics] = []
    for image, label, other, share in micro_batches(batch, state.accumulate):
        metrics = measure(state.model(image), label, other, share, state.label_smoothing)
        (metrics.loss / metrics.examples / state.accumulate).backward()
        parts.append(metrics._replace(loss=metrics.loss.detach()))
    state.optimizer.step()
    state.schedule.step()
    loss, errors = (torch.stack(sums).sum() for sums in list(zip(*parts, strict=True))[:2])
    return Metrics(loss, errors, len(batch.label))


def micro_batches(batch: Batch, accumulate: int) -> list[Batch]:
    """So many batches: the i-th has every so many-th example from the i-th on."""

    def part(i: int) -> Batch:
        rest = (None if x is None else x[i::accumulate] for x in (batch.other, batch.share))
        return Batch(batch.image[i::accumulate], batch.label[i::accumulate], *rest)

    return [part(i) for i in range(accumulate)]


@torch.no_grad()
def eval_step(model: ResNet, batch: Batch) -> Metrics:
    """Loss and errors of `batch` under the running statistics."""
    model.eval()
    return measure(model(batch.image), batch.label)


def measure(
    logits: Tensor,
    label: Tensor,
    other: Tensor | None = None,
    share: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Metrics:
    """Summed cross-entropy and errors; mixed images are measured by the class of larger share."""
    target = label
    if other is not None and share is not None:
        one, two = (F.one_hot(x, logits.shape[1]).to(logits.dtype) for x in (label, other))
        target = share[:, None] * one + (1 - share[:, None]) * two
        label = torch.where(share >= 0.5, label, other)
    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return Metrics(loss, (logits.argmax(1) != label).sum(), len(label))
