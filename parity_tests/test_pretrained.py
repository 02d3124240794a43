"""Claim: published weights load as they were exported, to the bit, without PyTorch; a file that is
damaged or of other makers is refused.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import flax_resnet
from flax_resnet.config import Dataset, Experiment, ResNetConfig, Shortcut, Stem
from flax_resnet.data import digits
from flax_resnet.data.pixels import Normalization, make_normalization
from flax_resnet.errors import WeightsError
from flax_resnet.json_files import write_json
from flax_resnet.resnet import abstract, split
from flax_resnet.step import init
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.weights import pretrained

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a checkpoint whose every number is random, of a network that the
    tensors alone do not tell: plain or A?
    """
    config = Experiment(model=ResNetConfig.paper(8, Shortcut.PLAIN), seed=4)
    config.data.name = Dataset.DIGITS
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype),
        jax.eval_shape(lambda: init(config)[1]),
    )
    state = state._replace(step=jax.numpy.array(7, jax.numpy.int32))
    directory = tmp_path_factory.mktemp("run") / "plain8"
    directory.mkdir()
    write_json(directory / "config.json", config.to_dict())
    row = {"step": 7, "split": "test", "error": 0.25, "loss": 1.5}
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(state, 0.25)
    np.save(directory / "leaves.npy", np.concatenate([x.ravel() for x in leaves(state.params)]))
    return directory


def leaves(tree: object) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def weights(run: Path) -> Path:
    out = run.parent / "weights" / "plain8.safetensors"
    command = [sys.executable, str(ROOT / "scripts/export.py"), str(run), str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(weights: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    for path in (weights, weights.with_suffix(".json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / weights.name


def test_loaded_it_is_the_network_to_the_bit(
    run: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    model = flax_resnet.load_pretrained("plain8", weights.parent)
    _, params, _ = split(model)
    found = np.concatenate([x.ravel() for x in leaves(params)])
    np.testing.assert_array_equal(found, np.load(run / "leaves.npy"))
    assert found.dtype == np.float32
    assert model.stages[0][0].shortcut is None  # the card tells plain from A
    assert model.stages[0][0].bn1.use_running_average


def test_the_card_says_what_the_run_says(weights: Path) -> None:
    card = pretrained.read_card(weights)
    assert card.tree["step"] == 7
    assert (card.tree["test_error"], card.tree["test_loss"]) == (0.25, 1.5)
    assert card.tree["examples"] == {"train": 1437, "test": 360}
    assert card.config.seed == 4
    expected = make_normalization(card.config.data.preprocess, digits.load()["train"].image)
    for ours, theirs in zip(card.normalization, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_whoever_may_read_the_card_may_read_the_weights(weights: Path) -> None:
    assert weights.stat().st_mode == weights.with_suffix(".json").stat().st_mode


def test_the_card_says_how_parity_was_checked(weights: Path) -> None:
    torch = pytest.importorskip("torch", reason="the check is against PyTorch")
    parity = pretrained.read_card(weights).tree["parity"]
    assert parity["with"] == f"torch {torch.__version__}"
    assert parity["largest relative difference of the logits"]["float64"] < 1e-13


def test_pytorchs_twin_reads_the_same_file(weights: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is the reader")
    from flax_resnet.weights.files import read, tensors
    from torch_ref.resnet import ResNet as Twin

    Twin(ResNetConfig.paper(8, Shortcut.PLAIN)).load_state_dict(tensors(read(weights).state_dict))


def test_a_damaged_file_is_refused(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is damaged or another file: its sha256 must be"):
        flax_resnet.load_pretrained(copy)


def test_a_card_of_another_network_is_refused(copy: Path) -> None:
    card = copy.with_suffix(".json")
    tree = json.loads(card.read_text())
    tree["config"]["model"]["num_classes"] = 7
    card.write_text(json.dumps(tree))
    with pytest.raises(WeightsError, match="holds another network than its card says"):
        flax_resnet.load_pretrained(copy)


def test_what_a_network_without_projections_does_not_show_is_no_other_network(
    tmp_path: Path,
) -> None:
    """Of such a stem the projections would have a bias, did the card not say otherwise."""
    config = Experiment(model=ResNetConfig.paper(8, Shortcut.A, stem=Stem.CONV))
    trees = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract(config.model)[1:])
    constants = Normalization(1 / 255, None, np.ones(3))
    path = tmp_path / "mixed.safetensors"
    pretrained.write(path, config, *trees, constants, 0, {})
    assert flax_resnet.load_pretrained(path).architecture == config.model.architecture


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "flax-resnet weights, version 2"}'])
def test_a_card_that_is_none_is_refused(copy: Path, text: str) -> None:
    copy.with_suffix(".json").write_text(text)
    with pytest.raises(WeightsError, match=r"is no card of flax-resnet weights|must be of format"):
        flax_resnet.load_pretrained(copy)


def test_safetensors_without_a_card_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"has no card foreign.json.*flax_resnet.from_torch"):
        flax_resnet.load_pretrained(path)


def test_an_unknown_name_lists_the_known_ones(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pretrained.ENVIRONMENT, str(weights.parent))
    with pytest.raises(WeightsError, match=r"no weights called 'resnet21'.*there are: plain8"):
        flax_resnet.load_pretrained("resnet21")
