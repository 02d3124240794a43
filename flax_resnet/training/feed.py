"""How the training images come to the devices: once and for all, or step by step as they stream."""

from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet.config import Experiment
from flax_resnet.data import order, pixels, stream
from flax_resnet.data.encoded import Images
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw
from flax_resnet.data.pixels import Batch, Normalization, Seen, Streamed
from flax_resnet.parallel import sharding
from flax_resnet.resnet import param_dtype


class Resident:
    """All images are on the devices, as `constant`; a step is told which of them it sees."""

    most_steps = None  # that go into one call unless `steps_per_call` says so; None: any number

    def __init__(self, config: Experiment, mesh: Mesh, constant: Examples):
        self.config, self.mesh, self.constant = config, mesh, constant

    def deal(self, step: int, size: int) -> Draw:
        """What the next `size` steps see, on the devices."""
        drawn = draw_steps(self.config, step, size, len(self.constant.label))
        return sharding.split_batch(self.mesh, drawn, self.config.parallel, axis=1)

    def like(self, size: int) -> Draw:
        """Arrays such as `deal` returns, for the compiler."""
        drawn = like_steps(self.config, size, len(self.constant.label))
        return sharding.split_like(self.mesh, drawn, self.config.parallel, axis=1)

    def close(self) -> None:
        """Ends what goes on beside the run: nothing."""


class Stream:
    """The images of each step are decoded while the devices are at the steps before."""

    constant = None
    most_steps = 1  # whose images are on the devices at once

    def __init__(self, config: Experiment, mesh: Mesh, images: Images):
        self.config, self.mesh, self.images = config, mesh, images
        self.places = sharding.local_places(mesh, config.train.batch_size)
        self.batches: Generator[np.ndarray] | None = None
        self.next: int | None = None  # step

    def deal(self, step: int, size: int) -> Streamed:
        """As of `Resident`; to be asked for in the run's order."""
        if step != self.next:
            self.begin(step)
        self.next = step + size
        assert self.batches is not None
        images = [next(self.batches) for _ in range(size)]
        image = images[0][None] if size == 1 else np.stack(images)  # without a copy if it can be
        return self.put(draw_steps(self.config, step, size, len(self.images)), image)

    def begin(self, step: int) -> None:
        self.close()
        settings = self.config.train
        self.batches = stream.training(
            *(self.config.data, self.images, self.config.seed, settings.batch_size),
            *(self.filled(), step, settings.steps),
        )

    def filled(self) -> np.ndarray:
        """The places whose images are decoded here; mixed ones need also the one before each."""
        if not (self.config.data.mixup or self.config.data.cutmix):
            return self.places
        before = (self.places - 1) % self.config.train.batch_size
        return np.union1d(self.places, before)

    def put(self, drawn: Draw, image: np.ndarray) -> Streamed:
        """Args: image: (steps, filled places, h, w, 3)."""
        filled = self.filled()

        def seen(places: np.ndarray, indices: np.ndarray) -> Seen:
            mine = image if len(places) == len(filled) and (places == filled).all() else None
            if mine is None:
                mine = image[:, np.searchsorted(filled, places)]
            return Seen(mine, self.images.label[indices[:, self.places]])

        images = seen(self.places, drawn.indices)
        others = None
        if drawn.mix is not None:
            others = seen((self.places - 1) % self.config.train.batch_size, drawn.mix.indices)
        parallel = self.config.parallel
        drawn = sharding.split_batch(self.mesh, drawn, parallel, axis=1)
        images, others = sharding.split_local(
            self.mesh, (images, others), self.places, parallel, axis=1
        )
        return Streamed(drawn, images, others)

    def like(self, size: int) -> Streamed:
        """As of `Resident`."""
        drawn = like_steps(self.config, size, len(self.images))
        places = size, self.config.train.batch_size
        image: Any = jax.ShapeDtypeStruct((*places, *[self.config.data.side] * 2, 3), np.uint8)
        label: Any = jax.ShapeDtypeStruct(places, self.images.label.dtype)
        images = Seen(image, label)
        streamed = Streamed(drawn, images, None if drawn.mix is None else images)
        return sharding.split_like(self.mesh, streamed, self.config.parallel, axis=1)

    def close(self) -> None:
        """Ends the decoding."""
        if self.batches is not None:
            self.batches.close()


Feed = Resident | Stream


def make_feed(config: Experiment, mesh: Mesh, train: Examples | Images) -> Feed:
    """Args: train: the training images, resident ones on the devices."""
    if isinstance(train, Examples):
        return Resident(config, mesh, train)
    return Stream(config, mesh, train)


def batch_of(
    config: Experiment, constant: Examples | None, dealt: Draw | Streamed, constants: Normalization
) -> Batch:
    """The preprocessed batch of one step, out of what was dealt for it. Runs inside `jit`."""
    pad, dtype = config.data.padding, param_dtype(config.model)
    if isinstance(dealt, Streamed):
        return pixels.streamed_batch(dealt, constants, pad, dtype)
    assert constant is not None
    return pixels.training_batch(constant, dealt, constants, pad, dtype)


def draw_steps(config: Experiment, step: int, size: int, num_examples: int) -> Draw:
    """What the next `size` steps see, stacked."""
    draws = [
        order.draw(config.data, config.seed, s, config.train.batch_size, num_examples)
        for s in range(step, step + size)
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *draws)


def like_steps(config: Experiment, size: int, num_examples: int) -> Draw:
    """Arrays such as `draw_steps` returns, for the compiler."""
    drawn = draw_steps(config, 0, 1, num_examples)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), drawn)
