"""Claim: several processes meet as they were started, or each says in a line why they cannot.

Threads take the place of processes, and environments that are written here that of Slurm's and
MPI's. The slow tests start real processes.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flax_resnet.errors import ConfigError
from flax_resnet.parallel import launcher, meeting, processes
from flax_resnet.parallel.launcher import Place
from flax_resnet.parallel.meeting import Patience

ROOT = Path(__file__).parent.parent

SLURM = {
    "SLURM_JOB_ID": "4101",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "n[07-09,12],m3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place("n07:61447", 4, 3, [1])),
        (without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), Place("n07:61445", 4, 3, [1])),
        (without(SLURM, "SLURM_NTASKS"), Place("n07:61447", 4, 3, [1])),
        # srun --gpus-per-task=1: the one that it sees has number 0, whatever the machine calls it.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Place("n07:61447", 4, 3, [0])),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,3"}, Place("n07:61447", 4, 3, [1])),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, Place("n07:99", 4, 3, [1])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1"}, Place("h:1", 4, 3, [1])),
        (MPI, Place("10.96.0.1:62624", 2, 1, [0])),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620:10d:3000:2]:43370"},
            Place("fe80::b9b:61441", 2, 1, [0]),
        ),
    ],
)
def test_a_place_is_what_the_launcher_tells(environment: dict[str, str], place: Place) -> None:
    assert launcher.find(environment) == place


@pytest.mark.parametrize(
    "environment",
    [
        {},  # a laptop waits for nobody
        {"SLURM_JOB_ID": "4101", "SLURM_NTASKS": "4"},  # the batch script itself
        {"SLURM_JOB_ID": "4101", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the same, newer
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # `srun --pty bash` in it
        without(SLURM, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"TPU_ML_PLATFORM": "JAX"},  # JAX asks the machine
    ],
)
def test_one_process_has_no_place_among_others(environment: dict[str, str]) -> None:
    assert launcher.find(environment) is None


def test_slurm_that_does_not_count_its_tasks_is_one_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    uncounted = without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") | {"SLURM_PROCID": "0"}
    assert launcher.find(uncounted) is None
    assert "(SLURM_NTASKS): training alone" in caplog.text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
            "task 3 of several of Slurm, which does not tell SLURM_NTASKS; start it by srun, or",
        ),
        (without(SLURM, "SLURM_JOB_ID"), "does not tell SLURM_JOB_ID; start it by srun, or give"),
        (
            without(SLURM, "SLURM_JOB_ID", "SLURM_LOCALID"),
            "does not tell SLURM_JOB_ID, SLURM_LOCALID; start it by srun, or give each --coord",
        ),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, "SLURM_STEP_NUM_TASKS must be a number, got"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID must be a number, got '-1'"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST must name the machines, got"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "one of 2 processes of mpirun, which does not"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "rubbish"}, "one of 2 processes of mpirun, which does"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, r"one of 2 processes \(PMI_SIZE\), and nothing tells"),
    ],
)
def test_a_launcher_that_tells_half_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        launcher.find(environment)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("gpu-[3,5].cluster,m1", "gpu-3.cluster"),
        ("r[1-2]n[04-06]", "r1n04"),
    ],
)
def test_the_first_machine_of_slurms_list(nodes: str, host: str) -> None:
    assert launcher.first_host(nodes) == host


def test_a_tpu_vm_is_joined_unless_it_is_to_compute_on_its_cpu() -> None:
    assert processes.is_tpu_vm({"TPU_ML_PLATFORM": "JAX"})
    assert not processes.is_tpu_vm({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"})
    assert not processes.is_tpu_vm({})


# Meeting. Each process is a thread.

SHORT = Patience(to_meet=0.6, to_find=0.3)
PATIENT = Patience(to_meet=60.0, to_find=60.0)


@pytest.fixture
def address() -> str:
    """On the loopback, with a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(*places: Place, patience: Patience = SHORT, between: float = 0) -> list[str]:
    """What each process says: nothing if they have met."""

    def one(place: Place) -> str:
        try:
            meeting.meet(place, patience)
        except ConfigError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(len(places)) as executor:
        told = []
        for place in places:
            told.append(executor.submit(one, place))
            time.sleep(between)
        return [future.result() for future in told]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_in_any_order(order: tuple[int, ...], address: str) -> None:
    said = meet(*(Place(address, 3, i) for i in order), patience=PATIENT, between=0.01)
    assert said == [""] * 3


def test_a_port_is_free_again_after_a_meeting(address: str) -> None:
    for _ in range(2):
        assert meet(Place(address, 2, 0), Place(address, 2, 1), patience=PATIENT) == [""] * 2


