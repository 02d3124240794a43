"""Claim: a run can begin with the weights of another run, of a file or of published ones, to the
bit, with their running statistics, and with nothing else of theirs. What does not fit is refused.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.config import (
    Architecture,
    ChannelPad,
    Dataset,
    DType,
    Experiment,
    Preprocess,
    Projection,
    ResNetConfig,
    Shortcut,
    Stages,
    Stem,
    Stride,
)
from flax_resnet.data import pixels
from flax_resnet.errors import CheckpointError, ConfigError, WeightsError
from flax_resnet.json_files import write_json
from flax_resnet.nn.scan import unstack
from flax_resnet.step import TrainState, init
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.loop import fit
from flax_resnet.training.starting_weights import check_architecture, settings, with_weights_of
from flax_resnet.training.workdir import DataFacts, open_run
from flax_resnet.weights import files, pretrained
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import to_state_dict

NORMALIZATION = pixels.make_normalization(Preprocess.IMAGENET)


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


def experiment(source: Path | str | None = None, **model: Any) -> Experiment:
    config = Experiment(ResNetConfig.paper(**{"depth": 8} | model))
    config.data.preprocess = Preprocess.IMAGENET
    config.init = None if source is None else str(source)
    return config


def trained(config: Experiment, step: int) -> TrainState:
    """A state of which no number is as at the start."""
    rng = np.random.default_rng(step)
    shapes = jax.eval_shape(lambda: init(config)[1])
    state = jax.tree.map(lambda x: np.asarray(rng.uniform(1, 2, x.shape), x.dtype), shapes)
    return state._replace(step=np.array(step, np.int32))


def write_run(directory: Path, config: Experiment, *, knows_data: bool = True) -> TrainState:
    """A work directory with checkpoints of steps 3 and 5; its last state."""
    directory.mkdir()
    write_json(directory / "config.json", config.to_dict())
    if knows_data:
        facts = DataFacts({"train": 1437, "test": 360}, NORMALIZATION)
        write_json(directory / "data.json", facts.to_dict())
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step in (3, 5):
            checkpoints.save(trained(config, step), None)
    return trained(config, 5)


def begun(config: Experiment) -> TrainState:
    """The state that the run of `config` begins with."""
    shapes = jax.eval_shape(lambda: init(config)[1])
    return with_weights_of(config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def check_weights(state: TrainState, theirs: TrainState) -> None:
    """All of theirs is there but the step, the momentum and the sums for the log."""
    for a, b in zip(jax.tree.leaves(state[1:3]), jax.tree.leaves(theirs[1:3]), strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == b.dtype
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state[3:]))


def test_they_are_those_of_a_run_or_of_one_of_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last = write_run(run, experiment())
    check_weights(begun(experiment(run)), last)
    check_weights(begun(experiment(run / "checkpoints" / "3")), trained(experiment(), 3))
    home = f"{run}/../run"  # any spelling of a path
    check_weights(begun(experiment(home)), last)


def write_file(path: Path, state: TrainState, layout: Layout = Layout.TWIN, **model: Any) -> Path:
    architecture = experiment(**model).model.architecture
    arrays = to_state_dict(architecture, state.params, state.batch_stats, step=5, layout=layout)
    files.write(path, arrays, layout)
    return path


@pytest.mark.parametrize(
    ("suffix", "layout"),
    [
        (".safetensors", Layout.TWIN),
        pytest.param(".safetensors", Layout.AKAMASTER, marks=pytest.mark.slow),
        pytest.param(".pt", Layout.TORCHVISION, marks=pytest.mark.slow),
        pytest.param(".th", Layout.AKAMASTER, marks=pytest.mark.slow),
    ],
)
def test_they_are_those_of_a_pytorch_file(
    suffix: str, layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = trained(experiment(), 5)
    path = write_file(tmp_path / f"x{suffix}", theirs, layout)
    logging.getLogger("flax_resnet").propagate = True
    check_weights(begun(experiment(path)), theirs)
    told = [record.getMessage() for record in caplog.records]
    assert f"{path} does not tell its shortcut: taken to be this run's, A" in told
    is_usual = layout is Layout.AKAMASTER
    assert any("does not tell data.preprocess" in line for line in told) != is_usual


def test_what_a_files_keys_do_not_tell_is_as_the_run_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The keys of a plain network are those of shortcut A, whatever is added to variances."""
    plain = {"shortcut": Shortcut.PLAIN, "batch_norm_epsilon": 1e-3}
    theirs = trained(experiment(**plain), 5)
    path = write_file(tmp_path / "x.safetensors", theirs, **plain)
    check_weights(begun(experiment(path, **plain)), theirs)
    assert f"{path} does not tell its shortcut: taken to be this run's, plain" in caplog.text
    assert f"{path} does not tell its batch_norm_epsilon: taken to be this run's, 0" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("stride", Stride)
