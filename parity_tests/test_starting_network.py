"""Claim: a run can take its network from the weights that it begins with, and its preprocessing
where they tell it; and it goes on to the same bits when they are gone.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_resnet.config import (
    DataConfig,
    Dataset,
    DType,
    Experiment,
    Interpolation,
    OptimConfig,
    Preprocess,
    ResNetConfig,
    Schedule,
    Shortcut,
    Stages,
    Stride,
    TrainConfig,
)
from flax_resnet.data import source
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.resnet import abstract
from flax_resnet.step import init
from flax_resnet.training.checkpoint import digest
from flax_resnet.training.loop import fit
from flax_resnet.training.starting_network import take_preprocessing, with_network_of
from flax_resnet.training.starting_weights import check_preprocess, images_of
from flax_resnet.training.workdir import SUMMARY, open_run, read_config
from flax_resnet.weights import pretrained
from flax_resnet.weights.files import Contents
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict
from parity_tests.test_starting_weights import (
    NORMALIZATION,
    DataFacts,
    experiment,
    trained,
    write_file,
)

NETWORK: dict[str, Any] = {"depth": 14, "shortcut": Shortcut.B, "batch_norm_epsilon": 1e-3}


def state_dict() -> dict[str, np.ndarray]:
    """Of ResNet-8, all zeros."""
    config = experiment().model
    params, stats = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(config)[1:])
    return to_state_dict(config.architecture, params, stats)


def taking(init: Path, **settings: Any) -> Experiment:
    """A run of the paper's network, but for what it takes."""
    config = Experiment(init=str(init), init_model=True, **settings)
    config.data.name = Dataset.DIGITS
    return config


def directory_of(path: Path, *, knows_data: bool = True) -> Path:
    """A work directory without checkpoints, which tells all that is asked."""
    path.mkdir()
    config = experiment(**NETWORK)
    config.data.preprocess = Preprocess.OWN_MEAN
    write_json(path / "config.json", config.to_dict())
    if knows_data:
        facts = DataFacts({"train": 1437, "test": 360}, NORMALIZATION)
        write_json(path / "data.json", facts.to_dict())
    return path


def test_the_network_is_that_of_a_run_and_how_it_is_computed_the_runs_own(tmp_path: Path) -> None:
    run = directory_of(tmp_path / "run")
    own: dict[str, Any] = {
        "dtype": DType.BFLOAT16,
        "scan_blocks": True,
        "remat": True,
        "batch_norm_momentum": 0.01,
    }
    config = taking(run, model=ResNetConfig(**own))
    found = with_network_of(config, tmp_path / "new")
    assert found.model == ResNetConfig(**NETWORK, **own)
    assert found.data.preprocess is Preprocess.OWN_MEAN
    assert found.init_fresh == ()
    assert config == taking(run, model=ResNetConfig(**own))  # is as it was
    config.init_model = False
    assert with_network_of(config, tmp_path / "new") is config


def test_it_is_that_of_a_file_whose_preprocessing_is_the_usual_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tmp_path / "x.safetensors", trained(experiment(), 5), Layout.AKAMASTER)
    found = with_network_of(taking(path), tmp_path / "new")
    assert (found.model.depth, found.model.shortcut) == (8, Shortcut.A)
    assert found.data.preprocess is Preprocess.IMAGENET
    assert f"{path} does not tell data.preprocess: taken to be the usual, imagenet" in caplog.text


@pytest.mark.slow
def test_it_is_that_of_published_weights_and_of_a_file_of_bottlenecks(tmp_path: Path) -> None:
    theirs, path = trained(experiment(), 5), tmp_path / "net.safetensors"
    pretrained.write(path, experiment(), theirs.params, theirs.batch_stats, NORMALIZATION, 5, {})
    found = with_network_of(taking(path), tmp_path / "new")
    assert (found.model.depth, found.data.preprocess) == (8, Preprocess.IMAGENET)
    large: dict[str, Any] = {"depth": 50, "stages": Stages.IMAGENET, "shortcut": Shortcut.B}
    path = write_file(tmp_path / "x.safetensors", trained(experiment(**large), 5), **large)
    found = with_network_of(taking(path), tmp_path / "new")
    assert (found.model.depth, found.model.stride) == (50, Stride.CONV3X3)


def test_a_preprocessing_that_is_set_stays(tmp_path: Path) -> None:
    config = taking(directory_of(tmp_path / "run"))
    config.data.preprocess = Preprocess.IMAGENET
    assert with_network_of(config, tmp_path / "new").data.preprocess is Preprocess.IMAGENET


