"""Claim: a work directory holds one run, and all that is needed to use it and to go on with it.

What decides nothing of the numbers of the steps that are done may change when it goes on; it ends
with the bits of a run that had it so from the start. It needs its config and a checkpoint alone.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_resnet.config import INCIDENTAL, Dataset, Experiment, Preprocess, Schedule
from flax_resnet.data import source
from flax_resnet.data.pixels import make_normalization
from flax_resnet.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from flax_resnet.json_files import read_json, write_json
from flax_resnet.studies import responses
from flax_resnet.training import loop, wandb_log, workdir
from flax_resnet.training.loop import fit
from flax_resnet.training.metrics_log import read_lines, read_metrics
from flax_resnet.training.reporter import Clock
from flax_resnet.training.wandb_log import Follower
from flax_resnet.training.workdir import OpenedRun, open_run

STEPS = 6


def experiment(**settings: object) -> Experiment:
    """The run of these tests; in `settings` what is other, such as {"optim.peak_lr": 0.2}."""
    config = Experiment()
    config.model.depth = 8
    config.data.name = Dataset.DIGITS
    config.optim.boundaries = (4,)
    train = config.train
    train.steps, train.batch_size, train.eval_batch_size = STEPS, 16, 400
    train.log_every, train.evaluate_every, train.checkpoint_every = 2, 6, 3
    for name, value in settings.items():
        group, _, field = name.rpartition(".")
        setattr(getattr(config, group) if group else config, field, value)
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
    finished: Path, half: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_log, "check", lambda project: None)
    monkeypatch.setattr(Follower, "start", lambda self, workdir: None)
    config = experiment()
    config.wandb = "project"
    config.data.dir = "/elsewhere"
    config.model.scan_blocks = config.model.remat = True
    settings = config.train
    settings.log_every, settings.evaluate_every, settings.checkpoint_every = 1, 3, 2
    settings.eval_batch_size, settings.steps_per_call = 100, 3
    data = config.data
    data.allow_bad, data.placement, data.threads, data.workers = 1, "streamed", 2, 1
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


def test_weights_that_have_seen_more_steps_than_the_run_has_are_refused(tmp_path: Path) -> None:
    """Such as a converted file's."""
    config = experiment()
    write_json(tmp_path / "config.json", config.to_dict())
    (tmp_path / "checkpoints" / "70000").mkdir(parents=True)
    message = rf"train\.steps must be at least 70000, .* got 6; .* --config\.init={tmp_path} "
    with pytest.raises(ConfigError, match=message), workdir.claimed(tmp_path, config):
        pass


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


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    config = experiment(**{"optim.peak_lr": 1e30, "optim.warmup_steps": 3})
    with pytest.raises(TrainingError, match=r"(not finite|the loss is nan) at step [456]"):
        fit(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.step == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state))


# --- More steps -----------------------------------------------------------------------------------


