"""Published weights: NAME.safetensors and beside it NAME.json, its card.

The tensors are the twin's state dict, which PyTorch reads as well. The card says how the network
was trained, what it comes to, how its parity with PyTorch was checked, and the SHA-256 of the
tensors' file, without which nothing is loaded.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from flax_resnet import places
from flax_resnet.config import Experiment
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.json_files import write_json
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import ResNet
from flax_resnet.shipped import WEIGHTS
from flax_resnet.weights import files
from flax_resnet.weights.header import Header
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict

FORMAT = "flax-resnet weights, version 1"
ENVIRONMENT = "FLAX_RESNET_WEIGHTS"


class Card(NamedTuple):
    """What is known of published weights."""

    config: Experiment
    normalization: Normalization  # for `data.normalize`: what the network's images went through
    tree: dict[str, Any]  # the whole JSON


def load_pretrained(
    name_or_path: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None
) -> ResNet:
    """A published network, in evaluation mode.

    Args:
        name_or_path: a .safetensors file with its card beside it, or the name of one (without the
            ending) in `directory`.
        directory: default: $FLAX_RESNET_WEIGHTS, else those that come with the library:
            results/weights of a checkout, also carried by a wheel. Nothing is downloaded.

    Raises:
        WeightsError: no weights of that name, which the message lists; no card; or the file is not
            the one that the card describes.
    """
    path = find(name_or_path, directory)
    card = read_card(path)
    digest = sha256(path)
    if digest != card.tree["sha256"]:
        raise WeightsError(
            f"{path} is damaged or another file: its sha256 must be {card.tree['sha256']}, "
            f"got {digest}"
        )
    model = card.config.model
    contents = files.read(path)
    if contents.header is not None and contents.header.architecture != model.architecture:
        raise WeightsError(f"{path} holds another network than its card says")
    imported = from_state_dict(
        contents.state_dict,
        header=contents.header,
        shortcut=model.shortcut,
        channel_pad=model.channel_pad,
        stride=model.stride,
        projection=model.projection,
        depth=model.depth,
    )
    if imported.config.architecture != model.architecture:
        raise WeightsError(f"{path} holds another network than its card says")
    return imported._replace(config=model.block_by_block()).model()


def read_card(path: Path) -> Card:
    """The card of a .safetensors file.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    card = path.with_suffix(".json")
    try:
        tree = json.loads(card.read_text())
        if tree["format"] != FORMAT:
            raise WeightsError(f"{card} must be of format {FORMAT!r}, got {tree['format']!r}")
        config = Experiment.from_dict(tree["config"])
        normalization = Normalization.from_dict(tree["normalization"])
        tree["sha256"]
    except FileNotFoundError as e:
        raise WeightsError(
            f"{path} has no card {card.name} beside it: these are no published weights of "
            "flax-resnet; PyTorch's files are for flax_resnet.from_torch"
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, WeightsError):
            raise
        reason = f"{type(e).__name__}: {e}"
        raise WeightsError(f"{card} is no card of flax-resnet weights ({reason})") from e
    return Card(config, normalization, tree)


def find(
    name_or_path: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None
) -> Path:
    """The file of a name, or the path itself. Raises WeightsError if there is none."""
    path = places.local_path(name_or_path, "weights")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise WeightsError(f"there is no file {path}")
        return path
    directory = directory or os.environ.get(ENVIRONMENT) or WEIGHTS
    folder = places.local_path(directory, "the folder of weights")
    known = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    if str(name_or_path) not in known:
        raise WeightsError(
            f"no weights called {str(name_or_path)!r} in {folder} (there are: "
            f"{', '.join(known) or 'none'}); give a .safetensors file, a directory, or set "
            f"${ENVIRONMENT}"
        )
    return known[str(name_or_path)]


def write(
    path: Path,
    config: Experiment,
    params: Tree,
    batch_stats: Tree,
    normalization: Normalization,
    step: int,
    facts: dict[str, Any],
) -> None:
    """Writes weights and their card.

    Args:
        path: ends in .safetensors.
        facts: what else the card says.

    Raises:
        ConfigError: another ending.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"OUT must end in .safetensors, got {path}")
    state_dict = to_state_dict(config.model.architecture, params, batch_stats, step=step)
    header = Header(
        config.model.architecture,
        config.data.preprocess,
        normalization,
        config.model.batch_norm_momentum,
    )
    files.write(path, state_dict, Layout.TWIN, header)
    tree = {
        "format": FORMAT,
        "sha256": sha256(path),
        "step": step,
        **facts,
        "config": config.to_dict(),
        "normalization": normalization.to_dict(),
    }
    write_json(path.with_suffix(".json"), tree)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
