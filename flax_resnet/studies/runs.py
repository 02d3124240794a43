"""Finished runs, read from their directories and grouped over seeds.

A run is a directory with summary.json and metrics.jsonl; errors are those of the last step, never
of the best one.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError, ResultsError
from flax_resnet.training.metrics_log import Row, read_metrics
from flax_resnet.training.workdir import BATCH_STATISTICS, RESPONSES, SUMMARY

# The last is the mark of a whole run, so it is copied last.
SMALL_FILES = ("config.json", "metrics.jsonl", RESPONSES, BATCH_STATISTICS, SUMMARY)


class Run(NamedTuple):
    """One finished run."""

    path: Path
    config: Experiment
    summary: Mapping[str, Any]
    rows: list[Row]
    responses: Mapping[str, Any] | None
    batch_statistics: Mapping[str, Any] | None

    def curve(self, split: str, name: str = "error") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a split, each (rows,)."""
        points = [(row["step"], row[name]) for row in self.rows if row["split"] == split]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps), np.array(values)

    @property
    def late_training_error(self) -> float:
        """Mean over the last tenth of the steps: a line of the log sees but a few batches."""
        steps, values = self.curve("train")
        return float(values[steps > 0.9 * self.summary["steps"]].mean())


def read_run(path: Path) -> Run:
    """Raises ResultsError if `path` is no finished run."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        config = Experiment.from_dict(summary["config"])
        responses, batch_statistics = (
            json.loads((path / name).read_text()) if (path / name).exists() else None
            for name in (RESPONSES, BATCH_STATISTICS)
        )
    except FileNotFoundError as e:
        raise ResultsError(f"{path} is no finished run: it has no summary.json") from e
    except (json.JSONDecodeError, KeyError) as e:
        raise ResultsError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    except ConfigError as e:
        raise ResultsError(f"{path / 'summary.json'}: {e}") from e
    rows = list(read_metrics(path / "metrics.jsonl"))
    if not rows:
        raise ResultsError(f"{path} is damaged: it has no metrics.jsonl")
    return Run(path, config, summary, rows, responses, batch_statistics)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs that `paths` are or hold.

    Raises:
        ResultsError: one of them is and holds none.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        inside = sorted(x.parent for x in path.glob("*/summary.json"))
        for directory in [path] if (path / "summary.json").exists() else inside or [path]:
            found.setdefault(directory.resolve(), read_run(directory))
    return list(found.values())


def copy_small_files(workdir: Path, target: Path) -> None:
    """What of a run is to be committed: no checkpoints, no TensorBoard events.

    Each file appears whole: another process may be drawing what is finished.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, target / f"{name}.tmp")
            (target / f"{name}.tmp").replace(target / name)
