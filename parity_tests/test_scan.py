"""Claim: scanning over blocks or over steps, and rematerialising, change nothing but rounding.

In float64, to 1e-12 of each tensor's largest value (0 measured on one device, 2e-13 on four, whose
sums have another order); the gradients that are written out for the CPU are JAX's own, to the bit.
On several devices, under `jit` and under `pmap`, with the statistics of the whole batch and with
each device's own. A checkpoint does not show how its run compiled.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from flax_resnet.config import DType, Experiment, Parallel, ResNetConfig, Shortcut, Statistics
from flax_resnet.data import digits, pixels
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.convolution import NHWC, convolve
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.scan import Scan, Tree, stack, unstack
from flax_resnet.parallel import sharding
from flax_resnet.resnet import ResNet, abstract, split
from flax_resnet.step import TrainState, init
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.feed import draw_steps
from flax_resnet.training.loop import compile_steps
from flax_resnet.weights.state_dict import to_state_dict

TOLERANCE = 1e-12
STEPS = 3


def experiment(
    parallel: Parallel = Parallel.JIT,
    batch_norm: Statistics = Statistics.GLOBAL,
    **settings: bool,
) -> Experiment:
    model = ResNetConfig(20, Shortcut.C, dtype=DType.FLOAT64, **settings)
    config = Experiment(model=model, parallel=parallel, batch_norm=batch_norm)
    config.train.batch_size = 4
    config.train.log_every = 2  # so that the metrics restart between two steps of one call
    return config


def run(
    config: Experiment, sizes: tuple[int, ...], num_devices: int = 1
) -> tuple[TrainState, list[float]]:
    """Calls of so many steps each; the state block by block, and the loss after every call."""
    examples = digits.load()["train"]
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    mesh = sharding.data_mesh()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), mesh.axis_names)
    program, state = init(config, num_devices)
    call = compile_steps(config, program, constants, mesh)
    state, on_device = sharding.replicate(mesh, (state, examples))
    losses, step = [], 0
    for size in sizes:
        drawn = draw_steps(config, step, size, len(examples.label))
        drawn = sharding.split_batch(mesh, drawn, config.parallel, axis=1)
        state, metrics = call(state, on_device, drawn)
        losses.append(metrics.mean()["loss"])
        step += size
    return unstack(jax.device_get(state)), losses


def distance(ours: TrainState, theirs: TrainState) -> float:
    def compare(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))

    return max(jax.tree.leaves(jax.tree.map(compare, ours[1:4], theirs[1:4])))


def test_gradients_and_statistics_are_the_same() -> None:
    """Of scanned blocks that are computed again, on small images: the default tests' only step."""
    config = ResNetConfig(20, Shortcut.A, dtype=DType.FLOAT64)
    scanned = replace(config, scan_blocks=True, remat=True)
    trees = make_trees(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))

    @partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
    def step(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
        def loss(params: Tree) -> tuple[jax.Array, Tree]:
            model = nnx.merge(graphdef, params, batch_stats, copy=True)
            return jnp.square(model(x)).sum(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    theirs = step(abstract(config)[0], *trees)
    ours = unstack(step(abstract(scanned)[0], *stack(trees)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() <= TOLERANCE * max(np.abs(b).max(), 1e-3)


def make_trees(config: ResNetConfig) -> tuple[Tree, Tree]:
    """Random weights, and statistics of a normalised batch."""
    rng = np.random.default_rng(0)
    _, params, batch_stats = abstract(config)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_in), leaf.shape))

    return jax.tree.map(draw, params), jax.tree.map(lambda x: jnp.ones(x.shape), batch_stats)


@pytest.fixture(scope="module")
def by_the_book() -> tuple[TrainState, list[float]]:
    return run(experiment(), (1,) * STEPS)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        pytest.param({"scan_blocks": True}, (1, 1, 1), id="blocks", marks=pytest.mark.slow),
        pytest.param(
            {"scan_blocks": True, "remat": True},
            (1, 1, 1),
            id="blocks, remat",
            marks=pytest.mark.slow,  # on four devices it is quick
        ),
        pytest.param({"remat": True}, (1, 1, 1), id="remat", marks=pytest.mark.slow),
        pytest.param({}, (3,), id="steps", marks=pytest.mark.slow),
        pytest.param({"scan_blocks": True}, (2, 1), id="blocks and steps", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same(
    settings: dict[str, bool], sizes: tuple[int, ...], by_the_book: tuple[TrainState, list[float]]
) -> None:
    state, losses = run(experiment(**settings), sizes)
    assert jax.tree.structure(state) == jax.tree.structure(by_the_book[0])
    assert state.step == STEPS
    assert distance(state, by_the_book[0]) <= TOLERANCE
    np.testing.assert_allclose(losses[-1], by_the_book[1][-1], rtol=1e-6)  # a float32


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("parallel", "remat", "sizes"),
    [
        pytest.param(Parallel.PMAP, True, (1, 1, 1), marks=slow),
        pytest.param(Parallel.PMAP, False, (2, 1), marks=slow),
        pytest.param(Parallel.JIT, True, (2, 1), marks=slow),
    ],
    ids=["pmap, blocks, remat", "pmap, blocks and steps", "jit, blocks and steps, remat"],
)
def test_training_on_four_devices_is_the_same(
    parallel: Parallel,
    remat: bool,
    sizes: tuple[int, ...],
    by_the_book: tuple[TrainState, list[float]],
) -> None:
    config = experiment(parallel, scan_blocks=True, remat=remat)
    state, losses = run(config, sizes, num_devices=4)
    assert distance(state, by_the_book[0]) <= TOLERANCE
    np.testing.assert_allclose(losses[-1], by_the_book[1][-1], rtol=1e-6)


@pytest.fixture(scope="module")
def replicas_by_the_book() -> TrainState:
    """Two devices, each with its own statistics, block by block."""
    return run(experiment(batch_norm=Statistics.REPLICA), (1,) * STEPS, num_devices=2)[0]


@slow
@pytest.mark.parametrize("parallel", Parallel, ids=lambda parallel: parallel.value)
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_training_with_replica_statistics_is_the_same(
    parallel: Parallel,
    remat: bool,
    replicas_by_the_book: TrainState,
    by_the_book: tuple[TrainState, list[float]],
) -> None:
    config = experiment(parallel, Statistics.REPLICA, scan_blocks=True, remat=remat)
    state, _ = run(config, (1,) * STEPS, num_devices=2)
    assert distance(state, replicas_by_the_book) <= TOLERANCE
    assert distance(state, by_the_book[0]) > 1e-2  # whose statistics are the whole batch's


@slow
@pytest.mark.parametrize(
    ("parallel", "batch_norm"),
    [(Parallel.PMAP, Statistics.GLOBAL), (Parallel.JIT, Statistics.REPLICA)],
    ids=["pmap, global", "jit, replica"],
)
def test_statistics_of_other_images_in_the_scanned_blocks_differ(
    parallel: Parallel,
    batch_norm: Statistics,
    by_the_book: tuple[TrainState, list[float]],
    replicas_by_the_book: TrainState,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = Scan.__call__

    def mutant(self: Scan, x: jax.Array) -> jax.Array:
        """What `init` has told BatchNorm does not reach the scanned blocks."""
        self.blocks.set_attributes(BatchNorm, axis_name=None, is_global=True, shares=1)
        return call(self, x)

    monkeypatch.setattr(Scan, "__call__", mutant)
    state, _ = run(experiment(parallel, batch_norm, scan_blocks=True), (1,) * STEPS, num_devices=2)
    book = by_the_book[0] if batch_norm is Statistics.GLOBAL else replicas_by_the_book
    assert distance(state, book) > 1e-2


def test_a_stacked_tree_is_the_same_tree() -> None:
    params, batch_stats = make_trees(ResNetConfig(20))
    stacked = stack((params, batch_stats))
    assert len(stacked[0]["stages"][2]) == 2
    assert jax.tree.leaves(stacked[0]["stages"][2][1])[0].shape[0] == 2
    assert jax.tree.structure(stack(stacked)) == jax.tree.structure(stacked)
    back = unstack(stacked)
    assert jax.tree.structure(back) == jax.tree.structure((params, batch_stats))
    jax.tree.map(np.testing.assert_array_equal, back, (params, batch_stats))


def test_a_scanned_network_starts_from_the_same_weights() -> None:
    config = ResNetConfig(14, Shortcut.B)
    _, *ours = split(ResNet(replace(config, scan_blocks=True), rngs=nnx.Rngs(5)))
    _, *theirs = split(ResNet(config, rngs=nnx.Rngs(5)))
    ours, theirs = (to_state_dict(config.architecture, *trees) for trees in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize("saved_scanned", [False, True], ids=["block by block", "scanned"])
def test_a_checkpoint_goes_both_ways(tmp_path: Path, saved_scanned: bool) -> None:
    shapes = jax.eval_shape(lambda: init(experiment())[1])
    rng = np.random.default_rng(0)
    unrolled = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    scanned = stack(unrolled)
    like = jax.eval_shape(lambda: init(experiment(scan_blocks=True))[1])
    assert jax.tree.structure(scanned) == jax.tree.structure(like)
    saved, like = (scanned, unrolled) if saved_scanned else (unrolled, scanned)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, None)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    jax.tree.map(np.testing.assert_array_equal, restored, like)


@pytest.mark.parametrize(("size", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0)])
def test_a_convolutions_gradients_are_jaxs_own(size: int, stride: int, pad: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 3)))
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)))
    strides, pads = (stride, stride), ((pad, pad), (pad, pad))

    def theirs(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)

    y, our_vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, strides, pads), x, kernel)
    z, their_vjp = jax.vjp(theirs, x, kernel)
    dy = jnp.asarray(rng.normal(size=y.shape))
    np.testing.assert_array_equal(y, z)
    for a, b in zip(our_vjp(dy), their_vjp(dy), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("depth", "settings", "scans", "blocks_again"),
    [
        (20, {}, 0, 0),
        (20, {"remat": True}, 0, 9),
        (20, {"scan_blocks": True}, 6, 0),  # one forwards and one backwards in each stage
        (20, {"scan_blocks": True, "remat": True}, 6, 6),  # the first of a stage and the scanned
        (14, {"scan_blocks": True}, 6, 0),
        (8, {"scan_blocks": True}, 0, 0),  # a stage of one block leaves none to scan
    ],
)
def test_the_gradients_program_has_what_was_asked_for(
    depth: int, settings: dict[str, bool], scans: int, blocks_again: int
) -> None:
    """Since neither setting changes a number, nothing else would show that it does something."""
    model = nnx.eval_shape(lambda: ResNet(ResNetConfig(depth, **settings), rngs=nnx.Rngs(0)))
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, batch_stats: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, batch_stats, copy=True)(x).sum()

    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    program = str(jax.make_jaxpr(jax.grad(loss))(params, batch_stats, image))
    assert len(re.findall(r"\bscan\[", program)) == scans
    assert len(re.findall(r"\b(?:checkpoint|remat2?)\[", program)) == blocks_again


def test_a_scan_stores_each_activation_once_and_in_its_own_type() -> None:
    """Of a block: what goes in, what each convolution gives and what each rectifier gives."""
    config = ResNetConfig(20, dtype=DType.BFLOAT16, scan_blocks=True)
    graphdef, params, batch_stats = abstract(config)

    def loss(params: Tree, batch_stats: Tree, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, batch_stats, copy=True)(x).sum()

    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(loss))(params, batch_stats, image).jaxpr
    scans = [x for x in program.eqns if x.primitive.name == "scan"]
    forwards = [x for x in scans if not x.params["reverse"]]
    assert len(forwards) == 3
    for side, channels, scan in zip((32, 16, 8), (16, 32, 64), forwards, strict=True):
        shape = (2, 2, side, side, channels)  # of two blocks
        stored = [x.aval.dtype for x in scan.outvars if x.aval.size == np.prod(shape)]
        assert stored == [jnp.bfloat16] * 5
