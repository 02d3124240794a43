"""PyTorch's files, and PyTorch's tensors: what `state_dict.py` does with arrays, for users.

Nothing in a file is ever executed: `torch.load(weights_only=True)`, or safetensors. torch is
imported only where a file or a tensor needs it, so that the library does without.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import pickle
import re
import shutil
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flax_resnet import places
from flax_resnet.config import ChannelPad, Preprocess, Shortcut, Stride
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import WeightsError
from flax_resnet.json_files import write_json
from flax_resnet.resnet import ResNet, split
from flax_resnet.settings import accepted, shown
from flax_resnet.weights import hub, huggingface
from flax_resnet.weights.header import Header, from_metadata, to_metadata
from flax_resnet.weights.infer import usual_preprocess
from flax_resnet.weights.kinds import Kind, is_plain_pickle, kind_of, module_class
from flax_resnet.weights.layouts import Layout, StateDict
from flax_resnet.weights.refusals import refuse_by_keys
from flax_resnet.weights.state_dict import Imported, from_state_dict, to_state_dict
from flax_resnet.weights.wrappings import choose, is_tensor

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pt", ".pth", ".th")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
OF_FOLDERS = (hub.SAFETENSORS, hub.PICKLE)  # of the Hub's models
# Classes that a pickle may have beside its tensors. Those of NumPy make its numbers and arrays.
HARMLESS = (argparse.Namespace, types.SimpleNamespace, np.ndarray, np.dtype)
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class Contents(NamedTuple):
    """What a file holds."""

    state_dict: dict[str, np.ndarray]
    ignored: list[str]  # entries beside the state dict, such as best_prec1
    told: list[str]  # in a few words each, how the state dict was found
    header: Header | None = None  # of our own safetensors files
    images: Mapping[str, Any] = types.MappingProxyType({})  # settings of `DataConfig`, by name
    classes: tuple[str, ...] | None = None  # their names

    @property
    def preprocess(self) -> Preprocess | None:
        """What the network's images go through; None if the file does not tell for certain."""
        if "preprocess" in self.images:
            return self.images["preprocess"]
        is_certain = self.header is not None and not self.header.assumes_preprocess
        return self.header.preprocess if self.header and is_certain else None

    @property
    def normalization(self) -> Normalization | None:
        """The constants of `preprocess`; None if the file does not hold them."""
        if self.images.get("preprocess") is Preprocess.CONSTANTS:
            mean, std = (np.array(self.images[name]) for name in ("mean", "std"))
            return Normalization(1 / 255, mean, std)
        return self.header and self.header.normalization

    def likely_preprocess(self, imported: Imported) -> Preprocess:
        """The file's, or what such networks are usually fed."""
        told = self.header and self.header.preprocess
        return told or usual_preprocess(imported.config.architecture, imported.layout)


