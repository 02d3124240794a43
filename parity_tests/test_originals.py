"""Claim: torchvision's own networks, read from their state dicts, give torchvision's own logits.

In evaluation mode, in float64, with random weights and running statistics; the largest difference
over the largest logit is measured at most 3.3e-15, and the tolerance is 1e-13. torchvision's code
knows nothing of this project, so it shares no mistake with the twin.

The odd image size puts max-pool's padding to the test, and the strides of all stages.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_resnet
from flax_resnet.config import Shortcut, Stride
from parity_tests import others
from parity_tests.pair import torch

pytestmark = pytest.mark.slow


def torchvision_model(depth: int) -> "torch.nn.Module":
    """torchvision's ResNet with random weights and statistics, in float64."""
    models = others.torchvision("models")
    torch.manual_seed(depth)
    model = getattr(models, f"resnet{depth}")(num_classes=10).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def difference(depth: int, size: int, stride: Stride = Stride.CONV3X3) -> float:
    """Largest difference of the logits over the largest logit."""
    theirs = torchvision_model(depth)
    ours = flax_resnet.from_torch(theirs.state_dict(), stride=stride)
    assert (ours.architecture.shortcut, len(ours.architecture.blocks)) == (Shortcut.B, 4)
    image = np.random.default_rng(0).normal(size=(2, size, size, 3))
    with torch.no_grad():
        expected = theirs(torch.tensor(image).permute(0, 3, 1, 2)).numpy()
    found = np.asarray(nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(image)))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("depth", "size"), [(18, 96), (18, 225), (34, 97), (50, 96), (50, 65), (101, 64), (152, 64)]
)
def test_the_logits_are_torchvisions(depth: int, size: int) -> None:
    assert difference(depth, size) <= 1e-13


def test_another_stride_than_torchvisions_differs() -> None:
    assert difference(50, 64, Stride.CONV1X1) > 1e-2


def test_what_is_exported_loads_in_torchvision() -> None:
    """Its own names, all of them and no others, and the same numbers."""
    theirs = torchvision_model(50)
    ours = flax_resnet.from_torch(theirs.state_dict())
    back = flax_resnet.to_torch(ours, layout=flax_resnet.Layout.TORCHVISION)
    other = torchvision_model(50)
    other.load_state_dict(back, strict=True)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
