"""Claim: a step sees the right pixels: drawn uniformly, cut exactly, and in PyTorch the same ones.

Crop and flip only copy numbers, so they must equal slices of a padded array to the bit. For the
draws chi-square over 128,000 examples and four fixed seeds: p > 1e-4 (measured: 0.05 or more), a
mutant's is below 1e-100.

PyTorch's pixels are ours to the bit for the paper's preprocessing in float32: one subtraction of
the same two numbers. The others also scale and divide, which XLA contracts to fewer roundings than
PyTorch makes, and OWN_MEAN sums each image in another order: within 4 ulp of the largest pixel
(measured: 3 for OWN_MEAN, 2 for the others). In float64 all within 1e-15 relative (measured:
5.2e-16, and 0 for the paper's).

Mixup and CutMix are torchvision's `v2.MixUp` and `v2.CutMix`, given the same Beta and box. Their
formulas are written here by hand, from the source of torchvision 0.28, whose wheel wants a CUDA
build of PyTorch. (With that part of it left out, its own classes gave the twin's pixels and targets
to the bit, in 360 batches.) CutMix copies, so ours are the same to the bit; a blend is a product
and a sum, which XLA contracts: within the bounds above (measured: 1 ulp, 2.2e-16).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_resnet import platforms
from flax_resnet.config import DataConfig, Experiment, Preprocess, ResNetConfig
from flax_resnet.data import order, pixels
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw
from flax_resnet.parallel import sharding
from flax_resnet.step import eval_step, init
from flax_resnet.training import evaluation

CONFIG = DataConfig()
MIXED = DataConfig(mixup=0.5, cutmix=1.0)
SHARES = (0.513573, 0.6875, 0.047428608, 0.44653258)  # of MIXED, seed 1, steps 0 to 3
BOXES = ((0, 0, 0, 0), (8, 0, 28, 16), (0, 0, 0, 0), (0, 0, 0, 0))
every_preprocess = pytest.mark.parametrize("preprocess", pixels.NAMED, ids=lambda p: p.value)
COLOUR = [[-0.011574434, -0.014741344, -0.0180803]]  # seed 1, step 2
OFFSETS = [(down, right) for down in range(9) for right in range(9)]


def random_examples(n: int, shape: tuple[int, int] = (32, 32)) -> Examples:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, *shape, 3), np.uint8)
    return Examples(image, rng.integers(0, 10, n, np.int32))


def by_hand(image: np.ndarray, offset: np.ndarray, flip: np.ndarray, pad: int) -> np.ndarray:
    """Crop and flip, an image at a time, in plain NumPy."""
    n, height, width, channels = image.shape
    result = np.empty_like(image)
    for i in range(n):
        padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), image.dtype)
        padded[pad : pad + height, pad : pad + width] = image[i]
        down, right = offset[i]
        crop = padded[down : down + height, right : right + width]
        result[i] = crop[:, ::-1] if flip[i] else crop
    return result


# --- The pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU", "other devices"])
@pytest.mark.parametrize("shape", [(32, 32), (6, 10)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_offset_and_flip_cuts_what_slicing_by_hand_does(
    shape: tuple[int, int], dtype: str, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "on_cpu", lambda: is_cpu)
    image = random_examples(2 * len(OFFSETS), shape).image.astype(dtype) - 100
    offset, flip = np.array(OFFSETS * 2, np.int32), np.arange(len(image)) < len(OFFSETS)
    ours = jax.jit(partial(pixels.crop_and_flip), static_argnums=3)(image, offset, flip, 4)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, by_hand(image, offset, flip, 4))


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU", "other devices"])
@pytest.mark.parametrize("pad", [0, 1, 2, 3])
def test_other_paddings_too(pad: int, is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "on_cpu", lambda: is_cpu)
    config = DataConfig(pad=pad)
    drawn = order.draw(config, seed=0, step=0, batch_size=64, num_examples=64)
    image = random_examples(64).image.astype("float32")
    ours = jax.jit(partial(pixels.crop_and_flip), static_argnums=3)(
        image, drawn.offset, drawn.flip, pad
    )
    np.testing.assert_array_equal(ours, by_hand(image, drawn.offset, drawn.flip, pad))


def flip_first(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
    image = jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)
    return pixels.crop_and_flip(image, offset, jnp.zeros_like(flip), 4)


def flip_upside_down(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
    turned = pixels.crop_and_flip(image.transpose(0, 2, 1, 3), offset[:, ::-1], flip, 4)
    return turned.transpose(0, 2, 1, 3)


def pad_with_the_edge(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
    wide = jnp.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    return pixels.crop_and_flip(wide, offset + 4, flip, 4)[:, :32, :32]


CUTS = {
    "axes swapped": lambda x, offset, flip: pixels.crop_and_flip(x, offset[:, ::-1], flip, 4),
    "a pixel off": lambda x, offset, flip: pixels.crop_and_flip(x, (offset + 1) % 9, flip, 4),
    "the others flipped": lambda x, offset, flip: pixels.crop_and_flip(x, offset, ~flip, 4),
    "flipped, then cropped": flip_first,
    "flipped upside down": flip_upside_down,
    "padded with the edge": pad_with_the_edge,
}


@pytest.mark.parametrize("mutant", CUTS.values(), ids=CUTS)
def test_a_mutant_cuts_something_else(mutant: Callable) -> None:
    image = random_examples(len(OFFSETS)).image.astype("float32")
    offset, flip = np.array(OFFSETS, np.int32), np.arange(len(image)) % 2 == 0
    ours, wrong = by_hand(image, offset, flip, 4), mutant(*map(jnp.asarray, (image, offset, flip)))
    assert wrong.shape == ours.shape
    assert (ours != wrong).mean() > 0.05


def training_image(
    examples: Examples, drawn: Draw, preprocess: Preprocess, dtype: str
) -> np.ndarray:
    """A training batch's pixels, by the compiled library."""
    constants = pixels.make_normalization(preprocess, examples.image)

    @jax.jit
    def batch(examples: Examples, drawn: Draw) -> pixels.Batch:
        return pixels.training_batch(examples, drawn, constants, 4, jnp.dtype(dtype))

    return np.asarray(batch(examples, drawn).image)


