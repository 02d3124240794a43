"""What our own safetensors files say of themselves, in their header beside the tensors.

The architecture, and how pixels become numbers where that is known: what no key tells. Other
readers of such files, PyTorch's among them, pass over it.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax_resnet.config import Architecture, Preprocess, ResNetConfig
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.settings import accepted, as_given, types_of

KEY = "flax_resnet"  # in the metadata, whose values are texts: JSON
VERSION = 1


class Header(NamedTuple):
    """What a file says of its network."""

    architecture: Architecture
    preprocess: Preprocess | None = None
    normalization: Normalization | None = None  # its constants
    batch_norm_momentum: float = ResNetConfig.batch_norm_momentum
    assumed: Mapping[str, str] = {}  # by setting, what was only assumed when the file was written
    assumes_preprocess: bool = False  # likewise


def to_metadata(header: Header | None) -> dict[str, str]:
    """The metadata of a safetensors file."""
    metadata = {"format": "pt"}  # without it PyTorch's readers refuse the file
    if header is None:
        return metadata
    tree: dict[str, Any] = {
        "version": VERSION,
        "architecture": {
            name: as_given(value) for name, value in dataclasses.asdict(header.architecture).items()
        },
        "assumed": {x: text for x, text in header.assumed.items() if x in types_of(Architecture)},
        "batch_norm_momentum": header.batch_norm_momentum,
        "preprocess": header.preprocess and header.preprocess.value,
        "assumes_preprocess": header.assumes_preprocess,
        "normalization": header.normalization and header.normalization.to_dict(),
    }
    return metadata | {KEY: json.dumps(tree)}


def from_metadata(metadata: Mapping[str, str] | None) -> Header | None:
    """Inverse of `to_metadata`; None for a file that is not ours.

    Raises:
        WeightsError: its header is damaged, or of a later version of this library.
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        if tree["version"] != VERSION:
            raise ConfigError(f"version must be {VERSION}, got {tree['version']!r}")
        told, types = tree["architecture"], types_of(Architecture)
        if told.keys() != types.keys():
            different = ", ".join(sorted(told.keys() ^ types.keys()))
            raise ConfigError(f"architecture has other settings than this version: {different}")
        architecture = Architecture(**{x: accepted(x, types[x], told[x]) for x in types})
        assumed = {str(name): str(text) for name, text in tree["assumed"].items()}
        momentum = accepted("batch_norm_momentum", float, tree["batch_norm_momentum"])
        preprocess = accepted("preprocess", Preprocess | None, tree["preprocess"])
        is_assumed = accepted("assumes_preprocess", bool, tree["assumes_preprocess"])
        constants = tree["normalization"]
        normalization = None if constants is None else Normalization.from_dict(constants)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{e}" if isinstance(e, ConfigError) else f"{type(e).__name__}: {e}"
        raise WeightsError(f"the header's {KEY!r} is not to be understood ({reason})") from e
    return Header(architecture, preprocess, normalization, momentum, assumed, is_assumed)
