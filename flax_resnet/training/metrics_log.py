"""What a run leaves for people to read: metrics.jsonl, TensorBoard events and curves.png.

tensorboardX (which brings torch along where there is one) and matplotlib take seconds to import, so
they are imported where they are used.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # step, split, loss, error, and what else was measured


class MetricsLog:
    """Appends rows to metrics.jsonl and to TensorBoard's events.

    Args:
        workdir: where both are.
        step: of the state that training goes on from; what was logged after it is dropped.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)  # line by line, so that a kill loses none
        self.events = EventsFile(workdir / "tensorboard", step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.events.close()

    def append(self, row: Row) -> None:
        """Writes one row. It has step and split; its other numbers become TensorBoard scalars."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in row.items() if name not in ("step", "split")}
        self.events.append(row["step"], {f"{row['split']}/{k}": v for k, v in numbers.items()})


class SilentLog(MetricsLog):
    """What the processes that are not the first have in its place: it writes nothing."""

    def __init__(self, workdir: Path, step: int):
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
    """Rows of a metrics.jsonl; a last line that was cut off by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
