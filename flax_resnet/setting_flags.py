"""A flag for every setting, `--config.PATH=VALUE`, and what its value means."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from absl import flags

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.settings import Settings, accepted, check_name, paths_of, plain

PREFIX = "config."
READERS: dict[type, Callable[[str], Any]] = {
    int: flags.IntegerParser().convert,
    float: flags.FloatParser().convert,
    bool: flags.BooleanParser().parse,
}

own_flags: dict[str, str] = {}  # by setting, the flag that the script has in its place

flags.disclaim_key_flags()  # they belong to the script that asks for them


class SettingParser(flags.ArgumentParser):
    """Raises ConfigError for a value that the setting cannot have."""

    def __init__(self, path: str, hint: Any):
        self.path, self.hint = path, hint

    def parse(self, argument: str) -> Any:
        return accepted(self.path, self.hint, meant(self.hint, argument))

    def flag_type(self) -> str:
        return "setting"


def meant(hint: Any, text: str) -> Any:
    """The value that a text stands for, or the text itself if it stands for none of that type."""
    kind, element, is_optional = plain(hint)
    if is_optional and text.lower() == "none":
        return None
    if kind is tuple:
        parts = text.strip().strip("()[]").split(",")
        if not parts[-1].strip():  # "" and "200,"
            parts.pop()
        return tuple(meant(element, part.strip().strip("'\"")) for part in parts)
    with contextlib.suppress(ValueError):
        return READERS[kind](text) if kind in READERS else text
    return text


def settings() -> dict[str, Any]:
    """The type of every setting that is no group, by path."""
    found = paths_of(Experiment).items()
    return {path: hint for path, hint in found if not issubclass(plain(hint).kind, Settings)}


def define(
    names: Collection[str] = (), *, but: Collection[str] = (), own: Mapping[str, str] | None = None
) -> None:
    """Defines the flags of the settings that a script takes.

    Args:
        names: of settings, and of groups of them; none for all.
        but: those among them that it does not take.
        own: likewise, by the flag that the script has in the place of each.
    """
    own_flags.update(own or {})
    for path, hint in settings().items():
        is_named = not names or path in names or path.partition(".")[0] in names
        if not is_named or path in but or path in own_flags:
            continue
        kind = plain(hint).kind
        # A tuple may also be given part by part: --config.x=1 --config.x=2.
        make = flags.MultiFlag if kind is tuple else flags.Flag
        flag = make(SettingParser(path, hint), None, PREFIX + path, None, path)
        flag.boolean = kind is bool
        flags.DEFINE_flag(flag, flags.FLAGS)


def defined() -> list[str]:
    """The settings that have flags."""
    return [path for path in settings() if PREFIX + path in flags.FLAGS]


def given() -> dict[str, Any]:
    """What the command line says, by path, such as {"model.depth": 20}."""
    found: dict[str, Any] = {}
    for path in defined():
        flag = flags.FLAGS[PREFIX + path]
        if flag.present:
            found[path] = joined(flag.value) if isinstance(flag, flags.MultiFlag) else flag.value
    return found


def joined(parts: Any) -> tuple[Any, ...] | None:
    """A tuple that was given in several parts."""
    return None if None in parts else sum(parts, ())


def check(argument: str) -> None:
    """Raises ConfigError if `--config.a.b=value` names a setting that there is not, or not here."""
    name = argument.lstrip("-").partition("=")[0]
    path = name.removeprefix("no").removeprefix(PREFIX)
    if not argument.startswith("-") or not name.removeprefix("no").startswith(PREFIX):
        return
    check_name(Experiment, path)
    if path not in settings():
        first = next(other for other in settings() if other.startswith(f"{path}."))
        raise ConfigError(
            f"--config.{path} is a group of settings; give one of them: --config.{first}=VALUE"
        )
    if path in own_flags:
        raise ConfigError(f"--config.{path} is {own_flags[path]} here")
    if path not in defined():
        taken = ", ".join(defined()) or "none"
        raise ConfigError(
            f"--config.{path} would change nothing here, where the settings are: {taken}"
        )
