"""A run's directory: config.json says whose it is, checkpoints/ holds its states.

It also has data.json (how many images there are, and the constants of their preprocessing),
metrics.jsonl, tensorboard/, and once finished summary.json and curves.png.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax

from flax_resnet.config import INCIDENTAL, DataConfig, Experiment
from flax_resnet.data import pixels, source
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import CheckpointError, ConfigError, DatasetError
from flax_resnet.json_files import read_json, write_json
from flax_resnet.parallel import processes
from flax_resnet.step import TrainState, init
from flax_resnet.training.checkpoint import load_state

log = logging.getLogger(__name__)


class DataFacts(NamedTuple):
    """What a run must know of its data to be used without the training images."""

    examples: dict[str, int]  # of each split
    normalization: Normalization

    def to_dict(self) -> dict[str, Any]:
        return {"examples": self.examples, "normalization": self.normalization.to_dict()}


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
    """What `WORKDIR` (its newest whole checkpoint) or `WORKDIR/checkpoints/STEP` holds.

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
def claimed(workdir: Path, config: Experiment) -> Iterator[None]:
    """`workdir`, made if need be, for this run alone and for this config alone.

    Of several processes only the first touches it. Settings that decide nothing of a run's numbers
    (`INCIDENTAL`) may differ from those in its config.json, which then follows.

    Raises:
        CheckpointError: another process uses it. (A lock left by a killed one is none.)
        ConfigError: it holds a run of another config; the message shows what differs.
    """
    processes.check_same("config", config.to_dict())
    lock = filelock.FileLock(workdir / ".lock", blocking=False)

    def claim() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as e:
            raise CheckpointError(
                f"{workdir} is in use by another run; wait for it, or choose another --workdir"
            ) from e
        changes = check_same(workdir, config, "--workdir")
        if changes:
            log.info("%s: goes on with %s", workdir, ", ".join(changes))
        path = workdir / "config.json"
        if not path.exists() or read_json(path) != config.to_dict():
            write_json(path, config.to_dict())

    try:
        processes.on_first(claim)
        yield
    finally:
        lock.release()


def check_same(directory: Path, config: Experiment, flag: str) -> list[str]:
    """What is incidental and differs between `config` and the run in `directory`, if there is one.

    Args:
        flag: by which the user can choose another directory.

    Returns:
        Such as ["data.dir b (was a)"].

    Raises:
        ConfigError: something differs that decides the run's numbers.
    """
    if not (directory / "config.json").exists():
        return []
    changes = difference(read_config(directory).to_dict(), config.to_dict())
    deciding = [
        f"{name}: {a} there, {b} here" for name, (a, b) in changes.items() if name not in INCIDENTAL
    ]
    if deciding:
        raise ConfigError(
            f"{directory} holds another run ({', '.join(deciding)}); choose another {flag}"
        )
    return [f"{name} {b} (was {a})" for name, (a, b) in changes.items()]


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


def facts_of(config: DataConfig, splits: Mapping[str, Examples] | None = None) -> DataFacts:
    """Counted and computed from the images. Raises DatasetError if they are not there."""
    splits = splits or source.load(config)
    constants = pixels.make_normalization(config.preprocess, splits["train"].image)
    return DataFacts({name: len(split.label) for name, split in splits.items()}, constants)


def keep_data_facts(workdir: Path, facts: DataFacts) -> None:
    """Writes data.json, once: every later session must have the same data.

    Raises:
        DatasetError: it says otherwise.
    """
    kept = read_data_facts(workdir)
    if kept is None:
        write_json(workdir / "data.json", facts.to_dict())
    elif kept.to_dict() != facts.to_dict():
        raise DatasetError(
            f"the images must be those that {workdir} began with, {kept.examples} by its data.json;"
            f" got {facts.examples}, or others; give their directory with --config.data.dir"
        )


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
        return DataFacts(examples, Normalization.from_dict(tree["normalization"]))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}: {e})") from e


def locate(checkpoint: Path) -> tuple[Path, int | None]:
    """Work directory and step (None: the newest) of `WORKDIR` or `WORKDIR/checkpoints/STEP`."""
    if checkpoint.name.isdecimal() and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent, int(checkpoint.name)
    return checkpoint, None