def from_torch(
    source: Any,
    *,
    shortcut: Shortcut | str | None = None,
    channel_pad: ChannelPad | str | None = None,
    stride: Stride | str | None = None,
    batch_norm_epsilon: float | None = None,
    depth: int | None = None,
    entry: str | None = None,
    rename: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
) -> ResNet:
    """A ready model, in evaluation mode (`model.train()` for more training), from PyTorch's.

    Args:
        source: a file of torch.save or safetensors; an `nn.Module`; or a state dict of tensors, or
            of NumPy's or JAX's arrays, in any layout of `Layout`, also within other dicts. It and
            the model share no memory.
        shortcut, channel_pad, stride, batch_norm_epsilon, depth: what the keys cannot tell; see
            `from_state_dict`.
            What is assumed is logged as a warning.
        entry: the name of the state dict, where there are several; see `wrappings.choose`.
        rename, ignore: what to do with keys of other names first; see `wrappings.bare`.

    Raises:
        WeightsError: it is no state dict of such a network; the message names the key.
        ConfigError: an argument is none that there is.
        OSError: the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        place = places.place(source, "source", hub=True)
        if isinstance(place, places.Url):
            if place.scheme != places.HUB:
                raise WeightsError(
                    f"source must be here or on the Hub, got {place}; fetch it first"
                )
            place = hub.fetch(str(place))
        contents = read(place, entry=entry)
    elif isinstance(source, Mapping) or callable(getattr(source, "state_dict", None)):
        contents = unwrap(source, entry=entry)
    else:
        raise WeightsError(
            "source must be a file, a state dict or a module of PyTorch, got "
            f"{type(source).__name__} {shown(source)}"
        )
    imported = from_state_dict(
        contents.state_dict,
        shortcut=accepted("shortcut", Shortcut | None, shortcut),
        channel_pad=accepted("channel_pad", ChannelPad | None, channel_pad),
        stride=accepted("stride", Stride | None, stride),
        batch_norm_epsilon=accepted("batch_norm_epsilon", float | None, batch_norm_epsilon),
        depth=accepted("depth", int | None, depth),
        header=contents.header,
        rename=[rename] if isinstance(rename, str) else rename,
        ignore=[ignore] if isinstance(ignore, str) else ignore,
    )
    if told := [*contents.told, *imported.told]:
        log.info("unwrapped: %s", "; ".join(told))
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


def read(path: Path, entry: str | None = None) -> Contents:
    """The state dict in a file, by itself or inside a dict such as {"state_dict": ...}.

    Args:
        path: the file, or the folder of one of the Hub's models, whose config.json and
            preprocessor_config.json are heeded.
        entry: which one, where there are several; see `wrappings.choose`.

    Raises:
        WeightsError: the file is damaged, holds code or no state dict, or claims more than it has;
            of a file of another kind the message says what it is.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return with_folder(read(file_in(path), entry), path)
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path} is empty")
    kind = kind_of(path)
    try:
        if kind is Kind.SAFETENSORS:
            contents = read_safetensors(path, entry)
        else:
            check_archive(path, size)
            # Given by its name, torch.load would go by the ending.
            with harmless_classes(), path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of what it then refuses
                content = import_torch().load(file, map_location="cpu", weights_only=True)
            contents = unwrap(content, size, entry=entry)
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e
    except pickle.UnpicklingError as e:
        if name := module_class(path):
            raise WeightsError(
                f"{path} holds a whole pickled model ({name}), which would run code, so it is not "
                "read; ask for a state dict alone, of torch.save(model.state_dict(), ...)"
            ) from e
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise WeightsError(
                f"{path} would run code ({code[1]}), so it is not read; ask for a state dict alone"
            ) from e
        if is_plain_pickle(path):
            raise WeightsError(
                f"{path} is a pickle, but not of torch.save: if you trust it, read it with pickle "
                "and give its arrays to flax_resnet.from_torch"
            ) from e
        raise unreadable(path, kind, e) from e
    # Neither torch nor safetensors says what it raises for a damaged file: OSError too.
    except Exception as e:
        raise unreadable(path, kind, e) from e
    is_named_so = (kind is Kind.SAFETENSORS) is (path.suffix == ".safetensors")
    if path.suffix in SUFFIXES and not is_named_so:
        contents.told.insert(0, f"a {kind.value} file, whatever its name says")
    return contents


def with_folder(contents: Contents, folder: Path) -> Contents:
    """What is told by the files beside a file of weights, too."""
    config, preprocessor = folder / huggingface.CONFIG, folder / huggingface.PREPROCESSOR
    told = huggingface.read_config(config) if config.is_file() else None
    if told is None:
        return contents
    header, classes = contents.header or Header(told), huggingface.read_classes(config)
    contents = contents._replace(header=header, classes=classes)
    try:
        return contents._replace(images=huggingface.read_preprocessor(preprocessor))
    except FileNotFoundError:
        return contents
    except WeightsError as e:
        return contents._replace(told=[*contents.told, f"passed over {e}"])


def file_in(folder: Path) -> Path:
    """The file of weights in a folder. Raises WeightsError if there is none."""
    found = [folder / name for name in OF_FOLDERS if (folder / name).is_file()]
    if not found:
        raise WeightsError(f"{folder} must hold {' or '.join(OF_FOLDERS)}, or be a work directory")
    return found[0]


def is_folder(path: Path) -> bool:
    """Whether it is a folder of weights, not of a run."""
    return path.is_dir() and any((path / name).is_file() for name in OF_FOLDERS)


def read_safetensors(path: Path, entry: str | None) -> Contents:
    with safetensors.safe_open(path, framework="numpy") as file:
        header = from_metadata(file.metadata())
        # Since ml_dtypes is imported, NumPy knows bfloat16.
        contents = unwrap(file.get_tensors(), entry=entry)._replace(header=header)
    constants = header and header.normalization
    if header and constants and header.preprocess is Preprocess.CONSTANTS:
        assert constants.mean is not None
        mean, std = constants.mean.tolist(), constants.std.tolist()
        images = {"preprocess": Preprocess.CONSTANTS, "mean": tuple(mean), "std": tuple(std)}
        return contents._replace(images=images)
    return contents


