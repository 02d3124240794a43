"""Several processes that train as one: how they meet, agree, and leave the talking to the first.

Each runs the same program over the devices of all of them. What only one may do (the log, the
checkpoints, the pictures) process 0 does, and its result or its failure is told to the others: no
file system need be shared.
"""

import json
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_resnet import errors
from flax_resnet.errors import ConfigError, UserError
from flax_resnet.parallel import launcher
from flax_resnet.parallel.launcher import FLAGS, Place
from flax_resnet.parallel.meeting import Patience, meet

PATIENCE = Patience()
SECONDS_TO_NOTICE = 20  # that a process sends no sign of life any more: JAX's are 100
SECONDS_TO_LEAVE = 10  # after the last collective act, which all have been through


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Meets the other processes, if there are any; to be called before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0, num_processes, process_id: all three, or none where
            the surroundings tell: a TPU VM, Slurm, Open MPI. Elsewhere none means one process.

    Raises:
        ConfigError: some are missing or break a rule, or the processes do not meet.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(f"{FLAGS} go together; missing: {', '.join(missing)}")
    if missing:
        place = launcher.find(os.environ)
    else:
        place = Place(coordinator or "", num_processes or 0, process_id or 0)
    if place is None and not is_tpu_vm(os.environ):
        return
    if place is not None:
        check(*place[:3])
        meet(place, PATIENCE)
    try:
        jax.distributed.initialize(
            place.coordinator if place else None,
            place.num_processes if place else None,
            place.process_id if place else None,
            place.devices if place else None,
            # JAX's own detection would take one of the GPUs; flags say nothing of devices.
            cluster_detection_method="deactivate" if place else None,
            initialization_timeout=int(PATIENCE.to_meet),
            heartbeat_timeout_seconds=SECONDS_TO_NOTICE,
            shutdown_timeout_seconds=SECONDS_TO_LEAVE,
        )
    except (RuntimeError, ValueError, OSError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"the processes cannot meet: {reason}") from e
    if not is_first():
        logging.getLogger("flax_resnet").setLevel(logging.WARNING)


def is_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Where JAX asks the machine itself; a host alone is several of one, which is fine."""
    return "TPU_ML_PLATFORM" in environment and environment.get("JAX_PLATFORMS") != "cpu"


def check(coordinator: str, num_processes: int, process_id: int) -> None:
    """Raises ConfigError for an address that is none, or a number out of range."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if num_processes < 1:
        raise ConfigError(f"--num_processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id must be 0 to {num_processes - 1} (--num_processes less 1), "
            f"got {process_id}"
        )


def leave(code: int) -> NoReturn:
    """Exits after an error, which the others may not know of: without waiting for them.

    The first stays a little, as they end at once, with less to say, when they lose it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    if is_first():
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that logs and saves."""
    return jax.process_index() == 0


def check_equal_shares() -> None:
    """Raises ConfigError, in every process, unless all have the same number of devices."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        numbers = ", ".join(str(counts[i]) for i in sorted(counts))
        raise ConfigError(f"every process must have as many devices as the others, got {numbers}")


def check_same(what: str, value: Any) -> None:
    """Raises ConfigError, in every process, unless all give the same JSON value."""
    if jax.process_count() == 1:
        return
    others = json.loads(_broadcast(json.dumps(value)))
    same = multihost_utils.process_allgather(np.array(others == value))
    if not same.all():
        different = ", ".join(map(str, np.flatnonzero(~same)))
        raise ConfigError(
            f"every process must have the same {what}; process 0's is not that of {different}"
        )


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` returned in process 0 (JSON), in every process; only process 0 runs it.

    Raises:
        Exception: it failed, in every process: in process 0 what it raised, in the others an error
            of the same kind, or a RuntimeError where the kind is none of ours nor the system's.
    """
    if jax.process_count() == 1:
        return function()
    error: Exception | None = None
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"result": function()}
        # Whatever it is: the others wait for an answer.
        except Exception as e:
            error, answer = e, {"failure": failure(e)}
    answer = json.loads(_broadcast(json.dumps(answer)))
    if error is not None:
        raise error
    if "failure" in answer:
        raise error_of(**answer["failure"])
    return answer["result"]


def failure(error: Exception) -> dict[str, Any]:
    """What the other processes are told of an error, as JSON."""
    number = error.errno if isinstance(error, OSError) else None
    message = str(error).removeprefix(f"[Errno {number}] ")
    return {"kind": type(error).__name__, "message": message, "number": number}


def error_of(kind: str, message: str, number: int | None) -> Exception:
    """The error of which `failure` told: one of ours, or the system's, known by its number."""
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, UserError):
        return ours(f"process 0: {message}")
    if number is not None:
        return OSError(number, f"process 0: {message}")
    return RuntimeError(f"process 0: {kind}: {message}")


def from_first(tree: Any) -> Any:
    """Process 0's numbers in every process, as host arrays; `tree` gives shapes and types."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def _broadcast(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = data[:size]
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


class Agreement:
    """The largest number that any process was told, known to all at the same call.

    It travels like the training step itself, from device to device, and is read `delay` calls
    later, so that nobody waits for it. One process alone agrees with itself at once.
    """

    def __init__(self, mesh: Mesh, delay: int):
        self.sharding = NamedSharding(mesh, P(mesh.axis_names))
        self.largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
        self.delay = delay
        self.pending: deque[jax.Array] = deque()

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        shape = (self.sharding.mesh.size,)
        told = jax.make_array_from_callback(
            shape, self.sharding, lambda index: np.full(shape, number, np.int32)[index]
        )
        self.pending.append(self.largest(told))
        if len(self.pending) <= self.delay:
            return 0
        return int(self.pending.popleft())
