"""A run whose work directory is a URL: it trains in a local copy, and the bucket follows.

At the start the copy is filled from the bucket, if that has a newer checkpoint. While the run goes
on, a thread looks for new checkpoints and uploads what is new; training does not wait for it. When
it ends, or is told to stop, the run waits until everything is there.
"""

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flax_resnet import places
from flax_resnet.config import INCIDENTAL, SCHEDULE
from flax_resnet.errors import CheckpointError, UserError
from flax_resnet.parallel import processes
from flax_resnet.places import HUB, Url
from flax_resnet.training import bucket
from flax_resnet.training.bucket import Bucket, Files, sha256, steps_of
from flax_resnet.training.checkpoint import one_line
from flax_resnet.training.lease import Lease, patience
from flax_resnet.training.signals import Stopped, stop_signal
from flax_resnet.training.workdir import difference, read_config
from flax_resnet.weights import files as weights
from flax_resnet.weights import hub

log = logging.getLogger(__name__)

Listing = dict[str, set[str]]  # names of the files of each checkpoint, by its step

POLL_SECONDS = 1.0
LONGEST_PAUSE = 60.0  # between two tries, in seconds


@contextlib.contextmanager
def mirrored(place: Path | Url, local: Path | None = None) -> Iterator[Path]:
    """The directory to train in: `place` itself, or a local copy that its bucket follows.

    Of several processes the first does it; the others wait for it here and at the end.

    Args:
        local: where the copy lies; default: `local_copy`.

    Raises:
        ConfigError: the store's driver is not installed.
        CheckpointError: another run writes there, the store cannot be used, what lies there is
            damaged; or, at the end, the last upload failed.
    """
    if isinstance(place, Path):
        yield place
        return
    mirror = Mirror(place, local or local_copy(place))
    processes.on_first(mirror.begin)
    try:
        yield mirror.workdir
    except SystemExit:  # a signal, of which all processes know; the next one acts at once
        processes.on_first(mirror.end)
        raise
    except Exception:
        if processes.is_first():
            try:
                mirror.end()
            except CheckpointError as e:
                log.warning("%s", e)
        raise
    except KeyboardInterrupt:
        if processes.is_first():
            mirror.lease.drop()
        raise
    with stop_signal() as stop:
        processes.on_first(mirror.end)
        if stop.number:
            raise Stopped(stop.number, "after its last upload")


def local_copy(url: Url) -> Path:
    """Where a run whose work directory is a URL trains, unless it is told otherwise."""
    return places.cache_directory() / "runs" / f"{url.name}-{sha256(str(url).encode())[:12]}"


