"""Which of several processes this one is, by what started them: Slurm's srun or MPI's mpirun.

JAX can find that out by itself, but takes some of the variables for granted and says of none that
it is missing.
"""

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

from flax_resnet.errors import ConfigError

Environment = Mapping[str, str]

FLAGS = "--coordinator, --num_processes and --process_id"
FIRST_PORT, PORTS = 61_440, 4096  # where JAX itself chooses one by the job's number

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A process's place among those that train together."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    devices: list[int] | None = None  # GPUs of the machine that are its own; None: all it sees


def find(environment: Environment) -> Place | None:
    """The place that the surroundings give this process; None if it is alone.

    Raises:
        ConfigError: they are of several processes, but do not tell all that is needed.
    """
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        return slurm(environment)
    if (number(environment, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return open_mpi(environment)
    if (number(environment, "PMI_SIZE") or 1) > 1:
        raise ConfigError(
            f"one of {environment['PMI_SIZE']} processes (PMI_SIZE), and nothing tells where the "
            f"first is; give each {FLAGS}"
        )
    return None


def slurm(environment: Environment) -> Place | None:
    """Of a step of several tasks; the batch script itself, or a shell of salloc, is alone."""
    count = number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    rank = number(environment, "SLURM_PROCID")
    if count is None and rank == 0:
        log.warning("Slurm does not say how many tasks there are (SLURM_NTASKS): training alone")
    if (count or 1) == 1 and not rank:
        return None
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_LOCALID") if name not in environment]
    if count is None:
        missing.insert(0, "SLURM_NTASKS")
    if count is None or missing:
        raise ConfigError(
            f"task {rank} of several of Slurm, which does not tell {', '.join(missing)}; start it "
            f"by srun, or give each {FLAGS}"
        )
    # Two steps of a job may run at the same time.
    offset = (number(environment, "SLURM_JOB_ID") or 0) + (
        number(environment, "SLURM_STEP_ID") or 0
    )
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return Place(
        address(environment, host, offset),
        count,
        rank or 0,
        devices(environment, number(environment, "SLURM_LOCALID")),
    )


def open_mpi(environment: Environment) -> Place:
    """Process 0 is taken to be where mpirun is, as JAX does."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.fullmatch(r"(\d+)\.\d+;.*?tcp6?://\[?([^,;\]]+?)(?:[,\]].*|:\d+.*)", uri)
    rank = number(environment, "OMPI_COMM_WORLD_RANK")
    if match is None or rank is None:
        raise ConfigError(
            f"one of {environment['OMPI_COMM_WORLD_SIZE']} processes of mpirun, which does not "
            f"tell where the first is (OMPI_MCA_orte_hnp_uri); give each {FLAGS}"
        )
    return Place(
        address(environment, match[2], int(match[1]) // 4096),
        number(environment, "OMPI_COMM_WORLD_SIZE") or 1,
        rank,
        devices(environment, number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")),
    )


def address(environment: Environment, host: str, offset: int) -> str:
    """HOST:PORT, unless JAX's own variables say another."""
    port = environment.get("JAX_COORDINATOR_PORT") or FIRST_PORT + offset % PORTS
    return environment.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{port}"


def devices(environment: Environment, local_id: int | None) -> list[int] | None:
    """The GPU of its own number on the machine, or the only one that the launcher lets it see."""
    if local_id is None:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [0] if visible != [""] and len(visible) == 1 else [local_id]


def first_host(nodes: str) -> str:
    """Of Slurm's `n[01-03,7]-ib,m5` the first: n01-ib."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST must name the machines, got {nodes!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def number(environment: Environment, *names: str) -> int | None:
    """The first of the variables that is there. Raises ConfigError if it is no number."""
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        return None
    if not environment[name].isdecimal():
        raise ConfigError(f"{name} must be a number, got {environment[name]!r}")
    return int(environment[name])