def test_a_finished_run_goes_on_to_the_bits_of_one_go(
    finished: Path, half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was finished at step 3, by its config and its summary."""
    config = experiment(**{"train.steps": 3, "optim.boundaries": (5,)})
    write_json(half / "config.json", config.to_dict())
    write_json(half / "summary.json", {"steps": 3, "test_error": 0.5})
    for name in ("curves.png", "layer_responses.json"):
        (half / name).write_text("of step 3")
    logging.getLogger("flax_resnet").propagate = True
    with caplog.at_level(logging.INFO, "flax_resnet"):
        summary = fit(experiment(), half)
    said = "goes on with optim.boundaries [4] (was [5]), train.steps 6 (was 3)"
    assert sum(record.getMessage().endswith(said) for record in caplog.records) == 1
    check_one_go(half, finished)
    assert summary == read_json(half / "summary.json")
    assert (half / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (half / "layer_responses.json").exists()


TWICE = {"train.steps": 2 * STEPS, "optim.boundaries": (4, 9)}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many steps in one go."""
    directory = tmp_path_factory.mktemp("twice") / "run"
    with jax.enable_x64(False):
        fit(experiment(**TWICE), directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "state", ["finished", "not finished", "killed when its config was written, nothing else"]
)
def test_to_twice_as_many_steps_it_goes_from_wherever_it_is(
    finished: Path, half: Path, twice: Path, tmp_path: Path, state: str
) -> None:
    run = half if state == "not finished" else tmp_path / "twice"
    if state != "not finished":
        shutil.copytree(finished, run)
    if state.startswith("killed"):
        write_json(run / "config.json", experiment(**TWICE).to_dict())
    fit(experiment(**TWICE), run)
    check_one_go(run, twice)


def check_one_go(run: Path, whole: Path) -> None:
    assert bits(open_run(run)) == bits(open_run(whole))
    assert workdir.read_config(run) == workdir.read_config(whole)
    assert losses(run) == losses(whole)
    ours, theirs = (read_json(directory / "summary.json") for directory in (run, whole))
    for name in ("steps", "test_error", "test_loss", "train_loss", "config"):
        assert ours[name] == theirs[name]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """What a run of 6 steps leaves, as far as what may change is concerned."""
    (tmp_path / "run" / "checkpoints" / str(STEPS)).mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", experiment().to_dict())
    return tmp_path / "run"


@pytest.mark.parametrize(
    "settings",
    [
        {"train.steps": 7},
        {"optim.boundaries": (4, 6)},  # the rate of the seventh step
        {"optim.boundaries": (4, 6, 8), "train.steps": 2**31 - 1},
        {"optim.boundaries": (4, 7), "data.dir": "/elsewhere"},
    ],
)
def test_the_future_may_change(fake: Path, settings: dict[str, object]) -> None:
    told = workdir.check_same(fake, experiment(**settings), "--workdir")
    assert [line.split()[0] for line in told] == sorted(settings)


@pytest.mark.parametrize(
    ("settings", "remark"),
    [
        ({"train.steps": 5}, "train.steps: 6 there, 5 here; 6 steps are done"),
        ({"optim.peak_lr": 0.2}, "optim.peak_lr: 0.1 there, 0.2 here; the learning rate of step 0"),
        ({"optim.boundaries": (5,)}, "the learning rate of step 4, which is done"),
        ({"optim.boundaries": (3, 9)}, "the learning rate of step 3, which is done"),
        ({"optim.boundaries": (4, 5)}, "the learning rate of step 5, which is done"),  # the last
        ({"optim.decay_factor": 0.5, "train.steps": 9}, "the learning rate of step 4"),
        ({"optim.warmup_steps": 2}, "the learning rate of step 0, which is done"),
        ({"optim.momentum": 0.5, "train.steps": 9}, "optim.momentum: 0.9 there, 0.5 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
    ],
)
def test_the_past_may_not_and_other_weights_are_offered(
    fake: Path, settings: dict[str, object], remark: str
) -> None:
    with pytest.raises(ConfigError) as error:
        workdir.check_same(fake, experiment(**settings), "--workdir")
    assert str(error.value).startswith(f"{fake} holds another run (")
    assert remark in str(error.value)
    assert f"--config.init={fake} begins anew from its weights" in str(error.value)


def test_a_rate_that_falls_towards_the_end_falls_otherwise_towards_a_later_one(fake: Path) -> None:
    cosine: dict[str, object] = {"optim.schedule": Schedule.COSINE, "optim.boundaries": ()}
    write_json(fake / "config.json", experiment(**cosine).to_dict())
    with pytest.raises(ConfigError, match="the learning rate of step 1, which is done"):
        workdir.check_same(fake, experiment(**cosine, **{"train.steps": 7}), "--workdir")


@pytest.mark.parametrize("settings", [{"optim.decay_factor": 0.5}, {"optim.warmup_lr": 0.5}])
def test_a_setting_that_has_decided_nothing_yet_is_future(
    fake: Path, settings: dict[str, object]
) -> None:
    """The rate falls at step 4 for the first time."""
    (fake / "checkpoints" / str(STEPS)).rename(fake / "checkpoints" / "4")
    assert workdir.check_same(fake, experiment(**settings), "--workdir")


def test_a_finished_run_that_lost_its_checkpoints_does_not_begin_again(fake: Path) -> None:
    (fake / "checkpoints" / str(STEPS)).rmdir()
    write_json(fake / "summary.json", {"steps": STEPS, "test_error": 0.5})
    with pytest.raises(CheckpointError, match="finished at step 6, and has no checkpoint to go on"):
        fit(experiment(**TWICE), fake)
    assert (fake / "summary.json").exists()


# --- Files that are lost --------------------------------------------------------------------------


def test_it_finishes_from_its_checkpoint_alone_though_nothing_can_be_drawn(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "checkpoints", run / "checkpoints")
    shutil.copy(finished / "config.json", run)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *args: 1 / 0)
        summary = fit(experiment(), run)
    assert "curves.png could not be drawn: ZeroDivisionError" in caplog.text
    assert summary == read_json(run / "summary.json")
    before = read_json(finished / "summary.json")
    same = {"test_error", "test_loss", "train_error", "train_loss", "parameters", "config"}
    assert {name: summary[name] for name in same} == {name: before[name] for name in same}
    assert summary["wall_seconds"] is None
    assert read_json(run / "data.json") == read_json(finished / "data.json")
    assert not (run / "curves.png").exists()
    fit(experiment(), run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "data.json", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff\n\xfe", b"[" * 10**5])
def test_no_damage_to_another_file_keeps_it_from_its_end(
    finished: Path, half: Path, name: str, content: bytes
) -> None:
    shutil.rmtree(half / "tensorboard")
    (half / name).write_bytes(content)
    summary = fit(experiment(), half)
    assert bits(open_run(half)) == bits(open_run(finished))
    assert summary["test_loss"] == read_json(finished / "summary.json")["test_loss"]


ROW = {"step": 2, "split": "train", "loss": 2.5, "error": 0.75}


@pytest.mark.parametrize(
    ("line", "is_good"),
    [
        (json.dumps(ROW), True),
        (json.dumps(ROW | {"seconds": 1}), True),
        (json.dumps(ROW)[:20], False),
        ("", False),
        ("\x00\ufffd", False),
        ("[" * 10**5, False),
        (json.dumps([ROW]), False),
        (json.dumps(ROW | {"step": "2"}), False),
        (json.dumps(ROW | {"loss": None}), False),
        (json.dumps({name: value for name, value in ROW.items() if name != "error"}), False),
    ],
)
def test_a_damaged_line_of_the_log_costs_no_other(line: str, is_good: bool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(ROW | {"step": 4}) + "\n"
    path.write_text(good + line + "\n" + good + good[:30])
    assert [row is not None for row in read_lines(path)] == [True, is_good, True]
    assert len(list(read_metrics(path))) == 2 + is_good


def test_time_that_nobody_has_kept_is_not_told() -> None:
    before = {"seconds": 1000.0}
    assert "seconds" not in Clock([ROW], step=2).lap()
    assert Clock([ROW, ROW | before], step=2).lap()["seconds"] >= 1000
    assert 0 <= Clock([], step=0).lap()["seconds"] < 1000


def test_checkpoints_without_a_config_are_nobodys(fake: Path) -> None:
    (fake / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds a run, but no config\.json that says"):
        fit(experiment(), fake)


# --- A start that failed --------------------------------------------------------------------------


def test_a_start_that_failed_for_want_of_data_leaves_the_directory_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(config: object) -> dict:
        raise DatasetError("no images")

    monkeypatch.setattr(source, "load", nothing)
    for settings in ({"data.dir": "/wrong"}, {"model.depth": 14, "seed": 3}):
        with pytest.raises(DatasetError, match="no images"):
            fit(experiment(**settings), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("left", ["config.json", "data.json", "metrics.jsonl"])
def test_what_a_start_left_that_made_no_step_binds_nobody(fake: Path, left: str) -> None:
    """As where it ran out of memory, or was killed while it compiled."""
    (fake / "checkpoints" / str(STEPS)).rmdir()
    if left == "metrics.jsonl":
        (fake / left).write_text("")
    if left == "data.json":
        facts = workdir.DataFacts({"train": 1}, make_normalization(Preprocess.IMAGENET))
        write_json(fake / left, facts.to_dict())
    assert workdir.check_same(fake, experiment(seed=1), "--workdir") == []
    assert workdir.known_data_facts(fake) is None
    (fake / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(ConfigError, match="holds another run"):
        workdir.check_same(fake, experiment(seed=1), "--workdir")


# --- Checkpoints by name --------------------------------------------------------------------------


def make_run(directory: Path, *steps: int) -> Path:
    for step in steps:
        (directory / "checkpoints" / str(step)).mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("given", "step"),
    [
        (".", None),
        ("checkpoints", None),
        ("checkpoints/", None),
        ("checkpoints/latest", None),
        ("checkpoints/best", "best"),
        ("checkpoints/best/", "best"),
        ("checkpoints/8", 8),
        ("checkpoints/8/", 8),
        ("checkpoints/17", 17),  # which is not there: for `Checkpoints.restore` to say
    ],
)
@pytest.mark.parametrize("name", ["run", "checkpoints", "checkpoints/20"])
def test_a_checkpoint_by_its_name(given: str, step: object, name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / name, 4, 8)
    assert workdir.is_run(run / given)
    assert workdir.locate(run / given) == (run, step)


def test_a_folder_named_checkpoints_need_not_be_a_runs(tmp_path: Path) -> None:
    run, empty = make_run(tmp_path / "checkpoints/run", 4), tmp_path / "checkpoints/empty"
    assert workdir.locate(empty) == (empty, None)
    make_run(tmp_path)
    assert workdir.locate(run) == (run, None)


def test_a_checkpoint_by_a_name_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", 4)
    for folder, given, step in [("", ".", None), ("4", ".", 4), ("4", "..", None), ("", "4", 4)]:
        monkeypatch.chdir(run / "checkpoints" / folder)
        directory, found = workdir.locate(Path(given))
        assert (directory.resolve(), found) == (run, step)


@pytest.mark.parametrize("name", ["newest", "4/state", "step_4", "best.pt"])
def test_a_checkpoint_that_there_is_not_names_those_that_there_are(
    name: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run", 10, 8) / "checkpoints"
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointError) as refusal:
        workdir.locate(folder / name)
    assert str(refusal.value) == (
        f"{folder / name} is no checkpoint; {folder} has latest, best and 8, 10"
    )


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("a.pt", "checkpoints/a.th", "checkpoints/a.safetensors"):
        assert not workdir.is_run(tmp_path / name)
    (tmp_path / "checkpoints" / "a").touch()
    assert not workdir.is_run(tmp_path / "checkpoints" / "a")


def test_a_step_that_there_is_not_names_those_that_there_are(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"step 17; {finished}/checkpoints has .* 3, 6$"):
        open_run(finished / "checkpoints" / "17")
