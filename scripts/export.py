"""Weights to publish, from a finished run: `python scripts/export.py WORKDIR OUT.safetensors`.

Written are the tensors, by PyTorch's names, and OUT.json: config, data, errors, SHA-256, versions,
and how far the logits of the file as read back are from those of PyTorch with the same file (where
PyTorch is installed). `flax_resnet.load_pretrained` reads them, without PyTorch. The errors are
those of the newest checkpoint's step; WORKDIR/checkpoints/STEP exports another one.
"""

import copy
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flax_resnet import cli, places
from flax_resnet.config import Dataset, Experiment, ResNetConfig
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.training.metrics_log import read_metrics
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import open_run
from flax_resnet.weights import files, pretrained
from flax_resnet.weights.state_dict import from_state_dict

OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace OUT if it is there")


def main(source: str, out: str) -> None:
    path = places.local_path(out, "OUT")
    if path.exists() and not OVERWRITE.value:
        raise ConfigError(f"{path} is there already; --overwrite replaces it")
    jax.config.update("jax_enable_x64", True)  # the run may be in float64
    run = open_run(fetch(places.place(source, "WORKDIR")))
    data = run.data_facts()
    classes = data.classes or source.class_names(run.config.data)
    facts = {"examples": data.examples, "classes": list(classes)}
    facts |= measured(run.directory, run.step)
    weights = run.state.params, run.state.batch_stats
    arguments = (without_place(run.config), *weights, data.normalization, run.step)
    pretrained.write(path, *arguments, facts)
    try:
        parity = check(path, run.config.model)
    except WeightsError:
        path.unlink()
        path.with_suffix(".json").unlink()
        raise
    pretrained.write(path, *arguments, facts | {"parity": parity})
    print(f"written: {path} ({path.stat().st_size:,} bytes) and {path.with_suffix('.json').name}")
    print(json.dumps({"step": run.step, **facts, "parity": parity}))


def without_place(config: Experiment) -> Experiment:
    """Without where the data set lay on that machine: it is known by its name."""
    config = copy.deepcopy(config)
    if config.data.name is not Dataset.FOLDER:
        config.data.dir = None
    return config


def measured(directory: Path, step: int) -> dict[str, Any]:
    """What the run's log says of that step, and the summary of how and where it ran."""
    facts: dict[str, Any] = {
        f"{row['split']}_{name}": row[name]
        for row in read_metrics(directory / "metrics.jsonl")
        for name in ("error", "loss")
        if row["step"] == step
    }
    summary = directory / "summary.json"
    if summary.exists():
        tree = json.loads(summary.read_text())
        facts |= {name: tree[name] for name in ("devices", "versions", "parameters")}
    return facts


def check(path: Path, model: ResNetConfig) -> dict[str, Any]:
    """How far the logits are from those of the twin with the same file, on random images.

    Raises:
        WeightsError: further than rounding explains.
    """
    try:
        import torch

        from torch_ref.compare.agreement import NUM_IMAGES, logit_differences
    except ImportError:
        return {"checked": False, "why": "PyTorch is not installed"}
    state_dict = files.read(path).state_dict
    imported = from_state_dict(state_dict, shortcut=model.shortcut, channel_pad=model.channel_pad)
    # Both networks as the card says, not as the file's keys suggest.
    found = logit_differences(imported._replace(config=model.block_by_block()), state_dict)
    return {
        "checked": True,
        "with": f"torch {torch.__version__}",
        "images": NUM_IMAGES,
        "largest relative difference of the logits": found,
    }


if __name__ == "__main__":
    cli.run(main, "WORKDIR", "OUT")