def test_what_a_file_says_of_its_images_is_taken_but_for_what_is_set() -> None:
    """The sizes only where both see photographs."""
    images: dict[str, Any] = {
        "preprocess": Preprocess.CONSTANTS,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.1, 0.3),
        "resize": 235,
        "interpolation": Interpolation.BICUBIC,
    }
    imported = from_state_dict(state_dict())
    theirs = images_of(Contents({}, [], [], images=images), imported)
    ours = DataConfig(name=Dataset.FOLDER, crop=128)
    take_preprocessing(ours, theirs)
    assert ours == DataConfig(name=Dataset.FOLDER, crop=128, **images)
    ours = DataConfig(name=Dataset.FOLDER, preprocess=Preprocess.IMAGENET, resize=160)
    take_preprocessing(ours, theirs)
    assert (ours.preprocess, ours.mean, ours.resize) == (Preprocess.IMAGENET, (), 160)
    ours = DataConfig(name=Dataset.DIGITS)
    take_preprocessing(ours, theirs)
    assert (ours.mean, ours.resize) == ((0.5, 0.4, 0.3), None)


def test_other_constants_are_refused() -> None:
    theirs = DataConfig(preprocess=Preprocess.CONSTANTS, mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3))
    config = Experiment(data=dataclasses.replace(theirs, std=(0.2, 0.2, 0.2)))
    with pytest.raises(
        ConfigError,
        match=r"x knows images by data.std 0.2,0.1,0.3, this run's is 0.2,0.2,0.2; set "
        r"--config.data.std=0.2,0.1,0.3$",
    ):
        check_preprocess("x", theirs, config, is_certain=True)
    check_preprocess("x", theirs, Experiment(data=theirs), is_certain=True)


def test_other_classes_have_a_new_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = directory_of(tmp_path / "run")
    monkeypatch.setattr(source, "class_names", lambda config: ("cat", "dog"))
    for given, fresh in (((), ("fc",)), (("stem",), ("stem", "fc")), (("fc",), ("fc",))):
        found = with_network_of(taking(run, init_fresh=given), tmp_path / "new")
        assert (found.model.num_classes, found.init_fresh) == (2, fresh)


def test_a_run_that_has_begun_needs_the_weights_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "class_names", lambda config: ("cat", "dog"))
    config = taking(directory_of(tmp_path / "run"))
    first = with_network_of(config, tmp_path / "new")
    (tmp_path / "new").mkdir()
    write_json(tmp_path / "new" / "config.json", first.to_dict())
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="init must be a work directory, one of its checkpoints"):
        with_network_of(config, tmp_path / "new")  # has not begun
    write_json(tmp_path / "new" / SUMMARY, {"steps": 1, "test_error": 0.5})
    assert with_network_of(config, tmp_path / "new") == first
    config.init = "another"
    with pytest.raises(ConfigError, match="init must be a work directory, one of its checkpoints"):
        with_network_of(config, tmp_path / "new")


# --- A whole run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fine_tuning_goes_on_from_its_middle_to_the_same_bits(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", init(experiment())[1], Layout.AKAMASTER)
    config = taking(
        path,
        init_fresh=("fc",),
        optim=OptimConfig(schedule=Schedule.COSINE, peak_lr=0.01, body_lr_factor=0.1),
        train=TrainConfig(
            steps=4,
            batch_size=16,
            eval_batch_size=360,
            checkpoint_every=2,
            frozen=("stem", "stages.0", "stages.1"),
            label_smoothing=0.1,
        ),
    )
    workdir = tmp_path / "new"
    fit(config, workdir)
    assert read_config(workdir).model == ResNetConfig.akamaster(8)
    whole, start = (open_run(workdir / "checkpoints" / step).state for step in ("4", "2"))
    for name in ("conv1", "bn1"):
        for now, then in zip(whole[1:3], start[1:3], strict=True):
            if name in now:
                assert all(np.array_equal(now[name][x], then[name][x]) for x in now[name])
    assert not np.array_equal(whole.params["fc"]["kernel"], start.params["fc"]["kernel"])
    shutil.rmtree(workdir / "checkpoints" / "4")  # as if killed before it was saved
    (workdir / SUMMARY).unlink()
    path.unlink()
    fit(config, workdir)
    assert digest(open_run(workdir).state) == digest(whole)
