"""A run's directory: config.json says whose it is, checkpoints/ holds its states.

A run needs nothing else to go on to its end. There are also data.json (how many images there are,
and the constants of their preprocessing), metrics.jsonl, tensorboard/, and once finished
summary.json, curves.png and, of photographs, confusion.png and mistakes.png.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import jax
import numpy as np

from flax_resnet.config import INCIDENTAL, SCHEDULE, DataConfig, Experiment
from flax_resnet.data import source
from flax_resnet.data.pixels import Normalization
from flax_resnet.data.source import Split
from flax_resnet.errors import CheckpointError, ConfigError, DatasetError
from flax_resnet.json_files import read_json, write_json
from flax_resnet.optim import make_schedule
from flax_resnet.parallel import processes
from flax_resnet.step import TrainState, init
from flax_resnet.training.checkpoint import load_state, names, steps_saved
from flax_resnet.training.metrics_log import read_metrics
from flax_resnet.weights.files import is_folder

log = logging.getLogger(__name__)

SUMMARY, CURVES = "summary.json", "curves.png"
RESPONSES, BATCH_STATISTICS = "layer_responses.json", "batch_statistics.json"
CONFUSION, MISTAKES = "confusion.png", "mistakes.png"
OF_THE_END = (
    SUMMARY,
    CURVES,
    CONFUSION,
    MISTAKES,
    RESPONSES,
    BATCH_STATISTICS,
)  # what tells of the last step alone


class DataFacts(NamedTuple):
    """What a run must know of its data to be used without the training images."""

    examples: dict[str, int]  # of each split
    normalization: Normalization
    classes: tuple[str, ...] | None = (
        None  # their names; None: an earlier version did not keep them
    )

    def to_dict(self) -> dict[str, Any]:
        tree = {"examples": self.examples, "normalization": self.normalization.to_dict()}
        return tree if self.classes is None else tree | {"classes": list(self.classes)}


class OpenedRun(NamedTuple):
    """A checkpoint of a run, and what is needed to use it."""

    directory: Path
    config: Experiment
    state: TrainState  # arrays of the host, block by block

    @property
    def step(self) -> int:
        """Training steps that the checkpoint has seen."""
        return int(self.state.step)

    def data_facts(self) -> DataFacts:
        """What the work directory keeps of its data.

        Version 0.1 kept nothing: then it is taken from the images. Raises DatasetError if they are
        not there, CheckpointError if what was kept is damaged.
        """
        return read_data_facts(self.directory) or facts_of(self.config.data)


def open_run(checkpoint: Path) -> OpenedRun:
    """What a checkpoint holds.

    Args:
        checkpoint: WORKDIR/checkpoints/STEP, WORKDIR/checkpoints/best (the one with the lowest
            error), or, for the newest that is whole, WORKDIR, WORKDIR/checkpoints or
            WORKDIR/checkpoints/latest.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: a setting in config.json is unknown or breaks a rule.
    """
    directory, step = locate(checkpoint)
    config = read_config(directory)
    config.model = config.model.block_by_block()
    state = load_state(directory, jax.eval_shape(lambda: init(config)[1]), step)
    return OpenedRun(directory, config, state)


@contextlib.contextmanager
def claimed(workdir: Path, config: Experiment) -> Iterator[Experiment | None]:
    """`workdir`, made if need be, for this run alone, where `config` may go on.

    Of several processes only the first touches it. Nothing is written there yet: `begin` does.

    Returns:
        What has been trained there so far; None if nothing has.

    Raises:
        CheckpointError: another process uses it (a lock left by a killed one is none), or its run
            has lost what it would go on from.
        ConfigError: it holds a run that cannot go on so; the message shows what differs.
    """
    processes.check_same("config", config.to_dict())
    lock = filelock.FileLock(workdir / ".lock", blocking=False)

    def claim() -> dict[str, Any] | None:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as e:
            raise CheckpointError(
                f"{workdir} is in use by another run; wait for it, or choose another --workdir"
            ) from e
        check_same(workdir, config, "--workdir")
        if not has_begun(workdir):
            return None
        done = steps_done(workdir)
        if done > config.train.steps:  # such as a converted file's
            raise ConfigError(
                f"train.steps must be at least {done}, the steps that {workdir} has seen, got "
                f"{config.train.steps}; or choose another --workdir, where --config.init={workdir} "
                "begins anew from its weights"
            )
        if 0 < done < config.train.steps and not steps_saved(workdir):
            raise CheckpointError(
                f"{workdir} is finished at step {done}, and has no checkpoint to go on from; copy "
                "its checkpoints/ there, or choose another --workdir"
            )
        return read_config(workdir).to_dict()

    try:
        before = processes.on_first(claim)
        yield None if before is None else Experiment.from_dict(before)
    finally:
        lock.release()


def begin(workdir: Path, config: Experiment, facts: DataFacts) -> None:
    """Makes `workdir` say what is trained there from now on: a new run, or an old one further on.

    To be called once nothing is left but to train: a start that fails before, for want of data,
    leaves the directory free for any other run.
    """
    if known_data_facts(workdir) is None:
        write_json(workdir / "data.json", facts.to_dict())
    keep_config(workdir, config)
    for name in OF_THE_END:
        (workdir / name).unlink(missing_ok=True)


def keep_config(workdir: Path, config: Experiment) -> None:
    """Writes config.json; says what is another setting than before."""
    changes = check_same(workdir, config, "--workdir")
    if changes:
        log.info("%s: goes on with %s", workdir, ", ".join(changes))
    path = workdir / "config.json"
    if not has_begun(workdir) or read_json(path) != config.to_dict():
        write_json(path, config.to_dict())


def has_begun(workdir: Path) -> bool:
    """Whether anything was trained there. Without that, a config.json is a failed start's.

    Raises:
        CheckpointError: nothing says what it was.
    """
    begun = steps_saved(workdir) or (workdir / SUMMARY).exists()
    begun = bool(begun or any(read_metrics(workdir / "metrics.jsonl")))
    if begun and not (workdir / "config.json").exists():
        raise CheckpointError(
            f"{workdir} holds a run, but no config.json that says which; restore it, or choose "
            "another directory"
        )
    return begun


def check_same(directory: Path, config: Experiment, flag: str) -> list[str]:
    """What differs between `config` and the run in `directory`, if there is one, and may.

    These are what decides nothing of a run's numbers (`INCIDENTAL`) and the number of steps and
    the learning rates (`SCHEDULE`) of those steps that are still to come.

    Args:
        flag: by which the user can choose another directory.

    Returns:
        Such as ["data.dir b (was a)"].

    Raises:
        ConfigError: something differs that has decided the run's numbers already.
    """
    if not has_begun(directory):
        return []
    before = read_config(directory)
    changes = difference(before.to_dict(), config.to_dict())
    past = [name for name in changes if name not in (*INCIDENTAL, *SCHEDULE)]
    done, remark = steps_done(directory), ""
    if any(name in SCHEDULE for name in changes):
        other = first_other_rate(before, config, done)
        if other is not None:
            past += [name for name in changes if name in SCHEDULE]
            remark = f"; the learning rate of step {other}, which is done, would be another"
        elif config.train.steps < done:
            past += ["train.steps"]
            remark = f"; {done} steps are done"
    if past:
        told = [f"{name}: {a} there, {b} here" for name, (a, b) in changes.items() if name in past]
        advice = f"choose another {flag}"
        same_network = before.model.architecture == config.model.architecture
        if flag == "--workdir" and steps_saved(directory) and same_network:
            advice += f", where --config.init={directory} begins anew from its weights"
        raise ConfigError(f"{directory} holds another run ({', '.join(told)}{remark}); {advice}")
    return [f"{name} {b} (was {a})" for name, (a, b) in changes.items()]


def steps_done(directory: Path) -> int:
    """How many steps of a run are not to be done again."""
    ends = [tree["steps"] for tree in [read_summary(directory)] if tree]
    return max([0, *steps_saved(directory), *ends])


def first_other_rate(a: Experiment, b: Experiment, steps: int) -> int | None:
    """The first of so many steps at which the learning rates of two experiments differ."""
    step = np.arange(steps)
    schedules = [make_schedule(config.optim, config.train.steps) for config in (a, b)]
    rates = [np.broadcast_to(schedule(step), step.shape) for schedule in schedules]
    different = np.flatnonzero(rates[0] != rates[1])
    return int(different[0]) if len(different) else None


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """What a finished run came to, by its summary.json; None if there is none, or a damaged one."""
    try:
        tree = read_json(workdir / SUMMARY)
    except FileNotFoundError:
        return None
    except CheckpointError as e:
        log.warning("%s; it counts for nothing", e)
        return None
    if not all(isinstance(tree.get(name), int | float) for name in ("steps", "test_error")):
        log.warning("%s lacks its numbers; it counts for nothing", workdir / SUMMARY)
        return None
    return tree


def difference(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """By name, such as "train.steps", the values that are not the same in both."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changes |= difference(a, b, f"{prefix}{name}.")
        elif a != b:
            changes[f"{prefix}{name}"] = (a, b)
    return changes


