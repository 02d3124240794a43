"""Claim: from Flax to PyTorch and back, or the other way round, changes no bit, nor the training.

Weights, statistics and the step survive in every layout, family and kind of shortcut, as arrays
and through files; so do the signs of zeros and denormal numbers. (One exception, which is stated
where it arises: tanjeffreyz's files hold projections that nothing uses; they are not kept.)

The optimizer's momentum survives too, so that 20 steps in one framework and 20 in the other are 40
steps in either. In float64 to 1e-11 of each array's largest number: rounding grows by every step,
to 1.4e-13 measured; beginning again with momentum 0 departs by 0.35.
"""

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_resnet
from flax_resnet.config import (
    DType,
    Experiment,
    OptimConfig,
    Projection,
    ResNetConfig,
    Shortcut,
    Stages,
)
from flax_resnet.data.pixels import Batch
from flax_resnet.errors import WeightsError
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import abstract, split
from flax_resnet.step import init, train_step
from flax_resnet.weights import files
from flax_resnet.weights.layouts import (
    Layout,
    check_layout,
    prefix_to_write,
    to_key,
    unused_projections,
)
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict
from flax_resnet.weights.trees import momentum_from_torch, momentum_to_torch, tree_to_torch
from parity_tests.pair import images, make_twin, to_torch, torch
from torch_ref import step as torch_step
from torch_ref.pixels import Batch as TorchBatch
from torch_ref.resnet import ResNet as TorchResNet

FAMILIES = {
    "paper": ResNetConfig.paper,
    "tanjeffreyz": ResNetConfig.tanjeffreyz,
    "akamaster": ResNetConfig.akamaster,
}
LAYOUTS = [layout for layout in Layout if layout not in (Layout.KUANGLIU, Layout.HUGGINGFACE)]
CASES = [
    pytest.param(layout, family, shortcut, id=f"{layout.value}-{family}-{shortcut.value}")
    for layout, family, shortcut in itertools.product(LAYOUTS, FAMILIES, Shortcut)
    if layout is not Layout.TANJEFFREYZ or family == "tanjeffreyz"
]


def random_trees(config: ResNetConfig, seed: int = 0) -> tuple[Tree, Tree]:
    """Parameters and statistics with every kind of number: negative zero and denormals too."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        array = rng.normal(size=leaf.shape).astype(leaf.dtype)
        array.flat[:3] = -0.0, np.finfo(leaf.dtype).smallest_subnormal, np.finfo(leaf.dtype).max
        return np.abs(array) if path[-1].key == "var" else array

    _, params, batch_stats = abstract(config)
    return jax.tree_util.tree_map_with_path(fill, (params, batch_stats))


@functools.cache
def network(
    family: str, depth: int, shortcut: Shortcut, dtype: DType
) -> tuple[ResNetConfig, Tree, Tree]:
    """Made once for all layouts; nothing writes to it."""
    config = FAMILIES[family](depth, shortcut, dtype=dtype, num_classes=7)
    return config, *random_trees(config)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Of two trees: the same structure, and in each leaf the same type, shape and bytes."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def random_torch(config: ResNetConfig, layout: Layout) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch network as PyTorch initialises it, with the layout's keys."""
    torch.manual_seed(0)
    state = {name: x.numpy().copy() for name, x in TorchResNet(config).state_dict().items()}
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(1234)
    if layout is Layout.TANJEFFREYZ:
        state |= unused_projections(config.architecture)
    prefix, blocks = prefix_to_write(layout, None), config.architecture.blocks
    return {prefix + to_key(name, layout, blocks): x for name, x in state.items()}


