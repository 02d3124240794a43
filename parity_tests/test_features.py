"""Claim: `model.features(images)` gives what the stem and each stage give, which is the twin's.

In evaluation mode in float64, to 1e-13; the head of the last of them is the network's result.
"""

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_resnet.config import DType, ResNetConfig, Shortcut, Stages
from flax_resnet.nn.scan import stack
from flax_resnet.resnet import ResNet, abstract
from parity_tests.pair import LARGE, Pair, images, make_pair, relative, to_torch, torch


def model_of(pair: Pair, **settings: bool) -> ResNet:
    """Ours in evaluation mode, with its blocks computed in another way."""
    config = pair.config
    graphdef, *_ = abstract(ResNetConfig(**vars(config) | settings))
    arrays = pair.params, pair.batch_stats
    model = nnx.merge(graphdef, *(stack(arrays) if settings.get("scan_blocks") else arrays))
    model.eval()
    return model


def check(config: ResNetConfig, **settings: bool) -> None:
    pair = make_pair(config)
    size = 32 if config.stages is Stages.CIFAR else 65
    image = images(2, size=size)
    model = model_of(pair, **settings)
    run = jax.jit(lambda model, x: (model.features(x), model(x)))
    ours, logits = run(model, jnp.asarray(image))
    with torch.no_grad():
        theirs = pair.twin.eval().features(to_torch(image))
        expected = pair.twin(to_torch(image))
        assert torch.equal(pair.twin.head(theirs[-1]), expected)
    assert len(ours) == len(theirs) == 1 + len(config.architecture.widths)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.transpose(0, 3, 1, 2), b) <= 1e-13
    assert relative(logits, expected) <= 1e-13


def test_they_are_the_twins() -> None:
    check(ResNetConfig.paper(8, Shortcut.A, dtype=DType.FLOAT64))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"scan_blocks": True, "remat": True}])
def test_they_are_the_twins_in_a_large_network(settings: dict[str, bool]) -> None:
    check(LARGE["50-B"], **settings)


def test_in_evaluation_mode_nothing_is_written() -> None:
    """So that a transformation, here `jax.eval_shape`, can close over the model."""
    settings = {"scan_blocks": True, "remat": True}
    config = ResNetConfig.paper(14, **settings)
    graphdef, *arrays = abstract(config)
    model = nnx.merge(graphdef, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arrays))
    model.eval()
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(lambda x: model(x), image).shape == (2, 10)
    model.train()
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate BatchStat"):
        jax.eval_shape(lambda x: model(x), image)


@pytest.mark.slow
def test_they_are_what_the_layers_give() -> None:
    """`layers()` goes block by block; a stage's last block gives the stage's feature."""
    pair = make_pair(ResNetConfig.paper(14, dtype=DType.FLOAT64))
    model, image = model_of(pair), jnp.asarray(images(2))
    x, found = image, {}
    for name, layer in model.layers():
        x = found[name] = layer(x)
    names = ["stem", "stages.0.1", "stages.1.1", "stages.2.1"]
    for name, feature in zip(names, model.features(image), strict=True):
        assert jnp.array_equal(found[name], feature)
