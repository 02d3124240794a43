"""What a network says of every single image: its likeliest classes, and how wrong they are.

An image may be looked at in several ways, whose probabilities are averaged.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from jaxtyping import Float, Int, UInt8
from PIL import Image

from flax_resnet.config import DataConfig
from flax_resnet.data import pixels, views
from flax_resnet.data.encoded import Images
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import ConfigError
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.scan import Tree
from flax_resnet.parallel import sharding
from flax_resnet.step import Metrics, measure

MOST_SHOWN = 5  # likeliest classes that are kept of each image
AHEAD = 64  # images that are decoded before the network wants them, at least

Pixels = UInt8[np.ndarray, "v h w 3"]  # views of one image, of the same size
Look = Callable[[int], Sequence[Pixels]]  # the views of an image by its number


class Predictions(NamedTuple):
    """The images of a split in their order. An image that could not be read has class -1."""

    label: Int[np.ndarray, " n"]  # the true class; -1: not known
    top: Int[np.ndarray, "n k"]  # the likeliest classes, the first one first; k is at most 5
    probability: Float[np.ndarray, "n k"]  # of these
    loss: Float[np.ndarray, " n"]  # cross-entropy of the true class, in nats; NaN: not known
    views: int  # of each image
    metrics: Metrics | None  # as an `Evaluation` sums them up, of a single view

    def summary(self) -> dict[str, float]:
        """Parts of the images: those whose likeliest class is wrong, and all of the five are."""
        hits = self.top == self.label[:, None]
        error, loss = float((~hits[:, 0]).mean()), float(self.loss.mean())
        if self.metrics is not None:
            mean = self.metrics.mean()
            error, loss = mean["error"], mean["loss"]
        top5_error = float((~hits.any(1)).mean())
        return {"test_error": error, "top5_error": top5_error, "test_loss": loss}


class Network:
    """A network that is shown uint8 images on this process's devices.

    Numbers are of the parameters' type, so of float64 where they are.

    Args:
        graphdef, params, batch_stats: of `resnet.split(model)`, or a Program's and a TrainState's.
        outputs: which of the network's compete, in the order of the labels; None: all.
        batch_size: of images of `side` pixels at once; fewer of larger ones, more of smaller ones.
        fills_up: the last batch to a whole one, as `Evaluation` does; else, where no whole one came
            before, to a power of two, which is less to compute of a few images.
        by_batch_statistics: tanjeffreyz's slip, see `make_evaluate_by_batch_statistics`; then no
            batch is filled up.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Tree,
        batch_stats: Tree,
        constants: Normalization,
        *,
        outputs: Sequence[int] | None = None,
        batch_size: int,
        side: int,
        fills_up: bool = True,
        by_batch_statistics: bool = False,
    ):
        devices = jax.local_devices()[: 1 if by_batch_statistics else None]
        self.mesh = Mesh(np.array(devices), (sharding.AXIS,), axis_types=(AxisType.Auto,))
        self.weights = sharding.replicate(self.mesh, (params, batch_stats))
        self.constants, self.pixels = constants, batch_size * side**2
        self.fills_up, self.by_batch_statistics = fills_up, by_batch_statistics
        self.seen: set[tuple[int, ...]] = set()  # sizes of which there was a whole batch
        dtype = jax.tree.leaves(params)[0].dtype
        chosen = None if outputs is None else np.asarray(outputs)

        def look(
            weights: tuple[Tree, Tree], image: jax.Array, label: jax.Array
        ) -> tuple[Metrics, jax.Array]:
            model = nnx.merge(graphdef, *weights, copy=True)
            if not by_batch_statistics:
                model.eval()
            logits = model(pixels.normalize(image, constants, dtype))
            logits = logits if chosen is None else logits[:, chosen]
            return measure(logits, label), jax.nn.log_softmax(logits)

        self.look = jax.jit(look, compiler_options=compiler_options())

    def rows(self, height: int, width: int) -> int:
        """How many images of a size go through the network at once."""
        most = max(1, self.pixels // (height * width))
        return -(-most // self.mesh.size) * self.mesh.size

    def padded(self, shape: tuple[int, ...]) -> int:
        """To how many images a batch is filled up."""
        number, rows = shape[0], self.rows(*shape[1:3])
        if self.by_batch_statistics:
            return number
        if number == rows:
            self.seen.add(shape[1:])
        if self.fills_up or shape[1:] in self.seen:
            return rows
        power = 1 << (number - 1).bit_length()
        return min(-(-power // self.mesh.size) * self.mesh.size, rows)

    def __call__(
        self, image: UInt8[np.ndarray, "b h w 3"], label: Int[np.ndarray, " b"]
    ) -> tuple[Metrics, Float[np.ndarray, "b classes"]]:
        """Summed metrics, on the devices, and each image's logarithms of probabilities.

        Args:
            label: -1: counts nowhere.

        Raises:
            ConfigError: images of this size cannot be normalised.
        """
        size = image.shape[1:3]
        mean = self.constants.mean
        if mean is not None and mean.ndim == 3 and mean.shape[:2] != size:
            height, width = mean.shape[:2]
            raise ConfigError(
                f"data.preprocess must be another than mean_image for images of {size[1]} x "
                f"{size[0]} pixels: the mean image has {width} x {height}"
            )
        missing = self.padded(image.shape) - len(image)
        padded = np.pad(image, [(0, missing), (0, 0), (0, 0), (0, 0)])
        labels = np.pad(label, (0, missing), constant_values=-1).astype(np.int32)
        batch = sharding.split_batch(self.mesh, (padded, labels))
        metrics, found = self.look(self.weights, *batch)
        return metrics, np.asarray(found)[: len(image)]


def predict(
    network: Network,
    label: Int[np.ndarray, " n"],
    look: Look,
    *,
    threads: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """What the network says of all images, averaged over the views of each.

    Images of one size go through the network together. Never more of them wait than fill a batch
    of each size, so that the memory does not grow with the number of images.

    Args:
        label: of each image; -1: not known.
        look: gives the views of an image; none, if there is no such image. Called in threads,
            ahead of the network. What it raises ends the prediction.
        threads: how many; 0: in this one, when the network wants them.
        after: is called with the number of images that have been read.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = collections.defaultdict(list)
    sums: dict[int, tuple[np.ndarray | float, int]] = {}  # of probabilities, as logarithms
    left: dict[int, int] = {}  # views of an image that are still to come
    size, most = len(label), 0
    result: dict[str, Any] = {"loss": np.full(size, np.nan)}
    metrics = Metrics.zeros()

    def flush(shape: tuple[int, ...], rows: int) -> None:
        nonlocal metrics
        batch, waiting[shape] = waiting[shape][:rows], waiting[shape][rows:]
        index = [i for i, _ in batch]
        summed, found = network(np.stack([view for _, view in batch]), label[index])
        metrics = metrics.plus(summed)
        for i, logarithms in zip(index, found, strict=True):
            total, count = sums.get(i, (-np.inf, 0))
            sums[i] = np.logaddexp(total, logarithms) if count else logarithms, count + 1
            left[i] -= 1
            if not left[i]:
                finish(i, *sums.pop(i))

    def finish(i: int, total: Any, count: int) -> None:
        logarithms = total - np.log(count) if count > 1 else total
        order = np.argsort(-logarithms, kind="stable")[:MOST_SHOWN]
        if "top" not in result:
            result["top"] = np.full((size, len(order)), -1, np.int32)
            result["probability"] = np.full(result["top"].shape, np.nan, logarithms.dtype)
        result["top"][i], result["probability"][i] = order, np.exp(logarithms[order])
        if label[i] >= 0:
            result["loss"][i] = -logarithms[label[i]]

    for i, found in enumerate(ahead(look, size, threads)):
        after(i + 1)
        left[i] = sum(map(len, found))
        most = max(most, left[i])
        for view in [view for part in found for view in part]:
            waiting[view.shape].append((i, view))
            rows = network.rows(*view.shape[:2])
            if len(waiting[view.shape]) >= rows:
                flush(view.shape, rows)
    for shape, rest in waiting.items():
        if rest:
            flush(shape, len(rest))
    nothing = np.full((size, 0), -1)
    return Predictions(
        label,
        result.get("top", nothing),
        result.get("probability", nothing.astype(float)),
        result["loss"],
        most,
        metrics if most == 1 else None,
    )


def ahead(look: Look, size: int, threads: int) -> Iterator[Sequence[Pixels]]:
    """`look(0)`, `look(1)` and so on, by threads a few of them ahead of whoever asks."""
    if not threads:
        yield from map(look, range(size))
        return
    most = max(AHEAD, 4 * threads)
    with ThreadPoolExecutor(threads) as pool:
        running: collections.deque[Future[Sequence[Pixels]]] = collections.deque()
        try:
            for i in range(size):
                running.append(pool.submit(look, i))
                if len(running) == most:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def looks(split: Examples | Images, view: Callable[[Image.Image], list[Pixels]]) -> Look:
    """The views of each image of a split. Resident images are shown as they are.

    An image that cannot be read raises a DatasetError.
    """
    if isinstance(split, Examples):
        return lambda i: [split.image[i : i + 1]]
    return lambda i: split.seen(i, view)


def as_evaluated(image: Image.Image, config: DataConfig) -> list[Pixels]:
    """The middle of the image: one view."""
    return [views.evaluation(image, config)[None]]


def ten_crops(image: Image.Image, config: DataConfig) -> list[Pixels]:
    """Corners, middle and mirror images, whose probabilities AlexNet and the paper average."""
    return [views.ten_crops(image, config)]


def at_scales(image: Image.Image, config: DataConfig, scales: Sequence[int]) -> list[Pixels]:
    """The whole image and its mirror image, with short sides of so many pixels.

    The fully convolutional test that the paper takes from VGG. There the classifier is applied at
    every place of the last stage, and its scores are averaged over the places. Here the places are
    averaged first; since the classifier is linear, the scores are the same. Windows of 7 x 7
    places, as VGG has them, would count those near the edge less. The paper averages "scores" over
    the scales and does not say of which kind. VGG averages probabilities, over scales and over
    the image and its mirror image, and so does this.
    """
    found = [views.whole(image, scale, config.interpolation) for scale in scales]
    return [np.stack([x, x[:, ::-1]]) for x in found]
