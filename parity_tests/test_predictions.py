"""Claim: each image's prediction is that of the network, and its views' probabilities are averaged.

However many images go through the network at once, in whatever order their sizes come. In float64;
the truth is the network called on one view after another.
"""

import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_resnet.config import DataConfig, DType, Preprocess, ResNetConfig
from flax_resnet.data import pixels
from flax_resnet.data.examples import Examples
from flax_resnet.data_config import Dataset
from flax_resnet.errors import ConfigError
from flax_resnet.parallel import sharding
from flax_resnet.step import Metrics, Program
from flax_resnet.training import predictions
from flax_resnet.training.evaluation import (
    TANJEFFREYZ_BATCH_SIZE,
    Evaluation,
    make_evaluate_by_batch_statistics,
)
from flax_resnet.training.predictions import Network, predict
from parity_tests.pair import Pair, make_pair

RNG = np.random.default_rng(15)
CONSTANTS = pixels.make_normalization(Preprocess.IMAGENET)
SIZES = [(32, 32), (32, 48), (48, 32)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(ResNetConfig.paper(8, dtype=DType.FLOAT64))


@pytest.fixture(scope="module")
def network(pair: Pair) -> Network:
    return Network(pair.graphdef, pair.params, pair.batch_stats, CONSTANTS, batch_size=8, side=32)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), np.uint8)


def logits(pair: Pair, image: np.ndarray) -> np.ndarray:
    model = pair.model()
    model.eval()
    return np.asarray(model(pixels.normalize(jnp.asarray(image), CONSTANTS, jnp.float64)))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Linear(Network):
    """Logits that are sums of pixels, in NumPy: nothing is compiled."""

    def __init__(self, batch_size: int):
        self.batch_size, self.shown = batch_size, []
        self.kernel = RNG.normal(size=(48, 48, 3, 10)) / 1e4

    def rows(self, height: int, width: int) -> int:
        return self.batch_size

    def logits(self, image: np.ndarray) -> np.ndarray:
        return np.einsum("bhwc,hwcn->bn", image, self.kernel[: image.shape[1], : image.shape[2]])

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[Metrics, np.ndarray]:
        self.shown.append(len(image))
        return Metrics.zeros(), np.log(softmax(self.logits(image)))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_probabilities_of_all_views_are_averaged(batch_size: int) -> None:
    """Images have one to three views, of sizes that come in any order; the last has none."""
    network = Linear(batch_size)
    found = [
        [noise(1 + i % 2, *SIZES[i % 3])] + [noise(1, 32, 32)] * (i % 5 == 0) for i in range(23)
    ]
    label = RNG.integers(0, 10, 24).astype(np.int32)
    result = predict(network, label, lambda i: [*found, []][i], threads=3)
    for i, images in enumerate(found):
        mean = np.concatenate([softmax(network.logits(view)) for view in images]).mean(0)
        order = np.argsort(-mean)[:5]
        np.testing.assert_array_equal(result.top[i], order)
        np.testing.assert_allclose(result.probability[i], mean[order], rtol=1e-12)
        np.testing.assert_allclose(result.loss[i], -np.log(mean[label[i]]), rtol=1e-12)
    assert result.views == 3
    assert (result.top[-1] == -1).all()
    assert np.isnan(result.loss[-1])
    assert max(network.shown) <= batch_size
    assert len(network.shown) <= 40 // batch_size + 3, "batches are filled where they can be"


def test_top_5_error_counts_the_images_whose_class_is_not_among_them() -> None:
    images, network = noise(40, 32, 32), Linear(8)
    order = np.argsort(-network.logits(images), 1)
    label = order[np.arange(40), np.arange(40) % 10].astype(np.int32)  # the i-th likeliest
    result = predict(network, label, lambda i: [images[i : i + 1]])
    summary = result._replace(metrics=None).summary()
    assert (summary["test_error"], summary["top5_error"]) == (0.9, 0.5)


@pytest.mark.slow
def test_a_single_view_is_counted_as_an_evaluation_does(pair: Pair, network: Network) -> None:
    """To the bit: what scripts/evaluate.py printed before it told of five classes."""
    examples = Examples(noise(30, 32, 32), RNG.integers(0, 10, 30).astype(np.int32))
    program = Program(pair.graphdef, Any, None, 0.0, 1)  # pyright: ignore
    mesh = sharding.data_mesh()
    evaluate = Evaluation(pair.config, program, CONSTANTS, mesh, 8)
    arguments = sharding.replicate(mesh, (pair.params, pair.batch_stats, examples))
    expected = evaluate(*arguments).mean()
    found = predict(network, examples.label, lambda i: [examples.image[i : i + 1]]).summary()
    assert (found["test_error"], found["test_loss"]) == (expected["error"], expected["loss"])