def read_config(workdir: Path) -> Experiment:
    """The experiment that `workdir` holds.

    Raises:
        CheckpointError: it holds none, or one that no work directory of ours would.
        ConfigError: a setting is unknown or breaks a rule.
    """
    path = workdir / "config.json"
    try:
        config = Experiment.from_dict(read_json(path))
        config.validate()
    except FileNotFoundError as e:
        raise CheckpointError(f"{workdir} is no work directory: it has no config.json") from e
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return config


def facts_of(config: DataConfig, splits: Mapping[str, Split] | None = None) -> DataFacts:
    """Counted and computed from the images. Raises DatasetError if they are not there."""
    splits = splits or source.load(config)
    constants = source.normalization(config, splits.get("train"))
    examples = {name: len(split.label) for name, split in splits.items()}
    return DataFacts(examples, constants, source.class_names(config))


def check_data_facts(workdir: Path, facts: DataFacts) -> None:
    """Raises DatasetError if a run has begun in `workdir` with other images than these."""
    known = known_data_facts(workdir)
    if known is not None and known.classes is None:
        facts = facts._replace(classes=None)
    if known is not None and known.to_dict() != facts.to_dict():
        raise DatasetError(
            f"the images must be those that {workdir} began with, {known.examples} by its "
            f"data.json; got {facts.examples}, or others; give their directory with "
            "--config.data.dir"
        )


