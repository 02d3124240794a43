"""A run's log on Weights & Biases, sent by a process of its own, which this file also is.

That process follows metrics.jsonl and ends when the one that trains does. So whatever happens to it
or to the network neither ends nor delays the training.
"""

import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_resnet.errors import ConfigError, UserError
from flax_resnet.json_files import read_json, write_json

SECONDS_TO_FINISH = 5  # that the end of a run waits for what is still to be sent
SECONDS_BETWEEN = 1  # two looks at metrics.jsonl
STATE, MESSAGES = "wandb.json", "wandb.log"  # which run it is and what was sent; the other's words

log = logging.getLogger(__name__)


def check(project: str | None) -> None:
    """Raises ConfigError if a project is named and the package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("config.wandb needs a package: pip install 'flax-resnet[wandb]'")


class Follower:
    """The process that sends the log of a work directory.

    Args:
        project: of Weights & Biases. A run that goes on goes on in the same run there, too, unless
            the project is another.
    """

    def __init__(self, workdir: Path, project: str):
        self.messages = workdir / MESSAGES
        self.process: subprocess.Popen[bytes] | None = None
        try:
            name_run(workdir / STATE, project)
            self.process = self.start(workdir)
        except (OSError, UserError) as e:
            log.warning("nothing is sent to Weights & Biases: %s; training goes on", e)

    def start(self, workdir: Path) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        with self.messages.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", __name__, str(workdir.absolute())],
                stdin=subprocess.PIPE,  # which ends when this process does, however it ends
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # Ctrl-C is not for it
            )

    def check(self) -> None:
        """Warns, once, if the process has ended."""
        if self.process is not None and self.process.poll() is not None:
            self.process = None
            words = self.messages.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(words) if line.strip()), "it says nothing")
            log.warning("no more is sent to Weights & Biases: %s; training goes on", last[:300])

    def close(self) -> None:
        """Lets it send the rest and end; if that takes long, without waiting for it."""
        self.check()
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            if self.process.wait(SECONDS_TO_FINISH):
                self.check()
        except subprocess.TimeoutExpired:
            number = self.process.pid
            log.info("the rest is still being sent to Weights & Biases, by process %d", number)


def name_run(path: Path, project: str) -> None:
    """Chooses the run's name there, unless it has one."""
    state = read_json(path) if path.exists() else {}
    if state.get("project") != project:
        write_json(path, {"project": project, "id": uuid.uuid4().hex[:8], "step": 0})


def main() -> None:
    """What the process does; its last line says why it could not go on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when its parent does
    try:
        follow(Path(sys.argv[1]))
    # Whatever it is, it is told in a line.
    except Exception as e:
        print(f"{type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)


def follow(workdir: Path) -> None:
    """Sends each row that was not sent yet, until standard input ends."""
    import wandb

    state = read_json(workdir / STATE)
    run = wandb.init(
        project=state["project"],
        id=state["id"],
        name=workdir.name,
        dir=str(workdir),
        config=read_json(workdir / "config.json"),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    for rows in new_rows(workdir / "metrics.jsonl"):
        for row in rows:
            if row["step"] > state["step"]:
                numbers = {k: v for k, v in row.items() if k not in ("step", "split")}
                run.log({f"{row['split']}/{k}": v for k, v in numbers.items()}, step=row["step"])
        # What has the last row's step may not be complete.
        sent = max((row["step"] for row in rows), default=0) - 1
        if sent > state["step"]:
            state["step"] = sent
            write_json(workdir / STATE, state)
    run.finish()


def new_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of the log that were added since the last time, until standard input ends."""
    position, ended = 0, False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], SECONDS_BETWEEN)[0])
        with path.open("rb") as file:
            file.seek(position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        position += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    main()