@contextlib.contextmanager
def harmless_classes() -> Iterator[None]:
    """Lets torch.load make numbers of NumPy, paths, and what argparse returns; none runs code."""
    serialization = import_torch().serialization
    numpy = np._core.multiarray  # pyright: ignore
    types_of_numbers = {type(np.dtype(letter)) for letter in np.typecodes["All"] if letter != "O"}
    found: list[Any] = [*HARMLESS, *types_of_numbers]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        found += [(numpy.scalar, f"{module}.scalar")]
        found += [(numpy._reconstruct, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        found += [(pathlib.PurePath, f"{module}.{name}") for name in PATHS]
    # Those that the user allowed stay allowed.
    known = serialization.get_safe_globals()
    with serialization.safe_globals([x for x in found if x not in known]):
        yield


def write(path: Path, state_dict: StateDict, layout: Layout, header: Header | None = None) -> None:
    """Writes a state dict, whole or not at all; the path's ending says the kind of file.

    A pickle in akamaster's layout is what that project's `trainer.py --resume` reads: epoch 0, no
    precision measured, and the state dict.

    Args:
        header: what a safetensors file says of its network.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            # `save_file` would make a file that nobody else may read.
            temporary.write_bytes(safetensors.numpy.save(dict(state_dict), to_metadata(header)))
        else:
            content: dict[str, Any] = tensors(state_dict)
            if layout is Layout.AKAMASTER:
                content = {"epoch": 0, "best_prec1": 0.0, "state_dict": content}
            import_torch().save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, state_dict: StateDict, header: Header) -> None:
    """Writes a folder of Hugging Face's, whole or not at all; what was there is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary / hub.SAFETENSORS, state_dict, Layout.HUGGINGFACE, header)
        write_json(temporary / huggingface.CONFIG, huggingface.to_config(header.architecture))
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tensors(arrays: StateDict) -> dict[str, Any]:
    """Torch tensors that share no memory with the arrays; bfloat16 becomes float32."""
    torch = import_torch()
    return {
        key: torch.tensor(array.astype(np.float32) if is_bfloat16(array) else array)
        for key, array in arrays.items()
    }


def is_bfloat16(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16


def unwrap(content: Any, size: int | None = None, *, entry: str | None = None) -> Contents:
    """The state dict that `content` is or holds, as arrays that share the tensors' memory.

    Args:
        size: of the file in bytes, which the tensors cannot exceed.
        entry: which one, where there are several; see `wrappings.choose`.

    Raises:
        WeightsError: it holds none, or several, or something that is no tensor.
    """
    found, ignored, told = choose(content, entry)
    refuse_by_keys({str(key): str(key) for key in found})  # what follows says less
    for key, value in found.items():
        if not isinstance(key, str) or not is_tensor(value):
            raise WeightsError(f"{key} must be a tensor, got {type(value).__name__}")
    if size is not None:
        claimed = sum(value.nbytes for value in found.values())
        if claimed > size:
            key = max(found, key=lambda key: found[key].nbytes)
            raise WeightsError(
                f"the tensors must fit into the file's {size} bytes, got {claimed}; the largest is "
                f"{key}, of shape {tuple(found[key].shape)}"
            )
    return Contents({key: to_array(key, value) for key, value in found.items()}, ignored, told)


def to_array(key: str, tensor: Any) -> np.ndarray:
    """An array of a tensor's memory. Raises WeightsError for one that no array can be."""
    if isinstance(tensor, np.ndarray | np.generic | jax.Array):
        return np.asarray(tensor)
    if tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
        raise WeightsError(f"{key} must be a dense tensor, got {tensor.layout} on {tensor.device}")
    tensor = tensor.detach().cpu()
    try:
        if str(tensor.dtype) == "torch.bfloat16":  # of which torch makes no array
            return tensor.view(import_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as e:
        raise WeightsError(f"{key} must have a type of floating point, got {tensor.dtype}") from e


def check_archive(path: Path, size: int) -> None:
    """Raises WeightsError for an archive that would grow when it is unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > size:
            raise WeightsError(f"an archive of {size} bytes cannot hold {claimed}")


def unreadable(path: Path, kind: Kind, error: Exception) -> WeightsError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return WeightsError(f"{path} is no {kind.value} file, or is damaged ({reason})")


def import_torch() -> Any:
    try:
        import torch  # noqa: TID251 (only on request: the library does without)
    except ImportError as e:
        raise WeightsError("this needs PyTorch: pip install 'flax-resnet[torch]'") from e
    return torch
