"""A lease of a bucket's folder: one run at a time writes there, and a dead one's does not last.

Leases are the objects lock/1, lock/2, ... The highest number holds, and a store makes a new object
for one of many who ask at once. The holder renews its lease again and again. It is over when it was
given back, when its process is gone and ran on this very machine, or when it was not renewed for as
many seconds as it says itself.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from flax_resnet.errors import CheckpointError, ConfigError
from flax_resnet.training.bucket import Bucket

log = logging.getLogger(__name__)

FOLDER = "lock"
SECONDS = "FLAX_RESNET_STORE_SECONDS"
RENEWALS = 9  # within the time that a lease lasts
ENDED: set[str] = set()  # owners of this process's leases that are no longer renewed


def patience() -> float:
    """Seconds without an answer after which a run, or a store, is taken for gone."""
    text = os.environ.get(SECONDS) or "180"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds < float("inf"):
        raise ConfigError(f"${SECONDS} must be at least 1, got {text!r}")
    return seconds


class Lease:
    """This process's lease of a bucket's folder."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        self.number = 0
        self.terms = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": started(os.getpid()),
            "machine": machine(),
            "seconds": patience(),
        }
        self.renewed = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)

    def take(self) -> None:
        """Waits for as long as another's lease may be that of a dead run.

        Raises:
            CheckpointError: another run holds it.
        """
        watched: tuple[int, dict[str, Any]] | None = None
        end = 0.0
        while True:
            found = number, other = self.latest()
            if watched is None or number != watched[0]:
                watched = found
                end = time.monotonic() + self.time_left(number, other)
                if is_alive(other):
                    raise self.refusal(other)
                if time.monotonic() < end:
                    log.info("%s; it may be dead: waiting for a sign", self.refusal(other))
            elif other != watched[1] and not other.get("over"):
                raise self.refusal(other)
            if (time.monotonic() >= end or other.get("over")) and self.make(number + 1):
                break
            time.sleep(self.terms["seconds"] / 90)
        self.thread.start()

    def latest(self) -> tuple[int, dict[str, Any]]:
        """The highest lease; number 0 if there is none."""
        number = max(self.numbers(), default=0)
        try:
            terms = json.loads(self.bucket.read(f"{FOLDER}/{number}") or b"{}")
        except ValueError:
            terms = {}
        return number, terms if isinstance(terms, dict) else {}

    def numbers(self) -> list[int]:
        names = [name.rpartition("/")[2] for name in self.bucket.names(FOLDER)]
        return [int(name) for name in names if name.isdecimal()]

    def time_left(self, number: int, other: dict[str, Any]) -> float:
        """Seconds after which it is over, unless it is renewed."""
        lasts = other.get("seconds")
        if other.get("over") or is_dead(other) or not isinstance(lasts, int | float):
            return 0.0
        return float(lasts) - self.bucket.age(f"{FOLDER}/{number}")

    def refusal(self, other: dict[str, Any]) -> CheckpointError:
        return CheckpointError(
            f"{self.bucket.url} is in use by another run (host {other.get('host')}, process "
            f"{other.get('process')}); wait for it, or choose another --workdir"
        )

    def make(self, number: int) -> bool:
        """Whether the lease of that number is now ours, and the highest."""
        self.number = number
        with contextlib.suppress(FileExistsError):  # or a first try of ours, whose answer was lost
            self.bucket.write(self.name, self.content(), new=True)
        if self.bucket.read(self.name) != self.content():
            return False
        numbers = self.numbers()
        for older in (x for x in numbers if x < number):
            self.bucket.remove(f"{FOLDER}/{older}")
        if max(numbers) > number:
            self.bucket.remove(self.name)
        return max(numbers) == number

    def check(self) -> None:
        """Raises CheckpointError if another run has taken it: this one was mute for too long."""
        number, other = self.latest()
        if number != self.number or other.get("owner") != self.terms["owner"]:
            raise CheckpointError(
                f"another run has taken {self.bucket.url} (host {other.get('host')}), since "
                f"this one gave no sign for {self.terms['seconds']:.0f} s"
            )

    def renew(self) -> None:
        while not self.over.wait(self.terms["seconds"] / RENEWALS):
            self.renewed += 1
            with contextlib.suppress(Exception):  # the store is away; whoever uploads says so
                self.bucket.write(self.name, self.content())

    def drop(self) -> None:
        """Lets it run out."""
        self.over.set()
        ENDED.add(self.terms["owner"])

    def give_back(self) -> None:
        self.drop()
        self.thread.join(self.terms["seconds"])
        with contextlib.suppress(Exception):  # then it lasts its seconds
            self.check()
            self.bucket.write(self.name, self.content())

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.number}"

    def content(self) -> bytes:
        state = {"renewed": self.renewed, "over": self.over.is_set()}
        return json.dumps(self.terms | state).encode()


def machine() -> str:
    """Of this boot, and of the container whose process numbers these are; empty if not known."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def started(process: int) -> str:
    """When it did, since numbers of processes come again; empty if it runs no more."""
    with contextlib.suppress(OSError):
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else numbers[18]
    return ""


def is_here(other: dict[str, Any]) -> bool:
    """Whether its process is or was on this machine, for sure."""
    return bool(machine()) and other.get("machine") == machine()


def is_alive(other: dict[str, Any]) -> bool:
    """Whether its process runs on this machine, for sure."""
    return is_here(other) and not is_dead(other) and not other.get("over")


def is_dead(other: dict[str, Any]) -> bool:
    """Whether its process ran on this machine and does no more, or has let it go."""
    is_gone = other.get("started") != started(other.get("process", 0))
    return other.get("owner") in ENDED or (is_here(other) and is_gone)
