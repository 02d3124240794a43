"""Runs that differ in their seeds alone, as one group; which groups a figure shows; their means."""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flax_resnet.config import Dataset, Experiment, Shortcut
from flax_resnet.studies.published import PUBLISHED
from flax_resnet.studies.runs import Run


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


def is_plain(group: Group) -> bool:
    return group.config.model.shortcut is Shortcut.PLAIN


def depths(groups: Sequence[Group]) -> list[int]:
    return sorted({group.config.model.depth for group in groups})


def at_one_depth(groups: Sequence[Group]) -> list[Group]:
    """Those of the depth that most of them have."""
    found = [group.config.model.depth for group in groups]
    return [group for group in groups if group.config.model.depth == max(found, key=found.count)]


def sides(groups: Sequence[Group]) -> tuple[list[Group], list[Group]] | None:
    """Plain groups, and the residual ones of their commonest shortcut; None without either."""
    plain = [group for group in groups if is_plain(group)]
    residual = [group for group in groups if not is_plain(group)]
    if not plain or not residual:
        return None
    shortcuts = [group.config.model.shortcut for group in residual]
    commonest = max(shortcuts, key=shortcuts.count)
    return plain, [group for group in residual if group.config.model.shortcut is commonest]


def responded(groups: Sequence[Group]) -> list[Group]:
    """Those of figure 7, as far as their layers' responses were measured: the shallowest and the
    deepest depth that there are plain and residual, and the deepest residual network.
    """
    measured = [group for group in groups if any(run.responses for run in group.runs)]
    pair = sides(measured)
    if pair is None:
        return [group for group in measured if group.config.model.depth in ends(measured)]
    common = [group for group in pair[1] if group.config.model.depth in depths(pair[0])]
    shown = ends(common)
    plain = [group for group in pair[0] if group.config.model.depth in shown]
    deepest = max(depths(pair[1]))
    return [*plain, *(g for g in pair[1] if g.config.model.depth in {*shown, deepest})]


def ends(groups: Sequence[Group]) -> set[int]:
    """The smallest and the largest depth."""
    found = depths(groups)
    return {found[0], found[-1]} if found else set()


def stacked(group: Group, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (rows,) and errors in % (seeds, rows), where the logs of all seeds have a row."""
    found = [dict(zip(*run.curve(split), strict=True)) for run in group.runs]
    steps = [step for step in found[0] if all(step in errors for errors in found)]
    errors = np.array([[errors[step] for step in steps] for errors in found])
    return np.array(steps, np.int64), 100 * errors


def deviation_of(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first axis; 0 for one value."""
    return np.asarray(values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:]))
