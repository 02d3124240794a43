"""Many runs, a process each: one after another, or as many at a time as there are accelerators.

Several machines, or the tasks of a Slurm array, can each take a share of them.

A run's process trains what its work directory's config.json says, writes its log beside it, and
stops when this process does, however this one ends: its standard input is a pipe from here.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.parallel.launcher import number
from flax_resnet.studies.recipes import Job
from flax_resnet.training.metrics_log import read_metrics
from flax_resnet.training.signals import stop_signal
from flax_resnet.training.workdir import check_same

Environment = dict[str, str]

POLL_SECONDS = 0.5
PROBE = """
import jax, json
places = {(d.process_index, str(getattr(d, "coords", d.id))) for d in jax.local_devices()}
print(json.dumps([jax.default_backend(), len(places)]))
"""  # coords: of a TPU's chip, which may be two devices


class Running(NamedTuple):
    """A run under way."""

    job: Job
    process: subprocess.Popen[bytes]
    environment: Environment
    log: Path
    log_start: int  # where this session's lines begin


def accelerators() -> list[Environment]:
    """For each accelerator the environment in which a process sees it alone; [{}] without any.

    Asked in another process, since JAX would keep the devices for this one.
    """
    probe = subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, check=True)
    backend, count = json.loads(probe.stdout.splitlines()[-1])
    if backend == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [{"CUDA_VISIBLE_DEVICES": x} for x in (visible.split(",") if visible else "")] or [
            {"CUDA_VISIBLE_DEVICES": str(i)} for i in range(count)
        ]
    if backend == "tpu":
        one = dict.fromkeys(("TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"), "1,1,1")
        return [one | {"TPU_VISIBLE_CHIPS": str(i)} for i in range(count)]
    return [{}]


def array_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which share of how many falls to this task of a Slurm array; (0, 1) outside of one.

    Raises:
        ConfigError: the array's variables do not tell.
    """
    task = number(environment, "SLURM_ARRAY_TASK_ID")
    if task is None:
        return 0, 1
    count = number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = number(environment, "SLURM_ARRAY_TASK_MIN")
    step = number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    if count is None or first is None:
        raise ConfigError(
            f"task {task} of a Slurm array that does not tell SLURM_ARRAY_TASK_COUNT and "
            "SLURM_ARRAY_TASK_MIN; give --share=I/N"
        )
    index, rest = divmod(task - first, step)
    if rest or not 0 <= index < count:
        raise ConfigError(
            f"a Slurm array must be a range, such as --array=0-{count - 1}, got task {task} of "
            f"{count} from {first}; or give --share=I/N"
        )
    return index, count


def parse_share(text: str) -> tuple[int, int]:
    """`2/8`: the third of eight. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--share must be I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return int(match[1]), int(match[2])


def share(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """The jobs that fall to one of `count`, in their order.

    Every job falls to exactly one. The longest are dealt out first, each to whoever has least.
    """
    burdens = [0] * count
    owners: dict[str, int] = {}
    for job in sorted(jobs, key=work, reverse=True):
        owner = burdens.index(min(burdens))
        burdens[owner] += work(job)
        owners[job.name] = owner
    return [job for job in jobs if owners[job.name] == index]


def prepare(config: Experiment, workdir: Path) -> None:
    """Makes `workdir` with the run's config.json, or brings what is incidental in it up to date.

    Raises:
        ConfigError: it holds another run.
    """
    check_same(workdir, config, "--out")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())


def run(
    jobs: Sequence[Job],
    workdirs: Path,
    command: Callable[[Path], list[str]],
    environments: Sequence[Environment],
    is_done: Callable[[Job], bool],
    on_success: Callable[[Job], None],
) -> dict[str, str]:
    """Runs every job that is not done; a failure does not keep the next one from running.

    Args:
        workdirs: holds each job's work directory, under the job's name.
        command: that trains the run in a work directory.
        environments: to be added to a process's own, one for every job at a time.

    Returns:
        By name, why jobs failed.

    Raises:
        SystemExit: after one of `signals.SIGNALS`, with code 128 + its number, once the running
            jobs have saved their states and stopped.
    """
    waiting = deque(job for job in jobs if not is_done(job))
    free = list(environments)
    running: list[Running] = []
    failures: dict[str, str] = {}
    done = {job.name: progress(job, workdirs) for job in waiting}
    done = {job.name: done.get(job.name, work(job)) for job in jobs}
    finished = len(jobs) - len(waiting)
    with (
        stop_signal() as stop,
        tqdm(
            total=sum(map(work, jobs)),
            initial=sum(done.values()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0,  # the time left is that of the average pace
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        ) as bar,
    ):
        told = False
        while running or (waiting and not stop.number):
            while waiting and free and not stop.number:
                running.append(start(waiting.popleft(), workdirs, command, free.pop()))
            if stop.number and not told:
                told = True
                tqdm.write("stopping: the running jobs save their states", file=sys.stderr)
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.environment)
                if one.process.returncode == 0:
                    on_success(one.job)
                    finished += 1
                elif not stop.number:
                    failures[one.job.name] = reason(one)
                    tqdm.write(f"{one.job.name} failed: {reason(one)}", file=sys.stderr)
            done |= {one.job.name: progress(one.job, workdirs) for one in running}
            bar.set_description_str(f"{finished} of {len(jobs)} runs done", refresh=False)
            names = ", ".join(one.job.name for one in running)
            bar.set_postfix_str(names, refresh=False)
            bar.update(sum(done.values()) - bar.n)
    if stop.number:
        sys.exit(128 + stop.number)
    return failures


def start(
    job: Job, workdirs: Path, command: Callable[[Path], list[str]], environment: Environment
) -> Running:
    workdir = workdirs / job.name
    prepare(job.config, workdir)
    path = workdir / "train.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            command(workdir),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
        )
        return Running(job, process, environment, path, log.tell())


def stop_with_parent() -> None:
    """For a run's process: SIGTERM, which saves, as soon as the one that started it is gone."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):  # sys.stdin's own lock would outlive the interpreter
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def work(job: Job) -> int:
    """What a run costs, in layers times steps."""
    return job.config.model.depth * job.config.train.steps


def progress(job: Job, workdirs: Path) -> int:
    """The part of `work` that the run's log says is done."""
    steps = [row["step"] for row in read_metrics(workdirs / job.name / "metrics.jsonl")]
    return job.config.model.depth * max(steps, default=0)


def reason(run: Running) -> str:
    """The last line that a failed run's process wrote."""
    with run.log.open("rb") as file:
        file.seek(run.log_start)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    told = errors or lines or ["it wrote nothing"]
    return f"{told[-1].removeprefix('error: ')} (exit code {run.process.returncode}, see {run.log})"
