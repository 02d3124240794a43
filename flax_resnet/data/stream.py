"""Images that are decoded as they are needed: by Grain's threads, ahead of the devices.

Which image a place of a batch holds, and how it is cut, is a pure function of (seed, step, place).
So the pixels are the same for any number of threads, processes and devices, and a run that goes on
needs to know its step alone.
"""

import contextlib
import multiprocessing
import pickle
import signal
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from flax_resnet.config import DataConfig
from flax_resnet.data import order, views
from flax_resnet.data.encoded import Images
from flax_resnet.errors import TrainingError

MOST_BYTES_AHEAD = 2**28  # of images that wait for the devices
BATCHES_AHEAD = 2
MOST_AT_A_TIME = 16  # images that a thread decodes and hands over together

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

    def decode(self, start: int, stop: int) -> UInt8[np.ndarray, "n h w 3"]:
        return np.stack([self.image(number) for number in range(start, stop)])

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
    """`Slots` as Grain's threads ask for it, some at a time: they decode, or have `pool` decode."""

    def __init__(self, slots: Slots, at_a_time: int, pool: Executor | None):
        self.slots, self.at_a_time, self.pool = slots, at_a_time, pool

    def __len__(self) -> int:
        return self.slots.size() // self.at_a_time

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "n h w 3"]:
        start, stop = index * self.at_a_time, (index + 1) * self.at_a_time
        if self.pool is None:
            return self.slots.decode(start, stop)
        try:
            return self.pool.submit(decode_in_worker, start, stop).result()
        except BrokenProcessPool as e:
            raise TrainingError(
                "a process that decodes images has died, as happens when memory runs out: the same "
                "command goes on from the last checkpoint, with fewer of them by "
                "--config.data.workers"
            ) from e


slots_of_worker: list[Slots] = []  # in a process that decodes: the one that it works for


def begin_worker(path: str) -> None:
    """Reads what this process works for. From a file: it may be large, and a pipe would block."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's affair
    slots_of_worker.append(pickle.loads(Path(path).read_bytes()))


def decode_in_worker(start: int, stop: int) -> UInt8[np.ndarray, "n h w 3"]:
    return slots_of_worker[0].decode(start, stop)


@contextlib.contextmanager
def workers(slots: Slots) -> Iterator[Executor | None]:
    """Processes that decode; None if `data.workers` wants none."""
    if not slots.config.workers:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slots")
        path.write_bytes(pickle.dumps(slots))
        context = multiprocessing.get_context("spawn")  # a fork of JAX's threads may hang
        pool = ProcessPoolExecutor(
            slots.config.workers, context, initializer=begin_worker, initargs=(str(path),)
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


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
    import grain  # which takes a second, and a resident run does without

    config, size = slots.config, len(slots.places)
    ahead = min(BATCHES_AHEAD * size, MOST_BYTES_AHEAD // (3 * config.side**2))
    with workers(slots) as pool:
        # Those that wait for processes have the next images ready for each.
        threads = 2 * config.workers or config.num_threads
        at_a_time = part_of(size, ahead // (2 * threads))
        buffer = max(ahead // at_a_time, threads)
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        parts = grain.MapDataset.source(Source(slots, at_a_time, pool)).to_iter_dataset(read)
        iterator = iter(parts.batch(size // at_a_time))
        try:
            for batch in iterator:
                yield batch.reshape(size, *batch.shape[2:])
        finally:
            iterator.close()


def part_of(size: int, most: int) -> int:
    """How many images a thread decodes at a time: `most`, or fewer, so that they divide a batch.

    If each image were handed over by itself, its thread and the one that waits for it would take
    turns with Python's lock, which costs a tenth of the time.
    """
    most = max(1, min(most, MOST_AT_A_TIME))
    return max(n for n in range(1, most + 1) if size % n == 0)
