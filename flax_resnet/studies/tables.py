"""Finished runs, grouped over seeds, and the tables that are written from them.

A run is a directory with summary.json and metrics.jsonl; errors are those of the last step, never
of the best one.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import Dataset, Experiment, OptimConfig, Stem, TrainConfig
from flax_resnet.errors import ResultsError
from flax_resnet.studies.recipes import STUDIES, TANJEFFREYZ_STEPS
from flax_resnet.studies.responses import BATCH_STATISTICS, RESPONSES
from flax_resnet.training.metrics_log import Row, read_metrics

# The last is the mark of a whole run, so it is copied last.
SMALL_FILES = ("config.json", "metrics.jsonl", RESPONSES, BATCH_STATISTICS, "summary.json")
STEPS_PER_EPOCH = 391  # of 128 out of 50,000
SWEEP = "sweep.json"  # beside the runs: how they were made

PAPER, AKAMASTER, TANJEFFREYZ = "paper", "akamaster", "tanjeffreyz"
# Test errors in % on CIFAR-10. The paper's: table 6 (ResNet-110: the best of 5, whose mean is
# 6.61). akamaster's: README of github.com/akamaster/pytorch_resnet_cifar10, one run each. The
# tanjeffreyz's: its 12 published runs, last epoch, tested with BatchNorm in training mode.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    PAPER: {
        "ResNet-20 A": (8.75,),
        "ResNet-32 A": (7.51,),
        "ResNet-44 A": (7.17,),
        "ResNet-56 A": (6.97,),
        "ResNet-110 A": (6.43,),
        "ResNet-1202 A": (7.93,),
    },
    AKAMASTER: {
        "ResNet-20 A": (8.27,),
        "ResNet-32 A": (7.37,),
        "ResNet-44 A": (6.90,),
        "ResNet-56 A": (6.61,),
        "ResNet-110 A": (6.32,),
        "ResNet-1202 A": (6.18,),
    },
    TANJEFFREYZ: {
        "plain-20": (12.42,),
        "plain-32": (12.76,),
        "plain-44": (15.34,),
        "plain-56": (15.82,),
        "ResNet-20 A": (11.16,),
        "ResNet-32 A": (10.15,),
        "ResNet-44 A": (9.89,),
        "ResNet-56 A": (10.91, 9.77),
        "ResNet-20 B": (10.76,),
        "ResNet-32 B": (10.73, 10.83),
    },
}


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


class Group(NamedTuple):
    """The runs of one network that differ in their seeds alone."""

    label: str  # such as "ResNet-20 A"
    runs: list[Run]

    @property
    def config(self) -> Experiment:
        return self.runs[0].config

    @property
    def test_errors(self) -> np.ndarray:
        """In %, at the last step, one for each run."""
        return np.array([100 * run.summary["test_error"] for run in self.runs])

    def published(self, source: str) -> tuple[float, ...]:
        """In %; () for a network that has none, or other data than CIFAR-10."""
        if self.config.data.name is not Dataset.CIFAR10:
            return ()
        return PUBLISHED[source].get(self.config.model.label.split(" (")[0], ())


# --- Reading --------------------------------------------------------------------------------------


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


def read_published_curves(directory: Path) -> dict[str, list[np.ndarray]]:
    """The published test curves of tanjeffreyz, by label: steps and errors in %, (2, tests) each.

    Args:
        directory: of its metrics, holding such as CifarResNet-20-R-A-DATE/test_errors.npy, whose
            rows are epochs from 0 and fractions.

    Raises:
        ResultsError: there are none.
    """
    curves: dict[str, list[np.ndarray]] = {}
    for path in sorted(directory.glob("CifarResNet-*/test_errors.npy")):
        _, depth, kind, shortcut, *_ = path.parent.name.split("-")
        name = f"plain-{depth}" if kind == "P" else f"ResNet-{depth} {shortcut}"
        epochs, errors = np.load(path)
        curves.setdefault(name, []).append(np.stack([(epochs + 1) * STEPS_PER_EPOCH, 100 * errors]))
    if not curves:
        raise ResultsError(f"{directory} has no CifarResNet-*/test_errors.npy")
    return curves


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """By everything but the seed and where data lie; plain first, by depth, by shortcut."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        tree = run.config.to_dict()
        del tree["seed"], tree["data"]["dir"]
        groups.setdefault(json.dumps([tree, data_of(run)], sort_keys=True), []).append(run)
    made = [
        Group(runs[0].config.model.label, sorted(runs, key=lambda run: run.config.seed))
        for runs in groups.values()
    ]
    order = ["plain", "A", "B", "C"]
    made.sort(
        key=lambda group: (
            group.config.model.depth,
            order.index(group.config.model.shortcut.value),
            group.label,
            -group.config.train.steps,
        )
    )
    labels = [group.label for group in made]
    return [
        group._replace(label=f"{group.label}, {group.config.train.steps:,} steps")
        if labels.count(group.label) > 1
        else group
        for group in made
    ]


