"""Claim: the parity report names the first block at which two networks part, and the weights."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flax_resnet.config import DType, ProjectionInit, ResNetConfig, Shortcut
from flax_resnet.errors import WeightsError
from parity_tests.pair import images, make_pair, torch
from torch_ref.compare.trace import (
    ROUNDING,
    Trace,
    Weights,
    check_one_network,
    compare,
    distances,
    judge,
)

ROOT = Path(__file__).parent.parent
LAYERS = ("stem", "stages.0.0", "head")


def report(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/parity_report.py"), f"--out={out}", *flags]
    # No display is needed, and no backend of the user's is looked for.
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://no_such_backend"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ours.pt"
    torch.save(make_pair(ResNetConfig.paper(14, Shortcut.B)).twin.state_dict(), path)
    return path


@pytest.mark.slow
def test_the_same_weights_differ_by_rounding_alone(weights: Path, tmp_path: Path) -> None:
    run = report(tmp_path, f"--checkpoint={weights}")
    assert run.returncode == 0, run.stderr
    assert "No layer differs by more than rounding" in run.stdout
    page = (tmp_path / "parity.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page  # it needs no other file


@pytest.mark.slow
def test_a_fault_is_found_at_its_block(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["stages.1.1.conv2.weight"][3, 2, 1, 0] *= 1.01
    torch.save(state, tmp_path / "theirs.pt")
    run = report(tmp_path, f"--checkpoint={weights}", f"--state_dict={tmp_path / 'theirs.pt'}")
    assert run.returncode == 1, run.stderr
    assert "The networks part at stages.1.1: " in run.stdout
    assert "1 of the weights differ: stages.1.1.conv2.weight." in run.stdout


def test_networks_of_other_shapes_are_refused() -> None:
    ours, theirs = (Weights(ResNetConfig.paper(depth), {}, {}) for depth in (8, 14))
    rule = r"both must be one network, got .*blocks=\(1, 1, 1\).* and .*blocks=\(2, 2, 2\)"
    with pytest.raises(WeightsError, match=rule):
        compare(ours, theirs, images(2), np.zeros(2, np.int64))


def test_how_a_network_began_and_is_computed_is_no_other_network() -> None:
    ours = ResNetConfig.paper(14, Shortcut.B)
    theirs = ResNetConfig.paper(
        14,
        Shortcut.B,
        dtype=DType.BFLOAT16,
        projection_init=ProjectionInit.AVERAGE,
        scan_blocks=True,
    )
    check_one_network(ours, theirs)


# --- The verdict ----------------------------------------------------------------------------------


def by_layer(outputs: tuple[float, ...], gradients: tuple[float, ...]) -> dict:
    return dict(zip(LAYERS, zip(outputs, gradients, strict=True), strict=True))


NOTHING = by_layer((0, 0, 0), (0, 0, 0))


def test_a_gradient_that_is_zero_is_measured_by_the_largest() -> None:
    """A rounding beside it is no fault, and what is no number stays none."""
    outputs = {"stem": np.ones(2), "head": np.ones(1)}
    theirs = Trace(outputs, {"stem": np.zeros(2), "head": np.array([4.0])})
    ours = Trace(outputs, {"stem": np.array([4e-16, 0]), "head": np.array([4.0])})
    assert distances(ours, theirs) == {"stem": (0, 1e-16), "head": (0, 0)}
    nothing = Trace(outputs, {name: np.zeros(1) for name in outputs})
    assert distances(nothing, nothing) == dict.fromkeys(outputs, (0, 0))
    ours.gradients["stem"][0] = math.nan
    assert math.isnan(distances(ours, theirs)["stem"][1])


def test_distances_are_relative_to_theirs() -> None:
    outputs, gradients = {"head": np.array([3.0, 4.0])}, {"head": np.array([0.0, 2.0])}
    theirs = Trace(outputs, gradients)
    ours = Trace({"head": np.array([3.0, 4.5])}, {"head": np.array([0.0, 3.0])})
    assert distances(ours, theirs) == {"head": (0.1, 0.5)}


def test_rounding_is_no_fault() -> None:
    found = by_layer((0, ROUNDING, 1e-16), (1e-15, 0, 2e-16))
    assert judge(found, NOTHING, []) == [
        "No layer differs by more than rounding: 1.0e-09 at the most in float64."
    ]


@pytest.mark.parametrize("distance", [2 * ROUNDING, math.nan, math.inf])
def test_the_first_layer_whose_output_differs_is_named(distance: float) -> None:
    found = by_layer((0, distance, 0.5), (1, 1, 1))
    assert judge(found, NOTHING, ["fc.bias"]) == [
        f"The networks part at stages.0.0: its output differs by {distance:.1e} in float64.",
        "1 of the weights differ: fc.bias.",
    ]


def test_the_last_layer_whose_gradient_differs_is_named() -> None:
    found = by_layer((0, 0, 0), (0.5, 0.1, 0))
    assert judge(found, NOTHING, []) == [
        "The gradients part: the last layer whose differs is stages.0.0.",
        "0 of the weights differ.",
    ]


def test_what_a_last_bit_of_the_image_does_to_pytorch_is_no_fault() -> None:
    own = by_layer((0, 1e-6, 0), (0, 0, 1e-6))
    within = by_layer((0, 9.9e-5, 0), (0, 0, 9.9e-5))
    assert len(judge(within, own, [])) == 1
    for other in (by_layer((0, 1.1e-4, 0), (0, 0, 0)), by_layer((0, 0, 0), (0, 0, 1.1e-4))):
        assert len(judge(other, own, [])) == 2


def test_of_many_weights_eight_are_named() -> None:
    names = [f"w{i}" for i in range(10)]
    *_, line = judge(by_layer((1, 1, 1), (1, 1, 1)), NOTHING, names)
    assert line == "10 of the weights differ: w0, w1, w2, w3, w4, w5, w6, w7."
