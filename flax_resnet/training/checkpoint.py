"""Orbax checkpoints of a TrainState, each with a digest, so that no damaged one is ever used."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_resnet.errors import CheckpointError, TrainingError
from flax_resnet.nn.scan import stack, unstack
from flax_resnet.parallel import processes
from flax_resnet.parallel.sharding import put
from flax_resnet.step import TrainState
from flax_resnet.surroundings import is_out_of_memory

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one directory: the two newest and the best are kept.

    Use as a context manager; leaving it waits for the save under way. Of several processes only
    the first reads and writes; all are to make the same calls.

    Args:
        directory: made if need be, unless `read_only`.
        read_only: never writes; leftovers of a killed run stay.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        self.directory = directory.absolute()
        policies = [
            preservation_policy.LatestN(2),
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics["error"],
                reverse=True,  # Orbax keeps the last n of the sorted list
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        if processes.is_first():
            refuse_links(self.directory)
        # Orbax reads all errors at once, and one damaged file would keep every checkpoint from us.
        self.knows_best = not (processes.is_first() and forget_damaged(self.directory, read_only))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["error"],
            lightweight_initialize=not self.knows_best,
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=False,
            read_only=read_only,
            # Alone, so that the others need not see its disk.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        )
        if not processes.is_first():
            return
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "meta")
            )
        # As in _restore_one.
        except Exception as e:
            raise CheckpointError(
                f"{self.directory} cannot be read: {one_line(e)}; restore a copy, or remove what "
                "is damaged"
            ) from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        if processes.is_first():
            with unsaved("the last checkpoint"):
                self.manager.close()

    def save(self, state: TrainState, error: float | None) -> None:
        """Starts saving `state`; `error` (None: not measured) decides which one is the best.

        Raises:
            TrainingError: a number in it is not finite; nothing is saved.
            CheckpointError: this one or the one before it cannot be written.
        """
        state = unstack(jax.device_get(state))
        step = int(state.step)
        for name, array in named_leaves(state):
            if not np.isfinite(array).all():
                raise TrainingError(f"not finite at step {step}: {name}; nothing saved")
        if not processes.is_first():
            return
        with unsaved(f"the checkpoint of step {step}, or the one before it,"):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave({"digest": digest(state)}),
                ),
                metrics=None if error is None else {"error": error},
            )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The newest good checkpoint, or the one of `step`; None if there is none at all.

        Args:
            like: gives structure, shapes, types and shardings. It may be stacked (`nn/scan.py`):
                what is on disk is not.

        Raises:
            CheckpointError: there are checkpoints, but none that is whole.
        """
        if jax.process_count() == 1:
            return self.read(like, step)
        host, restored = jax.device_get(like), None

        def read() -> bool:
            nonlocal restored
            restored = self.read(host, step)
            return restored is not None

        if not processes.on_first(read):
            return None
        state = processes.from_first(host if restored is None else restored)
        return jax.tree.map(lambda x, y: put(x, y.sharding), state, like)

    def read(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """What `restore` gives, in this process alone: for the first of several."""
        steps = sorted(self.manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step}; {names(self.directory, steps)}")
        steps = steps if step is None else [step]
        for candidate in steps:
            try:
                state = self._restore_one(like, candidate)
            except CheckpointError as e:
                log.warning("%s", e)
                if is_out_of_memory(e) and candidate == steps[-1]:
                    raise  # perhaps no checkpoint's fault, so none is to be removed for it
            else:
                return state
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole (tried steps {steps}); "
                "restore a copy, or remove the directory to start again"
            )
        return None

    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest error; None if one of the errors is damaged."""
        return self.manager.best_step() if self.knows_best else None

    def _restore_one(self, like: TrainState, step: int) -> TrainState:
        on_host = not isinstance(like.step, jax.Array)
        abstract = unstack(like) if on_host else jax.eval_shape(unstack, like)
        if not on_host:
            # Without a sharding Orbax reads whatever shape is on the disk, however large.
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.step.sharding),
                abstract,
            )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        try:
            restored = self.manager.restore(step, args=args)
        # Orbax and TensorStore raise bare Exceptions for damaged files, so nothing narrower serves.
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read: {one_line(e)}"
            ) from e
        state, meta = restored["state"], restored["meta"]
        if not isinstance(meta, dict) or digest(state) != meta.get("digest"):
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged: its digest differs"
            )
        if jax.tree.structure(state) != jax.tree.structure(like):
            state = stack(state)
        if on_host:
            return jax.device_get(state)
        return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state, like)


@contextlib.contextmanager
def unsaved(what: str) -> Iterator[None]:
    """Turns all that Orbax raises when it cannot write into one CheckpointError."""
    try:
        yield
    # Orbax, TensorStore and the disk raise anything, a bare Exception too.
    except Exception as e:
        full = any(word in str(e) for word in ("No space left", "RESOURCE_EXHAUSTED"))
        cause = "the disk is full; make room and start again: " if full else ""
        raise CheckpointError(f"{what} could not be saved: {cause}{one_line(e)}") from e


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def forget_damaged(directory: Path, read_only: bool) -> bool:
    """Removes the errors of checkpoints that cannot be read; whether any are left.

    The checkpoints stay: an error only decides which one is the best.
    """
    left = False
    for path in directory.glob("*/metrics/metrics"):
        try:
            float(json.loads(path.read_bytes())["error"])
        except (ValueError, TypeError, KeyError, RecursionError):
            log.warning("%s is damaged: the error of that checkpoint is forgotten", path)
            if read_only:
                left = True
            else:
                shutil.rmtree(path.parent)
    return left


def refuse_links(directory: Path) -> None:
    """Raises CheckpointError for a symbolic link, by which a checkpoint would reach elsewhere."""
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                raise CheckpointError(f"{path} must be no symbolic link; replace it with a copy")


def steps_saved(workdir: Path) -> list[int]:
    """Steps of the checkpoints that a run has, whole or not, in order."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def load_state(
    workdir: Path, like: TrainState, step: int | Literal["best"] | None = None
) -> TrainState:
    """The newest good checkpoint of a run, the one of `step`, or the one with the lowest error.

    Of several processes only the first can.

    Raises:
        CheckpointError: there is none.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{workdir} has no checkpoint")
    with Checkpoints(directory, read_only=True) as checkpoints:
        if step == "best" and (step := checkpoints.best_step()) is None:
            raise CheckpointError(
                f"{directory} does not tell which checkpoint is the best: give a step, or latest"
            )
        state = checkpoints.read(like, step)
    if state is None:
        raise CheckpointError(f"{workdir} has no checkpoint")
    return state


def names(directory: Path, steps: Sequence[int]) -> str:
    """What a user can ask `directory` for, in words."""
    if not steps:
        return f"{directory} has none"
    return f"{directory} has latest, best and {', '.join(map(str, sorted(steps)))}"


def digest(state: TrainState) -> str:
    """SHA-256 of every leaf's name, type, shape and bytes."""
    sha = hashlib.sha256()
    for name, array in named_leaves(state):
        sha.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def named_leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each leaf with its path, such as `.params['fc']['kernel']`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        yield jax.tree_util.keystr(path), np.asarray(leaf)
