"""Config files: Python with a `get_config` that returns an Experiment, or a dictionary of it."""

import contextlib
import inspect
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_resnet import places
from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError, UserError
from flax_resnet.settings import from_mapping, shown
from flax_resnet.shipped import CONFIGS

MODULE = "flax_resnet_config_file"  # what the file is while it runs, for `sys.modules`


def names() -> dict[str, Path]:
    """The configs that come with the library."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py"))}


def find(name: str) -> Path:
    """A config's file: `name` itself, if it ends in .py, or the library's of that name.

    Raises:
        ConfigError: there is none.
    """
    path, known = places.local_path(name, "--config") if name else Path(name), names()
    if path.suffix == ".py" and path.is_file():
        return path
    if name in known:
        return known[name]
    if path.is_file():
        told = f"the file {name!r} does not end in .py"
    elif not name:
        told = "it is empty"
    elif path.is_dir():
        told = f"{name!r} is a directory"
    else:
        told = f"there is no file {name!r}"
    raise ConfigError(f"--config must be a file or one of {', '.join(known)}; {told}")


def load(path: Path) -> Experiment:
    """What the file's `get_config` returns, which may be a dict or a ConfigDict, too.

    Raises:
        ConfigError: whatever is wrong with the file, which the message names.
    """
    with told_of(path):
        get_config = execute(path).get("get_config")
        if not callable(get_config):
            raise ConfigError("it must have a function get_config, which returns an Experiment")
        try:
            inspect.signature(get_config).bind()
        except TypeError as e:
            raise ConfigError(f"get_config must do without arguments; {e}") from e
        with import_path(path):
            config = get_config()
        if isinstance(config, Experiment):
            return config
        if hasattr(config, "keys"):  # of a dict and a ConfigDict
            return from_mapping(Experiment, config)
        got = "None; is there a `return`?" if config is None else shown(config)
        raise ConfigError(f"get_config must return an Experiment or a dictionary, got {got}")


def execute(path: Path) -> dict[str, Any]:
    """The names that a Python file defines. Nothing is cached: it is read as it stands."""
    code = compile(path.read_bytes(), path, "exec")
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module  # for what looks its own module up, such as dataclasses
    with import_path(path):
        exec(code, vars(module))
    return vars(module)


@contextlib.contextmanager
def import_path(path: Path) -> Iterator[None]:
    """The file's folder is where imports are looked for first, as in a script."""
    before = list(sys.path)
    sys.path.insert(0, str(path.absolute().parent))
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Turns whatever is raised into a ConfigError that says the file, and where in it."""
    try:
        yield
    except (Exception, SystemExit) as e:
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        message = e.msg if isinstance(e, SyntaxError) else str(e)
        raise ConfigError(" ".join(f"{place(e, path)}: {kind}{message}".split())) from e


def place(error: BaseException, path: Path) -> str:
    """The file, or one beside it that it imports, with the line that raised the error, if any."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).absolute().parent == path.absolute().parent:
            return f"{frame.filename}:{frame.lineno}"
    return str(path)
