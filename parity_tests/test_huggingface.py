"""Claim: a folder of transformers is read as its config.json says, and it reads ours.

No key tells where the stride of a bottleneck is: the config.json does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flax_resnet
from flax_resnet.config import Interpolation, Preprocess, ResNetConfig, Stride
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.training.converted import check_target
from flax_resnet.weights import files, huggingface
from flax_resnet.weights.header import Header
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import from_state_dict
from parity_tests.others import randomize
from parity_tests.pair import torch
from parity_tests.test_exports import TOLERANCE, difference, huggingface_model, peer

ROOT = Path(__file__).parent.parent
V1 = ResNetConfig.imagenet(50, stride=Stride.CONV1X1, num_classes=7, image_channels=1).architecture
V1_5 = ResNetConfig.imagenet(50, stride=Stride.CONV3X3).architecture
BASIC = ResNetConfig.imagenet(34, num_classes=10).architecture


def write_config(folder: Path, **changes: Any) -> Path:
    """A config.json of ResNet-50, with changes; those that are None are left out."""
    tree = {"model_type": "resnet", "id2label": {"0": "cat", "1": "dog", "2": "fish"}} | changes
    path = folder / "config.json"
    path.write_text(json.dumps({name: x for name, x in tree.items() if x is not None}))
    return path


@pytest.mark.parametrize("architecture", [V1, V1_5, BASIC], ids=["v1", "v1.5", "basic"])
def test_an_architecture_there_and_back(architecture: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface.to_config(architecture)))
    assert huggingface.read_config(path) == architecture


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    """Its defaults are those of ResNet-50 with the stride on the 3x3 convolution."""
    found = huggingface.read_config(write_config(tmp_path))
    assert found == ResNetConfig.imagenet(50, stride=Stride.CONV3X3, num_classes=3).architecture
    found = huggingface.read_config(write_config(tmp_path, downsample_in_bottleneck=True))
    assert found is not None
    assert found.stride is Stride.CONV1X1
    found = huggingface.read_config(write_config(tmp_path, id2label=None))
    assert found is not None
    assert found.num_classes == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type must be resnet, got vit"),
        ({"hidden_act": "gelu"}, "hidden_act must be relu, got gelu"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage must be False, got True"),
        ({"architectures": ["ResNetModel"]}, "this is a ResNetModel, which has no classifier"),
        ({"embedding_size": 32}, "embedding_size must be 64, got 32"),
        ({"layer_type": "wide"}, "is damaged"),
        ({"hidden_sizes": 3}, "is damaged"),
    ],
    ids=str,
)
def test_a_config_of_another_network(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        huggingface.read_config(write_config(tmp_path, **changes))
    assert "config.json" in str(error.value)


def test_a_config_of_others(tmp_path: Path) -> None:
    """timm's has no model_type: the keys are all there is to go by."""
    assert huggingface.read_config(write_config(tmp_path, model_type=None)) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is no JSON, or is damaged"):
        huggingface.read_config(tmp_path / "config.json")


def test_a_folder_is_read_with_its_config(tmp_path: Path) -> None:
    state = {"fc.weight": np.ones((3, 4), np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    assert files.read(tmp_path).header is None
    write_config(tmp_path, downsample_in_bottleneck=True)
    header = files.read(tmp_path).header
    assert header is not None
    assert header.architecture.stride is Stride.CONV1X1
    files.write_folder(tmp_path, state, Header(V1))  # what was there is replaced
    header = files.read(tmp_path).header
    assert header is not None
    assert header.architecture == V1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_only_such_a_folder_is_replaced(tmp_path: Path) -> None:
    files.write_folder(tmp_path, {"fc.weight": np.ones((3, 4), np.float32)}, Header(V1))
    check_target(tmp_path, is_workdir=True, overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is nothing that convert\.py wrote"):
        check_target(tmp_path, is_workdir=True, overwrite=True)


# --- With transformers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_transformers_saves_is_read_as_it_is(tmp_path: Path) -> None:
    """Here with the stride on the 1x1 convolution, which is not what would be assumed."""
    theirs = randomize(huggingface_model(50, in_first=True))
    theirs.save_pretrained(tmp_path)
    contents = files.read(tmp_path)
    imported = from_state_dict(contents.state_dict, header=contents.header)
    assert imported.assumed == {}
    assert imported.layout is Layout.HUGGINGFACE
    ours = flax_resnet.from_torch(tmp_path)
    assert ours.architecture.stride is Stride.CONV1X1
    assert difference(theirs, ours, 65) <= TOLERANCE
    with pytest.raises(WeightsError, match="stride must be"):
        flax_resnet.from_torch(tmp_path, stride=Stride.CONV3X3)


@pytest.mark.slow
def test_the_folder_that_convert_writes_is_read_by_transformers(tmp_path: Path) -> None:
    transformers = peer("transformers")
    theirs = randomize(huggingface_model(18)).float()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    folder = tmp_path / "folder"
    command = [sys.executable, ROOT / "scripts" / "convert.py", tmp_path / "theirs.pt", folder]
    subprocess.run(
        [*map(str, command), "--layout=huggingface"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    other, told = transformers.ResNetForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(told.values())
    assert other.config.num_labels == 10
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


MICROSOFT = {  # of microsoft/resnet-50
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
CUT = {"resize": 256, "crop": 224, "interpolation": Interpolation.BICUBIC}
OTHER = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (MICROSOFT, CUT | {"preprocess": Preprocess.IMAGENET}),
        (
            MICROSOFT | {"size": {"shortest_edge": 160}, "resample": 2} | OTHER,
            {"resize": 182, "crop": 160, "interpolation": Interpolation.BILINEAR}
            | {"preprocess": Preprocess.CONSTANTS, "mean": (0.5,) * 3, "std": (0.25,) * 3},
        ),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "do_normalize": False}
            | {"crop_size": {"height": 224, "width": 224}, "resample": 3},
            CUT | {"preprocess": Preprocess.CONSTANTS, "mean": (0.0,) * 3, "std": (1.0,) * 3},
        ),
        (MICROSOFT | {"do_resize": False}, {"preprocess": Preprocess.IMAGENET}),
    ],
)
def test_a_preprocessor_says_how_images_are_cut(tree: dict, expected: dict) -> None:
    assert huggingface.to_settings(tree) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 384}, "without cropping a square"),
        ({"resample": 1}, "resample must be one of"),
        ({"rescale_factor": 1}, "rescale_factor must be 1/255, got 1"),
    ],
)
def test_what_no_setting_can_say_is_refused(change: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        huggingface.to_settings(MICROSOFT | change)


def test_a_folders_preprocessor_and_classes_are_read_with_its_weights(tmp_path: Path) -> None:
    """A preprocessor that is not understood is told of, and the weights are read."""
    write_config(tmp_path)
    contents = files.Contents({}, [], [])
    found = files.with_folder(contents, tmp_path)
    assert (found.images, found.classes) == ({}, ("cat", "dog", "fish"))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(MICROSOFT))
    found = files.with_folder(contents, tmp_path)
    assert (found.images["resize"], found.preprocess) == (256, Preprocess.IMAGENET)
    path.write_text(json.dumps(MICROSOFT | {"size": 384}))
    found = files.with_folder(contents, tmp_path)
    assert found.images == {}
    assert "passed over" in found.told[0]
    write_config(tmp_path, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    assert files.with_folder(contents, tmp_path).classes is None
