"""Claim: what version 0.1 wrote still loads, resumes, evaluates, is measured and is plotted.

parity_tests/golden was made by version 0.1 (commit 7a08ef1) on jax 0.10.2: `paper`, 8 steps of
ResNet-8 A on the digits with checkpoints at 4 and 8; `reference`, without its checkpoints, the same
of tanjeffreyz's ResNet-8 B by version 0.1's names; `weights`, both exported.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_resnet
from flax_resnet.config import Experiment, Init, Preprocess, ResNetConfig, Shortcut, Statistics
from flax_resnet.data import digits, pixels
from flax_resnet.studies import figures, tables
from flax_resnet.studies.groups import group_runs
from flax_resnet.studies.runs import find_runs
from flax_resnet.training.loop import fit
from flax_resnet.training.workdir import open_run, read_config
from flax_resnet.weights import pretrained

GOLDEN = Path(__file__).parent / "golden"
# Other processors sum in another order; eight steps multiply a last bit of float32 (6e-8) to this.
TOLERANCE = 1e-3


def flat(tree: object) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(tree))])


def test_old_names_of_settings_are_read() -> None:
    config = read_config(GOLDEN / "reference")
    assert config.batch_norm is Statistics.REPLICA
    assert config.data.preprocess is Preprocess.OWN_MEAN
    # Version 0.1 started every bias at zero and the classifier as the convolutions.
    assert config.model == ResNetConfig.tanjeffreyz(8, Shortcut.B, init=Init.KAIMING)
    assert Experiment.from_dict(config.to_dict()) == config


def test_the_run_goes_on_and_ends_as_it_did(tmp_path: Path) -> None:
    run = tmp_path / "paper"
    shutil.copytree(GOLDEN / "paper", run)
    before = open_run(run)
    assert before.step == 8
    shutil.rmtree(run / "checkpoints" / "8")
    old = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    with jax.enable_x64(False):
        summary = fit(read_config(run), run)
    after = open_run(run)
    a, b = (flat((r.state.params, r.state.batch_stats, r.state.opt_state)) for r in (after, before))
    assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()
    assert summary["test_loss"] == pytest.approx(old["test_loss"], rel=TOLERANCE)
    assert summary["test_examples"] == 360
    assert after.data_facts().examples == {"train": 1437, "test": 360}


def test_without_data_json_the_constants_come_from_the_images() -> None:
    run = open_run(GOLDEN / "paper")
    assert not (GOLDEN / "paper" / "data.json").exists()
    mean = digits.load()["train"].image.mean(0, dtype=np.float64)
    assert np.array_equal(run.data_facts().normalization.mean, mean)


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_exported_weights_load_and_evaluate_to_their_cards_error(name: str) -> None:
    path = GOLDEN / "weights" / f"{name}.safetensors"
    card = pretrained.read_card(path)
    model = flax_resnet.load_pretrained(path)
    test = digits.load()["test"]
    x = pixels.normalize(jax.numpy.asarray(test.image), card.normalization, "float32")
    wrong = np.asarray(model(x)).argmax(-1) != test.label
    assert wrong.mean() == pytest.approx(card.tree["test_error"], abs=1e-9)


def test_both_runs_stand_in_the_table_and_in_the_figures(tmp_path: Path) -> None:
    groups = group_runs(find_runs([GOLDEN]))
    table = "\n".join(tables.table(groups, GOLDEN))
    assert "| ResNet-8 A | 0 |" in table
    assert "| ResNet-8 B (tanjeffreyz) | 0 |" in table
    assert "**83.61**" in table
    assert set(figures.draw_all(groups, tmp_path).written) == {"curves.png", "layer_responses.png"}