def test_so_is_the_stride_of_bottlenecks(stride: Stride, tmp_path: Path) -> None:
    large: dict[str, Any] = {"depth": 50, "stages": Stages.IMAGENET, "shortcut": Shortcut.B}
    theirs = trained(experiment(**large, stride=stride), 5)
    path = write_file(tmp_path / "x.safetensors", theirs, **large, stride=stride)
    check_weights(begun(experiment(path, **large, stride=stride)), theirs)


@pytest.mark.slow
def test_they_are_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, path = trained(experiment(), 5), tmp_path / "net.safetensors"
    arrays = theirs.params, theirs.batch_stats
    pretrained.write(path, experiment(), *arrays, NORMALIZATION, 5, {})
    monkeypatch.setenv(pretrained.ENVIRONMENT, str(tmp_path))
    for name in (path, "net"):
        check_weights(begun(experiment(name)), theirs)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(WeightsError, match="is damaged or another file"):
        begun(experiment("net"))


@pytest.mark.slow
def test_they_take_the_runs_type(tmp_path: Path, run: Path) -> None:
    double = {"dtype": DType.FLOAT64}
    with jax.enable_x64(True):
        theirs = write_run(tmp_path / "run", experiment(**double))
        widened = jax.tree.map(lambda x: x.astype(np.float64), trained(experiment(), 5))
        check_weights(begun(experiment(run, **double)), widened)
    assert theirs.params["fc"]["bias"].dtype == np.float64
    rounded = jax.tree.map(lambda x: x.astype(np.float32), theirs)
    check_weights(begun(experiment(tmp_path / "run")), rounded)


@pytest.mark.slow
def test_a_run_that_scans_its_blocks_has_the_same(tmp_path: Path) -> None:
    theirs = write_run(tmp_path / "run", experiment(depth=14))
    plain = begun(experiment(tmp_path / "run", depth=14))
    check_weights(plain, theirs)
    scanned = begun(experiment(tmp_path / "run", depth=14, scan_blocks=True))
    assert jax.tree.structure(scanned) != jax.tree.structure(plain)
    check_weights(unstack(scanned), theirs)


def begun_afresh(source: Path, *fresh: str, **model: Any) -> TrainState:
    """The state of a run that begins with new weights, here zeros, in these modules."""
    config = experiment(source, **model)
    config.init_fresh = fresh
    config.validate()
    return begun(config)


def check_fresh(state: TrainState, theirs: TrainState, *fresh: str) -> None:
    """These modules are zeros, and all others theirs."""
    for ours, expected in zip(state[1:3], theirs[1:3], strict=True):
        of_theirs = dict(jax.tree_util.tree_leaves_with_path(expected))
        for path, x in jax.tree_util.tree_leaves_with_path(ours):
            name = ".".join(str(entry.key) for entry in path)
            if name.startswith(tuple(f"{module}." for module in fresh)):
                assert not np.any(x), name
            else:
                assert np.array_equal(x, of_theirs[path]), name


