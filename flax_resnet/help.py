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
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from absl import flags

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.settings import Plain, plain, types_of

WIDTH = 100
WORDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
WRONG: dict[Any, Any] = {int: -1, float: -1.0}  # values that break a setting's rule, if it has one


class Setting(NamedTuple):
    """One `--config.PATH=VALUE`."""

    path: str  # such as "model.depth"
    default: str
    allowed: str  # such as "plain|A|B|C" or "INTEGER"
    meaning: list[str]  # sentences: what it is, and the rule that `validate` holds it to
    members: dict[str, str]  # of an enum: what a value means, where it says so


def page(
    doc: str,
    own: Iterable[flags.Flag],
    source: str,
    config: Experiment,
    taken: Collection[str],
) -> str:
    """The whole of `--help`.

    Args:
        own: the flags that are no settings.
        source: a sentence that says whose values `config` holds.
        config: its values are shown as the settings' defaults.
        taken: the settings that the script takes, by path.
    """
    lines = [doc.strip(), "", "Flags:"]
    lines += [about_flag(flag) for flag in sorted(own, key=lambda flag: flag.name)]
    if taken:
        lines += ["", f"Settings. {source}", about_settings(config, taken)]
    return "\n".join(lines)


def about_flag(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "" if flag.default_as_str is None else f" (default: {flag.default_as_str})"
    text = f"{name}: {' '.join((flag.help or '').split())}{default}"
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 6)


def about_settings(config: Experiment, taken: Collection[str]) -> str:
    """The settings in the groups of `config.py`, with the values of `config` as defaults."""
    lines: list[str] = []
    for name, group in groups(config).items():
        shown = [setting for setting in settings(config, name, group) if setting.path in taken]
        lines += ["", heading(name, group)] if shown else []
        for setting in shown:
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
    found = []
    for name_of_field, hint in types_of(type(group)).items():
        value = getattr(group, name_of_field)
        if dataclasses.is_dataclass(value):
            continue
        path = f"{name}.{name_of_field}" if name else name_of_field
        type_ = plain(hint)
        meaning = [comments(type(group)).get(name_of_field, "")]
        members: dict[str, str] = {}
        if issubclass(type_.kind, enum.Enum):
            meaning.append(first_sentence(type_.kind))
            texts = {show(one): comments(type_.kind).get(one.name) for one in type_.kind}
            members = {value: text for value, text in texts.items() if text}
        else:
            meaning.append(rule(config, path, type_))
        meaning = [sentence.removesuffix(".") for sentence in meaning if sentence]
        found.append(Setting(path, show(value), allowed(type_), meaning, members))
    return found


def allowed(type_: Plain) -> str:
    """Such as "plain|A|B|C", "INTEGER" or "INTEGER,INTEGER,..."."""
    if issubclass(type_.kind, enum.Enum):
        return "|".join(show(one) for one in type_.kind)
    if type_.kind is tuple:
        return "{0},{0},...".format(WORDS[type_.element])
    return "true|false" if type_.kind is bool else WORDS[type_.kind]


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


def rule(config: Experiment, path: str, type_: Plain) -> str:
    """What `validate` wants of a number, such as "must be at least 1", in its own words."""
    wrong = WRONG.get(type_.element or type_.kind)
    if wrong is None:
        return ""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    holder: Any = config
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, name, (wrong,) if type_.element else wrong)
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
