"""Claim: streamed images are those of the resident run, to the bit, whoever decodes them and where.

What a place of a batch holds is a function of (seed, step, place): of no thread, process or device.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import Mesh

from flax_resnet.config import Experiment, Parallel
from flax_resnet.data import digits, order, source, stream, views
from flax_resnet.data.encoded import Arrays, Images
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Batch
from flax_resnet.data_config import Crop, DataConfig, Dataset
from flax_resnet.errors import DatasetError, TrainingError
from flax_resnet.parallel import sharding
from flax_resnet.step import init
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.feed import Resident, Stream, batch_of
from parity_tests.mutants import one_by_default

BATCH, STEPS = 8, 5
MUTANTS = "other place", "other image mixed in", "label of its index"
MIXED: dict[str, Any] = {"mixup": 0.5, "cutmix": 1.0}


def photographs(root: Path, **more: Any) -> DataConfig:
    given: dict[str, Any] = {"resize": 24, "crop": 20, "threads": 2}
    return DataConfig(name="folder", dir=str(root), placement="streamed", **(given | more))


def images_of(config: DataConfig, split: str = "train") -> Images:
    found = source.load(config, (split,))[split]
    assert isinstance(found, Images)
    return found


def run(
    config: DataConfig,
    places: np.ndarray | None = None,
    first: int = 0,
    last: int = STEPS,
    images: Images | None = None,
) -> np.ndarray:
    """What so many steps see: (steps, places, h, w, 3)."""
    images = images or images_of(config)
    places = np.arange(BATCH) if places is None else places
    with contextlib.closing(
        stream.training(config, images, 3, BATCH, places, first, last)
    ) as batches:
        return np.stack(list(batches))


# --- Which pixels -------------------------------------------------------------------------------


@pytest.mark.parametrize("train_crop", Crop)
def test_each_place_holds_the_view_that_its_number_draws(root: Path, train_crop: Crop) -> None:
    config = photographs(root, train_crop=train_crop, jitter=(22, 40))
    images, found = images_of(config), run(config)
    for step in range(STEPS):
        drawn = order.draw(config, 3, step, BATCH, len(images))
        for place, index in enumerate(drawn.indices):
            words = order.random_integers(3, order.VIEW, step * BATCH + place, views.NUM_WORDS)
            expected = views.training(images.image(int(index)), config, words)
            np.testing.assert_array_equal(found[step, place], expected)


def test_threads_change_nothing_nor_does_where_a_run_goes_on(root: Path) -> None:
    config = photographs(root)
    whole = run(config)
    for threads in (1, 7):
        np.testing.assert_array_equal(run(photographs(root, threads=threads)), whole)
    np.testing.assert_array_equal(run(config, first=3), whole[3:])
    assert (run(config, first=3) != whole[:2]).any()


def test_each_process_decodes_its_share_alone(root: Path) -> None:
    config, seen = photographs(root), []

    class Counted(Images):
        def __init__(self, images: Images):
            self.images, self.label = images, images.label

        def image(self, index: int) -> Any:
            seen.append(index)
            return self.images.image(index)

        def name(self, index: int) -> str:
            return self.images.name(index)

    whole = run(config)
    for places in (np.array([0, 1, 2, 3]), np.array([1, 4, 7])):
        seen.clear()
        part = run(config, places, images=Counted(images_of(config)))
        np.testing.assert_array_equal(part, whole[:, places])
        assert len(seen) == STEPS * len(places)


@pytest.mark.slow
def test_processes_that_decode_change_nothing(root: Path) -> None:
    config = photographs(root, train_crop=Crop.SCALE_JITTER, jitter=(22, 40))
    others = photographs(root, train_crop=Crop.SCALE_JITTER, jitter=(22, 40), workers=2)
    np.testing.assert_array_equal(run(others), run(config))


# --- Streamed against resident ------------------------------------------------------------------


def small() -> Examples:
    examples = digits.load()["train"]
    return Examples(examples.image[:50], examples.label[:50])


def batches(config: Experiment, devices: int, is_resident: bool) -> list[Batch]:
    """What three steps see, in two calls, on so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (sharding.AXIS,))
    examples = small()
    constants = source.normalization(config.data, examples)
    if is_resident:
        feed = Resident(config, mesh, sharding.replicate(mesh, examples))
    else:
        feed = Stream(config, mesh, Arrays(examples, "the digits"))

    def see(constant: Any, dealt: Any) -> Batch:
        return batch_of(config, constant, dealt, constants)

    if config.parallel is Parallel.PMAP:
        shares = jax.pmap(see, sharding.AXIS, in_axes=(None, 0))

        def call(constant: Any, dealt: Any) -> Batch:
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shares(constant, dealt))

    else:
        call = jax.jit(see)
    found: list[Batch] = []
    with contextlib.closing(feed):
        for step, size in ((0, 1), (1, 2)):
            dealt = feed.deal(step, size)
            like, given = (jax.tree.map(kind, x) for x in (feed.like(size), dealt))
            assert like == given
            for i in range(size):
                batch = call(feed.constant, of_step(dealt, i, config.parallel))
                found.append(jax.tree.map(np.asarray, batch))
    return found


