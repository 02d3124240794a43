"""A work directory made of weights that came from elsewhere, such as a PyTorch file."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from flax_resnet.config import DataConfig, Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.optim import make_optimizer
from flax_resnet.step import Metrics, TrainState
from flax_resnet.training.checkpoint import Checkpoints, load_state
from flax_resnet.weights import files, hub
from flax_resnet.weights.state_dict import Imported

# Of a work directory, and of a folder of Hugging Face's.
CONTENTS = ({"config.json", "checkpoints"}, {"config.json", hub.SAFETENSORS})


def write_workdir(target: Path, imported: Imported, data: DataConfig) -> None:
    """A work directory with one checkpoint, whole or not at all; what was there is replaced.

    The optimizer begins with momentum 0, at the step that the weights have seen.

    Args:
        data: what images the network wants, which the weights do not tell.
    """
    config = Experiment(model=imported.config, data=data)
    params, batch_stats = jax.tree.map(jnp.array, (imported.params, imported.batch_stats))
    step = jnp.array(imported.step, jnp.int32)
    optimizer = make_optimizer(config.optim, config.train.steps).init(params)
    optimizer = optax.tree.set(optimizer, count=step)
    state = TrainState(step, params, batch_stats, optimizer, Metrics.zeros())

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", config.to_dict())
        with Checkpoints(temporary / "checkpoints") as checkpoints:
            checkpoints.save(state, None)
        load_state(temporary, state)  # read back: its digest is that of what was saved
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_workdir_name(name: str) -> bool:
    """Whether a conversion's target is a work directory: a name without an ending, or with a slash.

    Raises:
        ConfigError: it has an ending, and not that of a PyTorch file.
    """
    suffix = Path(name).suffix
    if suffix in files.SUFFIXES:
        return False
    if suffix and not name.endswith(os.sep):
        raise ConfigError(
            f"DST must end in one of {', '.join(files.SUFFIXES)}, or in no such ending or a "
            f"slash for a directory, got {name}"
        )
    return True


def check_target(target: Path, *, is_workdir: bool, overwrite: bool) -> None:
    """Raises ConfigError unless `target` can be written, so that nothing but old weights is lost.

    A work directory with a log, or with anything else that convert.py does not make, stays.
    """
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"{target} is there already; --overwrite replaces it")
    is_ours = target.is_dir() == is_workdir
    if is_ours and is_workdir:
        found = {path.name for path in target.iterdir()}
        is_ours = any(found <= content for content in CONTENTS)
    if not is_ours:
        raise ConfigError(f"{target} is nothing that convert.py wrote; remove it yourself")