@pytest.mark.parametrize(
    ("depth", "dtype"),
    [(8, DType.FLOAT64), pytest.param(20, DType.FLOAT32, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("layout", "family", "shortcut"), CASES)
def test_flax_to_pytorch_to_flax(
    layout: Layout, family: str, shortcut: Shortcut, depth: int, dtype: DType
) -> None:
    config, params, batch_stats = network(family, depth, shortcut, dtype)
    state = to_state_dict(config.architecture, params, batch_stats, step=1234, layout=layout)
    back = from_state_dict(state, shortcut=shortcut, channel_pad=config.channel_pad)
    assert_same_bits((back.params, back.batch_stats), (params, batch_stats))
    assert (back.config, back.step) == (config, 1234)
    # Without projections the two have the same keys.
    is_same = layout is Layout.AKAMASTER_FC and shortcut in (Shortcut.PLAIN, Shortcut.A)
    assert back.layout is (Layout.TORCHVISION if is_same else layout)
    assert back.assumed.keys() == {"batch_norm_epsilon", "batch_norm_momentum"}


@pytest.mark.parametrize(("layout", "family", "shortcut"), CASES)
def test_pytorch_to_flax_to_pytorch(layout: Layout, family: str, shortcut: Shortcut) -> None:
    state = random_torch(FAMILIES[family](14, shortcut), layout)
    ours = from_state_dict(state, shortcut=shortcut)
    back = to_state_dict(
        ours.config.architecture, ours.params, ours.batch_stats, step=ours.step, layout=layout
    )
    assert_same_bits(back, state)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.value)
def test_models_through_files(layout: Layout, suffix: str, tmp_path: Path) -> None:
    is_tanjeffreyz = layout is Layout.TANJEFFREYZ
    config = FAMILIES["tanjeffreyz" if is_tanjeffreyz else "paper"](8, Shortcut.C)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    params, batch_stats = random_trees(config)
    state = to_state_dict(config.architecture, params, batch_stats, layout=layout)
    files.write(first, state, layout)
    model = flax_resnet.from_torch(first)
    assert_same_bits(split(model)[1:], (params, batch_stats))
    assert not any(module.use_running_average is False for module in batch_norms(model))
    tensors = flax_resnet.to_torch(model, layout=layout)
    assert_same_bits({key: x.numpy() for key, x in tensors.items()}, state)
    files.write(second, files.unwrap(tensors).state_dict, layout)
    assert_same_bits(files.read(second).state_dict, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]


def batch_norms(model: flax_resnet.ResNet) -> list[Any]:
    return [m for _, m in nnx.iter_modules(model) if hasattr(m, "use_running_average")]


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (Layout.TANJEFFREYZ, ResNetConfig.paper(8), "conv_bias True, got stem conv_bn_relu"),
        (
            Layout.TANJEFFREYZ,
            ResNetConfig.tanjeffreyz(8, Shortcut.B, projection=Projection.CONV_BN),
            "projection conv_bias, got .* projection conv_bn;",
        ),
        (Layout.TANJEFFREYZ, ResNetConfig.imagenet(50), "block basic, .* got .* block bottleneck"),
        (Layout.AKAMASTER, ResNetConfig.kuangliu(18), r"widths \(16, 32, 64\), got widths \(64, "),
        (Layout.KUANGLIU, ResNetConfig.akamaster(8), r"widths \(64, .* got widths \(16, 32, 64\)"),
        (
            Layout.HUGGINGFACE,
            ResNetConfig.kuangliu(18),
            "stem conv7_bn_relu_pool, .* got stem conv",
        ),
        (Layout.HUGGINGFACE, ResNetConfig.imagenet(18, Shortcut.A), "shortcut B, .* shortcut A"),
        (
            Layout.HUGGINGFACE,
            ResNetConfig.imagenet(18, projection=Projection.CONV_BIAS),
            "projection conv_bn, got .* projection conv_bias",
        ),
        (Layout.HUGGINGFACE, ResNetConfig.imagenet(18, conv_bias=True), "conv_bias False, .* True"),
    ],
)
def test_a_model_that_no_network_of_the_layout_is_like(
    layout: Layout, config: ResNetConfig, message: str
) -> None:
    with pytest.raises(WeightsError, match=f"{layout.value}'s layout has networks .*{message}"):
        check_layout(config.architecture, layout)