def normalized_by_hand(examples: Examples, preprocess: Preprocess) -> np.ndarray:
    """Every image in float64, as the table in config.Preprocess says."""
    x = examples.image.astype(np.float64)
    match preprocess:
        case Preprocess.MEAN_IMAGE:
            return x - x.mean(0)
        case Preprocess.OWN_MEAN:
            return x / 255 - (x / 255).mean((1, 2), keepdims=True)
        case Preprocess.IMAGENET:
            return (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        case Preprocess.STANDARDIZE:
            return (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))


@every_preprocess
def test_the_padding_is_zero_after_the_subtraction(preprocess: Preprocess) -> None:
    """1e-6 relative: STANDARDIZE sums squares in float32 (measured: 3.5e-14)."""
    examples = random_examples(162)
    drawn = Draw(
        np.arange(162, dtype=np.int32), np.array(OFFSETS * 2, np.int32), np.arange(162) % 2 == 0
    )
    ours = training_image(examples, drawn, preprocess, "float64")
    by_the_book = normalized_by_hand(examples, preprocess)
    right = by_hand(by_the_book, drawn.offset, drawn.flip, 4)
    np.testing.assert_allclose(ours, right, rtol=0, atol=1e-6 * np.abs(right).max())
    outside = by_hand(np.ones_like(right), drawn.offset, drawn.flip, 4) == 0
    assert (ours[outside] == 0).all()

    raw = by_hand(examples.image, drawn.offset, drawn.flip, 4)  # the mutant: pad, then subtract
    mutant = normalized_by_hand(Examples(raw, examples.label), preprocess)
    assert np.abs(mutant - right).max() > 0.1 * np.abs(right).max()


def torch_image(
    examples: Examples, drawn: Draw, constants: pixels.Normalization, dtype: str
) -> np.ndarray:
    """A training batch's pixels, by the twin; in our layout."""
    torch = pytest.importorskip("torch", reason="the other side is PyTorch")
    from torch_ref import pixels as twin

    image = twin.normalize(examples.image[drawn.indices], *constants, getattr(torch, dtype))
    if drawn.colour is not None:
        image = twin.shift_colours(image, drawn.colour, constants.scale, constants.std)
    image = twin.crop_and_flip(image, drawn.offset, drawn.flip, CONFIG.pad)
    return image.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_preprocess
