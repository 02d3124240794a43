"""The user's own images, in a folder for each class: DIR/train/CLASS/ and DIR/val/CLASS/.

As torchvision's ImageFolder has it, but that the classes of all splits must be the same: there, a
class that one split lacks gives every later class another number.
"""

import logging
import os
from collections.abc import Collection
from pathlib import Path
from stat import S_ISREG

import numpy as np

from flax_resnet import places
from flax_resnet.config import DataConfig
from flax_resnet.data.encoded import Encoded, spelled
from flax_resnet.data.images import BadImageError
from flax_resnet.errors import DatasetError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # in whatever case
TRAIN, VALIDATION, TEST = ("train",), ("val", "validation", "valid"), ("test",)
NAMES = (*TRAIN, *VALIDATION, *TEST)  # of a split's folder
MOST_ASKED = 20_000  # files of a split that are asked for their size and time
SHOWN = 5  # classes of a kind that a message names

log = logging.getLogger(__name__)


class Folder(Encoded):
    """The images of one split, by class and then by name.

    Args:
        root: with a folder for each class.
        classes: their names, in order.
        files: of each image, its path below its class's folder.
    """

    def __init__(self, root: Path, classes: tuple[str, ...], label: np.ndarray, files: list[str]):
        self.root, self.classes, self.label, self.files = root, classes, label, files

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.label[index]], self.files[index])

    def read(self, index: int) -> bytes:
        # A pipe would not answer before somebody writes there, nor /dev/zero ever end.
        with open(self.path(index), "rb", opener=open_at_once) as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError("no regular file")
            return file.read()

    def name(self, index: int) -> str:
        return spelled(self.path(index))

    def stamp(self) -> object:
        """Of very many images not each is asked for its size and time, but each folder for its."""
        paths = [self.path(index) for index in range(len(self))]
        asked = paths if len(paths) <= MOST_ASKED else sorted(set(map(os.path.dirname, paths)))
        return paths, [(x.st_size, x.st_mtime_ns) for x in map(stat, asked)]


def open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def stat(path: str) -> os.stat_result:
    """Zeros for what is not there."""
    try:
        return os.stat(path)
    except OSError:
        return os.stat_result([0] * 10)


def load(config: DataConfig) -> dict[str, Folder]:
    """The splits that there are, of "train", "validation" and "test".

    "test" is what a run is measured by: the folder test, or where there is only val that. A folder
    that holds the classes themselves is a split of its own, "train".

    Raises:
        DatasetError: there is no such folder, no image, or a class that not every split has.
    """
    found = split_folders(config)
    classes = class_names(config)
    return {name: read_split(root, classes) for name, root in found.items()}


def class_names(config: DataConfig) -> tuple[str, ...]:
    """The classes, in the order of their numbers: that of their folders' names.

    Raises DatasetError as `load` does.
    """
    of_split = {root: set(folders(root)) for root in split_folders(config).values()}
    (first, classes), *others = of_split.items()
    for root, names in others:
        if names != classes:
            missing = [f"only in {first.name}: {told(classes - names)}"] * bool(classes - names)
            missing += [f"only in {root.name}: {told(names - classes)}"] * bool(names - classes)
            raise DatasetError(
                f"{spelled(first.parent)} must have the same classes in every split, got "
                f"{'; '.join(missing)}"
            )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"a class must have a name in UTF-8, got the folder {spelled(first / name)}; "
                "rename it"
            ) from None
    return tuple(sorted(classes))


def told(names: Collection[str]) -> str:
    shown = ", ".join(spelled(name) for name in sorted(names)[:SHOWN])
    return shown + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def split_folders(config: DataConfig) -> dict[str, Path]:
    """Where each split is."""
    root = places.local_path(config.dir or "", "data.dir")
    if not root.is_dir():
        kind = "the file" if root.exists() else "what is not there,"
        raise DatasetError(f"data.dir must be a directory of images, got {kind} {spelled(root)}")
    there = {name.lower(): root / name for name in folders(root) if name.lower() in NAMES}
    if not there:
        return {"train": root}

    def first(names: tuple[str, ...]) -> Path | None:
        found = [there[name] for name in names if name in there]
        if len(found) > 1:
            both = " and ".join(path.name for path in found)
            raise DatasetError(f"{spelled(root)} must have one validation split, got {both}")
        return found[0] if found else None

    train, validation, test = first(TRAIN), first(VALIDATION), first(TEST)
    if test is None:
        validation, test = None, validation
    splits = {"train": train, "validation": validation, "test": test}
    return {name: path for name, path in splits.items() if path is not None}


def folders(root: Path) -> list[str]:
    """The names of the folders in one, also by a link; those that begin with a dot are hidden."""
    try:
        with os.scandir(root) as entries:
            return sorted(x.name for x in entries if x.is_dir() and not x.name.startswith("."))
    except OSError as e:
        raise DatasetError(f"{spelled(root)} cannot be read ({e.strerror})") from e


def read_split(root: Path, classes: tuple[str, ...]) -> Folder:
    """Raises DatasetError for a class without images."""
    files: list[str] = []
    label: list[np.ndarray] = []
    passed_over: list[str] = []
    for number, name in enumerate(classes):
        images = images_below(root / name, passed_over)
        if not images:
            kinds = ", ".join(SUFFIXES)
            raise DatasetError(f"{spelled(root / name)} must hold images ({kinds}), got none")
        files += images
        label.append(np.full(len(images), number, np.int32))
    if not files:
        raise DatasetError(
            f"{spelled(root)} must hold a folder of images for each class, got none; data.dir is "
            "the directory with train/CLASS/ and val/CLASS/ inside"
        )
    if passed_over:
        log.warning(
            "%s: %d files are no images by their ending and were passed over: %s",
            *(spelled(root), len(passed_over), told(passed_over)),
        )
    return Folder(root, classes, np.concatenate(label), files)


def images_below(root: Path, passed_over: list[str]) -> list[str]:
    """The images of a class, by name; those in folders within it too.

    A link to a file is as good as the file; one to a folder within a class is not followed.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(f"{spelled(error.filename)} cannot be read ({error.strerror})")

    found: list[str] = []
    for folder, _, names in os.walk(root, onerror=fail):
        inner = os.path.relpath(folder, root)
        for name in names:
            if name.startswith("."):
                continue
            path = name if inner == "." else os.path.join(inner, name)
            (found if name.lower().endswith(SUFFIXES) else passed_over).append(path)
    return sorted(found)
