"""Images that are decoded as they are needed: by Grain's threads, ahead of the devices.

Which image a place of a batch holds, and how it is cut, is a pure function of (seed, step, place).
So the pixels are the same for any number of threads, processes and devices, and a run that goes on
needs to know its step alone.
"""

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from flax_resnet.config import DataConfig
from flax_resnet.data import order, views
from flax_resnet.data.encoded import Images
from flax_resnet.errors import TrainingError

MOST_BYTES_AHEAD = 2**28  # of images that wait for the devices
BATCHES_AHEAD = 2
WORKER = "grain-process-prefetch"  # in the names of Grain's processes
SECONDS_BETWEEN_LOOKS = 1.0

Places = Int[np.ndarray, " b"]  # of a batch, that this process is to fill


class Slots(NamedTuple):
    """For Grain: the images of all places of all batches from a step on, one after the other."""

    config: DataConfig
    images: Images
    seed: int | None  # None: in order, for an evaluation
    batch_size: int
    places: Places
    first: int  # step
    last: int

    def size(self) -> int:
        return (self.last - self.first) * len(self.places)

    def image(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        step, place = divmod(number, len(self.places))
        example = (self.first + step) * self.batch_size + int(self.places[place])
        if self.seed is None:
            return self.evaluated(example)
        epoch, position = divmod(example, len(self.images))
        index = int(order.permutation(self.seed, epoch, len(self.images))[position])
        words = order.random_integers(self.seed, order.VIEW, example, views.NUM_WORDS)
        return self.images.seen(index, lambda x: views.training(x, self.config, words))

    def evaluated(self, example: int) -> UInt8[np.ndarray, "h w 3"]:
        """Zeros beyond the last one."""
        if example >= len(self.images):
            return np.zeros((self.config.side, self.config.side, 3), np.uint8)
        return self.images.seen(example, lambda x: views.evaluation(x, self.config))


class Source:
    """`Slots` as Grain asks for it."""

    def __init__(self, slots: Slots):
        self.slots = slots

    def __len__(self) -> int:
        return self.slots.size()

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.slots.image(index)


def training(
    config: DataConfig,
    images: Images,
    seed: int,
    batch_size: int,
    places: Places,
    first: int,
    last: int,
) -> Generator[UInt8[np.ndarray, "b h w 3"]]:
    """What the steps from `first` to before `last` see in these places of their batches.

    To be closed, like every generator, when it is not read to its end.

    Raises:
        DatasetError: an image cannot be read.
    """
    return batches(Slots(config, images, seed, batch_size, places, first, last))


def evaluation(
    config: DataConfig, images: Images, batch_size: int, places: Places
) -> Generator[UInt8[np.ndarray, "b h w 3"]]:
    """All images in order, in as many batches as it takes, the last one filled up with zeros."""
    last = -(-len(images) // batch_size)
    return batches(Slots(config, images, None, batch_size, places, 0, last))


def batches(slots: Slots) -> Generator[UInt8[np.ndarray, "b h w 3"]]:
    config, size = slots.config, len(slots.places)
    ahead = min(BATCHES_AHEAD * size, MOST_BYTES_AHEAD // (3 * config.side**2))
    threads = config.num_threads
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    found = grain.MapDataset.source(Source(slots)).to_iter_dataset(read)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # which Grain's processes ask
            flags.FLAGS.mark_as_parsed()
        # Python's tracker of shared memory takes what Grain frees itself to be forgotten.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        buffer = max(1, ahead // config.workers)
        found = found.mp_prefetch(grain.MultiprocessingOptions(config.workers, buffer))
    iterator = iter(found.batch(size))
    if config.workers:
        yield from watched(iterator)
        return
    try:
        yield from iterator
    finally:
        iterator.close()


def watched(iterator: Any) -> Generator[UInt8[np.ndarray, "b h w 3"]]:
    """What an iterator with processes of its own gives, as long as none of them dies.

    Grain may wait for ever for one that is killed while it hands an image over.

    Raises:
        TrainingError: one has died.
    """
    results: queue.Queue[Any] = queue.Queue(1)
    is_over = threading.Event()

    def read() -> None:
        try:
            for batch in iterator:
                results.put(batch)
                if is_over.is_set():
                    return
            results.put(None)
        except Exception as e:  # which the reader raises again
            results.put(e)
        finally:
            iterator.close()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    known: set[Any] = set()
    try:
        while True:
            known |= {x for x in multiprocessing.active_children() if WORKER in x.name}
            check_alive(known)
            try:
                found = results.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                continue
            if found is None:
                return
            if isinstance(found, Exception):
                check_alive(known)  # of which Grain says less
                raise found
            yield found
    finally:
        is_over.set()
        if any(x.exitcode for x in known):  # there is no end to wait for
            for process in known:
                process.kill()
        else:
            while reader.is_alive():
                with contextlib.suppress(queue.Empty):
                    results.get(timeout=0.1)


def check_alive(processes: Iterable[Any]) -> None:
    """Raises TrainingError if one of them has died."""
    dead = [process.exitcode for process in processes if process.exitcode]
    if dead:
        raise TrainingError(
            f"a process that decodes images has died (exit code {dead[0]}; -9 is what a machine "
            "without memory left does): the same command goes on from the last checkpoint, with "
            "fewer of them by --config.data.workers"
        )
