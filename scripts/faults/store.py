"""A bucket's store is gone, or a run dies while half of an upload is there, or two runs share it.

The store is a real server in a process of its own (store_server.py). Runs reach it by a door, which
can be shut, and which can stop what passes after so many requests that write.
"""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from faults.fault import Result, Unavailable
from faults.run import STEPS, Run, newest, numbers, uninterrupted
from faults.store_server import BUCKET, HOST
from flax_resnet.errors import CheckpointError
from flax_resnet.places import Url
from flax_resnet.training import mirror
from flax_resnet.training.bucket import Bucket, steps_of

SERVER = Path(__file__).with_name("store_server.py")
NEEDED = {"s3": ("s3fs", "moto", "flask", "flask_cors"), "gs": ("gcsfs", "gcp_storage_emulator")}
SCHEMES = ("s3", "gs")
GONE_SECONDS = 60
WRITE = re.compile(rb"(PUT|POST|DELETE) ")


class Store:
    """A store's server with a door before it; a context manager.

    Within it this process and those that it starts find the store there, and look nowhere else.

    Raises:
        Unavailable: a package is not installed.
    """

    def __init__(self, scheme: str):
        missing = [name for name in NEEDED[scheme] if importlib.util.find_spec(name) is None]
        if missing:
            raise Unavailable(f"no {', '.join(missing)}: pip install 'flax-resnet[stores]'")
        self.scheme = scheme
        self.server_port, self.port = free_port(), free_port()
        self.held = threading.Event()
        self.writes_left: int | None = None  # that still pass; None: all
        self.open_sockets: list[socket.socket] = []
        self.listener: socket.socket | None = None

        address = f"http://{HOST}:{self.port}"
        environment = {
            "s3": {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "nobody",
                "AWS_SECRET_ACCESS_KEY": "nothing",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
            "gs": {
                "STORAGE_EMULATOR_HOST": address,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for credentials
                "NO_GCE_CHECK": "true",
            },
        }
        self.environment = mock.patch.dict(os.environ, environment[scheme])

    def url(self, name: str) -> Url:
        return Url(self.scheme, f"{BUCKET}/{name}")

    def __enter__(self) -> "Store":
        self.environment.start()
        command = [sys.executable, str(SERVER), self.scheme, str(self.server_port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no server of {self.scheme} on port {self.server_port}")
            time.sleep(0.05)
        self.unlock()
        if self.scheme == "s3":
            request = urllib.request.Request(f"http://{HOST}:{self.port}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request).close()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shut()
        self.process.kill()
        self.process.wait()
        self.environment.stop()

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self.server_port)).close()
            return True
        return False

    def unlock(self) -> None:
        """Opens the door."""
        self.writes_left = None
        self.held.clear()
        self.listener = socket.create_server((HOST, self.port), backlog=64)
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        """Shuts the door: who is within is thrown out, who knocks is refused."""
        if self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
        for one in self.open_sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open_sockets.clear()

    def hold_after(self, writes: int) -> None:
        """Lets so many writing requests pass, and then nothing; `held` is set then."""
        self.writes_left = writes

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the door is shut
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((HOST, self.server_port))
                self.open_sockets += [client, server]
                for source, target, writes in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self.pump, args=(source, target, writes), daemon=True
                    ).start()

    def pump(self, source: socket.socket, target: socket.socket, writes: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if writes and self.writes_left is not None and WRITE.match(data):
                    self.writes_left -= 1
                    if self.writes_left < 0:
                        self.held.set()
                if self.held.is_set():
                    continue
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def finish_from(store: Store, at: Path, directory: Path, **env: str) -> Result:
    """Ends the run of a bucket in `directory`; all numbers must be the uninterrupted run's."""
    name = "run"
    there = steps_there(store)
    step = max([*there, newest(directory)], default=0)
    run = Run(at, directory, url=store.url(name), **env)
    code = run.wait()
    if code != 0 or not (not step or run.said(f"from step {step}") or run.said("nothing to do")):
        return Result(False, f"it should go on from step {step}: {run}")
    if numbers(directory) != numbers(uninterrupted(at)):
        return Result(False, "it ends with other numbers")
    if STEPS not in steps_there(store):
        return Result(False, f"in the bucket are steps {steps_there(store)}")
    return Result(True, f"went on from step {step}")


def steps_there(store: Store) -> list[int]:
    """Of the checkpoints that the bucket's manifest names."""
    return [int(step) for step in steps_of(Bucket(store.url("run")).manifest() or {})]


def bucket_kill(runs: int, at: Path) -> Iterator[Result]:
    """Kills a run after so many requests that write; it goes on there, or on another machine."""
    uninterrupted(at)
    rng = random.Random(2)
    for i in range(runs):
        with Store(SCHEMES[i % 2]) as store:
            first, second = at / f"uploads{i}", at / f"elsewhere{i}"
            writes = rng.randint(3, 60)
            store.hold_after(writes)
            run = Run(at, first, url=store.url("run"))
            run.until(lambda _, store=store: store.held.is_set())
            run.process.kill()
            run.wait()
            store.shut()
            store.unlock()
            there = steps_there(store)
            if i % 4 < 2:
                shutil.rmtree(first, ignore_errors=True)
                end = finish_from(store, at, second)
            else:
                end = finish_from(store, at, first)
            detail = f"{store.scheme}, held after {writes} writes, there {there}, {end.detail}"
            yield Result(end.held and store_is_whole(store, at), detail)


def store_is_whole(store: Store, at: Path) -> bool:
    """Whether what can be fetched is the uninterrupted run's last state."""
    return numbers(mirror.fetch(store.url("run"))) == numbers(uninterrupted(at))


def bucket_gone(runs: int, at: Path) -> Iterator[Result]:
    """The store is unreachable for a while; every other time until the run has given it up."""
    uninterrupted(at)
    for i in range(runs):
        with Store(SCHEMES[i % 2]) as store:
            directory, for_good = at / f"gone{i}", i % 2 == 1
            env = {"FLAX_RESNET_STORE_SECONDS": "5"} if for_good else {}
            run = Run(at, directory, url=store.url("run"), **env)
            run.until(newest)
            store.shut()
            start = time.monotonic()
            trained = run.until_logged(STEPS)
            while not for_good and time.monotonic() < start + GONE_SECONDS:
                time.sleep(0.1)
            if for_good:
                run.wait()
                told = run.is_refused and run.said("is complete: start the same command again")
            store.unlock()
            if not for_good:
                run.wait()
                told = run.said("no upload") and run.said("the upload goes on")
                told = told and run.process.returncode == 0
            held, detail = trained and told, f"{store.scheme}: {run}"
            if held and for_good:
                end = finish_from(store, at, directory)
                held, detail = end.held, f"{detail}; then {end}"
            yield Result(held and store_is_whole(store, at), detail)


def bucket_two_runs(runs: int, at: Path) -> Iterator[Result]:
    """A second run on the same URL; then the first is killed, at times on "another machine"."""
    uninterrupted(at)
    for i in range(runs):
        with Store(SCHEMES[i % 2]) as store:
            first = Run(at, at / f"one{i}", url=store.url("run"))
            first.until(lambda directory: (directory / "config.json").exists())
            os.kill(first.process.pid, signal.SIGSTOP)  # else it would end before the second came
            second = Run(at, at / f"other{i}", url=store.url("run"))
            second.wait()
            held = second.is_refused and second.said("is in use by another run")
            first.send(signal.SIGKILL)
            if i % 2 == 1:
                move_elsewhere(store)
            end = finish_from(store, at, at / f"other{i}")
            yield Result(held and end.held, f"{store.scheme}, second: {second}; then {end.detail}")


def move_elsewhere(store: Store) -> None:
    """Has the last lease say that its run was on another machine, and that it is valid for 5 s."""
    bucket = Bucket(store.url("run"))
    name = bucket.names("lock")[-1]
    terms = json.loads(bucket.read(name) or b"") | {"machine": "another", "seconds": 5}
    bucket.write(name, json.dumps(terms).encode())


def bucket_damage(runs: int, at: Path) -> Iterator[Result]:
    """An object of the newest checkpoint is lost or cut off; then one of the other, too."""
    rng = random.Random(3)
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(Store(scheme)) for scheme in SCHEMES]
        for i in range(runs):
            yield damage(stores[i % 2], uninterrupted(at), i % 4 < 2, rng)


def damage(store: Store, workdir: Path, is_lost: bool, rng: random.Random) -> Result:
    bucket = Bucket(store.url("run"))
    for name in bucket.names():
        bucket.remove(name)
    copied = mirror.Mirror(store.url("run"), workdir)
    copied.begin()
    copied.end()
    older, newer = sorted(steps_there(store))
    for step, left in ((newer, older), (older, None)):
        contents = {name: bucket.read(name) or b"" for name in bucket.names(f"checkpoints/{step}")}
        name = rng.choice([name for name in contents if contents[name]])
        if is_lost:
            bucket.remove(name)
        else:
            bucket.write(name, contents[name][:-1])
        try:
            found = newest(mirror.fetch(store.url("run")))
        except CheckpointError as e:
            found = None if "is whole" in str(e) else -1
        if found != left:
            return Result(False, f"{store.scheme}: with damage to {name}, {found} was used")
    return Result(True, f"{store.scheme}, {'lost' if is_lost else 'cut off'}: {name}")