def test_what_stands_where_no_projection_is_used_decides_no_layout() -> None:
    config = ResNetConfig.tanjeffreyz(8, Shortcut.A, projection=Projection.CONV_BN)
    check_layout(config.architecture, Layout.TANJEFFREYZ)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "shortcut"),
    [(18, Shortcut.PLAIN), (18, Shortcut.A), (18, Shortcut.B), (34, Shortcut.B)],
)
def test_tanjeffreyzs_large_networks(depth: int, shortcut: Shortcut) -> None:
    """Also bit for bit: one channel, and keys that make room for the max-pool."""
    config = ResNetConfig.tanjeffreyz(depth, shortcut, stages=Stages.IMAGENET)
    params, batch_stats = random_trees(config)
    state = to_state_dict(
        config.architecture, params, batch_stats, step=7, layout=Layout.TANJEFFREYZ
    )
    back = from_state_dict(state, shortcut=shortcut, channel_pad=config.channel_pad)
    assert (back.config, back.layout, back.step) == (config, Layout.TANJEFFREYZ, 7)
    assert_same_bits((back.params, back.batch_stats), (params, batch_stats))
    again = to_state_dict(
        back.config.architecture,
        back.params,
        back.batch_stats,
        step=back.step,
        layout=Layout.TANJEFFREYZ,
    )
    assert_same_bits(again, state)


def test_tanjeffreyzs_unused_projections_are_the_exception() -> None:
    state = random_torch(ResNetConfig.tanjeffreyz(8, Shortcut.A), Layout.TANJEFFREYZ)
    state["model.2.conv_downsample.weight"] += 1
    ours = from_state_dict(state)
    back = to_state_dict(
        ours.config.architecture,
        ours.params,
        ours.batch_stats,
        step=1234,
        layout=Layout.TANJEFFREYZ,
    )
    changed = [key for key in state if not np.array_equal(back[key], state[key])]
    assert changed == ["model.2.conv_downsample.weight"]


# --- The optimizer --------------------------------------------------------------------------------

STEPS = 20
BATCH_SIZE = 4