def test_pytorch_sees_the_same_pixels(preprocess: Preprocess, dtype: str) -> None:
    examples = random_examples(300)
    drawn = order.draw(CONFIG, seed=3, step=5, batch_size=128, num_examples=300)
    ours = training_image(examples, drawn, preprocess, dtype)
    constants = pixels.make_normalization(preprocess, examples.image)
    theirs = torch_image(examples, drawn, constants, dtype)
    assert ours.dtype == theirs.dtype == dtype
    largest = np.abs(theirs).max()
    difference = np.abs(ours - theirs).max()
    if preprocess is Preprocess.MEAN_IMAGE and dtype == "float32":
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert difference <= (1e-15 * largest if dtype == "float64" else 4 * np.spacing(largest))


@pytest.mark.parametrize("mutant", ["seed", "step", "scale", "channel order"])
def test_a_mutant_shows_pytorch_other_pixels(mutant: str) -> None:
    examples = random_examples(300)
    constants = pixels.make_normalization(Preprocess.IMAGENET, examples.image)
    drawn = order.draw(CONFIG, 3, 5, 128, 300)
    ours = training_image(examples, drawn, Preprocess.IMAGENET, "float32")
    drawn = order.draw(CONFIG, 3 + (mutant == "seed"), 5 + (mutant == "step"), 128, 300)
    if mutant == "scale":
        constants = constants._replace(scale=1 / 256)
    if mutant == "channel order":
        examples = examples._replace(image=examples.image[..., ::-1])
    theirs = torch_image(examples, drawn, constants, "float32")
    assert np.abs(ours - theirs).max() > 1e-3 * np.abs(theirs).max()


# --- The draws ------------------------------------------------------------------------------------


def draws(config: DataConfig = CONFIG, seed: int = 0, steps: int = 1000) -> Draw:
    """Those of many steps, one after the other."""
    parts = [order.draw(config, seed, step, 128, 1000) for step in range(steps)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def uniformity(offset: np.ndarray, flip: np.ndarray) -> dict[str, float]:
    """p-values of: uniform, and independent of one another and of the example before."""
    cell = offset[:, 0] * 9 + offset[:, 1]
    step_on = offset[1:, 0] * 9 + offset[:-1, 0]
    return {
        "offset": stats.chisquare(np.bincount(cell, minlength=81)).pvalue,
        "flip": stats.chisquare(np.bincount(flip, minlength=2)).pvalue,
        "offset and flip": stats.chisquare(np.bincount(cell * 2 + flip, minlength=162)).pvalue,
        "example before": stats.chisquare(np.bincount(step_on, minlength=81)).pvalue,
    }


@pytest.mark.parametrize("seed", range(4))
def test_offsets_and_flips_are_uniform_and_independent(seed: int) -> None:
    drawn = draws(seed=seed)
    p_values = uniformity(drawn.offset, drawn.flip)
    assert min(p_values.values()) > 1e-4, p_values


DRAWS = {
    "never the last offset": lambda at, flip: (at % 8, flip),
    "one offset for both axes": lambda at, flip: (at[:, [0, 0]], flip),
    "flip tied to the offset": lambda at, flip: (at, at[:, 0] > 4),
    "flips four in ten": lambda at, flip: (at, flip & (np.arange(len(flip)) % 5 != 0)),
    "one draw for two examples": lambda at, flip: (at.repeat(2, 0), flip.repeat(2)),
}


@pytest.mark.parametrize("mutant", DRAWS.values(), ids=DRAWS)
def test_a_mutant_is_not_uniform(mutant: Callable) -> None:
    drawn = draws()
    p_values = uniformity(*mutant(drawn.offset, drawn.flip))
    assert min(p_values.values()) < 1e-100, p_values


def test_without_flip_none_is_flipped_and_the_rest_is_the_same() -> None:
    still = draws(DataConfig(flip=False), steps=10)
    assert not still.flip.any()
    np.testing.assert_array_equal(still.offset, draws(steps=10).offset)


def epochs(batch_size: int, n: int) -> np.ndarray:
    """The examples of four epochs, in the order in which steps see them."""
    steps = -(-4 * n // batch_size)
    index = [order.draw(CONFIG, 0, step, batch_size, n).indices for step in range(steps)]
    return np.concatenate(index)[: 4 * n].reshape(4, n)


@pytest.mark.parametrize(("batch_size", "n"), [(10, 50), (7, 50), (64, 50), (128, 10)])
def test_each_epoch_sees_every_example_once_in_an_order_of_its_own(batch_size: int, n: int) -> None:
    index = epochs(batch_size, n)
    np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(n), (4, 1)))
    assert len(np.unique(index, axis=0)) == 4


