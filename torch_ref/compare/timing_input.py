"""Images a second of the input alone: ours, and PyTorch's DataLoader with torchvision's transforms.

Both read the same folder of JPEGs. Each variant has a process of its own; they take turns. A turn
begins with batches that do not count, since a loader fills its buffer while others have theirs.
"""

import itertools
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flax_resnet.config import DataConfig, Dataset
from flax_resnet.data import order, source, stream, views
from flax_resnet.data.encoded import Images
from flax_resnet.errors import ConfigError

PHASES = ("train", "eval")
BATCH = 64
SIZE = 500, 375  # of a photograph, in pixels
UNCOUNTED = 4  # batches at the beginning of a turn: what was made ahead
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADER = (
    "| phase | input | images/s (min-max) | x best PyTorch | MiB (growth) |\n|---|---|---|---|---|"
)


class Loader(NamedTuple):
    """A way to read a folder."""

    framework: str  # flax or torch
    phase: str  # train or eval
    threads: int
    workers: int
    is_chain: bool = False  # of ours: one image after the other, with nothing around
    is_uint8: bool = False  # of PyTorch's: not made numbers, as ours are not

    @property
    def name(self) -> str:
        if self.is_chain:
            return "ours, one image after the other"
        if self.framework == "torch":
            return f"DataLoader, {self.workers} workers" + ", uint8" * self.is_uint8
        return f"ours, {self.workers or self.threads} {'workers' if self.workers else 'threads'}"


class Rate(NamedTuple):
    """A row: what a loader gave in its turns."""

    loader: Loader
    rates: list[float]  # images a second, of each turn
    memory: list[int]  # bytes of its processes, after each turn

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def growth(self) -> float:
        """Of the memory, from the second turn to the last, as a share."""
        return self.memory[-1] / self.memory[min(1, len(self.memory) - 1)] - 1

    def to_dict(self) -> dict[str, Any]:
        row = self.loader._asdict() | {"variant": self.loader.name, "batch_size": BATCH}
        return row | {
            "images_per_second": self.median,
            "images_per_second_min": min(self.rates),
            "images_per_second_max": max(self.rates),
            "peak_mib": round(max(self.memory) / 2**20),
            "memory_growth": self.growth,
            "cpu_cores": os.cpu_count(),
            "python": platform.python_version(),
        }


