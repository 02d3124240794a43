"""Claim: a checkpoint gives back every bit, and a damaged one is never used."""

import json
import logging
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from faults.damage import damage
from flax_resnet.config import Experiment, ResNetConfig
from flax_resnet.errors import CheckpointError, TrainingError
from flax_resnet.step import TrainState, init
from flax_resnet.training.checkpoint import Checkpoints, digest, load_state

CONFIG = Experiment(model=ResNetConfig(8))


def state_at(step: int) -> TrainState:
    """A state of which every number depends on the step."""
    _, state = init(CONFIG)
    return jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)


def save(directory: Path, *errors: float | None) -> None:
    """Checkpoints of steps 1, 2, ... with these test errors."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step, error in enumerate(errors, 1):
            checkpoints.save(state_at(step), error)


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_checkpoint_gives_back_every_bit(tmp_path: Path) -> None:
    save(tmp_path, None, None)
    assert digest(load_state(tmp_path, state_at(0))) == digest(state_at(2))
    assert digest(load_state(tmp_path, state_at(0), 1)) == digest(state_at(1))


def test_the_two_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 0.5, 0.1, 0.4, None, 0.3)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert set(checkpoints.manager.all_steps()) >= {2, 4, 5}
        assert not set(checkpoints.manager.all_steps()) & {1}
        assert checkpoints.best_step() == 2
    assert digest(load_state(tmp_path, state_at(0), "best")) == digest(state_at(2))


def test_a_best_that_nobody_measured_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, None)
    with pytest.raises(CheckpointError, match="does not tell which checkpoint is the best: give a"):
        load_state(tmp_path, state_at(0), "best")


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: Literal["flip", "truncate"], tmp_path: Path
) -> None:
    save(tmp_path, None, None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    results = list(damage(20, tmp_path, kind))
    assert len(results) == 20
    assert [result for result in results if not result.held] == []
    # Harmless is a byte of a timestamp, or an empty file cut short. Every second damage is to any
    # byte of the checkpoint, so nearly always to its arrays.
    harmless = [result.figure for result in results]
    assert sum(harmless) > 0
    assert sum(harmless[1::2]) < 5


def test_a_checkpoint_that_lacks_a_file_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, None, None)
    largest_file(tmp_path / "checkpoints" / "2").unlink()
    with caplog.at_level(logging.WARNING, logger="flax_resnet"):
        state = load_state(tmp_path, state_at(0))
    assert digest(state) == digest(state_at(1))
    assert "checkpoints/2" in caplog.text


@pytest.mark.parametrize("content", [b"", b'{"errnr": 0.5}', b"[" * 10**6, b"\xff", b"[0.5]"])
def test_a_damaged_error_costs_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    save(tmp_path, 0.5, 0.1)
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(content)
    assert digest(load_state(tmp_path, state_at(0))) == digest(state_at(2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state_at(3), None)
    assert digest(load_state(tmp_path, state_at(0))) == digest(state_at(3))


def test_no_good_checkpoint_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, None, None)
    for step in "12":
        path = largest_file(tmp_path / "checkpoints" / step)
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(tried steps"):
        load_state(tmp_path, state_at(0))


def test_want_of_memory_is_no_damage_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, None)

    def fail(*args: object, **kwargs: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(CheckpointError, match=r"1 cannot be read: .*Out of memory") as refusal:
        load_state(tmp_path, state_at(0))
    assert "remove" not in str(refusal.value)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    state = state_at(1)
    state.params["fc"]["bias"] = state.params["fc"]["bias"].at[3].set(jnp.nan)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(TrainingError, match=r"not finite at step 1: .*fc.*bias"),
    ):
        checkpoints.save(state, None)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_state(tmp_path, state_at(0))


@pytest.mark.parametrize("message", ["[Errno 28] No space left on device", "RESOURCE_EXHAUSTED: 7"])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, None)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(message)

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "save", refuse)
        with pytest.raises(CheckpointError, match="the disk is full; make room and start again"):
            checkpoints.save(state_at(2), None)
    assert digest(load_state(tmp_path, state_at(0))) == digest(state_at(1))
