"""Claim: no number of a setting silently becomes another: it is used as it is, or refused.

The kinds: seeds of more than 32 bits; what is counted in int32 (steps, boundaries, images, errors);
what is summed or divided in float32 (losses, batch sizes); rates that float32 has not; labels for
which a network has no class.
"""

from typing import Any

import jax
import numpy as np
import pytest

from flax_resnet import step
from flax_resnet.config import (
    LAST_STEP,
    MOST_IMAGES,
    MOST_SUMMANDS,
    DataConfig,
    Dataset,
    Experiment,
    OptimConfig,
    ResNetConfig,
)
from flax_resnet.data import order, source
from flax_resnet.data.pixels import Batch
from flax_resnet.errors import ConfigError
from flax_resnet.optim import make_schedule
from flax_resnet.studies.recipes import parse_seeds

# Neighbours that are one number in 32 bits, in float64 or in int64.
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**53, 2**53 + 1, 2**63 - 2, 2**63 - 1)


class Stop(Exception):
    """Of a test that has seen enough."""


def first_key(seed: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the first weights of a run are made from."""

    def take(config: object, *, rngs: Any) -> None:
        raise Stop(np.asarray(jax.random.key_data(rngs.params())).tobytes())

    monkeypatch.setattr(step, "ResNet", take)
    with pytest.raises(Stop) as stop:
        step.init(Experiment(seed=seed))
    return stop.value.args[0]


@pytest.mark.parametrize("x64", [False, True])
def test_every_seed_has_first_weights_of_its_own(
    x64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.enable_x64(x64):
        keys = [first_key(seed, monkeypatch) for seed in SEEDS]
    assert len(set(keys)) == len(SEEDS)


@pytest.mark.parametrize("x64", [False, True])
def test_seeds_of_32_bits_begin_as_they_always_did(x64: bool) -> None:
    with jax.enable_x64(x64):
        for seed in (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1):
            ours, jaxs = step.key_of(seed), jax.random.key(seed)
            assert ours.dtype == jaxs.dtype
            assert np.array_equal(jax.random.key_data(ours), jax.random.key_data(jaxs))


def test_every_seed_has_an_order_and_draws_of_its_own() -> None:
    flat = DataConfig(pad=0, flip=False)
    orders = {order.draw(flat, seed, 0, 32, 1000).indices.tobytes() for seed in SEEDS}
    offsets = {order.draw(DataConfig(), seed, 0, 32, 1000).offset.tobytes() for seed in SEEDS}
    flips = {order.draw(DataConfig(), seed, 0, 64, 1000).flip.tobytes() for seed in SEEDS}
    assert len(orders) == len(offsets) == len(flips) == len(SEEDS)


def test_the_last_step_sees_what_its_number_says() -> None:
    """Counted here in Python's integers, which have no end."""
    size, examples = 128, 1000
    drawn = order.draw(DataConfig(), 2**63 - 1, LAST_STEP - 1, size, examples)
    seen = [divmod((LAST_STEP - 1) * size + i, examples) for i in range(size)]
    expected = [order.permutation(2**63 - 1, epoch, examples)[at] for epoch, at in seen]
    assert drawn.indices.tolist() == expected


@pytest.mark.slow
def test_the_twin_refuses_seeds_that_pytorch_would_cut() -> None:
    pytest.importorskip("torch")
    from torch_ref import step as torch_step

    with pytest.raises(ConfigError, match=r"seed must be below 2\^32 for PyTorch, got 4294967296"):
        torch_step.init(Experiment(seed=2**32))


@pytest.mark.parametrize(
    ("path", "last", "beyond", "rule"),
    [
        ("seed", 2**63 - 1, 2**63, "0 to 2^63 - 1"),
        ("model.depth", 9998, 10_004, "at most 10000"),
        ("model.num_classes", 100_000, 100_001, "at most 100000"),
        ("train.steps", LAST_STEP, LAST_STEP + 1, f"at most {LAST_STEP}"),
        ("train.batch_size", MOST_IMAGES, MOST_IMAGES + 1, f"at most {MOST_IMAGES}"),
        ("train.eval_batch_size", MOST_IMAGES, MOST_IMAGES + 1, f"at most {MOST_IMAGES}"),
        ("optim.boundaries", (LAST_STEP,), (5, LAST_STEP + 1), f"at most {LAST_STEP}"),
        ("optim.momentum", 0.9999999, 1 - 2**-25, "below 1 in float32, too"),
        ("model.batch_norm_epsilon", 1e-30, 1e-46, "0 or a number that float32 has"),
        ("model.batch_norm_momentum", 1e-30, 1e-46, "0 or a number that float32 has"),
        ("train.label_smoothing", 0.9999999, 1 - 2**-25, "below 1 in float32, too"),
        ("data.mixup", 0.001, 1e-46, "0 or a number that float32 has"),
        ("optim.peak_lr", 2.0**-126, 1e-38, "0 or a number that float32 has"),
        ("optim.warmup_lr", 1e38, 1e39, "0 or a number that float32 has"),
        ("optim.decay_factor", 1e-30, 1e-46, "0 or a number that float32 has"),
        ("optim.weight_decay", 0.0, 5e-324, "0 or a number that float32 has"),
    ],
)
def test_the_last_number_that_is_used_and_the_first_that_is_refused(
    path: str, last: object, beyond: object, rule: str
) -> None:
    config = Experiment()
    *groups, name = path.split(".")
    holder: Any = config
    for group in groups:
        holder = getattr(holder, group)
    setattr(holder, name, last)
    config.validate()
    setattr(holder, name, beyond)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert str(error.value).startswith(f"{path} must be {rule}, got ")


def test_a_warm_up_that_ends_after_the_last_step() -> None:
    OptimConfig(warmup_steps=LAST_STEP, boundaries=()).validate()
    with pytest.raises(
        ConfigError, match="warmup_steps must be at most 2147483647, got 2147483648"
    ):
        OptimConfig(warmup_steps=LAST_STEP + 1, boundaries=()).validate()


def test_the_schedule_tells_the_last_step_from_the_one_before() -> None:
    schedule = make_schedule(OptimConfig(boundaries=(LAST_STEP,)), LAST_STEP)
    before, after = (float(schedule(np.int32(at))) for at in (LAST_STEP - 1, LAST_STEP))
    assert (before, after) == pytest.approx((0.1, 0.01))


def test_momentum_and_rates_that_are_accepted_are_numbers_in_float32() -> None:
    """XLA makes smaller numbers than these zero."""
    config = Experiment()
    config.optim.momentum, config.optim.peak_lr = 0.9999999, 2.0**-126
    config.validate()
    with jax.enable_x64(False):
        assert float(jax.numpy.float32(config.optim.momentum)) < 1
        rate = make_schedule(config.optim, config.train.steps)(0)
        assert float(rate * jax.numpy.ones(())) == 2.0**-126


@pytest.mark.parametrize(
    ("log_every", "steps", "batch_size", "most"),
    [
        (MOST_SUMMANDS, 10**6, 128, None),
        (MOST_SUMMANDS + 1, 10**6, 128, MOST_SUMMANDS),
        (10**12, MOST_SUMMANDS, 128, None),  # once, at the end
        (10**12, MOST_SUMMANDS + 1, 128, MOST_SUMMANDS),
        (127, 1000, MOST_IMAGES, None),
        (128, 1000, MOST_IMAGES, 127),  # 2^31 images
    ],
)
def test_a_line_of_the_log_counts_no_more_than_it_can(
    log_every: int, steps: int, batch_size: int, most: int | None
) -> None:
    config = Experiment()
    settings = config.train
    settings.log_every, settings.steps, settings.batch_size = log_every, steps, batch_size
    if most is None:
        config.validate()
    else:
        with pytest.raises(ConfigError, match=f"^train.log_every must be at most {most}, over "):
            config.validate()


def test_a_line_of_the_log_sums_up_to_four_digits() -> None:
    """The worst that there is: a network that learns nothing, whose losses are all the same."""
    losses = np.full(MOST_SUMMANDS, 128 * np.log(10), np.float32)
    summed = np.add.accumulate(losses)  # one after another, as the device does
    exact = losses.astype(np.float64).cumsum()
    assert np.abs(summed / exact - 1).max() < 5e-4


def test_sums_of_metrics_count_every_image() -> None:
    large = step.Metrics(
        *(jax.numpy.asarray(x, "int32") for x in (0, LAST_STEP - 1, LAST_STEP - 2))
    )
    one = step.Metrics(*(jax.numpy.asarray(x) for x in (np.float32(0), np.int32(1), np.int32(2))))
    total = step.Metrics.zeros().plus(large).plus(one)
    assert (int(total.errors), int(total.examples)) == (LAST_STEP, LAST_STEP)


def test_more_images_than_an_index_can_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "random_integers", None)  # which would fill the memory
    with pytest.raises(ConfigError, match="images must be at most 2147483647, got 2147483648"):
        order.draw(DataConfig(), 0, 0, 1, 2**31)


