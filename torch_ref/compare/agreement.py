"""Whether a Flax and a PyTorch network with the same arrays are one function, by their logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resnet.config import DType, ResNetConfig
from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import abstract
from flax_resnet.weights import files
from flax_resnet.weights.layouts import StateDict
from flax_resnet.weights.state_dict import Imported
from torch_ref.resnet import ResNet

NUM_IMAGES = 8
LIMIT = {DType.FLOAT32: 1e-3, DType.FLOAT64: 1e-9}  # rounding alone: 1e-6 and 1e-15


def logit_differences(imported: Imported, state_dict: StateDict) -> dict[str, float]:
    """Largest difference of the logits on random images, over the largest logit, by compute type.

    Args:
        imported: for Flax.
        state_dict: for PyTorch, by the twin's names; those of no tensor are left aside.

    Raises:
        WeightsError: further apart than rounding explains.
    """
    channels = imported.config.image_channels
    image = np.random.default_rng(0).normal(size=(NUM_IMAGES, 32, 32, channels))
    found = {}
    for dtype in LIMIT:
        config = dataclasses.replace(imported.config, dtype=dtype)
        with jax.enable_x64(True):
            ours = flax_logits(config, imported, image)
        theirs = torch_logits(config, state_dict, image)
        found[dtype.value] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not all(found[dtype.value] <= limit for dtype, limit in LIMIT.items()):
        raise WeightsError(f"the two networks' logits differ by more than rounding ({found})")
    return found


def flax_logits(config: ResNetConfig, imported: Imported, image: np.ndarray) -> np.ndarray:
    graphdef, _, _ = abstract(config)
    arrays = (imported.params, imported.batch_stats)
    trees: tuple[Tree, Tree] = jax.tree.map(lambda x: jnp.array(x, config.dtype.value), arrays)
    model = nnx.merge(graphdef, *trees)
    model.eval()
    return np.asarray(jax.jit(lambda x: model(x))(jnp.array(image, config.dtype.value)))


@torch.no_grad()
def torch_logits(config: ResNetConfig, state_dict: StateDict, image: np.ndarray) -> np.ndarray:
    twin = ResNet(config).eval()
    tensors = files.tensors(state_dict)
    twin.load_state_dict({name: x for name, x in tensors.items() if name in twin.state_dict()})
    return twin(torch.tensor(image, dtype=twin.fc.weight.dtype).permute(0, 3, 1, 2)).numpy()
