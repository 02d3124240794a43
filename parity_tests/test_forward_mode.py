"""Claim: in evaluation mode `jax.jvp` of a network is PyTorch's `torch.func.jvp`, in float64 to
1e-12.

By image and parameters at once. Measured 1e-15.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_resnet.config import DType, ResNetConfig, Shortcut, Stem
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import abstract
from flax_resnet.weights.trees import tree_to_torch
from parity_tests.pair import images, make_pair, relative, to_torch, torch

# PyTorch's forward mode compiles some of its rules with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

# With a max-pool, and all kinds of layers that the large networks have.
SMALL = ResNetConfig.paper(8, Shortcut.B, stem=Stem.CONV7_BN_RELU_POOL, dtype=DType.FLOAT64)


def make_logits(
    graphdef: nnx.GraphDef, batch_stats: Tree
) -> Callable[[Tree, jax.Array], jax.Array]:
    """The network in evaluation mode, as a function of its parameters and the images."""

    def logits(params: Tree, image: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        model.eval()
        return model(image)

    return logits


def results(config: ResNetConfig, left_out: str = "") -> tuple[Any, Any]:
    """Logits and their tangents, ours and theirs, whose tangent lacks what is left out."""
    pair = make_pair(config)
    image, change = (images(2, seed) for seed in (0, 1))
    rng = np.random.default_rng(2)
    moves: Any = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape)), pair.params)
    logits = make_logits(pair.graphdef, pair.batch_stats)
    ours = jax.jit(partial(jax.jvp, logits))(
        (pair.params, jnp.asarray(image)), (moves, jnp.asarray(change))
    )

    weights = {name: p.detach() for name, p in pair.twin.named_parameters()}
    tangent = {name: torch.from_numpy(x) for name, x in tree_to_torch(moves).items()}
    tangent = {name: tangent[name] for name in weights}  # in the same order
    if left_out == "parameters":
        tangent = {name: torch.zeros_like(x) for name, x in tangent.items()}
    change = to_torch(np.zeros_like(change) if left_out == "image" else change)

    def twin(weights: Any, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pair.twin.eval(), weights, (image,))

    return ours, torch.func.jvp(twin, (weights, to_torch(image)), (tangent, change))


@pytest.mark.slow
def test_it_is_pytorchs() -> None:
    ours, theirs = results(SMALL)
    assert max(map(relative, ours, theirs)) <= 1e-12


def test_it_can_be_compiled() -> None:
    """Lowering is where a gradient that is reverse-mode only is refused."""
    graphdef, params, batch_stats = abstract(SMALL)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float64)

    def derivative(params: Tree, batch_stats: Tree, image: jax.Array) -> Any:
        primals = params, image
        return jax.jvp(make_logits(graphdef, batch_stats), primals, primals)

    _, tangent = jax.jit(derivative).lower(params, batch_stats, image).out_info
    assert tangent.shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["parameters", "image"])
def test_a_part_of_the_tangent_that_is_left_out_differs(left_out: str) -> None:
    ours, theirs = results(SMALL, left_out)
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
