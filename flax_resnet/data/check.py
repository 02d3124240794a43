"""Images that cannot be read are found before the first step, and told by their names.

What is small enough is decoded whole, once: what came of it is remembered until a file changes. Of
more only a sample is decoded, since the first step must not wait for a million images;
`scripts/check_data.py` looks at all of them.
"""

import logging
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from flax_resnet import places
from flax_resnet.data import cache
from flax_resnet.data.encoded import Encoded, Images, Part
from flax_resnet.data.images import BadImageError
from flax_resnet.data_config import DataConfig
from flax_resnet.errors import DatasetError

# All images of a split are looked at if they are at most so many, in files of so many bytes: at
# 20 MB a second and core that takes 7 seconds on two cores.
MOST_IMAGES = 20_000
MOST_BYTES = 2**28
SAMPLE = 500  # evenly spaced images of a larger split, or fewer if they have more bytes
WEIGHED = 32  # evenly spaced images, whose sizes tell how large the others are
SHOWN = 10  # bad images that a message names
SLOW_IMAGES = 500  # from which it is worth to show how far it is

_CACHE_FORMAT = 1  # to be raised with every change to the layout of an entry, or to what is bad

_log = logging.getLogger(__name__)

Bad = dict[int, str]  # by the number of an image, why it is none


class Checked(NamedTuple):
    """What is known of a split."""

    bad: Bad
    looked_at: int  # images


def check(
    config: DataConfig, splits: dict[str, Encoded], *, everything: bool = False
) -> dict[str, Images]:
    """The splits without their bad images, of which there may be `config.allow_bad` in all.

    Args:
        everything: every image is looked at, however many there are. It is so, too, where some may
            be left out: they must be known.

    Raises:
        DatasetError: there are more, with the names of the first and what to do.
    """
    is_all = everything or config.allow_bad > 0
    found = {name: find(split, config.num_threads, name, is_all) for name, split in splits.items()}
    number = sum(len(checked.bad) for checked in found.values())
    if number > config.allow_bad:
        raise DatasetError(complaint(splits, found))
    kept: dict[str, Images] = {}
    for name, split in splits.items():
        bad = found[name].bad
        kept[name] = Part(split, np.setdiff1d(np.arange(len(split)), [*bad])) if bad else split
        if bad:
            listed = told({name: split}, found)
            _log.warning("%s: %d of %d images are left out: %s", name, len(bad), len(split), listed)
    return kept


def find(split: Encoded, threads: int, name: str, everything: bool) -> Checked:
    """Looks for bad images, or remembers which there are.

    Args:
        name: of the split, for the progress bar.
        everything: see `check`.
    """
    everything = everything or is_small(split)
    entry = remembered_at(split)
    known = read(entry)
    if known is not None:
        return Checked(known, len(split))
    if not everything:
        return look(split, sample(split), threads, name)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            known = read(entry)  # another process may have looked meanwhile
            if known is not None:
                return Checked(known, len(split))
            checked = look(split, range(len(split)), threads, name)
            cache.write(entry, pack(checked.bad))
            return checked
    except OSError as error:
        _log.warning("it cannot be remembered which images are bad: %s", error)
        return look(split, range(len(split)), threads, name)


def look(split: Encoded, indices: Collection[int], threads: int, name: str) -> Checked:
    """Decodes these images."""
    bad: Bad = {}
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(lambda index: why_bad(split, index), indices)
        is_quick = len(indices) < SLOW_IMAGES
        bar = tqdm(reasons, f"checking {name}", len(indices), unit="image", disable=is_quick)
        try:
            for index, reason in zip(indices, bar, strict=True):
                if reason:
                    bad[index] = reason
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Checked(bad, len(indices))


def why_bad(split: Encoded, index: int) -> str:
    """Empty if the image can be learnt from."""
    try:
        split.image(index)
    except BadImageError as e:
        return str(e)
    except OSError as e:
        return e.strerror or str(e)
    return "no label" if split.label[index] < 0 else ""


def is_small(split: Encoded) -> bool:
    return len(split) <= MOST_IMAGES and len(split) * mean_bytes(split) <= MOST_BYTES


def sample(split: Encoded) -> list[int]:
    """Evenly spaced images, and those that are known to have no label."""
    number = int(min(len(split), SAMPLE, 1 + MOST_BYTES / max(1, mean_bytes(split))))
    chosen = spaced(len(split), number)
    return sorted({*chosen, *map(int, np.flatnonzero(split.label < 0))})


def mean_bytes(split: Encoded) -> float:
    """Of an image's file, from a few of them."""
    sizes = [1]
    for index in spaced(len(split), WEIGHED):
        try:
            sizes.append(len(split.read(index)))
        except (OSError, BadImageError):
            continue
    return sum(sizes) / len(sizes)


def spaced(size: int, number: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, size - 1, min(size, number)).round())]


def complaint(splits: dict[str, Encoded], found: dict[str, Checked]) -> str:
    number = sum(len(checked.bad) for checked in found.values())
    size = sum(map(len, splits.values()))
    looked_at = sum(checked.looked_at for checked in found.values())
    of = f"{size:,}" if looked_at == size else f"{looked_at:,} looked at, of {size:,},"
    advice = f"leave them out with --config.data.allow_bad={number}"
    if looked_at < size:
        advice = "find the others with scripts/check_data.py"
    return (
        f"{number} of {of} images cannot be read: {told(splits, found)}; mend or remove them, or "
        f"{advice}"
    )


def told(splits: dict[str, Encoded], found: dict[str, Checked]) -> str:
    """Bad images by their names, the first ones."""
    lines = [
        f"{split.name(index)} ({reason})"
        for name, split in splits.items()
        for index, reason in found[name].bad.items()
    ]
    return ", ".join(lines[:SHOWN]) + f" and {len(lines) - SHOWN} more" * (len(lines) > SHOWN)


def remembered_at(split: Encoded) -> Path:
    key = cache.sha256(repr((_CACHE_FORMAT, split.stamp())))
    return places.cache_directory() / f"checked-{key[:32]}.npy"


def read(entry: Path) -> Bad | None:
    """What is remembered; None if nothing is."""
    try:
        arrays = cache.read(entry, "checked")
    except OSError as error:
        _log.warning("what was remembered of the images cannot be read: %s", error)
        return None
    return None if arrays is None else unpack(arrays)


def pack(bad: Bad) -> tuple[np.ndarray, np.ndarray]:
    text = "\n".join(" ".join(reason.split()) for reason in bad.values()).encode()
    return np.array([*bad], np.int64), np.frombuffer(text, np.uint8)


def unpack(arrays: Iterable[np.ndarray]) -> Bad:
    indices, text = arrays
    reasons = bytes(text).decode().split("\n")
    return {int(i): reason for i, reason in zip(indices, reasons, strict=False)}
