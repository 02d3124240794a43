"""Claim: table and figures show the errors of the runs' last steps, by mean and deviation."""

import json
from pathlib import Path

import numpy as np
import pytest

from flax_resnet.config import Schedule, Warmup
from flax_resnet.errors import ResultsError
from flax_resnet.studies import figures, tables
from flax_resnet.studies.groups import Group, group_runs
from flax_resnet.studies.published import PUBLISHED, TANJEFFREYZ, read_published_curves
from flax_resnet.studies.recipes import STUDIES, make_jobs
from flax_resnet.studies.runs import find_runs
from parity_tests.data_sets import need_metrics

SEEDS = (0, 1, 2)
NETWORKS = ("plain-20", "A-20", "plain-56", "A-56")
ERRORS = {  # in %, by network and seed; the best is not the last
    "plain-20": (9.0, 9.3, 9.9),
    "A-20": (8.1, 8.4, 8.2),
    "plain-56": (13.0, 14.0, 12.0),
    "A-56": (6.5, 6.9, 7.0),
}
RESPONSES = {"plain-20": 2.0, "A-20": 1.0, "plain-56": 1.5, "A-56": 0.5}


def write_run(directory: Path, name: str, steps: int | None = None, **fields: object) -> None:
    """A finished run with made-up numbers, as `fit` and `measure` leave it."""
    network, _, seed = name.rpartition("-s")
    (job,) = make_jobs(STUDIES["depth"], [network], [int(seed)], steps)
    total, error = job.config.train.steps, ERRORS[network][int(seed)] / 100
    rows = [
        {"step": step, "split": split, "error": e, "loss": 1.0}
        for step, factor in ((total // 4, 3.0), (total // 2, 0.9), (total, 1.0))
        for split, e in (("train", error * factor / 2), ("test", error * factor))
    ]
    summary = {
        "test_error": error,
        "steps": total,
        "wall_seconds": 7200.0,
        "parameters": 270_000,
        "devices": "1 x TPU v4",
        "train_examples": 50_000,
        "test_examples": 10_000,
        "config": job.config.to_dict(),
    }
    run = directory / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps(summary | fields))
    std = [RESPONSES[network] * (i + 1) for i in range(job.config.model.depth - 1)]
    (run / "layer_responses.json").write_text(json.dumps({"std": std}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for network in NETWORKS:
        for seed in SEEDS:
            write_run(tmp_path / "depth", f"{network}-s{seed}")
    return tmp_path / "depth"


def groups(runs: Path) -> list[Group]:
    return group_runs(find_runs([runs]))


def rows(table: list[str]) -> dict[str, list[str]]:
    """Cells by network."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_mean_and_deviation_of_the_last_errors(runs: Path) -> None:
    table = rows(tables.table(groups(runs), runs))
    assert list(table)[2:] == ["plain-20", "ResNet-20 A", "plain-56", "ResNet-56 A"]
    for name, network in zip(list(table)[2:], NETWORKS, strict=True):
        mean, deviation = np.mean(ERRORS[network]), np.std(ERRORS[network], ddof=1)
        seeds, steps, data, test_error, train_error, *_ = table[name]
        assert test_error == f"**{mean:.2f} ± {deviation:.2f}**"
        assert train_error == f"{mean / 2:.2f} ± {deviation / 2:.2f}"
        assert (seeds, steps, data) == ("0, 1, 2", "64,000", "CIFAR-10")
    assert table["ResNet-56 A"][5:8] == ["6.97", "6.61", "10.91, 9.77"]
    assert table["ResNet-56 A"][8:10] == ["1 x TPU v4", "2.00"]
    for seed in SEEDS:
        assert f"[A-56-s{seed}](A-56-s{seed}/metrics.jsonl)" in table["ResNet-56 A"][10]


def test_a_row_says_what_is_less_than_the_papers(tmp_path: Path) -> None:
    write_run(tmp_path, "A-20-s0", steps=1500, train_examples=49_483, test_examples=9_886)
    row = rows(tables.table(groups(tmp_path), tmp_path))["ResNet-20 A"]
    assert row[1] == "**1,500 of 64,000**, rate ÷ 10 at 750 and 1,125"
    assert row[2] == "**reduced** CIFAR-10: 49,483 + 9,886 images"
    assert row[3] == "**8.10**"  # one run has no deviation


def test_a_row_says_which_options_are_on() -> None:
    (job,) = make_jobs(STUDIES["depth"], ["A-110"])
    config = job.config
    assert tables.schedule(config) == "64,000, first 400 at 0.01"
    config.optim.schedule, config.optim.warmup = Schedule.COSINE, Warmup.LINEAR
    config.train.steps = 9000
    text = "**9,000 of 64,000**, cosine to 0, first 400 rising from 0.01"
    assert tables.schedule(config) == text
    config.train.label_smoothing, config.data.cutmix, config.train.accumulate = 0.1, 1.0, 4
    text += ", label smoothing 0.1, CutMix 1, 4 micro-batches each"
    assert tables.schedule(config) == text


def test_runs_of_other_steps_are_no_seeds_of_each_other(runs: Path) -> None:
    write_run(runs.parent / "short", "A-20-s0", steps=1500)
    found = group_runs(find_runs([runs, runs.parent / "short"]))
    labels = [group.label for group in found if group.config.model.depth == 20]
    assert labels == ["plain-20", "ResNet-20 A, 64,000 steps", "ResNet-20 A, 1,500 steps"]


def test_depth_is_drawn_at_the_means_with_the_published_points(runs: Path) -> None:
    axes = figures.error_by_depth(groups(runs)).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    for kind, label in (("plain", "plain, here"), ("A", "residual, A, here")):
        means = [np.mean(ERRORS[f"{kind}-{depth}"]) for depth in (20, 56)]
        np.testing.assert_allclose(lines[label], means)
    np.testing.assert_allclose(lines["A, paper"], [8.75, 6.97])
    np.testing.assert_allclose(lines["A, akamaster"], [8.27, 6.61])
    np.testing.assert_allclose(lines["A, tanjeffreyz"], [11.16, 10.91, 9.77])
    np.testing.assert_allclose(lines["plain, tanjeffreyz"], [12.42, 15.82])
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    low = np.mean(ERRORS["plain-20"]) - np.std(ERRORS["plain-20"], ddof=1)
    assert edge.min() == pytest.approx(low)


def test_side_by_side_is_plain_left_and_residual_right(runs: Path) -> None:
    left, right = figures.side_by_side(*figures.sides(groups(runs))).axes
    assert left.get_ylim() == right.get_ylim()
    for axes, kind in ((left, "plain"), (right, "A")):
        for i, depth in enumerate((20, 56)):
            train, test = axes.lines[2 * i : 2 * i + 2]
            mean = np.mean(ERRORS[f"{kind}-{depth}"])
            np.testing.assert_allclose(test.get_ydata(), np.array([3.0, 0.9, 1.0]) * mean)
            np.testing.assert_allclose(train.get_ydata(), np.array([1.5, 0.45, 0.5]) * mean)
            np.testing.assert_array_equal(test.get_xdata(), [16_000, 32_000, 64_000])
            assert test.get_linewidth() > 2 * train.get_linewidth()


def test_a_row_is_as_high_as_its_numbers(tmp_path: Path) -> None:
    """tanjeffreyz published two runs of ResNet-56 A, whose errors stand below each other."""
    for name in ("plain-56-s0", "A-56-s0"):
        write_run(tmp_path, name)
    figure = figures.curves(group_runs(find_runs([tmp_path])))
    (table,) = figure.axes[1].tables
    cells = table.get_celld()
    head, plain, residual = ({cells[row, i].get_height() for i in range(6)} for row in range(3))
    assert "\n" in cells[2, 5].get_text().get_text()
    assert head == plain
    assert len(residual) == 1
    assert min(residual) > 1.5 * max(plain)


def test_responses_are_drawn_in_order_and_ranked(runs: Path) -> None:
    upper, lower = figures.layer_responses(groups(runs)).axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.lines}
    np.testing.assert_allclose(drawn["plain-56"], 1.5 * np.arange(1, 56))
    np.testing.assert_allclose(drawn["ResNet-20 A"], np.arange(1, 20))
    for line in lower.lines:
        np.testing.assert_allclose(line.get_ydata(), drawn[line.get_label()][::-1])


def test_all_figures_are_written_and_the_same_runs_give_the_same_files(runs: Path) -> None:
    names, failed = figures.draw_all(groups(runs), runs)
    assert failed == []
    assert names == [
        "plain_vs_residual.png",
        "side_by_side.png",
        "depth.png",
        "layer_responses.png",
    ]
    first = {path: path.read_bytes() for path in runs.glob("*.*g")}
    assert len(first) == 8
    figures.draw_all(groups(runs), runs)
    assert {path: path.read_bytes() for path in first} == first


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"is no finished run: it has no summary.json"):
        find_runs([tmp_path])
    write_run(tmp_path, "A-20-s0")
    (tmp_path / "A-20-s0" / "metrics.jsonl").unlink()
    with pytest.raises(ResultsError, match=r"is damaged: it has no metrics.jsonl"):
        find_runs([tmp_path])


def test_tanjeffreyzs_numbers_are_its_last_epochs() -> None:
    curves = read_published_curves(need_metrics())
    last = {name: sorted(round(x[1, -1], 2) for x in found) for name, found in curves.items()}
    published = PUBLISHED[TANJEFFREYZ]
    assert {name: sorted(x) for name, x in published.items()} == last


def test_tanjeffreyzs_curves_are_drawn_beside_ours(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "tanjeffreyz" / "CifarResNet-56-R-A-12_02_54" / "test_errors.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.array([[0.0, 156.0], [0.6, 0.1]]))
    published = read_published_curves(path.parent.parent)
    left, right = figures.side_by_side(*figures.sides(groups(runs)), published).axes
    ours, theirs = right.lines[3], right.lines[2]
    np.testing.assert_allclose(theirs.get_xdata(), [391, 157 * 391])
    np.testing.assert_allclose(theirs.get_ydata(), [60, 10])
    assert theirs.get_color() == ours.get_color()
    assert (len(left.lines), len(right.lines)) == (4, 5)


def test_a_family_is_named_only_where_it_tells_networks_apart() -> None:
    ours, theirs = (
        [job.config.model.label for job in make_jobs(STUDIES[study], ["A-20", "plain-20"])]
        for study in ("depth", "tanjeffreyz")
    )
    for labels, expected in (
        (theirs, ["ResNet-20 A", "plain-20"]),
        (ours + theirs, [*ours, "ResNet-20 A (tanjeffreyz)", "plain-20 (tanjeffreyz)"]),
    ):
        shown = figures.short_labels([Group(label, []) for label in labels])
        assert [group.label for group in shown] == expected
