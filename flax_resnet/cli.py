"""Flags, messages and exit codes that the scripts share."""

import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from flax_resnet import config_file, help, places, setting_flags
from flax_resnet.config import DType, Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.parallel import processes
from flax_resnet.places import Url
from flax_resnet.shipped import COMMANDS
from flax_resnet.streams import prepare_streams, write_out
from flax_resnet.surroundings import check_spelling, explain, hear_devices
from flax_resnet.training import signals

USER_ERROR = 2  # exit code
HELP = ("--help", "-help", "-h", "--helpfull", "-helpfull", "--helpshort", "-helpshort")
started_by_command = False  # whether `flax-resnet` runs the script, which then sets this
about_overrides = ""  # what `define_overrides` was told

flags.disclaim_key_flags()  # --config belongs to the script that asks for it here


def define_config(default: str, names: Collection[str] = ()) -> flags.FlagHolder[str]:
    """`--config NAME`, or `--config FILE.py` with a `get_config`, and `--config.a.b=value`.

    Args:
        names: of the settings that the script uses, as in `setting_flags.define`; none for all.
    """
    known = ", ".join(config_file.names())
    text = f"the experiment: a file that ends in .py, or one of {known}"
    holder: Any = flags.DEFINE_string("config", default, text, flag_values=flags.FLAGS)
    setting_flags.define(names)
    return holder


def define_overrides(
    of: str,
    names: Collection[str] = (),
    *,
    but: Collection[str] = (),
    own: Mapping[str, str] | None = None,
) -> None:
    """`--config.a.b=value` alone, for `override` to write into a config from elsewhere.

    Args:
        of: whose settings they override, in a sentence for `--help`.
        names, but, own: which settings the script uses, as in `setting_flags.define`.
    """
    global about_overrides
    about_overrides = of
    setting_flags.define(names, but=but, own=own)


class PlaceParser(flags.ArgumentParser):
    """Of a flag whose value is a path, or with `buckets` or `hub` maybe a URL of such."""

    def __init__(self, buckets: bool, hub: bool = False):  # absl wants the arguments kept as is
        self.buckets, self.hub = buckets, hub

    def parse(self, argument: str | Path) -> Path | Url:  # absl names the flag
        if not self.buckets:
            return places.local_path(argument, "it")
        return places.place(argument, "it", hub=self.hub)


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag whose value is a local path: `~` and file:// are understood, other URLs refused."""
    return flags.DEFINE(PlaceParser(buckets=False), name, default, help)


def define_place(
    name: str, default: str | None, help: str, *, hub: bool = False
) -> flags.FlagHolder:
    """A flag whose value is a local path or the `Url` of a bucket, or with `hub` of a model."""
    return flags.DEFINE(PlaceParser(buckets=True, hub=hub), name, default, help)


def takes_config_file() -> bool:
    """Whether the script has called `define_config`."""
    return "config" in flags.FLAGS


def config_values(argv: list[str]) -> list[str]:
    """The values that a command line has for --config."""
    found: list[str] = []
    for i, argument in enumerate(argv[1:], 1):
        option, given, value = argument.partition("=")
        if argument == "--":
            break
        if option in ("--config", "-config"):
            found += [value] if given else argv[i + 1 : i + 2]
    return found


def overrides() -> dict[str, Any]:
    """What the command line says, by path, such as {"model.depth": 20}."""
    return setting_flags.given()


def override(config: Experiment) -> Experiment:
    """`config` with the settings given on the command line, checked."""
    for path, value in overrides().items():
        *groups, name = path.split(".")
        holder = config
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, name, value)
    return checked(config)


def config_name(flag: flags.FlagHolder[str]) -> str:
    """What the flag's config is called: the name of its file, without folder and ending."""
    return Path(flag.value).stem


def experiment(flag: flags.FlagHolder[str]) -> Experiment:
    """What the flag's config says, overrides included, checked.

    Raises:
        ConfigError: a setting breaks a rule, or one that the command line gives changes nothing.
    """
    path = config_file.find(flag.value)
    config = config_file.load(path)
    try:
        override(config)
    except ConfigError as e:
        if str(e).partition(" ")[0] in overrides():
            raise
        raise ConfigError(f"{path}: {e}") from e
    check_effects([config])
    return config


def check_effects(configs: Iterable[Experiment]) -> None:
    """Raises ConfigError if a setting given on the command line changes nothing in any config."""
    idle = [config.idle() for config in configs]
    for path in overrides():
        if all(path in reasons for reasons in idle):
            raise ConfigError(f"--config.{path} would change nothing: {idle[0][path]}")


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
        jax.config.update("jax_compilation_cache_dir", str(places.cache_directory() / "jax"))
    # Making the initial weights is hundreds of small programs, together seconds of compiling.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(main: Callable[..., None], *names: str) -> None:
    """Parses flags and calls `main`. A user's mistake becomes one line and exit code 2.

    Args:
        names: of the arguments that `main` takes from the command line, such as "SRC"; if the last
            ends in "...", one or more of it.
    """
    prepare_streams()
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
    hear_devices(handler)
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
        if any(argument in HELP for argument in argv[1:]):
            print(help_page(argv))
            sys.exit()
        check_spelling(argv[1:])
        check_config_flag(config_values(argv))
        for argument in itertools.takewhile(lambda argument: argument != "--", argv[1:]):
            setting_flags.check(argument)
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            raise ConfigError(str(e).strip().splitlines()[-1]) from e

    return guarded(parse)


def check_config_flag(values: list[str]) -> None:
    """Raises ConfigError if --config has several values, or if the script does not take it."""
    if values and not takes_config_file():
        settings = setting_flags.defined()
        told = "settings are given one by one, --config.NAME=VALUE" if settings else "see --help"
        raise ConfigError(f"this takes no --config, got {values[0]!r}; {told}")
    if len(set(values)) > 1:
        raise ConfigError(f"--config must be given once, got {' and '.join(values)}")


def help_page(argv: list[str]) -> str:
    """The help of the script that runs. Its settings' defaults are those of --config."""
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    own = {name: flag for name, flag in own.items() if name.partition(".")[0] != "config"}
    source, config = about_overrides, Experiment()
    if takes_config_file():
        flag = own["config"] = flags.FLAGS["config"]
        name = str((config_values(argv) or [flag.default])[-1])
        source = f"The defaults are those of {name}."
        try:
            config = config_file.load(config_file.find(name))
        except ConfigError as e:
            source = f"The defaults are the paper's: {name} cannot be used ({e})."
    doc = sys.modules["__main__"].__doc__ or ""
    return as_typed(help.page(doc, own.values(), source, config, setting_flags.defined()))


def as_typed(text: str) -> str:
    """A text about scripts in the words of the command that the user typed."""
    if not started_by_command:
        return text
    names = {script: name for name, script in COMMANDS.items()}

    def command(found: re.Match[str]) -> str:
        return f"flax-resnet {names[found[1]]}" if found[1] in names else found[0]

    text = re.sub(r"python scripts/(\w+)\.py", command, text)
    return re.sub(r"\bconfigs/(\w+)\.py", r"\1", text)


def guarded(function: Callable[[], Any]) -> Any:
    """What `function` returns. What a user can mend ends the process with one line instead."""
    try:
        try:
            return function()
        finally:
            write_out()
    except signals.Stopped as e:
        if jax.distributed.is_initialized():  # whose processes leave together
            raise
        signals.end_process(e, is_told=True)  # Python would wait for what is being computed
    except Exception as e:
        message = explain(e)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        if os.environ.get("FLAX_RESNET_TRACEBACK"):
            raise
        processes.leave(USER_ERROR)