class Mirror:
    """Keeps a bucket like a work directory, from `begin` to `end`."""

    def __init__(self, url: Url, workdir: Path):
        self.url, self.workdir = url, workdir
        self.published: Files = {}
        self.failure: Exception | None = None
        self.closing = threading.Event()
        self.closed_at = 0.0
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def begin(self) -> None:
        with usable(self.url):
            self.bucket = Bucket(self.url)
            self.lease = Lease(self.bucket)
            self.lease.take()
            try:
                self.fill()
            except BaseException:
                self.lease.give_back()
                raise
        log.info("%s: trains in %s, and uploads every checkpoint", self.url, self.workdir)
        self.thread.start()

    def fill(self) -> None:
        """Makes the work directory the bucket's, where that has the newer checkpoint."""
        files = self.bucket.manifest()
        if files is None:
            files = self.bucket.listed()
            if not files:  # so that half of a first upload is not taken for a copy
                self.bucket.upload({}, {})
        theirs, ours = steps_of(files), sorted(self.listing(), key=int)
        if theirs and (not ours or int(theirs[-1]) > int(ours[-1])):
            self.bucket.download(self.workdir, files)
            whole = [x for x in theirs if self.bucket.download_step(self.workdir, files, x)]
            if not whole and not ours:
                raise CheckpointError(
                    f"no checkpoint in {self.url} is whole (tried steps {', '.join(theirs)}); "
                    "restore a copy, or remove it to start again"
                )
            log.info("%s: filled from %s, step %s", self.workdir, self.url, (whole or ours)[-1])
        elif theirs:
            self.check_same_run()
        elif ours:
            log.info("%s holds no checkpoint yet; that of %s goes up", self.url, self.workdir)
        there = set(self.bucket.names())
        self.published = {name: sha for name, sha in files.items() if sha and name in there}

    def check_same_run(self) -> None:
        """Raises CheckpointError if the bucket and the work directory hold different runs."""
        data = self.bucket.read("config.json")
        if data is None or not (self.workdir / "config.json").exists():
            return
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "config.json").write_bytes(data)
            theirs = read_config(Path(temporary)).to_dict()
        changes = difference(theirs, read_config(self.workdir).to_dict())
        told = [
            f"{name}: {a} there, {b} here"
            for name, (a, b) in changes.items()
            if name not in (*INCIDENTAL, *SCHEDULE)
        ]
        if told:
            raise CheckpointError(
                f"{self.workdir}, the local copy, holds another run than {self.url} "
                f"({', '.join(told)}); remove the copy, or choose another --workdir"
            )

    def follow(self) -> None:
        """What the thread does: uploads what is new, until `closing`, and then once more."""
        before: Listing = {}
        failures = 0
        while not self.lease.over.is_set():
            closing = self.closing.is_set()
            listing = self.listing()
            try:
                if closing or not listing.keys() <= set(steps_of(self.published)):
                    self.publish(listing, listing if closing else before)
                if failures:
                    log.info("%s: the upload goes on", self.url)
                self.failure, failures = None, 0
            # Drivers raise anything.
            except Exception as e:
                self.failure = e
                failures += 1
                if isinstance(e, UserError):  # the lease is lost
                    log.warning("%s; nothing more is uploaded", e)
                    return
                if closing and self.is_final(e):
                    return
                if failures.bit_count() == 1:  # the first, second, fourth, eighth, ...
                    log.warning("%s: no upload (%s); it is tried again", self.url, one_line(e))
                pause = min(2.0 ** (failures - 1), LONGEST_PAUSE)
                if closing:
                    time.sleep(min(pause, 5.0))
                else:
                    self.closing.wait(pause)
                continue
            before = listing
            if closing:
                return
            self.closing.wait(POLL_SECONDS)

    def is_final(self, error: Exception) -> bool:
        """Whether no further try is to be made before the end."""
        is_refusal = isinstance(error, PermissionError | FileNotFoundError)
        return is_refusal or time.monotonic() > self.closed_at + patience()

    def publish(self, listing: Listing, before: Listing) -> None:
        """Uploads what is new.

        Args:
            listing: of the checkpoints that there are.
            before: of a while ago. Of old checkpoints only those count that have not changed since:
                one that is about to be deleted loses file after file. The two newest are kept.
        """
        self.lease.check()
        contents: dict[str, bytes] = {}
        files: Files = {}

        def add(found: dict[str, bytes]) -> None:
            for name, data in found.items():
                files[name] = sha256(data)
                if self.published.get(name) != files[name]:
                    contents[name] = data

        newest = sorted(listing, key=int)[-2:]
        for step, names in listing.items():
            if step in newest or before.get(step) == names:
                add(self.read_step(step, names))
        if steps_of(files):
            add(self.read_rest())
            if files != self.published:
                self.bucket.upload(files, contents)
                self.published = files

    def listing(self) -> Listing:
        found: Listing = {}
        # os.walk passes over what is deleted meanwhile.
        for folder, _, names in os.walk(self.workdir / "checkpoints"):
            paths = (Path(folder, name).relative_to(self.workdir).as_posix() for name in names)
            for path in filter(bucket.step_of, paths):
                found.setdefault(bucket.step_of(path), set()).add(path)
        return found

    def read_step(self, step: str, names: set[str]) -> dict[str, bytes]:
        """The files of a checkpoint; none if it is deleted meanwhile."""
        try:
            found = {name: (self.workdir / name).read_bytes() for name in sorted(names)}
        except FileNotFoundError:
            return {}
        return found if self.listing().get(step) == names else {}

    def read_rest(self) -> dict[str, bytes]:
        events = (self.workdir / "tensorboard").glob("*")
        found: dict[str, bytes] = {}
        for name in (*bucket.FILES, *(f"tensorboard/{path.name}" for path in events)):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                found[name] = (self.workdir / name).read_bytes()
        return found

    def end(self) -> None:
        """Waits for the last upload.

        Raises:
            CheckpointError: it failed, or the store does not answer any more.
        """
        self.closed_at = time.monotonic()
        self.closing.set()
        self.thread.join(POLL_SECONDS)
        if self.thread.is_alive():
            log.info("%s: waiting for the last upload", self.url)
        while self.thread.is_alive() and not self.is_stuck():
            self.thread.join(0.2)
        self.lease.give_back()
        if self.thread.is_alive() or self.failure:
            reason = one_line(self.failure) if self.failure else "the store does not answer"
            raise CheckpointError(
                f"{self.url} lacks what is new ({reason}); {self.workdir} is complete: start the "
                "same command again on this machine, and it uploads that"
            )
        steps = steps_of(self.published)
        if steps:
            log.info("%s: step %s is there", self.url, steps[-1])

    def is_stuck(self) -> bool:
        """Whether nothing has gone up for a long time."""
        return time.monotonic() > max(self.closed_at, self.bucket.sent_at) + patience()


