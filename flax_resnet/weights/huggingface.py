"""The config.json of transformers' ResNets: the architecture, of which the keys tell only a part.

A folder of its and of model.safetensors is what `ResNetForImageClassification.from_pretrained`
reads, and what `save_pretrained` writes.
"""

import json
from pathlib import Path
from typing import Any

from flax_resnet.config import (
    Architecture,
    Block,
    ChannelPad,
    Projection,
    ResNetConfig,
    Shortcut,
    Stem,
    Stride,
)
from flax_resnet.errors import WeightsError

CONFIG = "config.json"
EXPANSION = {Block.BASIC: 1, Block.BOTTLENECK: 4}
# What transformers takes where a config.json is silent.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
}
FIXED = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_first_stage": False}


def read_config(path: Path) -> Architecture | None:
    """The architecture that a config.json tells; None if it is not one of transformers.

    Raises:
        WeightsError: it is of another network than a ResNet, or damaged.
    """
    try:
        tree = json.loads(path.read_text())
    except ValueError as e:
        raise WeightsError(f"{path} is no JSON, or is damaged ({e})") from e
    if not isinstance(tree, dict) or "model_type" not in tree:
        return None
    try:
        return to_architecture(DEFAULTS | tree)
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f"{path} is damaged ({type(e).__name__}: {e})") from e


def to_architecture(tree: dict[str, Any]) -> Architecture:
    """The architecture of a whole config.json. Raises WeightsError if there is none such."""
    for name, value in FIXED.items():
        if tree[name] != value:
            raise WeightsError(f"{name} must be {value}, got {tree[name]}")
    if "ResNetModel" in (tree.get("architectures") or ()):
        raise WeightsError(
            "this is a ResNetModel, which has no classifier; give a ResNetForImageClassification"
        )
    block = Block(tree["layer_type"])
    widths = tuple(int(size) // EXPANSION[block] for size in tree["hidden_sizes"])
    if tree["embedding_size"] != widths[0]:
        raise WeightsError(f"embedding_size must be {widths[0]}, got {tree['embedding_size']}")
    stride = Stride.CONV1X1 if tree["downsample_in_bottleneck"] else Stride.CONV3X3
    return Architecture(
        image_channels=int(tree["num_channels"]),
        stem=Stem.CONV7_BN_RELU_POOL,
        block=block,
        widths=widths,
        blocks=tuple(map(int, tree["depths"])),
        stride=stride if block is Block.BOTTLENECK else None,
        shortcut=Shortcut.B,
        channel_pad=ChannelPad.END,
        projection=Projection.CONV_BN,
        conv_bias=False,
        batch_norm_epsilon=ResNetConfig.batch_norm_epsilon,  # PyTorch's: transformers sets none
        num_classes=len(tree["id2label"]),
    )


def to_config(architecture: Architecture) -> dict[str, Any]:
    """Inverse of `to_architecture`, for networks of transformers' layout."""
    labels = [f"LABEL_{i}" for i in range(architecture.num_classes)]
    expansion = EXPANSION[architecture.block]
    return FIXED | {
        "architectures": ["ResNetForImageClassification"],
        "num_channels": architecture.image_channels,
        "embedding_size": architecture.widths[0],
        "hidden_sizes": [expansion * width for width in architecture.widths],
        "depths": list(architecture.blocks),
        "layer_type": architecture.block.value,
        "downsample_in_bottleneck": architecture.stride is Stride.CONV1X1,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
