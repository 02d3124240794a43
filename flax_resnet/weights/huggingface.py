"""What lies beside the weights of transformers' ResNets, and says what no key tells.

config.json has the architecture and the names of the classes. A folder of it and of
model.safetensors is what `ResNetForImageClassification.from_pretrained` reads, and what
`save_pretrained` writes. preprocessor_config.json, if it is there, says what images it wants.
"""

import json
from pathlib import Path
from typing import Any

from flax_resnet.config import (
    Architecture,
    Block,
    ChannelPad,
    Interpolation,
    Preprocess,
    Projection,
    ResNetConfig,
    Shortcut,
    Stem,
    Stride,
)
from flax_resnet.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from flax_resnet.errors import WeightsError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
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
SQUASHED_FROM = 384  # pixels, from which ConvNext's preprocessor crops no more
RESAMPLING = {2: Interpolation.BILINEAR, 3: Interpolation.BICUBIC}  # PIL's numbers
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


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names of the classes that a config.json tells; None if it only numbers them.

    To be asked of one that `read_config` has read.
    """
    told = json.loads(path.read_text()).get("id2label") or {}
    names = {int(i): str(name) for i, name in told.items()}
    found = tuple(names[i] for i in sorted(names))
    is_numbered = not found or any(name == f"LABEL_{i}" for i, name in enumerate(found))
    return None if is_numbered else found


def read_preprocessor(path: Path) -> dict[str, Any]:
    """What a preprocessor_config.json says, by the name of `DataConfig`'s settings.

    Here PIL resizes and torchvision's rule cuts out the middle. transformers resizes tensors, so
    its pixels may differ a little.

    Raises:
        WeightsError: it is damaged, or does something to images that there is no setting for.
    """
    try:
        return to_settings(json.loads(path.read_text()))
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{path} is damaged ({type(e).__name__}: {e})") from e


def to_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Of a whole preprocessor_config.json. Raises WeightsError for what no setting can say."""
    kind = tree.get("image_processor_type") or tree.get("feature_extractor_type") or ""
    size, crop = tree.get("size"), tree.get("crop_size")
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    if isinstance(crop, dict):
        crop = crop["height"] if crop["height"] == crop["width"] else None
    found: dict[str, Any] = {}
    if "ConvNext" in kind or "crop_pct" in tree:
        side = side or SQUASHED_FROM
        is_whole, crop = side >= SQUASHED_FROM, side
        resize = int(side / (tree.get("crop_pct") or 224 / 256))
    else:
        is_whole, resize = not tree.get("do_center_crop"), side
    if not tree.get("do_resize", True):
        resize, is_whole = None, False
    elif is_whole or resize is None or not isinstance(crop, int):
        raise WeightsError(
            f"it makes images of size {size} without cropping a square out of their middle, for "
            "which there is no setting; data.resize and data.crop say what to do"
        )
    if resize is not None:
        found |= {"resize": int(resize), "crop": crop}
        number = tree.get("resample", 3 if "ConvNext" in kind else 2)
        if number not in RESAMPLING:
            raise WeightsError(f"resample must be one of {[*RESAMPLING]} (PIL's), got {number}")
        found["interpolation"] = RESAMPLING[number]
    if tree.get("do_rescale", True) and abs(tree.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise WeightsError(f"rescale_factor must be 1/255, got {tree['rescale_factor']}")
    mean, std = (0.0,) * 3, (1.0,) * 3
    if tree.get("do_normalize", True):
        mean = tuple(map(float, tree.get("image_mean", IMAGENET_MEAN)))
        std = tuple(map(float, tree.get("image_std", IMAGENET_STD)))
    if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        return found | {"preprocess": Preprocess.IMAGENET}
    return found | {"preprocess": Preprocess.CONSTANTS, "mean": mean, "std": std}


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
