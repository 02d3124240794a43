"""A work directory in a bucket, gs:// or s3://, through fsspec.

Its objects have the names of the work directory's files. One more, mirror.json, says which of them
belong together. It is written last, in one piece, and what it no longer names is removed only then:
whoever reads by it sees an upload that came to its end, whatever interrupted the next one.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax_resnet.errors import CheckpointError, ConfigError
from flax_resnet.places import Url
from flax_resnet.training import wandb_log
from flax_resnet.training.workdir import OF_THE_END

log = logging.getLogger(__name__)

Files = dict[str, str]  # SHA-256 by name; empty where nobody has told it

MANIFEST = "mirror.json"
FILES = ("config.json", "data.json", "metrics.jsonl", wandb_log.STATE, *OF_THE_END)
EVENTS = re.compile(r"tensorboard/[^/]+")
CHECKPOINT = re.compile(r"checkpoints/(\d+)(/[^/]+)+")
DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # package, our extra
AT_ONCE = 8  # objects on their way


class Bucket:
    """The objects under a URL.

    Every method raises whatever the driver does when the store cannot be reached or refuses.

    Raises:
        ConfigError: the driver is not installed.
    """

    def __init__(self, url: Url):
        self.url = url
        self.system = file_system(url.scheme)
        self.sent_at = 0.0  # time.monotonic() when an upload last got an object there

    def read(self, name: str) -> bytes | None:
        """None if there is no such object."""
        try:
            return self.system.cat_file(f"{self.url.path}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Raises FileExistsError if it is to be `new` and is not."""
        mode = "create" if new else "overwrite"
        self.system.pipe_file(f"{self.url.path}/{name}", data, mode=mode)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.url.path}/{name}")

    def names(self, folder: str = "") -> list[str]:
        """Of all objects in it, however deep."""
        start = f"{self.url.path}/"
        found = self.system.find(f"{start}{folder}".rstrip("/"))
        return [name.lstrip("/").removeprefix(start) for name in found]

    def age(self, name: str) -> float:
        """Seconds since it was written, by the store's own clock."""
        now = f"{name}.now"
        self.write(now, b"")
        times = [self.system.modified(f"{self.url.path}/{x}") for x in (now, name)]
        self.remove(now)
        return (times[0] - times[1]).total_seconds()

    def manifest(self) -> Files | None:
        """What belongs together; None if nobody has said so.

        Raises CheckpointError if it is damaged.
        """
        data = self.read(MANIFEST)
        if data is None:
            return None
        try:
            files = json.loads(data)["files"]
            return {name: str(sha) for name, sha in files.items() if is_mirrored(name)}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(
                f"{self.url}/{MANIFEST} is damaged ({type(e).__name__}); remove it to have "
                f"everything that lies in {self.url} taken for whole"
            ) from e

    def listed(self) -> Files:
        """What there is, for a work directory that was copied there by other means."""
        return {name: "" for name in self.names() if is_mirrored(name)}

    def upload(self, files: Files, changed: Mapping[str, bytes]) -> None:
        """Makes the bucket hold `files`.

        Args:
            changed: the contents of those that are not there yet.
        """

        def send(name: str) -> None:
            self.write(name, changed[name])
            self.sent_at = time.monotonic()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for is_checkpoint in (False, True):
                names = [name for name in changed if bool(step_of(name)) == is_checkpoint]
                list(pool.map(send, names))
            tree = {"files": dict(sorted(files.items()))}
            self.write(MANIFEST, json.dumps(tree, indent=1).encode())
            left = [x for x in self.names() if (x in FILES or step_of(x)) and x not in files]
            list(pool.map(self.remove, left))

    def download(self, workdir: Path, files: Files) -> None:
        """Everything but the checkpoints; what `files` does not name is removed from `workdir`."""
        for name in {*FILES, *files}:
            if step_of(name):
                continue
            data = self.read(name) if name in files else None
            if data is not None:
                write(workdir / name, data)
            elif name in files:
                log.warning("%s/%s is gone; going on without it", self.url, name)
            if data is None and name in FILES:
                (workdir / name).unlink(missing_ok=True)

    def download_step(self, workdir: Path, files: Files, step: str) -> bool:
        """A checkpoint, whole or not at all; False, and a warning, if it is not whole."""
        target, temporary = workdir / "checkpoints" / step, workdir / f".{step}.tmp"
        if target.exists():
            return True
        shutil.rmtree(temporary, ignore_errors=True)
        names = sorted(name for name in files if step_of(name) == step)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, data in zip(names, pool.map(self.read, names), strict=True):
                if data is None or files[name] not in ("", sha256(data)):
                    log.warning(
                        "%s: checkpoint %s is not whole: %s is %s",
                        *(self.url, step, name, "gone" if data is None else "damaged"),
                    )
                    shutil.rmtree(temporary, ignore_errors=True)
                    return False
                write(temporary / Path(name).relative_to(f"checkpoints/{step}"), data)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        return True


def file_system(scheme: str) -> Any:
    """fsspec's. Raises ConfigError if its driver is not installed."""
    package, extra = DRIVERS[scheme]
    logging.getLogger(package).setLevel(logging.CRITICAL)  # what it raises is told here
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as e:
        raise ConfigError(
            f"{scheme}:// needs {package}: pip install 'flax-resnet[{extra}]' ({e})"
        ) from e


def is_mirrored(name: str) -> bool:
    """Whether a file of that name belongs to a work directory, and lies in it."""
    known = name in FILES or EVENTS.fullmatch(name) or CHECKPOINT.fullmatch(name)
    return bool(known) and not {".", ".."} & set(name.split("/"))


def step_of(name: str) -> str:
    """Of a checkpoint's file; empty for any other."""
    found = CHECKPOINT.fullmatch(name)
    return found[1] if found else ""


def steps_of(files: Iterable[str]) -> list[str]:
    """Of the checkpoints that files belong to, in order."""
    return sorted({step_of(name) for name in files} - {""}, key=int)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
