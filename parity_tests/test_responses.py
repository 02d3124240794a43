"""Claim: the layers' responses are PyTorch's, in float64 to 1e-13 of each: the standard deviation
of what every 3x3 layer gives, after BatchNorm and before ReLU and addition.

Measured: at most 1.5e-14. PyTorch's come from hooks on the twin, over all images at once; ours from
batches.
"""

import numpy as np
import pytest

from flax_resnet.config import DType, Experiment, ResNetConfig, Shortcut
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.studies import responses
from parity_tests.pair import Pair, make_pair, to_torch, torch

CONSTANTS = Normalization(1 / 255, np.full(3, 0.5), np.full(3, 0.25))


def examples() -> Examples:
    image = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    return Examples(image, np.zeros(11, np.int32))


def theirs(pair: Pair) -> dict[str, float]:
    """By the name of the convolution that each layer begins with."""
    found: dict[str, float] = {}
    twin = pair.twin.eval()
    for name, module in twin.named_modules():
        is_bare_stem = name == "conv1" and twin.bn1 is None
        is_norm = isinstance(module, torch.nn.BatchNorm2d) and "shortcut" not in name
        if is_norm or is_bare_stem:
            layer = name.replace("bn", "conv")
            module.register_forward_hook(
                lambda _, __, y, layer=layer: found.update({layer: y.std(correction=0).item()})
            )
    image = (examples().image / 255 - 0.5) / 0.25
    with torch.no_grad():
        twin(to_torch(image))
    return found


@pytest.mark.parametrize(
    "model",
    [
        ResNetConfig.paper(8, Shortcut.PLAIN, dtype=DType.FLOAT64),
        ResNetConfig.paper(8, Shortcut.C, dtype=DType.FLOAT64),
        ResNetConfig.tanjeffreyz(8, Shortcut.A, dtype=DType.FLOAT64),
    ],
    ids=["plain", "C", "tanjeffreyz"],
)
def test_responses_are_pytorchs(model: ResNetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "BATCH_SIZE", 4)  # batches of 4, 4 and 3
    pair = make_pair(model)
    ours = responses.layer_responses(
        Experiment(model=model), pair.params, pair.batch_stats, examples(), CONSTANTS
    )
    expected = theirs(pair)
    assert ours["layers"] == list(expected)
    assert len(expected) == model.depth - 1  # all but the classifier
    np.testing.assert_allclose(ours["std"], list(expected.values()), rtol=1e-13)