def kind(x: Any) -> tuple[Any, ...]:
    """What the compiler knows of an array."""
    return x.shape, x.dtype, x.sharding


def of_step(dealt: Any, i: int, parallel: Parallel) -> Any:
    """What is dealt for one step of several."""
    return jax.tree.map(lambda x: x[:, i] if parallel is Parallel.PMAP else x[i], dealt)


@pytest.mark.parametrize("parallel", Parallel)
@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("more", [{}, MIXED], ids=["plain", "mixed"])
def test_a_step_sees_the_same_batch(parallel: Parallel, devices: int, more: dict[str, Any]) -> None:
    data = DataConfig(name=Dataset.DIGITS, threads=2, **more)
    config = Experiment(data=data, parallel=parallel)
    config.train.batch_size, config.train.steps = BATCH, 3
    resident, streamed = (batches(config, devices, x) for x in (True, False))
    for ours, theirs in zip(streamed, resident, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mutant", one_by_default({name: name for name in MUTANTS}))
def test_a_mutant_sees_another_batch(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Stream.put

    def wrong(self: Stream, drawn: Any, image: np.ndarray) -> Any:
        if mutant == "other place":
            return put(self, drawn, np.roll(image, 1, 1))
        found = put(self, drawn, image)
        if mutant == "label of its index":
            label = self.images.label[np.arange(BATCH)][None].repeat(len(image), 0)
            label = jax.device_put(label, found.images.label.sharding)
            return found._replace(images=found.images._replace(label=label))
        return found._replace(others=found.images)

    config = Experiment(data=DataConfig(name=Dataset.DIGITS, threads=2, **MIXED))
    config.train.batch_size, config.train.steps = BATCH, 3
    resident = batches(config, 1, True)
    monkeypatch.setattr(Stream, "put", wrong)
    pairs = zip(jax.tree.leaves(batches(config, 1, False)), jax.tree.leaves(resident), strict=True)
    assert any((a != b).any() for a, b in pairs)


@pytest.mark.slow
def test_an_evaluation_gives_the_same_sums() -> None:
    """50 examples in batches of 16: the last one is filled up."""
    config = Experiment(data=DataConfig(name=Dataset.DIGITS, threads=2))
    config.model.depth = 8
    program, state = init(config, 2)
    mesh = Mesh(np.array(jax.devices()[:2]), (sharding.AXIS,))
    examples = small()
    constants = source.normalization(config.data, examples)
    evaluate = Evaluation(config.model, program, constants, mesh, 16, config.data)
    arrays = sharding.replicate(mesh, (state.params, state.batch_stats))
    resident = evaluate(*arrays, sharding.replicate(mesh, examples)).mean()
    streamed = evaluate(*arrays, Arrays(examples, "the digits"))
    assert streamed.mean() == resident
    assert int(streamed.examples) == 50


# --- What goes wrong ----------------------------------------------------------------------------


def test_an_image_that_vanishes_ends_the_run_with_its_name(root: Path) -> None:
    config = photographs(root)
    images = images_of(config)
    (root / "train/green/2.jpg").unlink()
    with pytest.raises(DatasetError, match=r"train/green/2\.jpg cannot be read \(No such file"):
        run(config, images=images)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(root: Path) -> None:
    config = photographs(root, workers=2)
    images, places = images_of(config), np.arange(BATCH)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with contextlib.closing(stream.training(config, images, 3, BATCH, places, 0, 10**6)) as found:
        next(found)
        mine = [x for x in psutil.Process().children(recursive=True) if x.pid not in before]
        (one, *_) = [x for x in mine if "spawn_main" in " ".join(x.cmdline())]
        os.kill(one.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="a process that decodes images has died"):
            for _ in found:
                pass
