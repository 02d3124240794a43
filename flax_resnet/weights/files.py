"""PyTorch's files, and PyTorch's tensors: what `state_dict.py` does with arrays, for users.

Nothing in a file is ever executed: `torch.load(weights_only=True)`, or safetensors. torch is
imported only where a file or a tensor needs it, so that the library does without.
"""

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from flax_resnet.config import ChannelPad, Shortcut, Stride
from flax_resnet.errors import WeightsError
from flax_resnet.resnet import ResNet, split
from flax_resnet.weights.layouts import Layout, StateDict, listed
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pt", ".pth", ".th")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")


class Contents(NamedTuple):
    """What a file holds."""

    state_dict: dict[str, np.ndarray]
    ignored: list[str]  # entries beside the state dict, such as best_prec1


def from_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    shortcut: Shortcut | None = None,
    channel_pad: ChannelPad | None = None,
    stride: Stride | None = None,
    depth: int | None = None,
) -> ResNet:
    """A ready model, in evaluation mode (`model.train()` for more training), from PyTorch's.

    Args:
        source: a .pt, .pth, .th or .safetensors file, or a state dict of tensors or arrays, in any
            layout of `Layout`. It and the model share no memory.
        shortcut, channel_pad, stride, depth: what the keys cannot tell; see `from_state_dict`.
            What is assumed is logged as a warning.

    Raises:
        WeightsError: it is no state dict of such a network; the message names the key.
        OSError: the file cannot be read.
    """
    contents = unwrap(source) if isinstance(source, Mapping) else read(Path(source))
    imported = from_state_dict(
        contents.state_dict,
        shortcut=shortcut,
        channel_pad=channel_pad,
        stride=stride,
        depth=depth,
    )
    for assumption in imported.assumed.values():
        log.warning("assumed: %s", assumption)
    return imported.model()


def to_torch(
    model: ResNet, *, layout: Layout = Layout.TWIN, prefix: str | None = None, step: int = 0
) -> dict[str, Any]:
    """The model's state dict of torch tensors, for `load_state_dict`; shares no memory with it.

    Args:
        prefix: what stands before every key; empty, or ends in a dot. Without it `module.` in
            akamaster's layout, as in its published files, and nothing in all others.
        step: what BatchNorm's `num_batches_tracked` is to say.

    Raises:
        WeightsError: no network of that layout is like the model, the prefix lacks its dot, or
            torch is not installed.
    """
    _, params, batch_stats = split(model)
    arrays = to_state_dict(
        model.architecture, params, batch_stats, step=step, layout=layout, prefix=prefix
    )
    return tensors(arrays)


def read(path: Path) -> Contents:
    """The state dict in a file, by itself or inside a dict such as {"state_dict": ...}.

    Raises:
        WeightsError: the file is damaged, holds code or no state dict, or claims more than it has.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise WeightsError(f"{path} is empty")
    try:
        if path.suffix == ".safetensors":
            return unwrap(safetensors.numpy.load_file(path))
        check_archive(path, size)
        return unwrap(import_torch().load(path, map_location="cpu", weights_only=True), size)
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e
    except pickle.UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise WeightsError(
                f"{path} would run code ({code[1]}), so it is not read; ask for a state dict alone"
            ) from e
        raise unreadable(path, e) from e
    # Neither torch nor safetensors says what it raises for a damaged file: OSError too.
    except Exception as e:
        raise unreadable(path, e) from e


def write(path: Path, state_dict: StateDict, layout: Layout) -> None:
    """Writes a state dict, whole or not at all; the path's ending says the kind of file.

    A pickle in akamaster's layout is what that project's `trainer.py --resume` reads: epoch 0, no
    precision measured, and the state dict.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt"}  # without it PyTorch's readers refuse the file
            safetensors.numpy.save_file(dict(state_dict), temporary, metadata)
        else:
            content: dict[str, Any] = tensors(state_dict)
            if layout is Layout.AKAMASTER:
                content = {"epoch": 0, "best_prec1": 0.0, "state_dict": content}
            import_torch().save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors(arrays: StateDict) -> dict[str, Any]:
    """Torch tensors that share no memory with the arrays."""
    torch = import_torch()
    return {key: torch.tensor(array) for key, array in arrays.items()}


def unwrap(content: Any, size: int | None = None) -> Contents:
    """The state dict that `content` is or holds, as arrays that share the tensors' memory.

    Args:
        size: of the file in bytes, which the tensors cannot exceed.

    Raises:
        WeightsError: it holds none, or several, or something that is no tensor.
    """
    ignored: list[str] = []
    if not (isinstance(content, Mapping) and has_tensors(content)):
        entries: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
        names = [key for key, value in entries.items() if has_tensors(value)]
        if "state_dict" in names:
            names = ["state_dict"]
        if len(names) != 1:
            found = listed([str(key) for key in entries]) or type(content).__name__
            raise WeightsError(f"there must be one state dict, of names and tensors, got {found}")
        ignored = [str(key) for key in entries if key != names[0]]
        content = entries[names[0]]
    for key, value in content.items():
        if not isinstance(key, str) or not is_tensor(value):
            raise WeightsError(f"{key} must be a tensor, got {type(value).__name__}")
    if size is not None:
        claimed = sum(value.nbytes for value in content.values())
        if claimed > size:
            key = max(content, key=lambda key: content[key].nbytes)
            raise WeightsError(
                f"the tensors must fit into the file's {size} bytes, got {claimed}; the largest is "
                f"{key}, of shape {tuple(content[key].shape)}"
            )
    return Contents({key: to_array(key, value) for key, value in content.items()}, ignored)


def to_array(key: str, tensor: Any) -> np.ndarray:
    """An array of a tensor's memory. Raises WeightsError for one that no array can be."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
        raise WeightsError(f"{key} must be a dense tensor, got {tensor.layout} on {tensor.device}")
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # unknown to NumPy; every number of it is a float32
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as e:
        raise WeightsError(f"{key} must have a type of floating point, got {tensor.dtype}") from e


def is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(is_tensor, value.values()))


def check_archive(path: Path, size: int) -> None:
    """Raises WeightsError for an archive that would grow when it is unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > size:
            raise WeightsError(f"an archive of {size} bytes cannot hold {claimed}")


def unreadable(path: Path, error: Exception) -> WeightsError:
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return WeightsError(f"{path} is no {kind} file, or is damaged ({reason})")


def import_torch() -> Any:
    try:
        import torch  # noqa: TID251 (only on request: the library does without)
    except ImportError as e:
        raise WeightsError("this needs PyTorch: pip install 'flax-resnet[torch]'") from e
    return torch