def experiment(family: str, shortcut: Shortcut) -> Experiment:
    model = FAMILIES[family](8, shortcut, dtype=DType.FLOAT64)
    # The rate drops once in each half.
    return Experiment(model=model, optim=OptimConfig(boundaries=(STEPS // 2, STEPS * 3 // 2)))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    image = images(BATCH_SIZE, seed=step)[:, :16, :16]  # a quarter, which costs a quarter
    return image, np.random.default_rng(step).integers(10, size=BATCH_SIZE)


class Flax:
    """A training in Flax; its weights and momentum are told as arrays by PyTorch's names."""

    def __init__(self, config: Experiment):
        self.program, self.state = init(config)
        self.step = jax.jit(
            lambda state, *batch: train_step(self.program, state, Batch(*batch))[0],
            compiler_options=compiler_options(),
        )

    def run(self, start: int) -> None:
        for step in range(start, start + STEPS):
            self.state = self.step(self.state, *map(jnp.array, batch(step)))

    def weights(self) -> dict[str, np.ndarray]:
        return tree_to_torch(self.state.params) | tree_to_torch(self.state.batch_stats)

    def momentum(self) -> dict[str, np.ndarray]:
        return momentum_to_torch(self.state.opt_state)

    def take_over(self, other: "Torch") -> None:
        state = {key: x.numpy().copy() for key, x in other.state.model.state_dict().items()}
        imported = from_state_dict(state, shortcut=other.config.model.shortcut)
        assert imported.step == STEPS
        like = self.state.opt_state
        self.state = self.state._replace(
            step=jnp.array(imported.step, jnp.int32),
            params=jax.tree.map(jnp.array, imported.params),
            batch_stats=jax.tree.map(jnp.array, imported.batch_stats),
            opt_state=momentum_from_torch(other.momentum(), imported.step, like),
        )


class Torch:
    """The same in PyTorch."""

    def __init__(self, config: Experiment):
        self.config = config
        self.state = torch_step.init(config)

    def run(self, start: int) -> None:
        for step in range(start, start + STEPS):
            image, label = batch(step)
            torch_step.train_step(self.state, TorchBatch(to_torch(image), torch.tensor(label)))

    def weights(self) -> dict[str, np.ndarray]:
        state = self.state.model.state_dict().items()
        return {k: x.numpy().copy() for k, x in state if not k.endswith("num_batches_tracked")}

    def momentum(self) -> dict[str, np.ndarray]:
        buffers = self.state.optimizer.state
        named = self.state.model.named_parameters()
        return {name: buffers[p]["momentum_buffer"].numpy().copy() for name, p in named}

    def take_over(self, other: Flax, momentum: bool = True) -> None:
        state = other.state
        arrays = to_state_dict(
            self.config.model.architecture, state.params, state.batch_stats, step=int(state.step)
        )
        self.state.model.load_state_dict(files.tensors(arrays))
        buffers = files.tensors(other.momentum())
        for name, p in self.state.model.named_parameters():
            buffer = buffers[name] if momentum else torch.zeros_like(p)
            self.state.optimizer.state[p]["momentum_buffer"] = buffer
        for _ in range(int(state.step)):
            self.state.schedule.step()


def largest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Difference as a fraction of each array's largest number, or of 1e-3 if all are smaller.

    A bias before a BatchNorm has no effect, so its gradient is 0 but for rounding, and so is it.
    """
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[name] - x).max() / max(np.abs(x).max(), 1e-3))
        for name, x in theirs.items()
    )


@pytest.mark.slow  # test_trajectory goes side by side, and both directions are exact: see above
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize(
    ("family", "shortcut"), [("paper", Shortcut.A), ("tanjeffreyz", Shortcut.B)]
)
def test_twenty_steps_here_and_twenty_there(family: str, shortcut: Shortcut) -> None:
    config = experiment(family, shortcut)
    flax = Flax(config)
    flax.run(0)
    theirs, forgetful = Torch(config), Torch(config)
    theirs.take_over(flax)
    forgetful.take_over(flax, momentum=False)
    for training in (theirs, forgetful, flax):
        training.run(STEPS)
    there = largest(theirs.weights(), flax.weights()), largest(theirs.momentum(), flax.momentum())
    mutant = largest(forgetful.weights(), flax.weights())

    whole, ours = Torch(config), copy.copy(flax)
    whole.run(0)
    ours.take_over(whole)
    whole.run(STEPS)
    ours.run(STEPS)
    here = largest(ours.weights(), whole.weights()), largest(ours.momentum(), whole.momentum())
    print(f"Flax then PyTorch {there}, PyTorch then Flax {here}, without momentum {mutant:.1e}")
    assert max(*there, *here) <= 1e-11
    assert mutant > 1e-2


def at_step_0(config: Experiment) -> optax.OptState:
    """Shapes and types alone."""
    return jax.eval_shape(lambda: init(config)[1]).opt_state


def with_momentum(config: Experiment) -> optax.OptState:
    """After 7 steps, with random momentum."""
    trace, _ = random_trees(config.model)
    return optax.tree.set(at_step_0(config), trace=trace, count=jnp.array(7, jnp.int32))


def test_momentum_comes_back_bit_for_bit() -> None:
    config = experiment("paper", Shortcut.B)
    opt_state = with_momentum(config)
    back = momentum_from_torch(momentum_to_torch(opt_state), 7, at_step_0(config))
    assert_same_bits(back, opt_state)


def test_momentum_of_another_network_is_refused() -> None:
    config = experiment("paper", Shortcut.B)
    opt_state = with_momentum(config)
    momentum = momentum_to_torch(opt_state)
    del momentum["stages.1.0.shortcut.conv.weight"]
    rule = r"stages.1.0.shortcut.conv.weight must be an array of shape \(32, 16, 1, 1\), got none"
    with pytest.raises(WeightsError, match=rule):
        momentum_from_torch(momentum, 7, at_step_0(config))
    other = dataclasses.replace(config.model, num_classes=7)
    with pytest.raises(
        WeightsError, match=r"fc.bias must be an array of shape \(7,\), got \(10,\)"
    ):
        momentum_from_torch(momentum_to_torch(opt_state), 7, at_step_0(Experiment(model=other)))


def test_a_swapped_axis_would_be_seen() -> None:
    """The mutant: square kernels that are transposed wrongly keep their shape, not their bits."""
    config = ResNetConfig.paper(8, Shortcut.A)
    params, batch_stats = random_trees(config)
    state = to_state_dict(config.architecture, params, batch_stats)
    key = "stages.0.0.conv1.weight"
    state[key] = np.ascontiguousarray(state[key].transpose(1, 0, 3, 2))
    with pytest.raises(AssertionError):
        assert_same_bits(from_state_dict(state).params, params)
    twin = make_twin(config, params, batch_stats)
    theirs = twin.state_dict()[key].numpy()
    assert not np.array_equal(theirs, state[key])
