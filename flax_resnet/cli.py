"""Flags, messages and exit codes that the scripts share."""

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from flax_resnet import help
from flax_resnet.config import DType, Experiment
from flax_resnet.errors import ConfigError, UserError
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.parallel import processes
from flax_resnet.shipped import COMMANDS, CONFIGS

USER_ERROR = 2  # exit code
HELP = ("--help", "-help", "-h")
started_by_command = False  # whether `flax-resnet` runs the script, which then sets this

flags.disclaim_key_flags()  # --config belongs to the script that asks for it here


def define_config(default: str) -> flags.FlagHolder:
    """`--config NAME`, or `--config FILE.py` with a `get_config`, and `--config.a.b=value`."""
    holder = config_flags.DEFINE_config_file(
        "config",
        str(find_config(default)),
        f"the experiment: a file, or one of {', '.join(config_names())}",
        lock_config=False,
    )
    flags.FLAGS["config"].default_as_str = default
    return holder


def define_overrides(of: str) -> flags.FlagHolder:
    """`--config.a.b=value` alone, for `override` to write into a config from elsewhere.

    Args:
        of: whose settings they override, in a sentence for `--help`.
    """
    return config_flags.DEFINE_config_dataclass("config", Experiment(), of)


def takes_config_file() -> bool:
    """Whether the script has called `define_config`."""
    return "config" in flags.FLAGS and flags.FLAGS["config"].flag_type() == "config object"


def config_names() -> dict[str, Path]:
    """The configs that come with the library."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py"))}


def find_config(name: str) -> Path:
    """A config's file: `name` itself, or the one of that name which comes with the library.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    names = config_names()
    if name not in names:
        known = ", ".join(names)
        raise ConfigError(f"--config must be a file or one of {known}; there is no file {name!r}")
    return names[name]


def config_arguments(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """Where the values of --config are: index in `argv`, what stands before it there, value."""
    for i, argument in enumerate(argv[1:], 1):
        option, given, value = argument.partition("=")
        if argument == "--":
            return
        if option in ("--config", "-config"):
            if given:
                yield i, f"{option}=", value
            elif i + 1 < len(argv):
                yield i + 1, "", argv[i + 1]


def with_config_found(argv: list[str]) -> list[str]:
    """The command line, with the file in the place of a config's name."""
    found = list(argv)
    for i, before, value in config_arguments(argv):
        found[i] = f"{before}{find_config(value)}"
    return found


def overrides() -> dict[str, Any]:
    """What the command line says, by path, such as {"model.depth": 20}."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def override(config: Experiment) -> Experiment:
    """`config` with the settings given on the command line, checked."""
    for path, value in overrides().items():
        *groups, name = path.split(".")
        holder = config
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, name, value)
    return checked(config)


def experiment(flag: flags.FlagHolder) -> Experiment:
    """The flag's value, overrides included, checked."""
    return checked(flag.value)


def checked(config: Experiment) -> Experiment:
    """Raises ConfigError if a setting breaks a rule; switches 64-bit arithmetic on if it asks."""
    config.validate()
    jax.config.update("jax_enable_x64", config.model.dtype is DType.FLOAT64)
    return config


def keep_compiled_programs() -> None:
    """JAX's compilation cache in a directory of the user's own, unless JAX was told of another.

    It is `flax-resnet/jax` under XDG_CACHE_HOME, by default ~/.cache; JAX_COMPILATION_CACHE_DIR
    names another, JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "flax-resnet" / "jax"))
    # Making the initial weights is hundreds of small programs, together seconds of compiling.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(main: Callable[..., None], *names: str) -> None:
    """Parses flags and calls `main`. A user's mistake becomes one line and exit code 2.

    Args:
        names: of the arguments that `main` takes from the command line, such as "SRC"; if the last
            ends in "...", one or more of it.
    """
    keep_memory()
    keep_compiled_programs()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax and TFDS speak to their own developers
    # After a damaged checkpoint Orbax leaves tasks behind, which asyncio reports at length.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = report_unraisable
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("flax_resnet")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    app.run(lambda argv: guarded(lambda: call(main, argv, names)), flags_parser=parse_flags)


def report_unraisable(unraisable: Any) -> None:
    """Python's own, but for what TensorStore repeats of a full disk when nobody listens any more.

    It comes from a thread of TensorStore, after Orbax has told the error once.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def call(main: Callable[..., None], argv: list[str], names: tuple[str, ...]) -> None:
    many = bool(names) and names[-1].endswith("...")
    if len(argv) - 1 > len(names) and not many:
        raise ConfigError(
            f"no such argument: {argv[len(names) + 1]!r}; settings are --config.NAME=VALUE"
        )
    if len(argv) - 1 < len(names):
        raise ConfigError(f"missing argument: {names[len(argv) - 1]}; usage: {' '.join(names)}")
    main(*argv[1:])


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with `--help` of our own, and errors that name the setting and its rule."""

    def parse() -> list[str]:
        found = with_config_found(argv) if takes_config_file() else argv
        try:
            if any(argument in HELP for argument in argv[1:]):
                print(help_page(found))
                sys.exit()
            for argument in argv[1:]:
                check_setting(argument)
            return flags.FLAGS(found)
        except (flags.Error, TypeError, KeyError) as e:
            raise ConfigError(str(e).strip().splitlines()[-1]) from e

    return guarded(parse)


def help_page(argv: list[str]) -> str:
    """The help of the script that runs. Its settings' defaults are those of --config."""
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    own = {name: flag for name, flag in own.items() if name.partition(".")[0] != "config"}
    source, config = "", None
    if takes_config_file():
        flag = own["config"] = flags.FLAGS["config"]
        given = [value for _, _, value in config_arguments(argv)]
        config = flag.parser.parse(given[-1]) if given else flag.value
        source = f"The defaults are those of {given[-1] if given else flag.default_as_str}."
    elif "config" in flags.FLAGS:
        source, config = flags.FLAGS["config"].help, Experiment()
    return as_typed(help.page(sys.modules["__main__"].__doc__ or "", own.values(), source, config))


def as_typed(text: str) -> str:
    """A text about scripts in the words of the command that the user typed."""
    if not started_by_command:
        return text
    names = {script: name for name, script in COMMANDS.items()}

    def command(found: re.Match[str]) -> str:
        return f"flax-resnet {names[found[1]]}" if found[1] in names else found[0]

    text = re.sub(r"python scripts/(\w+)\.py", command, text)
    return re.sub(r"\bconfigs/(\w+)\.py", r"\1", text)


def check_setting(argument: str) -> None:
    """Raises ConfigError if `--config.a.b=value` names a field that an Experiment lacks."""
    name, _, _ = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or not name.startswith("config."):
        return
    holder: Any = Experiment
    for part in name.split(".")[1:]:
        types = {f.name: f.type for f in dataclasses.fields(holder)} if is_group(holder) else {}
        if part not in types:
            known = f"there are {', '.join(types)}" if types else "it has no parts"
            raise ConfigError(f"no such setting: {name} ({part!r} is unknown; {known})")
        holder = types[part]


def is_group(type_: Any) -> bool:
    return dataclasses.is_dataclass(type_)


def guarded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (UserError, OSError, jax.errors.JaxRuntimeError) as e:
        message = " ".join(str(e).split())
        if isinstance(e, jax.errors.JaxRuntimeError):
            if not jax.distributed.is_initialized():
                raise
            message = f"another process is gone; start all again ({message[:200]})"
        print(f"error: {message}", file=sys.stderr)
        if os.environ.get("FLAX_RESNET_TRACEBACK"):
            raise
        processes.leave(USER_ERROR)
