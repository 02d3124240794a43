"""The tables that are written from finished runs: Markdown, with the published values beside."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.config import Experiment, OptimConfig, Schedule, Stem, TrainConfig, Warmup
from flax_resnet.errors import ResultsError
from flax_resnet.studies.groups import Group, data_of, group_runs
from flax_resnet.studies.published import PUBLISHED
from flax_resnet.studies.recipes import STUDIES, TANJEFFREYZ_STEPS
from flax_resnet.studies.runs import Run, find_runs

SWEEP = "sweep.json"  # beside the runs: how they were made


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
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    (root / "README.md").write_text("\n".join([*lines, NOTES]) + "\n", encoding="utf-8")


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
        seconds = [run.summary["wall_seconds"] for run in runs if run.summary["wall_seconds"]]
        row.append(f"{np.mean(seconds) / 3600:.2f}" if seconds else "-")
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
    """The number of steps; where that is not the recipe's, also what became of the schedule.

    And what else of the recipe is an option that is on.
    """
    optim, steps = config.optim, config.train.steps
    full = TANJEFFREYZ_STEPS if config.model.stem is Stem.CONV else TrainConfig().steps
    text, rate = f"{steps:,}", ""
    if optim.schedule is Schedule.COSINE:
        rate = f"cosine to {optim.final_lr:g}"
    elif (steps, optim.boundaries) != (full, OptimConfig().boundaries):
        drops = [f"{boundary:,}" for boundary in optim.boundaries if boundary < steps]
        rate = f"rate ÷ {1 / optim.decay_factor:g} at {' and '.join(drops)}"
        rate = rate if drops else "rate constant"
    if rate:
        text = f"**{text} of {full:,}**, {rate}"
    if optim.warmup_steps:
        how = "rising from" if optim.warmup is Warmup.LINEAR else "at"
        text += f", first {optim.warmup_steps} {how} {optim.warmup_lr}"
    options = {
        "label smoothing": config.train.label_smoothing,
        "mixup": config.data.mixup,
        "CutMix": config.data.cutmix,
    }
    text += "".join(f", {name} {value:g}" for name, value in options.items() if value)
    if config.train.accumulate > 1:
        text += f", {config.train.accumulate} micro-batches each"
    return text


def hardware(run: Run) -> str:
    cores = run.summary.get("cpu_cores")
    on_cpu = run.summary["devices"].endswith("cpu") and cores
    return f"{run.summary['devices']}{f' ({cores} cores)' if on_cpu else ''}"


def link(run: Run, base: Path) -> str:
    path = Path(os.path.relpath(run.path.resolve(), base.resolve()))
    return f"[{run.path.name}]({path.as_posix()}/metrics.jsonl)"