def test_a_mutant_that_draws_with_replacement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def replacing(seed: int, epoch: int, n: int) -> np.ndarray:
        return order.random_integers(seed, order.ORDER, epoch, n) % np.uint64(n)

    monkeypatch.setattr(order, "permutation", replacing)
    assert (np.sort(epochs(7, 50)) != np.arange(50)).any()


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["plain", "mixed"])
def test_a_draw_is_a_pure_function_of_seed_and_step(config: DataConfig) -> None:
    def draw(seed: int, step: int) -> bytes:
        drawn = jax.tree.leaves(order.draw(config, seed, step, 128, 1000))
        return b"".join(x.tobytes() for x in drawn)

    pairs = [(seed, step) for seed in range(5) for step in range(20)]
    first = {at: draw(*at) for at in pairs}
    order.drawn_permutation.cache_clear()
    np.random.default_rng(1).shuffle(pairs)
    assert {at: draw(*at) for at in pairs} == first
    assert len(set(first.values())) == len(first)  # different seeds and steps differ


def raw_numbers() -> np.ndarray:
    """All that 200 steps of two runs draw, orders and augmentation."""
    raw = [
        order.random_integers(seed, stream, step, 3 * 128)
        for seed in range(2)
        for stream in range(6)
        for step in range(200)
    ]
    return np.concatenate(raw)


def test_no_two_steps_share_their_random_numbers() -> None:
    assert len(np.unique(raw_numbers())) == len(raw_numbers())


def test_a_mutant_whose_counters_overlap_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlapping(seed: int, stream: int, counter: int) -> np.random.Philox:
        return np.random.Philox(key=[seed, stream], counter=[counter, 0, 0, 0])

    monkeypatch.setattr(order, "philox", overlapping)
    assert len(np.unique(raw_numbers())) < len(raw_numbers()) / 10


def test_a_draw_is_the_same_for_ever() -> None:
    drawn = order.draw(CONFIG, seed=1, step=2, batch_size=4, num_examples=10)
    np.testing.assert_array_equal(drawn.indices, [1, 4, 4, 0])
    np.testing.assert_array_equal(drawn.offset, [[0, 7], [3, 4], [0, 0], [8, 1]])
    np.testing.assert_array_equal(drawn.flip, [False, True, False, False])
    many = order.draw(CONFIG, seed=1, step=2, batch_size=64, num_examples=64)
    assert np.packbits(many.flip).tobytes().hex() == "e05df0b9bb5c7116"
    colour = order.draw_colour(DataConfig(colour=0.1), 1, 2, 1)
    np.testing.assert_allclose(colour, COLOUR, rtol=1e-6)
    shares, boxes = zip(*(order.draw_share(MIXED, 1, step) for step in range(4)), strict=True)
    np.testing.assert_allclose(shares, SHARES, rtol=1e-6)  # pow and log are the system's
    assert boxes == BOXES


# --- Mixtures -------------------------------------------------------------------------------------


def test_nothing_is_mixed_unless_asked_for_and_else_the_rest_is_the_same() -> None:
    plain = draws(steps=10)
    assert plain.mix is None
    for name in ("mixup", "cutmix"):
        mixed = draws(DataConfig(**{name: 1.0}), steps=10)
        assert mixed.mix is not None
        for a, b in zip(mixed[:3], plain[:3], strict=True):
            np.testing.assert_array_equal(a, b)


def box_by_hand(lam: float, r_x: int, r_y: int, height: int, width: int) -> tuple[int, ...]:
    """As `v2.CutMix.make_params` has it: (x1, y1, x2, y2)."""
    r = 0.5 * math.sqrt(1.0 - lam)
    r_w_half, r_h_half = int(r * width), int(r * height)
    x1, y1 = max(r_x - r_w_half, 0), max(r_y - r_h_half, 0)
    return x1, y1, min(r_x + r_w_half, width), min(r_y + r_h_half, height)


