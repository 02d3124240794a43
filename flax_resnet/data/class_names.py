"""What the classes of a network are called: names from a file, and whose they are.

A class may have several names, such as ImageNet's n01440764 and tench.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_resnet.errors import ConfigError

Names = tuple[str, ...]  # of one class; the last one is for people

SHOWN = 3  # names in a message
WORDNET = re.compile(r"(n\d{8})\s+(\S.*)")  # a line of ImageNet's synset_words.txt


def read(path: Path, number: int) -> tuple[Names, ...]:
    """The names of a network's classes, in the order of its outputs.

    The file has one a line, or is JSON: a list, or an index such as ImageNet's
    {"0": ["n01440764", "tench"], ...}. A line may begin with WordNet's number.

    Args:
        number: of classes that there must be.

    Raises:
        ConfigError: it cannot be read, or has other contents, or another number of names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"--class_names: {path} cannot be read ({reason})") from e
    found = from_json(path, text) if text.lstrip()[:1] in ("[", "{") else from_lines(text)
    if len(found) != number or not all(found):
        empty = sum(not names for names in found)
        told = f"{len(found)}, {empty} of them empty" if empty else str(len(found))
        raise ConfigError(
            f"--class_names must hold a name for each of the network's {number} classes, got "
            f"{told} in {path}"
        )
    return found


def from_lines(text: str) -> tuple[Names, ...]:
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    matches = [(line, WORDNET.fullmatch(line)) for line in lines]
    return tuple(m.groups() if m else (line,) * bool(line) for line, m in matches)


def from_json(path: Path, text: str) -> tuple[Names, ...]:
    def names(value: Any) -> Names:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError
        return tuple(part for part in parts if part)

    try:
        tree = json.loads(text)
        if isinstance(tree, dict):
            by_number = {int(i): value for i, value in tree.items()}
            tree = [by_number[i] for i in range(len(by_number))]
        return tuple(map(names, tree))
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f'--class_names must be a list of names in JSON, or an index {{"0": NAME, ...}}, got '
            f"something else in {path}"
        ) from e


def outputs_of(classes: Sequence[str], names: Sequence[Names], source: str) -> list[int]:
    """Which output of a network stands for each class of a data set.

    Case does not matter, and an underscore is a space.

    Args:
        classes: of the data set.
        names: of the network's outputs.
        source: of the names, for the message.

    Raises:
        ConfigError: a class has no output, or several.
    """
    outputs: dict[str, list[int]] = {}
    for i, several in enumerate(names):
        for key in {spelled(name) for name in several}:
            outputs.setdefault(key, []).append(i)
    found = [outputs.get(spelled(name), []) for name in classes]
    missing = [name for name, several in zip(classes, found, strict=True) if not several]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + " ..." * (len(missing) > SHOWN)
        raise ConfigError(
            f"the classes of the images must be among the network's, by {source}, got "
            f"{len(missing)} that are not: {shown}"
        )
    for name, several in zip(classes, found, strict=True):
        if len(several) > 1:
            raise ConfigError(
                f"{name} is the name of several of the network's classes, by {source} "
                f"({', '.join(map(str, several))}); give the folder a name that only one has"
            )
    return [output for (output,) in found]


def in_order(classes: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """Which output stands for each class of a data set, where both have the same names.

    None if their order is the same, or their names are not.
    """
    is_other = list(classes) != list(theirs) and sorted(classes) == sorted(theirs)
    return [list(theirs).index(name) for name in classes] if is_other else None


def spelled(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