def test_those_that_are_missing_are_named_to_all(address: str) -> None:
    said = meet(Place(address, 4, 0), Place(address, 4, 2))
    assert (
        said == [f"2 of 4 processes met at {address} within 0.6 s; missing: --process_id 1, 3"] * 2
    )


def test_nobody_waits_for_a_first_process_for_ever(address: str) -> None:
    (said,) = meet(Place(address, 2, 1))
    assert said == (
        f"no process 0 at {address} within 0.6 s (Connection refused); start it there, or correct "
        "--coordinator"
    )


def test_two_of_one_number_are_refused(address: str) -> None:
    said = meet(*(Place(address, 3, i) for i in (0, 1, 1)), patience=PATIENT)
    assert said == ["--process_id must differ in every process, got 1 twice"] * 3


def test_another_number_of_processes_is_refused(address: str) -> None:
    said = meet(Place(address, 2, 0), Place(address, 3, 1), patience=PATIENT)
    rule = "--num_processes must be the same in every process, got 2 in process 0 and 3 in process"
    assert said == [f"{rule} 1"] * 2


def test_a_coordinator_that_nobody_knows_is_named(address: str) -> None:
    port = address.rpartition(":")[2]
    said = meet(*(Place(f"nosuch.invalid:{port}", 2, i) for i in range(2)))
    for line, beginning in zip(
        said, ["process 0 does not find itself", "no process 0"], strict=True
    ):
        assert line.startswith(f"{beginning} at nosuch.invalid:{port} within 0.3 s (no such host")


def test_what_process_0_cannot_do_is_told_to_the_others(address: str) -> None:
    port = address.rpartition(":")[2]
    said = meet(Place(f"nosuch.invalid:{port}", 2, 0), Place(address, 2, 1))
    assert said[0] == said[1]
    assert said[0].startswith("process 0 does not find itself at nosuch.invalid")


def test_a_coordinator_on_another_machine_than_process_0_is_named() -> None:
    (said,) = meet(Place("192.0.2.1:61440", 2, 0))  # an address for documentation: nobody has it
    assert said.startswith("process 0 does not find itself at 192.0.2.1:61440 within 0.3 s (")


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a server of something else."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_a_port_in_use_is_named(stranger: str) -> None:
    said = meet(Place(stranger, 2, 0))
    assert said[0].startswith(
        f"port {stranger.rpartition(':')[2]} of this machine cannot be had (Address already in use)"
    )


def test_something_else_in_the_place_of_process_0_is_named(stranger: str) -> None:
    said = meet(Place(stranger, 2, 1))
    assert said[0].startswith(f"no process 0 at {stranger} within 0.3 s (something else answers); ")


def call(address: str, said: bytes) -> None:
    """Says something to process 0, once it listens, and hangs up."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                return connection.sendall(said)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_strangers_and_the_dead_are_no_processes(address: str) -> None:
    """One asks for a web page, others say nothing of use, and process 1 was killed meanwhile."""
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(meet, Place(address, 3, 0), patience=PATIENT)
        for said in (b"GET / HTTP/1.1\r\n", b"[1]\n", b'{"process_id": "1"}\n', b"", b"\xff\n"):
            call(address, said)
        call(address, b'{"process_id": 1, "num_processes": 3}\n')
        assert meet(Place(address, 3, 1), Place(address, 3, 2), patience=PATIENT) == [""] * 2
        assert first.result() == [""]


# Real processes.

TRAIN = [
    sys.executable,
    str(ROOT / "scripts/train_flax.py"),
    f"--config={ROOT / 'configs/quickstart.py'}",
    "--config.train.steps=2",
    "--config.train.batch_size=8",
]


def start(home: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TRAIN, *flags],
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def finish(*running: subprocess.Popen[str]) -> list[tuple[int, list[str]]]:
    errors = [process.communicate(timeout=300)[1] for process in running]
    return [
        (process.returncode, [line for line in text.splitlines() if "[Gloo]" not in line])
        for process, text in zip(running, errors, strict=True)
    ]


@pytest.mark.slow
def test_two_tasks_of_slurm_train_as_one(tmp_path: Path, address: str) -> None:
    """By the variables that srun would set, on one machine."""
    step = SLURM | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": address.rpartition(":")[2]}
    ranks = [step | {"SLURM_PROCID": str(i)} for i in range(2)]
    ends = finish(*(start(tmp_path, **rank) for rank in ranks))
    assert [code for code, _ in ends] == [0, 0], ends
    assert (tmp_path / "runs/quickstart/summary.json").exists()
    assert ends[1][1] == []


@pytest.mark.slow
def test_a_port_in_use_ends_a_command_with_a_line(tmp_path: Path, stranger: str) -> None:
    flags = [f"--coordinator={stranger}", "--num_processes=2", "--process_id=0"]
    ((code, lines),) = finish(start(tmp_path, *flags))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: port ")
