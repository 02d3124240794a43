"""What a run leaves for people to read: metrics.jsonl, TensorBoard events, and whoever follows.

tensorboardX (which brings torch along where there is one) and matplotlib take seconds to import, so
they are imported where they are used.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_resnet.training.wandb_log import Follower

log = logging.getLogger(__name__)

Row = dict[str, Any]  # step, split, loss, error, and what else was measured


class MetricsLog:
    """Appends rows to metrics.jsonl and to TensorBoard's events.

    Neither need be there: a run does not depend on its log.

    Args:
        workdir: where both are.
        step: of the state that training goes on from; what was logged after it is dropped.
        wandb: the project of Weights & Biases to which the rows are sent as well.
    """

    def __init__(self, workdir: Path, step: int, wandb: str | None = None):
        path = workdir / "metrics.jsonl"
        lines = read_lines(path)
        if damaged := lines.count(None):
            log.warning("%s: damaged lines are left out: %d", path, damaged)
        self.rows = [row for row in lines if row is not None and row["step"] <= step]
        if step and not self.rows:
            log.warning("%s tells nothing of the %d steps that are done", path, step)
        if lines and not step:
            log.warning("%s: begun again, as there is no checkpoint of what it told", path)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)  # line by line, so that a kill loses none
        self.events = EventsFile(workdir / "tensorboard", step + 1)
        self.follower = None if wandb is None else Follower(workdir, wandb)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.events.close()
        if self.follower is not None:
            self.follower.close()

    def append(self, row: Row) -> None:
        """Writes one row. It has step and split; its other numbers become TensorBoard scalars."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in row.items() if name not in ("step", "split")}
        self.events.append(row["step"], {f"{row['split']}/{k}": v for k, v in numbers.items()})
        if self.follower is not None:
            self.follower.check()


class SilentLog(MetricsLog):
    """What the processes that are not the first have in its place: it writes nothing."""

    def __init__(self, workdir: Path, step: int, wandb: str | None = None):
        self.rows = []

    def __exit__(self, *exc: object) -> None:
        pass

    def append(self, row: Row) -> None:
        pass


class EventsFile:
    """A file of TensorBoard events, written at once.

    tensorboardX's own SummaryWriter leaves it to a thread: where the disk is full the thread dies,
    and soon its caller waits for it for ever.

    Args:
        directory: made if need be.
        purge_step: what earlier files tell of this step and later ones is void.
    """

    def __init__(self, directory: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory.mkdir(exist_ok=True)
        self.writer = EventsWriter(str(directory / "events"))
        self.proto: Any = event_pb2  # generated code, which type checkers cannot see into
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self.write(step=purge_step, session_log=start)
        self.writer.flush()

    def append(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for tag, value in scalars.items():
            self.write(step=step, summary=scalar(tag, value))
        self.writer.flush()

    def write(self, **content: Any) -> None:
        self.writer.write_event(self.proto.Event(wall_time=time.time(), **content))

    def close(self) -> None:
        self.writer.close()


def read_metrics(path: Path) -> Iterator[Row]:
    """Rows of a metrics.jsonl, if there is one; damaged lines are passed over."""
    return (row for row in read_lines(path) if row is not None)


def read_lines(path: Path) -> list[Row | None]:
    """The same, with None for each damaged line but a last one that a kill has cut off."""
    if not path.is_file():
        return []
    *lines, cut_off = path.read_text(errors="replace").split("\n")
    rows = [read_line(line) for line in lines]
    last = read_line(cut_off)
    return rows if last is None else [*rows, last]


def read_line(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_row(row) else None


def is_row(row: Any) -> bool:
    """Whether it has what every row has: step, split, and numbers alone beside them."""
    if not isinstance(row, dict) or not {"step", "split", "loss", "error"} <= row.keys():
        return False
    numbers = [value for name, value in row.items() if name != "split"]
    is_number = [isinstance(x, int | float) and not isinstance(x, bool) for x in numbers]
    return isinstance(row["split"], str) and isinstance(row["step"], int) and all(is_number)