def test_every_box_is_torchvisions_and_its_share_what_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = [float(np.float32(x)) for x in np.linspace(0, 1, 20)]
    for side, step in ((32, 3), (224, 31)):
        for lam, down, right in itertools.product(shares, range(0, side, step), range(side)):
            x1, y1, x2, y2 = box_by_hand(lam, right, down, side, side)
            assert order.cut_box(lam, down, right, side) == (y1, x1, y2, x2)
    for box in ((0, 0, 0, 0), (8, 0, 28, 16), (0, 0, 32, 32), (31, 31, 32, 32)):
        monkeypatch.setattr(order, "cut_box", lambda *_, box=box: box)
        y1, x1, y2, x2 = box
        lam_adjusted = 1.0 - (x2 - x1) * (y2 - y1) / (32 * 32)
        assert order.draw_share(DataConfig(cutmix=1.0), 0, 0) == (lam_adjusted, box)


def mix_by_hand(
    image: np.ndarray, label: np.ndarray, share: float, box: np.ndarray, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """As `v2.MixUp` and `v2.CutMix` do: the batch (b, h, w, 3) and its labels by one are rolled."""
    rolled, target = np.roll(image, 1, 0), np.eye(num_classes)[label]
    target = np.roll(target, 1, 0) * (1.0 - share) + target * share
    top, left, bottom, right = box
    if bottom > top and right > left:
        mixed = image.copy()
        mixed[:, top:bottom, left:right] = rolled[:, top:bottom, left:right]
        return mixed, target
    return rolled * image.dtype.type(1.0 - share) + image * image.dtype.type(share), target


def target_of(batch: pixels.Batch) -> np.ndarray:
    """(b, 10): the probabilities of the classes."""
    one, two = np.eye(10)[np.array(batch.label)], np.eye(10)[np.array(batch.other)]
    share = np.asarray(batch.share, np.float64)[:, None]
    return share * one + (1 - share) * two


def mixed_batches(dtype: str) -> Iterator[tuple[Draw, pixels.Batch, np.ndarray, np.ndarray]]:
    """Of 12 steps: the draw, our batch, and the images and targets by hand of the same crops."""
    examples = random_examples(300)
    constants = pixels.make_normalization(CONFIG.preprocess, examples.image)

    @jax.jit
    def batch(examples: Examples, drawn: Draw) -> pixels.Batch:
        return pixels.training_batch(examples, drawn, constants, 4, jnp.dtype(dtype))

    image = examples.image.astype(dtype) - constants.mean.astype(dtype)
    for step in range(12):
        drawn = order.draw(MIXED, 3, step, 16, 300)
        cut = by_hand(image[drawn.indices], drawn.offset, drawn.flip, 4)
        share, box = float(drawn.mix.share[0]), drawn.mix.box[0]
        yield (
            drawn,
            batch(examples, drawn),
            *mix_by_hand(cut, examples.label[drawn.indices], share, box),
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mixtures_are_torchvisions(dtype: str) -> None:
    kinds = set()
    for drawn, ours, image, target in mixed_batches(dtype):
        is_cut = bool(drawn.mix.box.any())
        kinds.add(is_cut)
        assert ours.image.dtype == ours.share.dtype == dtype
        largest = np.abs(image).max()
        bound = 1e-15 * largest if dtype == "float64" else 4 * np.spacing(np.float32(largest))
        assert np.abs(ours.image - image).max() <= (0 if is_cut else bound)
        np.testing.assert_array_equal(target_of(ours), target)
    assert kinds == {True, False}


def test_the_twin_mixes_as_torchvision_does_to_the_bit() -> None:
    torch = pytest.importorskip("torch", reason="the other side is PyTorch")
    from torch_ref import pixels as twin

    for step in range(12):
        drawn = order.draw(MIXED, 3, step, 16, 300)
        image = random_examples(16).image.astype("float32")
        share, box = float(drawn.mix.share[0]), drawn.mix.box[0]
        right, _ = mix_by_hand(image, np.zeros(16, int), share, box)
        x = torch.tensor(image).permute(0, 3, 1, 2)
        mixed = twin.mix(x, x.roll(1, 0), torch.tensor(drawn.mix.share), drawn.mix.box)
        np.testing.assert_array_equal(mixed.permute(0, 2, 3, 1).numpy(), right)


LARGER = np.array([0, 0, 1, 1])
MIXES: dict[str, Callable[[Draw], dict[str, np.ndarray]]] = {
    "shares swapped": lambda drawn: {"share": 1 - drawn.mix.share},
    "the image after": lambda drawn: {"indices": np.roll(drawn.indices, -1)},
    "cropped like the image itself": lambda drawn: {"offset": drawn.offset},
    "box turned": lambda drawn: {"box": drawn.mix.box[:, [1, 0, 3, 2]]},
    "box a pixel larger": lambda drawn: {"box": drawn.mix.box + drawn.mix.box.any() * LARGER},
}


@pytest.mark.parametrize("mutant", MIXES.values(), ids=MIXES)
def test_a_mutant_mixes_something_else(mutant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = order.draw

    def mutated(*arguments: Any) -> Draw:
        drawn = draw(*arguments)
        return drawn._replace(mix=drawn.mix._replace(**mutant(drawn)))

    right = [(image, target) for _, _, image, target in mixed_batches("float32")]
    monkeypatch.setattr(order, "draw", mutated)
    wrong = [batch for _, batch, _, _ in mixed_batches("float32")]
    apart = [
        np.abs(batch.image - image).max() for batch, (image, _) in zip(wrong, right, strict=True)
    ]
    assert max(apart) > 1


@pytest.mark.parametrize("alpha", [pytest.param(0.2, marks=pytest.mark.slow), 1.0])
def test_shares_are_betas_and_centres_uniform(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    beta = stats.beta(alpha, alpha)
    shares = [order.draw_share(DataConfig(mixup=alpha), 0, step)[0] for step in range(2000)]
    assert stats.kstest(shares, beta.cdf).pvalue > 1e-4
    assert stats.kstest(shares, stats.beta(alpha, 1.5 * alpha).cdf).pvalue < 1e-6  # the mutant

    seen: list[tuple[float, int, int, int]] = []
    monkeypatch.setattr(order, "cut_box", lambda *given: seen.append(given) or (0, 0, 0, 0))
    for step in range(2000):
        order.draw_share(DataConfig(cutmix=alpha), 0, step)
    shares, down, right, sides = zip(*seen, strict=True)
    assert set(sides) == {32}
    assert stats.kstest(shares, beta.cdf).pvalue > 1e-4
    assert {float(np.float32(share)) for share in shares} == set(shares)
    for at in (down, right):
        assert stats.chisquare(np.bincount(at, minlength=32)).pvalue > 1e-4
    together = np.bincount(np.array(down) // 4 * 8 + np.array(right) // 4, minlength=64)
    assert stats.chisquare(together).pvalue > 1e-4


def test_of_both_a_coin_says_which() -> None:
    both = [order.draw_share(DataConfig(mixup=1.0, cutmix=0.5), 0, step) for step in range(500)]
    cut = [order.draw_share(DataConfig(cutmix=0.5), 0, step) for step in range(500)]
    blend = [order.draw_share(DataConfig(mixup=1.0), 0, step) for step in range(500)]
    is_cut = np.array([one == other for one, other in zip(both, cut, strict=True)])
    is_blend = np.array([one == other for one, other in zip(both, blend, strict=True)])
    assert (is_cut ^ is_blend).all()
    assert stats.binomtest(int(is_cut.sum()), 500).pvalue > 1e-4


# --- Colours --------------------------------------------------------------------------------------

# Of pixels in 0..1: the table of fb.resnet.torch, and its `Lighting`, an image at a time.
PCA = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
COLOURED = DataConfig(colour=0.1)


def lighting(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """In plain NumPy, of an image (h, w, 3) of 0..1."""
    rgb = [sum(PCA[i, j] * alpha[j] * EIGENVALUES[j] for j in range(3)) for i in range(3)]
    return image + np.array(rgb)


def coloured_by_hand(preprocess: Preprocess, examples: Examples) -> tuple[Draw, np.ndarray]:
    """A draw, and each image it names, shifted, normalised and cut in float64."""
    drawn = order.draw(COLOURED, 3, 5, 64, 300)
    alpha = np.linalg.solve(PCA * EIGENVALUES, drawn.colour.astype(np.float64).T).T
    constants = pixels.make_normalization(preprocess, examples.image)
    x = examples.image[drawn.indices] / 255
    x = np.stack([lighting(image, a) for image, a in zip(x, alpha, strict=True)])
    x = (x * 255 * constants.scale - constants.mean) / constants.std
    return drawn, by_hand(x, drawn.offset, drawn.flip, 4)


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess.IMAGENET, pytest.param(Preprocess.MEAN_IMAGE, marks=pytest.mark.slow)],
    ids=lambda p: p.value,
)
def test_the_colours_are_alexnets_before_the_normalization(preprocess: Preprocess) -> None:
    """In float64 within 1e-12 of the largest pixel, and the twin within 1e-15 of it."""
    examples = random_examples(300)
    drawn, right = coloured_by_hand(preprocess, examples)
    ours = training_image(examples, drawn, preprocess, "float64")
    largest = np.abs(right).max()
    assert np.abs(ours - right).max() <= 1e-12 * largest
    constants = pixels.make_normalization(preprocess, examples.image)
    theirs = torch_image(examples, drawn, constants, "float64")
    assert np.abs(ours - theirs).max() <= 1e-15 * largest
    plain = training_image(examples, drawn._replace(colour=None), preprocess, "float64")
    turned = drawn._replace(colour=drawn.colour[:, ::-1])  # a mutant: blue for red
    wrong = training_image(examples, turned, preprocess, "float64")
    assert min(np.abs(x - right).max() for x in (plain, wrong)) > 1e-3 * largest


def test_a_shift_is_normal_along_each_component_and_an_images_own() -> None:
    drawn = draws(COLOURED, steps=100)
    alpha = np.linalg.solve(PCA * EIGENVALUES, drawn.colour.astype(np.float64).T)
    for each in alpha:
        assert stats.kstest(each, stats.norm(0, 0.1).cdf).pvalue > 1e-4
        assert stats.kstest(each, stats.norm(0, 0.11).cdf).pvalue < 1e-6  # the mutant
        assert abs(np.corrcoef(each[1:], each[:-1])[0, 1]) < 0.05
    assert np.abs(np.corrcoef(alpha) - np.eye(3)).max() < 0.05


def test_without_it_nothing_is_drawn_and_with_it_the_rest_is_the_same() -> None:
    assert draws(steps=2).colour is None
    for a, b in zip(draws(COLOURED, steps=10)[:3], draws(steps=10)[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mixed_image_keeps_the_colours_of_its_parts() -> None:
    drawn = order.draw(DataConfig(colour=0.1, mixup=0.5), 3, 5, 64, 300)
    np.testing.assert_array_equal(drawn.mix.colour, np.roll(drawn.colour, 1, 0))


# --- Evaluation -----------------------------------------------------------------------------------


def test_evaluation_batches_hold_every_example_once_and_padding() -> None:
    examples = random_examples(10)
    constants = pixels.make_normalization(Preprocess.MEAN_IMAGE, examples.image)
    on_device = Examples(*map(jnp.asarray, examples))
    index = jnp.array([0, 8, 9, -1, -1])
    batch = pixels.evaluation_batch(on_device, index, constants, jnp.float32)
    np.testing.assert_array_equal(batch.label, [*examples.label[[0, 8, 9]], -1, -1])
    right = examples.image[[0, 8, 9]] - constants.mean.astype(np.float32)
    np.testing.assert_array_equal(batch.image[:3], right)


N_TEST = 30


def evaluate(batch_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """(in batches, all at once): the mean loss and the error of 30 examples."""
    config = Experiment(model=ResNetConfig.paper(8))
    program, state = init(config)
    examples = random_examples(N_TEST)
    constants = pixels.make_normalization(Preprocess.OWN_MEAN, examples.image)
    mesh = sharding.data_mesh()
    call = evaluation.Evaluation(config.model, program, constants, mesh, batch_size)
    arguments = (state.params, state.batch_stats, examples)
    ours = call(*sharding.replicate(mesh, arguments)).mean()
    image = pixels.normalize(jnp.asarray(examples.image), constants, jnp.float32)
    batch = pixels.Batch(image, jnp.asarray(examples.label))
    return ours, eval_step(program, state.params, state.batch_stats, batch).mean()


@pytest.mark.parametrize("batch_size", [7, 10, 64])
def test_evaluation_counts_each_example_once_and_padding_nowhere(batch_size: int) -> None:
    """1e-6 relative: the order of float32 sums (measured: EVAL); one example more moves it 1e-3."""
    ours, whole = evaluate(batch_size)
    assert ours["error"] == whole["error"]
    assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_mutant_that_counts_the_padding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(
        examples: Examples, index: jax.Array, constants: pixels.Normalization, dtype: jnp.dtype
    ) -> pixels.Batch:
        image = pixels.normalize(examples.image[index], constants, dtype)
        return pixels.Batch(image, examples.label[index])

    monkeypatch.setattr(pixels, "evaluation_batch", counts)
    ours, whole = evaluate(7)
    assert abs(ours["loss"] / whole["loss"] - 1) > 1e-4
