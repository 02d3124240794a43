"""Claim: in evaluation mode `jax.jvp` of a network is PyTorch's, in float64 to 1e-12.

By image, parameters and running statistics at once. Measured at most 4e-15. The mutants are the
same networks with one part of the tangent left out.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_resnet.config import DType, ResNetConfig, Shortcut
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import abstract
from flax_resnet.weights.state_dict import to_state_dict
from parity_tests.pair import LARGE, images, make_pair, relative, to_torch, torch

# PyTorch's forward mode compiles some of its rules with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def tangents(config: ResNetConfig, left_out: str = "") -> tuple[Any, Any]:
    """Ours and theirs, of the logits."""
    pair = make_pair(config)
    size = 32 if config.depth == 8 else 33
    image, towards = (images(2, seed, size=size) for seed in (0, 1))
    rng = np.random.default_rng(2)
    arrays = pair.params, pair.batch_stats
    moves: Any = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape), arrays)

    def logits(params: Tree, batch_stats: Tree, image: jax.Array) -> jax.Array:
        model = nnx.merge(pair.graphdef, params, batch_stats, copy=True)
        model.eval()
        return model(image)

    given = (*moves, towards)
    parts = ("parameters", "statistics", "image")
    given = [
        jax.tree.map(jnp.zeros_like, x) if name == left_out else x
        for name, x in zip(parts, given, strict=True)
    ]
    primals = (*arrays, jnp.asarray(image))
    found = jax.jit(lambda *args: jax.jvp(logits, args, tuple(given)))(*primals)
    changes = to_state_dict(config.architecture, *moves)
    # Of the tensors that are no counters, in one order.
    weights = {k: x.clone() for k, x in pair.twin.state_dict().items() if x.is_floating_point()}
    changes = {name: torch.from_numpy(changes[name]) for name in weights}

    def twin(weights: Any, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pair.twin.eval(), weights, (image,))

    theirs = (weights, to_torch(image)), (changes, to_torch(towards))
    return found, torch.func.jvp(twin, *theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ResNetConfig.paper(8, Shortcut.B, dtype=DType.FLOAT64), id="8-B"),
        pytest.param(LARGE["18-A"], id="18-A, with a max-pool"),
    ],
)
def test_it_is_pytorchs(config: ResNetConfig) -> None:
    ours, theirs = tangents(config)
    assert max(map(relative, ours, theirs)) <= 1e-12


@pytest.mark.parametrize("config", LARGE.values(), ids=LARGE)
def test_there_is_forward_mode_in_every_large_network(config: ResNetConfig) -> None:
    """It is traced, not computed."""
    graphdef, *arrays = abstract(config)

    def logits(params: Tree, batch_stats: Tree, image: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        model.eval()
        return model(image)

    image = jax.ShapeDtypeStruct((2, 64, 64, config.image_channels), jnp.float64)
    primals = (*arrays, image)
    _, tangent = jax.eval_shape(partial(jax.jvp, logits), primals, primals)
    assert tangent.shape == (2, config.num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["parameters", "statistics"])
def test_a_part_of_the_tangent_that_is_left_out_differs(left_out: str) -> None:
    ours, theirs = tangents(ResNetConfig.paper(8, Shortcut.B, dtype=DType.FLOAT64), left_out)
    assert relative(ours[0], theirs[0]) <= 1e-12
    assert relative(ours[1], theirs[1]) > 1e-2


@pytest.mark.slow
def test_training_mode_has_reverse_mode_alone_again_after_evaluation() -> None:
    """The gradients that are written for the CPU, which a scan needs to be fast, come back."""
    pair = make_pair(ResNetConfig.paper(8, dtype=DType.FLOAT64))
    model = pair.model()
    model.eval()
    model.train()
    assert nnx.split(model)[0] == nnx.split(pair.model())[0]
