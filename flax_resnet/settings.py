"""The gate: a setting has a known name, and a value of its own type, wherever it comes from.

Every assignment passes it, be it a config file's, the command line's, a stored config.json's or a
program's. What can mean one thing only is converted: "B" to `Shortcut.B`, 1 to 1.0, a list to a
tuple, NumPy's numbers to Python's. All else is refused.
"""

import dataclasses
import enum
import functools
import math
import numbers
import os
import typing
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from flax_resnet.errors import ConfigError

T = TypeVar("T", bound="Settings")

LONGEST = 100  # characters of a refused value that are shown
NUMBERS: dict[type, Any] = {int: numbers.Integral, float: numbers.Real}
ONE = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}
SEVERAL: dict[Any, str] = {int: "integers", float: "finite numbers", str: "texts"}
LEAST_NUMBER, MOST_NUMBER = 2.0**-126, 2.0**127  # float32 has smaller ones, which XLA makes zero
ALIKE = 0.6  # of 1: how like a name must be to be suggested


class Settings:
    """Base of the dataclasses that hold settings: no field takes what is not of its type.

    Args (of the class statement):
        group: the name under which an experiment holds them, such as "model".
    """

    __no_type_check__ = True  # jaxtyping would refuse "B" before it is converted

    prefix: ClassVar[str] = ""  # what stands before a field's name in messages, such as "model."

    def __init_subclass__(cls, group: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if group:
            cls.prefix = f"{group}."

    if not TYPE_CHECKING:  # a type checker is to know the fields, and no others

        def __setattr__(self, name: str, value: Any) -> None:
            """Raises ConfigError for an unknown name, or for a value that is not of its type."""
            check_name(type(self), name)
            path = self.prefix + name
            super().__setattr__(name, accepted(path, types_of(type(self))[name], value))


def from_mapping(cls: type[T], tree: Any) -> T:
    """Settings from a dict or a ConfigDict, and its groups likewise; what it lacks is the default.

    Raises:
        ConfigError: an unknown name, or a value that is not of its type.
    """
    for name in tree:
        check_name(cls, name)
    return cls(**{name: tree[name] for name in tree})


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The type hint of every field of a dataclass, by name."""
    return {f.name: f.type for f in dataclasses.fields(cls)}


def paths_of(cls: type) -> dict[str, Any]:
    """The type hint of every setting by path, such as "model.depth", and of every group."""
    found: dict[str, Any] = {}
    for name, hint in types_of(cls).items():
        found[name] = hint
        if isinstance(hint, type) and issubclass(hint, Settings):
            found |= {f"{name}.{path}": inner for path, inner in paths_of(hint).items()}
    return found


def check_name(cls: type[Settings], path: object) -> None:
    """Raises ConfigError, with the nearest name, unless it is a setting or a group of `cls`."""
    known = paths_of(cls) if "." in str(path) else types_of(cls)
    if path in known:
        return
    near = nearest(str(path), paths_of(cls))
    if near:
        told = f"did you mean {cls.prefix}{near}?"
    else:
        told = f"there are {', '.join(cls.prefix + name for name in types_of(cls))}"
    raise ConfigError(f"no such setting: {cls.prefix}{path}; {told}")


def nearest(path: str, known: Iterable[str]) -> str | None:
    """The path whose last part is like that of `path`; of several the one that is like the whole.

    So "steps" finds "train.steps", and "model.dpeth" finds "model.depth".
    """

    def likeness(a: str, b: str) -> float:
        return SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def last(path: str) -> str:
        return path.rpartition(".")[2]

    like = [other for other in known if likeness(last(path), last(other)) >= ALIKE]
    return max(like, key=lambda other: likeness(path, other), default=None)


def accepted(name: str, hint: Any, value: Any) -> Any:
    """A value as a setting of that type holds it.

    Args:
        name: of the setting, for the message.

    Raises:
        ConfigError: it is not of that type, and cannot mean one thing only; or it is not finite.
    """
    try:
        # NumPy's and JAX's numbers and arrays have `tolist`.
        return converted(hint, value.tolist() if hasattr(value, "tolist") else value)
    except ConfigError:  # of a setting within a group
        raise
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"{name} must be {rule(hint)}, got {shown(value)}") from e


def converted(hint: Any, value: Any) -> Any:
    """Raises TypeError, ValueError or OverflowError for what `accepted` refuses."""
    kind, element, is_optional = plain(hint)
    if value is None and is_optional:
        return None
    if issubclass(kind, Settings):
        if isinstance(value, kind):
            return value
        if not hasattr(value, "keys"):  # of a dict and a ConfigDict
            raise TypeError
        return from_mapping(kind, value)
    if issubclass(kind, enum.Enum):
        return value if isinstance(value, kind) else member(kind, value)
    if kind is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise TypeError
        return tuple(converted(element, part) for part in value)
    if kind in (int, float):
        return number(kind, value)
    if not isinstance(value, bool if kind is bool else str | os.PathLike):
        raise TypeError
    return kind(value)


def number(kind: type, value: Any) -> int | float:
    if not isinstance(value, NUMBERS[kind]) or isinstance(value, bool):
        raise TypeError
    value = kind(value)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


class Plain(NamedTuple):
    """A type hint in its parts: `tuple[int, ...] | None` is a tuple of int, or None."""

    kind: type
    element: type | None  # of a tuple
    is_optional: bool


def plain(hint: Any) -> Plain:
    parts = typing.get_args(hint)
    is_optional = type(None) in parts
    if is_optional:
        (hint,) = (part for part in parts if part is not type(None))
        parts = typing.get_args(hint)
    return Plain(typing.get_origin(hint) or hint, parts[0] if parts else None, is_optional)


def member(kind: type[enum.Enum], text: object) -> enum.Enum:
    """The member with that value or name, in whatever case."""
    for one in kind:
        if isinstance(text, str) and text.lower() in (one.value.lower(), one.name.lower()):
            return one
    raise ValueError


def rule(hint: Any) -> str:
    """What a value of a type must be, such as "an integer or None"."""
    kind, element, is_optional = plain(hint)
    if issubclass(kind, Settings):
        told = f"a {kind.__name__} or a dictionary of its settings"
    elif issubclass(kind, enum.Enum):
        told = f"one of {', '.join(repr(one.value) for one in kind)}"
    elif kind is tuple:
        told = f"a list of {SEVERAL[element]}"
    else:
        told = ONE[kind]
    return told + " or None" * is_optional


def as_given(value: Any) -> Any:
    """A setting as a flag or a JSON file gives it: an enum's value."""
    return value.value if isinstance(value, enum.Enum) else value


def shown(value: object) -> str:
    """A refused value on one line, cut where it is long."""
    if isinstance(value, Settings):
        return f"a {type(value).__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more than 4,300 digits
        return f"something of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raises ConfigError `name must be rule, got value` unless it holds."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {shown(value)}")


def require_float32(settings: Settings) -> None:
    """Raises ConfigError if float32 would make a number of these settings another one."""
    for name in types_of(type(settings)):
        value = getattr(settings, name)
        if isinstance(value, float):
            is_number = not value or LEAST_NUMBER <= abs(value) <= MOST_NUMBER
            rule = "0 or a number that float32 has"
            require(is_number, settings.prefix + name, rule, value)
