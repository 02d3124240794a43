"""Claim: PyTorch with torchvision's own transforms and these commands see and say the same.

The same file, a ResNet-18 of torchvision's code with random weights, is shown the same photographs,
from their files on. In float64 the largest difference of the logarithms of the probabilities, over
the largest logit, is measured 2.5e-15; the tolerance is 1e-12.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet
from flax_resnet.config import DataConfig, Dataset, Placement, Preprocess
from flax_resnet.data import pixels, source, views
from flax_resnet.data.encoded import Images
from flax_resnet.resnet import split
from flax_resnet.training import predictions
from flax_resnet.training.predictions import Network
from parity_tests import data_sets, others
from parity_tests.pair import torch
from parity_tests.test_originals import torchvision_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
OUTPUTS = [7, 0, 5, 2]  # of the network's ten, that stand for the four classes
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Theirs(NamedTuple):
    """What PyTorch says of the photographs of val, in the order of ImageFolder."""

    paths: list[Path]
    label: np.ndarray
    logits: np.ndarray  # float64 (n, 10)


def photos() -> DataConfig:
    place = str(data_sets.need_photos())
    return DataConfig(name=Dataset.FOLDER, dir=place, placement=Placement.STREAMED)


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    transforms, datasets = others.torchvision("transforms"), others.torchvision("datasets")
    cut = [
        *(transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()),
        *(transforms.ConvertImageDtype(torch.float64), transforms.Normalize(**IMAGENET)),
    ]
    found = datasets.ImageFolder(data_sets.need_photos() / "val", transforms.Compose(cut))
    model = torchvision_model(18)
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in found])).numpy()
    paths, label = zip(*found.samples, strict=True)
    return Theirs(list(map(Path, paths)), np.array(label), logits)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_numbers_that_a_network_is_given_are_torchvisions_to_the_bit() -> None:
    """In float32, as its presets have them, inside a compiled step."""
    transforms = others.torchvision("transforms")
    config = photos()
    cut = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    preset = transforms.Compose([*cut, transforms.Normalize(**IMAGENET)])
    constants = pixels.make_normalization(Preprocess.IMAGENET)
    normalize = jax.jit(lambda x: pixels.normalize(x, constants, jnp.float32))
    test = source.load(config, ("test",))["test"]
    assert isinstance(test, Images)
    for i in (0, 5, 9, 15):
        image = test.image(i)
        found = np.asarray(normalize(views.evaluation(image, config)[None]))[0]
        np.testing.assert_array_equal(found, preset(image).permute(1, 2, 0).numpy())


def test_every_photograph_has_pytorchs_probabilities(theirs: Theirs) -> None:
    model = flax_resnet.from_torch(torchvision_model(18).state_dict())
    config, constants = photos(), pixels.make_normalization(Preprocess.IMAGENET)
    test = source.load(config, ("test",))["test"]
    network = Network(*split(model), constants, batch_size=16, side=224)
    np.testing.assert_array_equal(test.label, theirs.label)
    shown = np.stack([test.seen(i, lambda x: views.evaluation(x, config)) for i in range(16)])
    expected, scale = log_softmax(theirs.logits), np.abs(theirs.logits).max()
    _, ours = network(shown, test.label)
    assert np.abs(ours - expected).max() / scale <= 1e-12

    look = predictions.looks(test, lambda x: predictions.as_evaluated(x, config))
    found = predictions.predict(network, test.label, look, threads=2)
    np.testing.assert_array_equal(found.top, np.argsort(-expected, 1)[:, :5])
    loss = -expected[np.arange(16), theirs.label]
    assert np.abs(found.loss - loss).max() / scale <= 1e-12


def run(script: str, *arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_say_what_pytorch_says(theirs: Theirs, tmp_path: Path) -> None:
    """A network of ten classes on a folder of four, by their names; and each photograph."""
    file, names = tmp_path / "resnet18.pth", [f"thing {i}" for i in range(10)]
    folders = sorted({path.parent.name for path in theirs.paths})
    for output, folder in zip(OUTPUTS, folders, strict=True):
        names[output] = folder
    (tmp_path / "names.txt").write_text("\n".join(names))
    torch.save(torchvision_model(18).state_dict(), file)
    config = photos()
    common = [f"--checkpoint={file}", f"--class_names={tmp_path / 'names.txt'}"]
    told = run(
        *("evaluate.py", *common, "--config.data.name=folder", f"--config.data.dir={config.dir}"),
        "--config.model.dtype=float64",
    )
    found = json.loads(told.splitlines()[-1])
    expected = log_softmax(theirs.logits[:, OUTPUTS])
    loss = -expected[np.arange(16), theirs.label].mean()
    assert found["test_error"] == pytest.approx((expected.argmax(1) != theirs.label).mean())
    assert (found["top5_error"], found["examples"]) == (0, 16)
    assert found["test_loss"] == pytest.approx(loss, rel=1e-6)  # summed in float32

    told = run(
        *("predict.py", *common, "--json", "--config.model.dtype=float64"),
        *map(str, theirs.paths[:3]),
    )
    for line, logits in zip(map(json.loads, told.splitlines()), theirs.logits, strict=False):
        probability = np.exp(log_softmax(logits[None]))[0]
        order = np.argsort(-probability)[:5]
        assert [x["name"] for x in line["classes"]] == [names[i] for i in order]
        shares = [x["probability"] for x in line["classes"]]
        np.testing.assert_allclose(shares, probability[order], rtol=1e-10)