def copy_small_files(workdir: Path, target: Path) -> None:
    """What of a run is to be committed: no checkpoints, no TensorBoard events."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, target / name)


# --- Writing --------------------------------------------------------------------------------------


def write_readme(directory: Path, figures: Sequence[str] = ()) -> None:
    """directory/README.md: how its runs were made, their table, and its figures.

    Args:
        figures: names of PNG files in `directory`.
    """
    lines = [f"# {heading(directory)}", "", *made_by(directory)]
    lines += table(group_runs(find_runs([directory])), directory)
    for name in figures:
        lines += ["", f"![{Path(name).stem.replace('_', ' ')}]({name})"]
    lines += ["", NOTES]
    (directory / "README.md").write_text("\n".join(lines) + "\n")


def write_index(root: Path) -> None:
    """root/README.md: the table of every experiment below `root`.

    Raises:
        ResultsError: there is none, and nothing is written.
    """
    experiments = sorted({path.parent.parent for path in root.glob("*/*/summary.json")})
    if not experiments:
        raise ResultsError(
            f"{root} has no experiments: give a folder of folders of finished runs, such as results"
        )
    lines = ["# Results", "", "Written by `scripts/reproduce.py` and `scripts/plot.py`.", ""]
    for directory in experiments:
        lines += [f"## {heading(directory)}", "", *made_by(directory)]
        lines += [*table(group_runs(find_runs([directory])), root), ""]
        if (directory / "README.md").exists():
            lines += [f"[Figures]({directory.name}/README.md)", ""]
    (root / "README.md").write_text("\n".join([*lines, NOTES]) + "\n")


NOTES = """\
Test error: at the last step, never the best one; mean ± sample standard deviation over the seeds.
Training error: mean over the last tenth of the steps, on augmented images, while training.
Published, in %: the paper's table 6 (ResNet-110: the best of 5 runs); one run each of
akamaster/pytorch_resnet_cifar10; tanjeffreyz's last epochs, tested with BatchNorm in training
mode."""


def heading(directory: Path) -> str:
    study = STUDIES.get(read_sweep(directory).get("experiment", ""))
    return study.title if study else directory.name


def made_by(directory: Path) -> list[str]:
    command = read_sweep(directory).get("command")
    return ["```bash", command, "```", ""] if command else []


def read_sweep(directory: Path) -> dict[str, Any]:
    """What reproduce.py says of the runs in `directory`; {} if they came otherwise."""
    path = directory / SWEEP
    return json.loads(path.read_text()) if path.exists() else {}


def table(groups: Sequence[Group], base: Path) -> list[str]:
    """Markdown, a row for each group; links are relative to `base`."""
    by_batch_statistics = any(run.batch_statistics for group in groups for run in group.runs)
    head = ["network", "seeds", "steps", "data", "test error, %"]
    head += ["with batch statistics, %"] if by_batch_statistics else []
    head += ["training error, %", *PUBLISHED, "hardware", "hours a run", "runs"]
    rows = [head, ["---"] * len(head)]
    for group in groups:
        runs = group.runs
        row = [group.label, ", ".join(str(run.config.seed) for run in runs)]
        row += [schedule(group.config), data_of(runs[0]), f"**{spread(group.test_errors)}**"]
        if by_batch_statistics:
            found = [run.batch_statistics["test_error"] for run in runs if run.batch_statistics]
            row.append(spread(100 * np.array(found)))
        row.append(spread(100 * np.array([run.late_training_error for run in runs])))
        row += [", ".join(f"{x:.2f}" for x in group.published(s)) or "-" for s in PUBLISHED]
        row.append(", ".join(dict.fromkeys(hardware(run) for run in runs)))
        row.append(f"{np.mean([run.summary['wall_seconds'] for run in runs]) / 3600:.2f}")
        row.append(", ".join(link(run, base) for run in runs))
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def spread(values: np.ndarray) -> str:
    """Such as "8.31 ± 0.12"; "8.31" for one value, "-" for none."""
    if not len(values):
        return "-"
    deviation = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation}"


def schedule(config: Experiment) -> str:
    """The number of steps; where that is not the recipe's, also what became of the schedule."""
    optim, steps = config.optim, config.train.steps
    full = TANJEFFREYZ_STEPS if config.model.stem is Stem.CONV else TrainConfig().steps
    text = f"{steps:,}"
    if (steps, optim.boundaries) != (full, OptimConfig().boundaries):
        drops = [f"{boundary:,}" for boundary in optim.boundaries if boundary < steps]
        rate = f"rate ÷ {1 / optim.decay_factor:g} at {' and '.join(drops)}"
        text = f"**{text} of {full:,}**, {rate if drops else 'rate constant'}"
    if optim.warmup_steps:
        text += f", first {optim.warmup_steps} at {optim.warmup_lr}"
    return text


def data_of(run: Run) -> str:
    """The dataset; where it is not whole, how much of it there was."""
    if run.config.data.name is not Dataset.CIFAR10:
        return run.config.data.name.value
    held_out = run.config.data.validation
    name = f"CIFAR-10, {held_out:,} held out" if held_out else "CIFAR-10"
    if "train_examples" not in run.summary:
        return f"{name} (sizes not recorded)"
    train, test = run.summary["train_examples"], run.summary["test_examples"]
    if (train + held_out, test) == (50_000, 10_000):
        return name
    return f"**reduced** {name}: {train:,} + {test:,} images"


def hardware(run: Run) -> str:
    cores = run.summary.get("cpu_cores")
    on_cpu = run.summary["devices"].endswith("cpu") and cores
    return f"{run.summary['devices']}{f' ({cores} cores)' if on_cpu else ''}"


def link(run: Run, base: Path) -> str:
    path = Path(os.path.relpath(run.path.resolve(), base.resolve()))
    return f"[{run.path.name}]({path.as_posix()}/metrics.jsonl)"
