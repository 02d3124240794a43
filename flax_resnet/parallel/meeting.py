"""Processes call the roll before JAX connects them, so that whoever is missing or wrong is named.

JAX itself ends a process that meets nobody by an abort, and one that cannot have its port by a
segmentation fault. Here process 0 listens where JAX's own service is to listen next. Every process,
the first too, connects there, says in a line which it is, and is told in a line, once all are
there, that they can begin or why they cannot.
"""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from flax_resnet.errors import ConfigError
from flax_resnet.parallel.launcher import Place

SECONDS_TO_ANSWER = 5  # between connecting and saying who one is
SECONDS_BETWEEN = 0.2  # attempts to connect
LONGEST_LINE = 4096  # bytes


class Patience(NamedTuple):
    """For how many seconds a process tries."""

    to_meet: float = 300.0  # the others, which may start later
    to_find: float = 30.0  # the coordinator's name, and process 0 there rather than something else


class StrangerError(ConnectionError):
    """What answers is no process of ours."""


def meet(place: Place, patience: Patience) -> None:
    """Returns, in every process, once all are there.

    Raises:
        ConfigError: some process is missing, two of them disagree, or the port is taken.
    """
    if place.process_id:
        attend(place, patience)
        return
    with listen(place) as listener, ThreadPoolExecutor(1) as executor:
        # JAX connects from process 0, too, to the coordinator's address.
        own = executor.submit(attend, place, patience)
        gather(listener, place, patience, own)
    own.result()


def attend(place: Place, patience: Patience) -> None:
    """Tells process 0 that this process is there, and waits until all are."""
    start = time.monotonic()
    while True:
        seconds = patience.to_meet if place.process_id else patience.to_find
        try:
            verdict = ask(place, patience.to_meet + SECONDS_TO_ANSWER)
            break
        except socket.gaierror as e:
            reason, seconds = f"no such host: {e.strerror}", patience.to_find
        except StrangerError as e:
            reason, seconds = str(e), patience.to_find
        except OSError as e:
            reason = e.strerror or str(e)
        if time.monotonic() - start >= seconds:
            where = f"at {place.coordinator} within {seconds:g} s ({reason})"
            if place.process_id:
                raise ConfigError(f"no process 0 {where}; start it there, or correct --coordinator")
            raise ConfigError(
                f"process 0 does not find itself {where}; --coordinator must name its machine"
            )
        time.sleep(SECONDS_BETWEEN)
    if verdict:
        raise ConfigError(verdict)


def ask(place: Place, seconds: float) -> str:
    """Process 0's verdict: why the processes cannot begin, or nothing.

    Args:
        seconds: to wait for it.

    Raises:
        OSError: there is no process 0.
    """
    host, _, port = place.coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    with socket.create_connection(address, timeout=SECONDS_TO_ANSWER) as connection:
        say(connection, {"process_id": place.process_id, "num_processes": place.num_processes})
        connection.settimeout(seconds)
        verdict = hear(connection).get("verdict")
    if not isinstance(verdict, str):
        raise StrangerError("something else answers")
    return verdict


def gather(listener: socket.socket, place: Place, patience: Patience, own: Future[None]) -> None:
    """Receives all processes and tells them the verdict, until this one has heard it, too."""
    present: dict[int, socket.socket] = {}
    waiting: list[socket.socket] = []
    verdict, deadline = "", time.monotonic() + patience.to_meet
    with contextlib.ExitStack() as connections:
        while True:
            if own.done() and own.exception() and not verdict:  # it could not connect
                verdict = str(own.exception())
            elif len(present) < place.num_processes and time.monotonic() >= deadline:
                verdict = verdict or absent(place, present, patience)
            if verdict or len(present) == place.num_processes:
                for connection in waiting:
                    with contextlib.suppress(OSError):
                        say(connection, {"verdict": verdict})
                waiting.clear()
                if own.done():
                    return
            with contextlib.suppress(OSError):
                connection = connections.enter_context(listener.accept()[0])
                connection.settimeout(SECONDS_TO_ANSWER)
                match hear(connection):
                    case {"process_id": int(number), "num_processes": int(count)}:
                        waiting.append(connection)
                        verdict = verdict or disagreement(place, present, number, count)
                        present[number] = connection


def absent(place: Place, present: dict[int, socket.socket], patience: Patience) -> str:
    missing = sorted(set(range(place.num_processes)) - present.keys())
    return (
        f"{len(present)} of {place.num_processes} processes met at {place.coordinator} within "
        f"{patience.to_meet:g} s; missing: --process_id {', '.join(map(str, missing))}"
    )


def disagreement(place: Place, present: dict[int, socket.socket], number: int, count: int) -> str:
    """Why a process that says `number` of `count` cannot be one of these; nothing if it can."""
    if count != place.num_processes:
        return (
            f"--num_processes must be the same in every process, got {place.num_processes} in "
            f"process 0 and {count} in process {number}"
        )
    if number in present and is_there(present[number]):
        return f"--process_id must differ in every process, got {number} twice"
    return ""


def is_there(connection: socket.socket) -> bool:
    """Whether the other end still waits. It may have been killed and started again."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(SECONDS_TO_ANSWER)


def listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=dual, backlog=place.num_processes + 8
        )
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else str(e)
        raise ConfigError(
            f"port {port} of this machine cannot be had ({reason}); give another one to every "
            "process, in --coordinator or in JAX_COORDINATOR_PORT"
        ) from e
    listener.settimeout(SECONDS_BETWEEN)
    return listener


def say(connection: socket.socket, what: dict[str, Any]) -> None:
    connection.sendall(json.dumps(what).encode() + b"\n")


def hear(connection: socket.socket) -> dict[str, Any]:
    """One line; an empty dictionary if it is none of ours. Raises OSError."""
    with connection.makefile("rb") as file:
        line = file.readline(LONGEST_LINE)
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