@pytest.mark.parametrize("name", [Dataset.CIFAR10, Dataset.DIGITS])
@pytest.mark.parametrize("classes", [9, 11, 1000])
def test_a_network_must_have_the_classes_of_the_images(name: Dataset, classes: int) -> None:
    """Of fewer the loss would be NaN, and one of more was made for other images."""
    config = DataConfig(name=name)
    source.check_network(config, ResNetConfig(num_classes=10))
    message = rf"model\.num_classes must be 10, .* got {classes}; .* --config.model.num_classes=10"
    with pytest.raises(ConfigError, match=message):
        source.check_network(config, ResNetConfig(num_classes=classes))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_must_have_the_channels_of_the_images(channels: int) -> None:
    with pytest.raises(ConfigError, match=rf"image_channels must be 3, .* got {channels}"):
        source.check_network(DataConfig(), ResNetConfig(image_channels=channels))


@pytest.mark.slow
def test_the_digits_have_as_many_classes_as_is_said() -> None:
    labels = source.load(DataConfig(name=Dataset.DIGITS))["train"].label
    assert set(labels.tolist()) == set(range(10))


def test_runs_for_ever_that_an_earlier_version_began_are_still_read() -> None:
    stored = Experiment().to_dict()
    stored["train"] |= {"steps": 10**11, "log_every": 10**9}
    config = Experiment.from_dict(stored)
    config.validate()
    assert (config.train.steps, config.train.log_every) == (LAST_STEP, MOST_SUMMANDS)
    stored["train"] |= {"steps": 300}
    assert Experiment.from_dict(stored).train.log_every == 10**9


def test_a_number_of_seeds_that_no_memory_holds() -> None:
    for text in ("4294967296", "0..99999999999", "9" * 19):
        with pytest.raises(ConfigError, match="seeds must be at most 10000, got "):
            parse_seeds(text)
    assert parse_seeds("4294967296,") == [2**32]
    assert parse_seeds("9223372036854775807..9223372036854775807") == [2**63 - 1]


def test_the_largest_batch_is_counted_in_no_int32() -> None:
    """It has 2^34 pixels in the first layers. Nothing is computed here, and no memory is needed."""
    config = Experiment()
    config.model.depth = 8
    images = (MOST_IMAGES, 32, 32, 3)
    batch = Batch(
        jax.ShapeDtypeStruct(images, "float32"), jax.ShapeDtypeStruct(images[:1], "int32")
    )

    def train(batch: Batch) -> step.Metrics:
        return step.train_step(*step.init(config), batch)[1]

    with jax.enable_x64(False):
        metrics = jax.eval_shape(train, batch)
    assert metrics.examples.dtype == "int32"