@pytest.mark.slow
def test_batch_statistics_are_those_of_tanjeffreyz_batches(pair: Pair) -> None:
    """Of 128 images in order, and at last of what is left."""
    examples = Examples(noise(200, 32, 32), RNG.integers(0, 10, 200).astype(np.int32))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    evaluate = make_evaluate_by_batch_statistics(pair.config, CONSTANTS, mesh)
    expected = evaluate(pair.params, pair.batch_stats, examples).mean()
    network = Network(
        *(pair.graphdef, pair.params, pair.batch_stats, CONSTANTS),
        batch_size=TANJEFFREYZ_BATCH_SIZE,
        side=32,
        by_batch_statistics=True,
    )
    found = predict(network, examples.label, lambda i: [examples.image[i : i + 1]]).summary()
    assert (found["test_error"], found["test_loss"]) == (expected["error"], expected["loss"])


def test_a_batch_is_filled_up_to_few_sizes() -> None:
    """To whole ones as `Evaluation` does, or where there was no whole one to a power of two."""
    mesh = types.SimpleNamespace(size=1)

    def network(**settings: bool) -> Any:
        usual = {"fills_up": False, "by_batch_statistics": False, "pixels": 100 * 32 * 32}
        return types.SimpleNamespace(
            **(usual | settings),
            mesh=mesh,
            seen=set(),
            rows=lambda h, w: Network.rows(network(), h, w),  # pyright: ignore
        )

    def padded(network: Any, *numbers: int, side: int = 32) -> list[int]:
        return [Network.padded(network, (n, side, side, 3)) for n in numbers]

    assert padded(network(fills_up=True), 5, 100) == [100, 100]
    assert padded(network(), 1, 5, 64, 65, 100, 5) == [1, 8, 64, 100, 100, 100]
    assert padded(network(by_batch_statistics=True), 5, 100) == [5, 100]
    assert padded(network(), 3, 25, side=64) == [4, 25]


@pytest.mark.slow
def test_only_the_outputs_that_are_named_compete(pair: Pair) -> None:
    """In the order of the labels."""
    outputs, image = [7, 2, 5], noise(1, 32, 32)
    weights = pair.graphdef, pair.params, pair.batch_stats
    network = Network(*weights, CONSTANTS, outputs=outputs, batch_size=1, side=32)
    result = predict(network, np.array([1], np.int32), lambda i: [image])
    expected = softmax(logits(pair, image)[0, outputs])
    order = np.argsort(-expected)
    np.testing.assert_array_equal(result.top[0], order)
    np.testing.assert_allclose(result.probability[0], expected[order], rtol=1e-12)
    np.testing.assert_allclose(result.loss, -np.log(expected[1]), rtol=1e-12)


def test_what_a_look_raises_ends_the_prediction() -> None:
    def look(i: int) -> Sequence[np.ndarray]:
        if i == 30:
            raise ConfigError("image 30 is none")
        return [noise(1, 32, 32)]

    with pytest.raises(ConfigError, match="image 30 is none"):
        predict(Linear(8), np.zeros(50, np.int32), look, threads=2)


def test_a_mean_image_fits_its_own_size_alone(pair: Pair) -> None:
    constants = pixels.make_normalization(Preprocess.MEAN_IMAGE, noise(5, 32, 32))
    network = Network(
        pair.graphdef, pair.params, pair.batch_stats, constants, batch_size=1, side=32
    )
    with pytest.raises(ConfigError, match="another than mean_image for images of 48 x 32"):
        predict(network, np.zeros(1, np.int32), lambda i: [noise(1, 32, 48)])


def test_the_views_of_a_photograph() -> None:
    config = DataConfig(name=Dataset.FOLDER, dir="images", resize=40, crop=32)
    image = Image.fromarray(noise(80, 120))
    (one,) = predictions.as_evaluated(image, config)
    (ten,) = predictions.ten_crops(image, config)
    assert (one.shape, ten.shape) == ((1, 32, 32, 3), (10, 32, 32, 3))
    np.testing.assert_array_equal(ten[4], one[0])
    scales = predictions.at_scales(image, config, (32, 64))
    assert [x.shape for x in scales] == [(2, 32, 32, 3), (2, 64, 96, 3)]
    for whole, mirrored in scales:
        np.testing.assert_array_equal(whole[:, ::-1], mirrored)
