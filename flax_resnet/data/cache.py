"""What took a while to read, kept as files: arrays behind the sha256 of their bytes."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_log = logging.getLogger(__name__)


def read(entry: Path, what: str = "decoded") -> tuple[np.ndarray, ...] | None:
    """Returns what `write` stored; None, and no file, if it is not the same to the bit.

    Args:
        what: is to be done again with what the arrays are made from, for the message.
    """
    try:
        with entry.open("rb") as file:
            digest = file.read(32)
            if digest == hashlib.file_digest(file, "sha256").digest():
                file.seek(32)
                end = os.fstat(file.fileno()).st_size
                found: list[np.ndarray] = []
                while file.tell() < end:
                    found.append(np.lib.format.read_array(file, allow_pickle=False))
                return tuple(found)
    except FileNotFoundError:
        return None
    _log.warning("%s is damaged: removed, to be %s again", entry, what)
    entry.unlink(missing_ok=True)
    return None


def write(entry: Path, arrays: Sequence[np.ndarray]) -> None:
    """Stores the arrays, whole or not at all; the caller holds the lock."""
    partial = entry.with_suffix(".partial")
    try:
        with partial.open("w+b") as file:
            file.write(bytes(32))
            for array in arrays:
                np.lib.format.write_array(file, array, allow_pickle=False)
            file.seek(32)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(entry)
    finally:
        partial.unlink(missing_ok=True)


def stamp(files: Iterable[str | os.PathLike[str]]) -> list[tuple[str, int, int]]:
    """The name, size and time of each file: another one if what they hold has changed."""
    stats = [(os.path.basename(path), os.stat(path)) for path in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def sha256(text: str) -> str:
    """Of a text in which there may be names of files that are no UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