def fetch(place: Path | Url, *, checkpoints: bool = True) -> Path:
    """A local path of what `place` names; of a bucket's a copy, removed when this process ends.

    Args:
        place: a run (its newest whole checkpoint is fetched), RUN/checkpoints/STEP, a file of
            weights, or a model on the Hub, which stays in the Hub's own cache.
        checkpoints: whether any are fetched.

    Raises:
        WeightsError: the Hub has no such model, or cannot be reached.
        ConfigError: the store's driver is not installed.
        CheckpointError: it cannot be reached, or there is no such thing, or it is damaged.
    """
    if isinstance(place, Path):
        return place
    if place.scheme == HUB:
        return hub.fetch(str(place))
    temporary = Path(tempfile.mkdtemp(prefix="flax-resnet-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    with usable(place):
        if Path(place.name).suffix in weights.SUFFIXES:
            data = Bucket(place.parent).read(place.name)
            if data is None:
                raise CheckpointError(f"there is no {place}")
            bucket.write(temporary / place.name, data)
            return temporary / place.name
        is_step = place.parent.name == "checkpoints"
        root = place.parent.parent if is_step else place
        fetch_run(Bucket(root), temporary / root.name, place.name if is_step else "", checkpoints)
        tail = ("checkpoints", place.name) if is_step else ()
        return temporary.joinpath(root.name, *tail)


def fetch_run(source: Bucket, directory: Path, which: str, checkpoints: bool) -> None:
    """Fetches a run.

    Args:
        which: the step of a checkpoint; empty: the newest that is whole; else all, for a name
            such as "best".
    """
    for _ in range(3):  # the run may go on meanwhile, and remove what it has listed
        files = source.manifest()
        files = source.listed() if files is None else files
        if "config.json" not in files:
            raise CheckpointError(f"{source.url} is no work directory: it has no config.json")
        steps = steps_of(files)[::-1]
        if which.isdecimal() and which not in steps:
            raise CheckpointError(
                f"{source.url} has no checkpoint of step {which}, only {', '.join(steps)}"
            )
        source.download(directory, files)
        for step in steps if checkpoints else ():
            if which in ("", step) or not which.isdecimal():
                is_whole = source.download_step(directory, files, step)
                if is_whole and not which:
                    break
        if not checkpoints or (directory / "checkpoints").exists() or not steps:
            return
        if source.manifest() == files:
            break
    raise CheckpointError(f"no checkpoint in {source.url} is whole; restore a copy")


@contextlib.contextmanager
def usable(url: Url) -> Iterator[None]:
    """Turns all that a driver raises into one CheckpointError."""
    try:
        yield
    except UserError:
        raise
    # Drivers raise anything.
    except Exception as e:
        raise CheckpointError(f"{url} cannot be used: {one_line(e)}") from e
