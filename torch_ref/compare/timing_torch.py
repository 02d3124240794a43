"""A PyTorch variant made ready to be timed, with all that makes PyTorch fast.

channels_last and all cores; on a GPU TF32, bfloat16 autocast, fused SGD, torch.compile's modes and
captured CUDA graphs. The data is on the device, too, and so is what the steps of a round see of it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor

from flax_resnet.config import DType, Experiment
from flax_resnet.data import pixels
from flax_resnet.training.feed import draw_steps
from torch_ref import pixels as torch_pixels
from torch_ref.compare.timing import (
    NUM_EXAMPLES,
    Prepared,
    Ready,
    Variant,
    cpu_name,
    random_examples,
)
from torch_ref.step import TrainState, eval_step, init, measure, micro_batches

COMPILE_MODES = {  # of torch.compile
    "inductor": "default",
    "inductor in a cuda graph": "default",
    "max-autotune": "max-autotune",
}
Run = Callable[[int], None]  # so many steps, or the start of them
Drawn = tuple[Tensor, ...]  # indices, offset, flip; and the fields of a Mix, if there is one


class Data(NamedTuple):
    """The random examples on the device, and how their pixels become numbers."""

    device: str
    image: Tensor  # uint8 (n, h, w, 3)
    label: Tensor  # (n,)
    constants: tuple[float, Any, Any]  # scale, mean (or None), std
    dtype: torch.dtype

    def normalized(self, indices: Tensor) -> Tensor:
        """Those images as numbers (b, 3, h, w)."""
        return torch_pixels.normalize(self.image[indices], *self.constants, self.dtype)


def prepare(variant: Variant) -> Prepared:
    """Compiles the variant and runs it a few times."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    jax.config.update("jax_platforms", "cpu")  # it draws, on the host
    config = variant.config
    data = make_data(config)
    state = init(config)
    # PyTorch's own stubs leave memory_format out.
    state.model.to(data.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if data.device == "cuda":
        state.optimizer.param_groups[0]["fused"] = True
    mode = COMPILE_MODES.get(variant.name)
    forward = torch.compile(state.model, mode=mode) if mode else state.model
    autocast = torch.autocast(
        data.device,
        torch.bfloat16,
        enabled=config.model.dtype is DType.BFLOAT16,
        cache_enabled=False,
    )
    if variant.phase == "eval":
        start = evaluation(config, data, forward, autocast)
    else:
        is_graph = variant.name.endswith("cuda graph")
        train = training(config, data, state, forward, autocast, keep_gradients=is_graph)
        state.model.train()
        start = captured(config, data, train) if is_graph else step_by_step(config, data, train)

    def run(count: int) -> None:
        start(count)
        if data.device == "cuda":
            torch.cuda.synchronize()

    run(4)
    name = torch.cuda.get_device_name() if data.device == "cuda" else cpu_name()
    return Prepared(Ready(name, torch.__version__, {}, 1), run, dict)


def make_data(config: Experiment) -> Data:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float64 if config.model.dtype is DType.FLOAT64 else torch.float32
    examples = random_examples(config)
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    mean, std = (
        None if x is None else torch.tensor(x, device=device, dtype=dtype) for x in constants[1:]
    )
    label = torch.tensor(examples.label, device=device).long()
    image = torch.tensor(examples.image, device=device)
    return Data(device, image, label, (constants.scale, mean, std), dtype)


def evaluation(config: Experiment, data: Data, forward: Any, autocast: torch.autocast) -> Run:
    """The first four batches over and over."""
    size = config.train.batch_size

    def run(count: int) -> None:
        for i in range(count):
            part = torch.arange(i % 4 * size, (i % 4 + 1) * size, device=data.device) % NUM_EXAMPLES
            x = data.normalized(part)
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast:
                eval_step(forward, torch_pixels.Batch(x, data.label[part]))

    return run


def training(
    config: Experiment,
    data: Data,
    state: TrainState,
    forward: Any,
    autocast: torch.autocast,
    *,
    keep_gradients: bool,
) -> Callable[..., None]:
    """One step on what was drawn.

    Args:
        keep_gradients: set to zero, not given back: a captured graph writes to them in place.
    """

    def seen(indices: Tensor, offset: Any, flip: Any) -> torch_pixels.Batch:
        x = data.normalized(indices)
        x = torch_pixels.crop_and_flip(x, offset, flip, config.data.pad)
        return torch_pixels.Batch(x, data.label[indices])

    def train(indices: Tensor, offset: Any, flip: Any, *mix: Any) -> None:
        batch = seen(indices, offset, flip)
        if mix:
            *drawn, share, box = mix
            other = seen(*drawn)
            share = share.to(data.dtype)
            x = torch_pixels.mix(batch.image, other.image, share, box)
            batch = torch_pixels.Batch(x, batch.label, other.label, share)
        for x, label, other, share in micro_batches(batch, state.accumulate):
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast:
                metrics = measure(forward(x), label, other, share, state.label_smoothing)
            (metrics.loss / metrics.examples / state.accumulate).backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=not keep_gradients)

    return train


def step_by_step(config: Experiment, data: Data, train: Callable[..., None]) -> Run:
    def run(count: int) -> None:
        for drawn in draw(config, data, count):
            train(*drawn)

    return run


def captured(config: Experiment, data: Data, train: Callable[..., None]) -> Run:
    """The step as one CUDA graph, whose inputs are written over before each replay."""
    (slots,) = draw(config, data, 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(*slots)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(*slots)

    def run(count: int) -> None:
        for drawn in draw(config, data, count):
            for slot, new in zip(slots, drawn, strict=True):
                slot.copy_(new)
            graph.replay()

    return run


def draw(config: Experiment, data: Data, count: int) -> Iterator[Drawn]:
    """What so many steps see, sent to the device a hundred at a time, as Flax's are."""
    for first in range(0, count, 100):
        size = min(100, count - first)
        drawn = jax.tree.leaves(draw_steps(config, first, size, NUM_EXAMPLES))
        yield from zip(*(torch.as_tensor(x).to(data.device) for x in drawn), strict=True)


def peak_device_bytes() -> int | None:
    """Of the GPU; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