def test_modules_that_begin_afresh_keep_their_own(run: Path) -> None:
    """So a network gets a classifier for other classes."""
    theirs = trained(experiment(), 5)
    state = begun_afresh(run, "fc", num_classes=7)
    assert state.params["fc"]["kernel"].shape == (64, 7)
    check_fresh(state, theirs, "fc")


@pytest.mark.slow
def test_so_do_a_stage_and_a_batch_norm(run: Path) -> None:
    fresh = "stages.2", "stages.1.0.bn1"
    check_fresh(begun_afresh(run, *fresh), trained(experiment(), 5), *fresh)


@pytest.mark.slow
def test_so_do_those_of_a_run_that_scans_its_blocks(tmp_path: Path) -> None:
    theirs = write_run(tmp_path / "run", experiment(depth=14))
    model: dict[str, Any] = {"depth": 14, "scan_blocks": True}
    state = begun_afresh(tmp_path / "run", "fc", "stages.0.1", num_classes=7, **model)
    check_fresh(unstack(state), theirs, "fc", "stages.0.1")


@pytest.mark.parametrize(
    ("fresh", "model", "message"),
    [
        (("fcc",), {}, "init_fresh must name modules .*, got 'fcc'; the nearest is fc"),
        (("stage.2",), {}, r"got 'stage\.2'; the nearest is stages\.2"),
        ((), {"num_classes": 7}, r"num_classes: 10 there, 7 here\); .* --config\.init_fresh=fc"),
        (("conv1",), {"num_classes": 7}, "model.num_classes: 10 there, 7 here"),
        (("fc",), {"num_classes": 7, "depth": 14}, r"\(model\.depth: 8 there, 14 here\)"),
        (("fc",), {"image_channels": 1}, "model.image_channels: 3 there, 1 here"),
    ],
)
def test_what_does_not_fit_beside_them_is_refused(
    fresh: tuple[str, ...], model: dict[str, Any], message: str, run: Path
) -> None:
    config = experiment(run, **model)
    config.init_fresh = fresh
    with pytest.raises(ConfigError, match=message):
        begun(config)


def test_without_init_nothing_can_begin_afresh() -> None:
    config = experiment()
    config.init_fresh = ("fc",)
    with pytest.raises(ConfigError, match=r"init_fresh must be empty without init, .* \('fc',\)"):
        config.validate()


# --- What does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depth": 14}, "model.depth: 8 there, 14 here"),
        ({"shortcut": Shortcut.B}, "model.shortcut: A there, B here"),
        ({"shortcut": Shortcut.PLAIN}, "model.shortcut: A there, plain here"),
        ({"num_classes": 7}, "model.num_classes: 10 there, 7 here"),
        ({"conv_bias": True}, "model.conv_bias: False there, True here"),
        ({"stem": Stem.CONV}, "model.stem: conv_bn_relu there, conv here"),
        ({"num_classes": 7, "depth": 20}, "model.depth: 8 there, 20 here, model.num_classes: 10 "),
        ({"channel_pad": ChannelPad.CENTRE}, "model.channel_pad: end there, centre here"),
        ({"batch_norm_epsilon": 1e-3}, "model.batch_norm_epsilon: 1e-05 there, 0.001 here"),
        ({"stages": Stages.IMAGENET, "depth": 18}, "model.depth: 8 there, 18 here, model.stages: "),
    ],
)
def test_another_network_is_refused_by_the_settings_that_differ(
    model: dict[str, Any], message: str
) -> None:
    theirs, ours = (experiment(**each).model.architecture for each in ({}, model))
    with pytest.raises(ConfigError, match="init: runs/a holds another network") as error:
        check_architecture("runs/a", theirs, ours)
    assert f"({message}" in str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("init") / "run"
    with jax.enable_x64(False):
        write_run(directory, experiment())
    return directory


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depth": 14}, "model.depth: 8 there, 14 here"),
        ({"shortcut": Shortcut.B}, "model.shortcut: A there, B here"),
        ({"num_classes": 7}, "model.num_classes: 10 there, 7 here"),
    ],
)
def test_so_is_a_pytorch_file_of_another(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "x.safetensors", trained(experiment(), 5))
    with pytest.raises(ConfigError, match=f"holds another network .*{message}"):
        begun(experiment(path, **model))


