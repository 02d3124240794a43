"""Claim: a work directory holds one run, and all that is needed to use it.

What decides nothing of a run's numbers may change when it goes on; it ends with the same bits.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_resnet.config import INCIDENTAL, Dataset, Experiment
from flax_resnet.data import source
from flax_resnet.errors import CheckpointError, ConfigError, DatasetError
from flax_resnet.studies import responses
from flax_resnet.training import workdir
from flax_resnet.training.loop import fit
from flax_resnet.training.metrics_log import read_metrics
from flax_resnet.training.workdir import OpenedRun, open_run

STEPS = 6


def experiment() -> Experiment:
    config = Experiment()
    config.model.depth = 8
    config.data.name = Dataset.DIGITS
    config.optim.boundaries = (4,)
    settings = config.train
    settings.steps, settings.batch_size, settings.eval_batch_size = STEPS, 16, 400
    settings.log_every, settings.evaluate_every, settings.checkpoint_every = 2, 6, 3
    return config


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("workdir") / "run"
    with jax.enable_x64(False):
        fit(experiment(), directory)
    return directory


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """A copy that stands at step 3."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def bits(run: OpenedRun) -> list[bytes]:
    state = run.state._replace(metrics=None)  # of the lines since the last one
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def test_a_run_goes_on_with_other_incidental_settings(
    finished: Path, half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment()
    config.data.dir = "/elsewhere"
    config.model.scan_blocks = config.model.remat = True
    settings = config.train
    settings.log_every, settings.evaluate_every, settings.checkpoint_every = 1, 3, 2
    settings.eval_batch_size, settings.steps_per_call = 100, 3
    logging.getLogger("flax_resnet").propagate = True
    with caplog.at_level(logging.INFO, "flax_resnet"):
        fit(config, half)
    assert bits(open_run(half)) == bits(open_run(finished))
    (line,) = [r.getMessage() for r in caplog.records if "goes on with" in r.getMessage()]
    assert "data.dir /elsewhere (was None)" in line
    assert all(name in line for name in INCIDENTAL)
    assert workdir.read_config(half) == config
    every = losses(half)
    assert every.keys() == {("train", step) for step in (2, 4, 5, 6)} | {("test", 6)}
    # A line of the log is the mean of the steps since the line before it.
    mean = (every["train", 5] + every["train", 6]) / 2
    assert losses(finished)["train", 6] == pytest.approx(mean, rel=1e-6)


def losses(directory: Path) -> dict[tuple[str, int], float]:
    rows = read_metrics(directory / "metrics.jsonl")
    return {(row["split"], row["step"]): row["loss"] for row in rows}


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("train", "batch_size", 8),
        ("optim", "peak_lr", 0.2),
        ("data", "flip", False),
        ("model", "conv_bias", True),
    ],
)
def test_what_decides_the_numbers_is_refused(
    half: Path, group: str, name: str, value: object
) -> None:
    config = experiment()
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=rf"holds another run \({group}.{name}: .* there, "):
        fit(config, half)


def test_no_training_image_is_read_to_use_a_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source.load` is all that reads images; data.json has what the training images gave."""
    load, wanted = source.load, []
    monkeypatch.setattr(source, "load", lambda *args: wanted.append(args[1]) or load(*args))
    shutil.copytree(finished, tmp_path / "run")
    responses.record(tmp_path / "run")
    assert (tmp_path / "run" / "layer_responses.json").exists()
    assert wanted == [("test",)]


def test_other_images_than_the_runs_are_refused(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = source.load

    def brighter(config: object, *args: object) -> dict:
        splits = load(config, *args)
        image = splits["train"].image.copy()
        image[0, 0, 0, 0] += 1
        return splits | {"train": splits["train"]._replace(image=image)}

    monkeypatch.setattr(source, "load", brighter)
    with pytest.raises(DatasetError, match="the images must be those that"):
        fit(experiment(), half)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"examples": {}, "normalization": {"mean": 1}}'])
def test_a_damaged_data_json_is_an_error(half: Path, text: str) -> None:
    (half / "data.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"data\.json (is not JSON|must be|is damaged)"):
        open_run(half).data_facts()
