"""A run's directory: config.json says whose it is, checkpoints/ holds its states.

It also has metrics.jsonl, tensorboard/, and once finished summary.json and curves.png.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from flax_resnet.config import Experiment
from flax_resnet.errors import CheckpointError, ConfigError
from flax_resnet.json_files import read_json, write_json
from flax_resnet.parallel import processes

MAX_DEPTH, MAX_CLASSES = 10_000, 100_000  # of a work directory that somebody else may have made


@contextlib.contextmanager
def claimed(workdir: Path, config: Experiment) -> Iterator[None]:
    """`workdir`, made if need be, for this run alone and for this config alone.

    Of several processes only the first touches it.

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
        path = workdir / "config.json"
        if path.exists():
            changes = difference(read_config(workdir).to_dict(), config.to_dict())
            if changes:
                raise ConfigError(
                    f"{workdir} holds another run ({', '.join(changes)}); choose another --workdir"
                )
        else:
            write_json(path, config.to_dict())

    try:
        processes.on_first(claim)
        yield
    finally:
        lock.release()


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Such as `["train.steps: 100 there, 200 here"]`."""
    changes: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            changes.append(f"{prefix}{name}: {a} there, {b} here")
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
    except (TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is no config of ours: {e}") from e
    # Of its word alone: the network is built, and takes the memory, before its weights are read.
    for name, largest in {"depth": MAX_DEPTH, "num_classes": MAX_CLASSES}.items():
        value = getattr(config.model, name)
        if value > largest:
            raise CheckpointError(f"{path}: model.{name} must be at most {largest}, got {value}")
    return config


def locate(checkpoint: Path) -> tuple[Path, int | None]:
    """Work directory and step (None: the newest) of `WORKDIR` or `WORKDIR/checkpoints/STEP`."""
    if checkpoint.name.isdecimal() and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent, int(checkpoint.name)
    return checkpoint, None