def write_photos(photos: Path, root: Path, number: int) -> None:
    """Makes JPEGs in DIR/train/CLASS/, of ImageNet's size, from parts of other photographs."""
    found = sorted(x for x in photos.rglob("*") if x.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise ConfigError(f"--photos must be a folder with photographs, got {photos}")
    whole = [Image.open(path).convert("RGB") for path in found]
    rng = random.Random(0)
    for i in range(number):
        image = whole[i % len(whole)]
        side = rng.uniform(0.5, 1) * min(image.width / SIZE[0], image.height / SIZE[1])
        width, height = side * SIZE[0], side * SIZE[1]
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        part = image.resize(SIZE, box=(left, top, left + width, top + height))
        folder = root / "train" / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        part.save(folder / f"{i:05d}.jpg", quality=95)


def loaders(
    phase: str, frameworks: Sequence[str], threads: Sequence[int], workers: Sequence[int]
) -> list[Loader]:
    """All ways to read that are compared.

    Args:
        threads: of our own, with no workers.
        workers: of PyTorch's, and of ours with a thread each, but for 0.
    """
    found: list[Loader] = []
    if "flax" in frameworks:
        found.append(Loader("flax", phase, 1, 0, is_chain=True))
        found += [Loader("flax", phase, number, 0) for number in threads]
        found += [Loader("flax", phase, 1, number) for number in workers if number]
    if "torch" in frameworks:
        found += [
            Loader("torch", phase, 1, number, is_uint8=is_uint8)
            for number in workers
            for is_uint8 in (False, True)
        ]
    return found


def take_turns(
    found: list[Loader],
    root: Path,
    repeats: int,
    seconds: float,
    report_failure: Callable[[Loader], None],
) -> Iterator[Rate]:
    """Each loader's rates, after `repeats` turns of so many seconds.

    Args:
        report_failure: called with one that could not begin; the others go on.
    """
    running: list[tuple[Loader, Connection, Any]] = []
    try:
        for loader in found:
            begin(loader, root, running, report_failure)
        results: list[list[tuple[float, int]]] = [[] for _ in running]
        for _ in range(repeats):
            for (_, connection, _), result in zip(running, results, strict=True):
                connection.send(seconds)
                result.append(connection.recv())
        for (loader, connection, process), result in zip(running, results, strict=True):
            connection.send(0)
            process.join()
            rates, memory = zip(*result, strict=True)
            yield Rate(loader, list(rates), list(memory))
    finally:
        for _, _, process in running:
            process.kill()


def begin(
    loader: Loader,
    root: Path,
    running: list[tuple[Loader, Connection, Any]],
    report_failure: Callable[[Loader], None],
) -> None:
    """Starts a loader's process and waits for its first batch."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, loader, root))
    process.start()
    theirs.close()
    try:
        ours.recv()
    except EOFError:
        report_failure(loader)
    else:
        running.append((loader, ours, process))


def serve(connection: Connection, loader: Loader, root: Path) -> None:
    """Runs in the loader's own process: reads for so many seconds whenever told to."""
    batches = ours(loader, root) if loader.framework == "flax" else theirs(loader, root)
    next(batches)
    connection.send("ready")
    while seconds := connection.recv():
        for _ in range(UNCOUNTED):
            next(batches)
        began, number = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            number += len(next(batches))
        connection.send((number / (time.perf_counter() - began), memory()))
    batches.close()


def ours(loader: Loader, root: Path) -> Generator[Any]:
    """uint8 (b, 224, 224, 3), epoch after epoch."""
    config = DataConfig(name=Dataset.FOLDER, dir=str(root))
    config.threads, config.workers = loader.threads, loader.workers
    images = source.load_files(config)["train"]
    if loader.is_chain:
        yield from chain(loader, config, images)
    elif loader.phase == "train":
        yield from stream.training(config, images, 0, BATCH, np.arange(BATCH), 0, 10**6)
    else:
        while True:
            yield from stream.evaluation(config, images, BATCH, np.arange(BATCH))


def chain(loader: Loader, config: DataConfig, images: Images) -> Generator[Any]:
    def view(number: int) -> Any:
        index = number % len(images)
        if loader.phase == "eval":
            return images.seen(index, lambda x: views.evaluation(x, config))
        words = order.random_integers(0, order.VIEW, number, views.NUM_WORDS)
        return images.seen(index, lambda x: views.training(x, config, words))

    for first in itertools.count(0, BATCH):
        yield np.stack([view(first + i) for i in range(BATCH)])


def theirs(loader: Loader, root: Path) -> Generator[Any]:
    """float32 (b, 3, 224, 224), epoch after epoch."""
    # torchvision's compiled operators may be of another build of torch; none is needed here.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    is_training = loader.phase == "train"
    cut = (
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        if is_training
        else [transforms.Resize(256), transforms.CenterCrop(224)]
    )
    numbers: list[Callable[..., Any]] = (
        [transforms.PILToTensor()]
        if loader.is_uint8
        else [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    )
    images = ImageFolder(str(root / "train"), transforms.Compose([*cut, *numbers]))
    batches = DataLoader(
        images,
        BATCH,
        shuffle=is_training,
        num_workers=loader.workers,
        persistent_workers=loader.workers > 0,
        multiprocessing_context="fork" if loader.workers else None,  # its own choice on Linux
    )
    while True:
        for image, _ in batches:
            yield image


def memory() -> int:
    """Bytes of this process and those that it has started; what they share counts once."""
    processes = [os.getpid(), *(x.pid for x in multiprocessing.active_children())]
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    return total


def table(rates: Sequence[Rate]) -> str:
    """In Markdown; the ratios are to the fastest DataLoader that makes numbers."""
    lines = [HEADER]
    for rate in rates:
        best = max(
            (
                x.median
                for x in rates
                if x.loader.framework == "torch"
                and x.loader.phase == rate.loader.phase
                and not x.loader.is_uint8
            ),
            default=None,
        )
        ratio = f"{rate.median / best:.2f}" if best else "-"
        lines.append(
            f"| {rate.loader.phase} | {rate.loader.name} "
            f"| {rate.median:.0f} ({min(rate.rates):.0f}-{max(rate.rates):.0f}) | {ratio} "
            f"| {max(rate.memory) / 2**20:.0f} ({100 * rate.growth:+.0f} %) |"
        )
    return "\n".join(lines)
