"""What a file is, by its content: the ending of its name is often wrong.

Nothing here reads more than a file's first and last bytes, or the list of what an archive holds.
"""

import enum
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from flax_resnet.errors import WeightsError

START = 1024  # bytes of a file that are looked at
# Packages whose classes are no modules of a user's.
NO_MODULES = {"torch", "collections", "builtins", "__builtin__", "numpy", "argparse", "pathlib"}
MAGIC = 0x1950A86A20F9469CFC6C  # in the first of them
PICKLES = 4  # PyTorch's format before 1.6 is several pickles, one after another; these come first


class Kind(enum.Enum):
    """What this library reads."""

    PYTORCH = "PyTorch"
    SAFETENSORS = "safetensors"


DOWNLOAD = "the download failed; fetch it again"
KERAS = "a Keras model (HDF5)", "only PyTorch's weights and safetensors are read"
TENSORFLOW = "only PyTorch's weights and safetensors are read"
UNPACK = "unpack it, and give the file in it"
NUMPY = "give its arrays to flax_resnet.from_torch, as a dictionary"
# What files of other kinds begin with; what they are, and what to do.
STARTS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|head)", "a web page (HTML), not the file itself", DOWNLOAD),
    (rb"\s*<\?xml", "an XML text, perhaps a server's error, not the file itself", DOWNLOAD),
    (rb"\x89HDF\r\n\x1a\n", *KERAS),
    (rb"\x93NUMPY", "an array of NumPy (.npy)", NUMPY),
    (rb"\x1f\x8b", "packed by gzip", UNPACK),
    (rb"BZh[1-9]", "packed by bzip2", UNPACK),
    (rb"\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!", "a packed archive", UNPACK),
    (rb"GGUF", "a GGUF file", "only PyTorch's weights and safetensors are read"),
    (rb"(?s).{4}TFL3", "a TensorFlow Lite model", TENSORFLOW),
    (rb"model_checkpoint_path:", "the index of TensorFlow checkpoints", TENSORFLOW),
    (rb"\x08\x01\x12", "a SavedModel of TensorFlow", TENSORFLOW),
    (
        rb"(?s)\x08[\x02-\x20][\x12\x3a]",
        "an ONNX model",
        "ask for the PyTorch weights it was made from",
    ),
)
# What the table of a TensorFlow checkpoint (its .index file) ends with.
TABLE_END = bytes.fromhex("57fb808b247547db")
# What an archive of another kind holds.
ENTRIES = (
    (
        r"(.*/)?constants\.pkl|.*/code/.*",
        "a TorchScript archive, which holds a program",
        "save the state_dict() of torch.jit.load's module",
    ),
    (r"(.*/)?model\.weights\.h5", *KERAS),
    (
        r"(.*/)?(archive_format|serialized_exported_program\.json|models/.*\.json)",
        "a program of torch.export",
        "save the state_dict of torch.export.load's program",
    ),
    (r".*\.npy", "an archive of NumPy (.npz)", NUMPY),
)
TAR_ENTRIES = {"sys_info", "pickle", "storages"}  # of torch.save before 0.1.10


def kind_of(path: Path) -> Kind:
    """The kind of a file that is read; by its name where the content does not tell.

    Raises:
        WeightsError: it is of another kind, which the message names.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start, size = file.read(START), path.stat().st_size
        file.seek(max(0, size - len(TABLE_END)))
        end = file.read()
    if is_safetensors(start, size):
        return Kind.SAFETENSORS
    for pattern, what, advice in STARTS:
        if re.match(pattern, start):
            raise refusal(path, what, advice)
    if end == TABLE_END or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        raise refusal(path, "a TensorFlow checkpoint", TENSORFLOW)
    if start[257:262] == b"ustar":
        check_tar(path)
    if zipfile.is_zipfile(path):
        check_zip(path)
        return Kind.PYTORCH
    is_pickle = start[:1] == b"\x80" or start[:2] == b"PK"
    return Kind.SAFETENSORS if path.suffix == ".safetensors" and not is_pickle else Kind.PYTORCH


def is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file begins with the length of a header, and with a header that fits into it."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def check_zip(path: Path) -> None:
    """Raises WeightsError unless the archive may be one of torch.save."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for pattern, what, advice in ENTRIES:
        if any(re.fullmatch(pattern, name) for name in names):
            raise refusal(path, what, advice)
    if not any(re.fullmatch(r"(.*/)?data\.pkl", name) for name in names):
        raise refusal(path, "a zip archive of something else", UNPACK)


def check_tar(path: Path) -> None:
    """Raises WeightsError: no tar archive is read."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = {entry.name for entry in islice(archive, 100)}
    except tarfile.TarError:
        return
    if names >= TAR_ENTRIES:
        raise refusal(
            path,
            "in PyTorch's tar format of before 0.1.10, whose reading may run code",
            "if you trust it, read it with torch.load(weights_only=False) and save its state dict",
        )
    raise refusal(path, "a tar archive", UNPACK)


def refusal(path: Path, what: str, advice: str) -> WeightsError:
    return WeightsError(f"{path} is {what}: {advice}")


# --- Pickles, without running them ----------------------------------------------------------------


def module_class(path: Path) -> str | None:
    """The class of a whole pickled module that a PyTorch file holds; None if it holds none."""
    names = list(globals_of(path))
    modules = [name for name in names if name.startswith("torch.nn.modules.")]
    own = [name for name in names if name.partition(".")[0] not in NO_MODULES]
    return next(iter(own + modules)) if modules else None


def is_plain_pickle(path: Path) -> bool:
    """Whether a file is a whole pickle that torch.save did not write."""
    with path.open("rb") as file:
        try:
            return all(argument != MAGIC for _, argument, _ in pickletools.genops(file))
        except (ValueError, EOFError):
            return False


def globals_of(path: Path) -> Iterator[str]:
    """The classes and functions that the pickles of a PyTorch file name, in their order."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                for _ in range(PICKLES):
                    yield from globals_in(file)
            return
        with zipfile.ZipFile(path) as archive:
            (name,) = (x for x in archive.namelist() if re.fullmatch(r"(.*/)?data\.pkl", x))
            with archive.open(name) as file:
                yield from globals_in(file)
    except (ValueError, EOFError, OSError):  # a damaged pickle ends here, too
        return


def globals_in(file: Any) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and isinstance(argument, str):
            yield argument.replace(" ", ".")