def known_data_facts(workdir: Path) -> DataFacts | None:
    """Those of the run that has begun there; None if they are not known, or no run has."""
    if not has_begun(workdir):
        return None
    try:
        return read_data_facts(workdir)
    except CheckpointError as e:
        log.warning("%s; it is made again from the images", e)
        return None


def read_data_facts(workdir: Path) -> DataFacts | None:
    """What data.json says; None where version 0.1 made the work directory.

    Raises CheckpointError if it is damaged.
    """
    path = workdir / "data.json"
    if not path.exists():
        return None
    tree = read_json(path)
    try:
        examples = {str(name): int(size) for name, size in tree["examples"].items()}
        classes = tree.get("classes")
        classes = None if classes is None else tuple(map(str, classes))
        return DataFacts(examples, Normalization.from_dict(tree["normalization"]), classes)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}: {e})") from e


def is_run(path: Path) -> bool:
    """Whether `path` is meant as a run or a checkpoint of it, rather than as a file."""
    if path.exists():
        return path.is_dir() and not is_folder(path)
    return path.parent.name == "checkpoints" and not path.suffix


def locate(checkpoint: Path) -> tuple[Path, int | Literal["best"] | None]:
    """Work directory and step (None: the newest) of what `open_run` is given.

    Raises:
        CheckpointError: WORKDIR/checkpoints holds nothing of that name.
    """
    # A work directory may itself be named "checkpoints", or lie in a folder of that name.
    if (checkpoint / "config.json").exists():
        return checkpoint, None
    path = checkpoint if "checkpoints" in checkpoint.parts else Path(os.path.abspath(checkpoint))
    for folder in (path, *path.parents):
        directory = folder.parent
        if folder.name != "checkpoints" or not (directory / "config.json").exists():
            continue
        match path.relative_to(folder).parts:
            case () | ("latest",):
                return directory, None
            case ("best",):
                return directory, "best"
            case (name,) if name.isdecimal():
                return directory, int(name)
            case (name, *_):
                steps = [int(x.name) for x in folder.iterdir() if x.name.isdecimal()]
                raise CheckpointError(f"{path} is no checkpoint; {names(folder, steps)}")
    return checkpoint, None
