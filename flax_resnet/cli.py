"""Flags, messages and exit codes that the scripts share."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from flax_resnet.config import DType, Experiment
from flax_resnet.errors import ConfigError, UserError
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.parallel import processes

USER_ERROR = 2  # exit code


def define_config(**kwargs: Any) -> flags.FlagHolder:
    """`--config FILE.py`, whose `get_config` gives an Experiment, and `--config.a.b=value`."""
    return config_flags.DEFINE_config_file(
        "config", help_string="experiment: a file of configs/", lock_config=False, **kwargs
    )


def define_overrides() -> flags.FlagHolder:
    """`--config.a.b=value` alone, for `override` to write into a config from elsewhere."""
    return config_flags.DEFINE_config_dataclass("config", Experiment())


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
    """absl's parser, with errors that name the setting and what it may be."""

    def parse() -> list[str]:
        for argument in argv[1:]:
            check_setting(argument)
        try:
            return flags.FLAGS(argv)
        except (flags.Error, TypeError, KeyError) as e:
            raise ConfigError(str(e).strip().splitlines()[-1]) from e

    return guarded(parse)


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
