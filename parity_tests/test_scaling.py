"""Claim: the model of a step on more chips is docs/scale.md's formula, on what was compiled."""

import json
from pathlib import Path
from typing import Any

import pytest

from flax_resnet.config import Experiment
from flax_resnet.data_config import DataConfig, Dataset
from flax_resnet.errors import ConfigError
from flax_resnet.studies import scaling
from flax_resnet.studies.compiled_text import Collectives
from flax_resnet.studies.scaling import HOP, LINK, Step

GATHERS = Collectives("all-gather", 10, 8000, 0)
REDUCTION = Collectives("all-reduce", 1, 9e6, 0)


def step_of(*collectives: Collectives, is_decoded: bool = False) -> Step:
    return Step("net", 128, 8, 1.5e6, list(collectives), is_decoded)  # a millisecond of cycles


def on(step: Step, chips: int) -> scaling.Point:
    return scaling.on({step.chips: step}, chips)


def test_a_chip_alone_exchanges_nothing() -> None:
    point = on(step_of(GATHERS, REDUCTION), 1)
    assert (point.seconds, point.efficiency) == (pytest.approx(1e-3), 1)
    assert point.images_per_second == pytest.approx(128_000)


@pytest.mark.parametrize(
    ("chips", "hops", "axes"),
    [(8, 1 + 3, 2), (64, 7 + 7, 2), (256, 8 + 8, 2)],  # rows of 16 are rings
)
def test_exchanges_take_hops_and_bytes(chips: int, hops: int, axes: int) -> None:
    gathers = 10 * hops * HOP + 8000 * chips / 8 / (2 * LINK * axes)
    reduction = 2 * (hops * HOP + 9e6 / (2 * LINK * axes))
    point = on(step_of(GATHERS, REDUCTION), chips)
    assert point.exchanges == pytest.approx(gathers + reduction, rel=1e-12)
    assert point.efficiency == pytest.approx(1e-3 / (1e-3 + gathers + reduction))
    assert point.batch == 128 * chips


def test_an_exchange_during_which_the_chip_computes_costs_nothing() -> None:
    some = on(step_of(GATHERS._replace(overlapping=4)), 8).exchanges
    assert some == pytest.approx(0.6 * on(step_of(GATHERS), 8).exchanges)
    assert on(step_of(GATHERS._replace(overlapping=10)), 8).exchanges == 0


def test_a_host_decodes_what_its_chips_see() -> None:
    """128,000 images a second and chip, of which one core decodes 512; eight chips have a host."""
    step = step_of(is_decoded=True)
    assert [on(step, chips).cores for chips in (1, 8, 256)] == [250, 2000, 2000]
    assert on(step_of(), 8).cores == 0


def file_of(folder: Path, **more: Any) -> Path:
    """Such as `compile_for.py --json` writes, with what the model does not read left out."""
    config = Experiment(data=DataConfig(name=Dataset.FOLDER, dir="photographs"))
    program = {
        "phase": "train",
        "images": 1024,
        "steps_per_call": 100,
        "step": {"cycles": 1e6, "collectives": [GATHERS._asdict()]},
        "call": {"cycles": 5e7, "collectives": []},
    }
    does_not_fit = {"phase": "train", "images": 2048, "steps_per_call": 100}
    told = {"device_kind": "TPU v5 lite", "chips": 8, "config": config.to_dict()}
    told["programs"] = [program, program | {"phase": "eval"}, does_not_fit]
    path = folder / "found.json"
    path.write_text(json.dumps(told | more))
    return path


def test_a_step_is_read_from_its_file(tmp_path: Path) -> None:
    (step,) = scaling.steps(file_of(tmp_path))
    assert step == Step("ResNet-20 A", 128, 8, 1.5e6, [GATHERS], True)
    assert scaling.points([step._replace(chips=1)]) == []
    points = scaling.points([step, step._replace(images=16)])
    assert [(x.step.images, x.chips) for x in points] == [
        (images, chips) for images in (128, 16) for chips in (1, 8, 64, 256)
    ]
    assert scaling.table(points).count("\n") == 9


def test_where_it_was_compiled_for_so_many_chips_it_is_that_program() -> None:
    """And its efficiency is that of one chip's own program, which prepares no exchanges."""
    alone = Step("net", 128, 1, 1.2e6, [], False)
    many = step_of(REDUCTION)._replace(chips=256, cycles=1.8e6)
    dearer = alone._replace(cycles=1.4e6)
    points = scaling.points([dearer, many, step_of(GATHERS, REDUCTION), alone, dearer])
    assert [(x.chips, x.step.chips) for x in points] == [(1, 1), (8, 8), (64, 8), (256, 256)]
    assert points[0].efficiency == 1
    assert points[1].efficiency == pytest.approx(0.8e-3 / points[1].seconds)
    reduction = 2 * (16 * HOP + 9e6 / (4 * LINK))
    assert points[3].seconds == pytest.approx(1.2e-3 + reduction)
    (first, *_) = scaling.points([many])
    assert (first.step, first.efficiency) == (many, 1)


def test_other_chips_and_other_files(tmp_path: Path) -> None:
    assert scaling.steps(file_of(tmp_path, device_kind="TPU v5")) == []
    with pytest.raises(ConfigError, match=r"files of compile_for.py --json, got .*found.json"):
        scaling.steps(file_of(tmp_path, programs=[{}]))
