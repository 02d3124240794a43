"""What a command's surroundings can do to it: the disk, the locale, memory and devices.

Each becomes one line for the user. Whatever is none of these is a mistake of ours, and keeps its
traceback.
"""

import logging
import os
import sys
from collections.abc import Iterable

import jax

from flax_resnet.errors import ConfigError, UserError

LESS_MEMORY = (
    "take a smaller train.batch_size or train.eval_batch_size, model.remat=True, or "
    "model.dtype=bfloat16"
)
PLACES = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "TFDS_DATA_DIR")
NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


def explain(error: Exception) -> str | None:
    """What to tell the user of it, in one line; None if it is a mistake of ours."""
    message = one_line(error)
    match error:
        case UserError():
            return message
        case MemoryError() | jax.errors.JaxRuntimeError() if is_out_of_memory(error):
            return f"out of memory ({message[:200] or 'of the host'}): {LESS_MEMORY}"
        case BrokenPipeError() if error.filename is None:
            return f"nobody reads the output any more ({message})"
        case OSError():
            return message
        case UnicodeEncodeError() if is_misspelt(error.object):
            return misspelt(error.object)
        case jax.errors.JaxRuntimeError() if jax.distributed.is_initialized():
            return f"another process is gone; start all again ({message[:200]})"
        case RuntimeError() | AssertionError():
            return why_no_device()
    return None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_out_of_memory(error: Exception) -> bool:
    """Of the host or of a device, whoever says so."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY)


def why_no_device() -> str | None:
    """Why JAX cannot use the devices that it is told to use; None if it can."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        # No word at all: a GPU is asked for and there is none.
        reason = one_line(e).partition(" (set JAX_PLATFORMS")[0] or "there is no such device"
        told = os.environ.get("JAX_PLATFORMS")
        if not told:
            return reason
        return (
            f"JAX_PLATFORMS={told} cannot be had: {reason[:300]}; install what it needs (the extra "
            "gpu or tpu, a newer driver), or unset JAX_PLATFORMS"
        )
    return None


def check_spelling(arguments: Iterable[str]) -> None:
    """Raises ConfigError for a name that would not reach the disk as it was given."""
    told = [f"{name}={os.environ.get(name, '')}" for name in PLACES]
    for text in (*arguments, os.getcwd(), *told):
        if is_misspelt(text):
            raise ConfigError(misspelt(text))


def is_misspelt(text: str) -> bool:
    """Whether the locale could not read it, or TensorStore would write it as another name.

    Python keeps bytes that it cannot read as surrogates. TensorStore takes every name as UTF-8.
    """
    unread = any("\ud800" <= character <= "\udfff" for character in text)
    return unread or (sys.getfilesystemencoding() != "utf-8" and not text.isascii())


def misspelt(text: str) -> str:
    encoding = sys.getfilesystemencoding()
    cure = "name it in UTF-8" if encoding == "utf-8" else "set LC_ALL=C.UTF-8"
    return f"{text!a} cannot be spelled in this locale ({encoding}): {cure}, or use another name"


def hear_devices(handler: logging.Handler) -> None:
    """Lets JAX tell why it does without a GPU or a TPU that may be there, in a line each time."""
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addHandler(handler)
    logger.addFilter(shorten)
    logger.setLevel(logging.WARNING)  # for absl has silenced all others
    logger.propagate = False


def shorten(record: logging.LogRecord) -> bool:
    """A filter that keeps every record, and of an error in it the message alone."""
    if record.exc_info and record.exc_info[1]:
        record.msg = f"{record.getMessage()}: {record.exc_info[1]}"
        record.args, record.exc_info = (), None
    record.msg = " ".join(str(record.msg).split())
    return True