def test_no_setting_of_an_architecture_is_left_out() -> None:
    """One by one, in a network that has them all; its blocks are its depth and its stages."""
    names = {field.name for field in dataclasses.fields(Architecture)}
    bottlenecks = ResNetConfig.imagenet(50).architecture
    padded = dataclasses.replace(bottlenecks, shortcut=Shortcut.A)
    compared = settings(bottlenecks).keys() | settings(padded).keys()
    assert compared == {f"model.{name}" for name in names - {"block", "widths", "blocks"}} | {
        "model.depth",
        "model.stages",
    }
    theirs = dataclasses.replace(bottlenecks, stride=Stride.CONV3X3)
    with pytest.raises(ConfigError, match=r"model\.stride: conv3x3 there, conv1x1 here"):
        check_architecture("resnet50.pt", theirs, bottlenecks)


def test_so_is_a_run_of_another(run: Path) -> None:
    with pytest.raises(ConfigError, match=f"init: {run}, step 5 holds another network"):
        begun(experiment(run, depth=14))


def test_what_a_network_does_not_have_cannot_differ() -> None:
    """Shortcut B pads nothing, A projects nothing, and basic blocks are no bottlenecks."""
    idle = {"channel_pad": ChannelPad.CENTRE, "stride": Stride.CONV3X3}
    for model in ({"shortcut": Shortcut.B} | idle, {"projection": Projection.CONV_BIAS}):
        ours = experiment(**model).model.architecture
        theirs = experiment(shortcut=ours.shortcut).model.architecture
        check_architecture("runs/a", theirs, ours)


def test_another_preprocessing_is_refused_where_it_is_known_and_told_where_it_is_assumed(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(run)
    config.data.preprocess = Preprocess.OWN_MEAN
    with pytest.raises(ConfigError, match=r"set --config\.data\.preprocess=imagenet"):
        begun(config)
    shutil.copytree(run, tmp_path / "converted")
    (tmp_path / "converted" / "data.json").unlink()
    config.init = str(tmp_path / "converted")
    check_weights(begun(config), trained(experiment(), 5))
    assert "does not tell data.preprocess: usual is imagenet, this run's is own_mean" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing",
            "init must be a work directory, one of its checkpoints .* of published weights",
        ),
        ("nothing.pt", "init: there is no file nothing.pt"),
        ("nothing/checkpoints/3", "init must be a work directory"),
    ],
)
def test_what_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(experiment(name))


def test_a_checkpoint_that_a_run_has_not_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; .* 3, 5"):
        begun(experiment(run / "checkpoints" / "4"))


# --- A whole run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_goes_on_without_them_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    def train(directory: str, steps: int) -> None:
        config = experiment(tmp_path / "source")
        config.data.name = Dataset.DIGITS
        config.train.batch_size, config.train.eval_batch_size = 16, 360
        config.train.steps = steps
        fit(config, tmp_path / directory)

    shutil.copytree(run, tmp_path / "source")
    train("whole", 4)
    train("begun", 2)
    first = open_run(tmp_path / "begun" / "checkpoints" / "0").state
    check_weights(first, trained(experiment(), 5))
    shutil.rmtree(tmp_path / "begun" / "checkpoints" / "2")  # as if killed before it was saved
    (tmp_path / "begun" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "source")
    train("begun", 4)
    ours, theirs = (open_run(tmp_path / name).state for name in ("begun", "whole"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(a, b)
