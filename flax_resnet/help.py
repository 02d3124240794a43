"""What `--help` prints: a script's docstring, its flags, and every setting.

What it says of the settings is read from the classes of `config.py`. Defaults and types come from
the dataclasses, meanings from the comments in the source, and rules from what `validate` says of a
wrong value.
"""

import ast
import copy
import dataclasses
import enum
import functools
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from absl import flags

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError

WIDTH = 100
WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "INTEGER,INTEGER,..."}
WRONG = {int: -1, float: -1.0, tuple: (-1,)}  # values that break a setting's rule, if it has one


class Setting(NamedTuple):
    """One `--config.PATH=VALUE`."""

    path: str  # such as "model.depth"
    default: str
    allowed: str  # such as "plain|A|B|C" or "INTEGER"
    meaning: list[str]  # sentences: what it is, and the rule that `validate` holds it to
    members: dict[str, str]  # of an enum: what a value means, where it says so


def page(doc: str, own: Iterable[flags.Flag], source: str, config: Experiment | None) -> str:
    """The whole of `--help`.

    Args:
        own: the flags that are no settings.
        source: a sentence that says whose values `config` holds.
        config: its values are shown as the settings' defaults. None: a script without settings.
    """
    lines = [doc.strip(), "", "Flags:"]
    lines += [about_flag(flag) for flag in sorted(own, key=lambda flag: flag.name)]
    if config is not None:
        lines += ["", f"Settings. {source}", about_settings(config)]
    return "\n".join(lines)


def about_flag(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "" if flag.default_as_str is None else f" (default: {flag.default_as_str})"
    text = f"{name}: {' '.join((flag.help or '').split())}{default}"
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 6)


def about_settings(config: Experiment) -> str:
    """All settings in the groups of `config.py`, with the values of `config` as defaults."""
    lines: list[str] = []
    for name, group in groups(config).items():
        lines += ["", heading(name, group)]
        for setting in settings(config, name, group):
            lines.append(
                f"  --config.{setting.path}={setting.allowed} (default: {setting.default})"
            )
            if setting.meaning:
                lines.append(indented("; ".join(setting.meaning)))
            lines += [indented(f"{value}: {text}") for value, text in setting.members.items()]
    return "\n".join(lines)


def groups(config: Experiment) -> dict[str, Any]:
    """The dataclasses within `config` by name, then `config` itself, whose name is empty."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: v for k, v in fields.items() if dataclasses.is_dataclass(v)} | {"": config}


def heading(name: str, group: Any) -> str:
    return f"{name}: {first_sentence(type(group))}" if name else "The experiment as a whole."


def settings(config: Experiment, name: str, group: Any) -> list[Setting]:
    """The settings of one group."""
    types = typing.get_type_hints(type(group))
    found = []
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            continue
        path = f"{name}.{field.name}" if name else field.name
        type_ = plain_type(types[field.name])
        members: dict[str, str] = {}
        meaning = [comments(type(group)).get(field.name, "")]
        if issubclass(type_, enum.Enum):
            allowed = "|".join(show(member) for member in type_)
            meaning.append(first_sentence(type_))
            texts = {show(member): comments(type_).get(member.name) for member in type_}
            members = {value: text for value, text in texts.items() if text}
        elif type_ is bool:
            allowed = "true|false"
        else:
            allowed = WORDS[type_]
            meaning.append(rule(config, path, type_))
        meaning = [sentence.removesuffix(".") for sentence in meaning if sentence]
        found.append(Setting(path, show(value), allowed, meaning, members))
    return found


def plain_type(hint: Any) -> type:
    """`int` of `int | None`, `tuple` of `tuple[int, ...]`."""
    hints = [hint for hint in typing.get_args(hint) if hint is not type(None)]
    if len(hints) == 1 and type(None) in typing.get_args(hint):
        hint = hints[0]
    return typing.get_origin(hint) or hint


def show(value: Any) -> str:
    """A value as the command line takes it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case enum.Enum():
            return value.value
        case tuple():
            return ",".join(map(str, value)) or "()"
    return str(value)


def rule(config: Experiment, path: str, type_: type) -> str:
    """What `validate` wants of a number, such as "must be at least 1", in its own words."""
    if type_ not in WRONG:
        return ""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    holder: Any = config
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, name, WRONG[type_])
    try:
        config.validate()
    except ConfigError as e:
        words = re.match(rf"{re.escape(path)} (must .*), got ", str(e))
        return words[1] if words else ""
    return ""


def first_sentence(cls: type) -> str:
    """The first line of a class's own docstring, if it has one."""
    doc = vars(cls).get("__doc__") or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc.strip().partition("\n")[0]


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """What the source says of a class's fields or members, in a comment behind or above each.

    Empty where there is no source, as in a package of compiled files alone.
    """
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    behind: dict[int, str] = {}
    above: dict[int, str] = {}  # by the line that the comment stands on, all of its lines joined
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, text = token.start[0], token.string.lstrip("# ")
            if token.line[: token.start[1]].strip():
                behind[row] = text
            else:
                above[row] = f"{above.get(row - 1, '')} {text}".strip()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement in tree.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                text = behind.get(statement.end_lineno or 0) or above.get(statement.lineno - 1)
                if text:
                    found[name] = text
    return found


def indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 8)
