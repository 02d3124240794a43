"""Claim: a layout gives every tensor of every network a key of its own, and finds it again by that.

A table could do so and still be wrong: some keys of each layout are spelled out here by hand, and
test_published_weights reads files that others wrote. A key that no table has is refused by name.
"""

import functools
import itertools
import re
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from flax_resnet.config import ResNetConfig, Shortcut
from flax_resnet.errors import WeightsError
from flax_resnet.resnet import abstract
from flax_resnet.weights.layouts import (
    Layout,
    by_name,
    cut_into_stages,
    listed,
    prefix_to_write,
    recognize,
    to_key,
    to_name,
    unused_projections,
)
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict
from flax_resnet.weights.trees import counters, torch_shapes

FAMILIES = ("paper", "tanjeffreyz")  # akamaster's modules are those of the paper
SMALL_LAYOUTS = [layout for layout in Layout if layout not in (Layout.KUANGLIU, Layout.HUGGINGFACE)]
CASES = [
    pytest.param(layout, family, shortcut, id=f"{layout.value}-{family}-{shortcut.value}")
    for layout, family, shortcut in itertools.product(SMALL_LAYOUTS, FAMILIES, Shortcut)
    if layout is not Layout.TANJEFFREYZ or family == "tanjeffreyz"
]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@functools.cache
def names_of(family: str, shortcut: Shortcut, depth: int) -> list[str]:
    """Of every tensor, as the networks themselves have them."""
    _, params, batch_stats = abstract(getattr(ResNetConfig, family)(depth, shortcut))
    names = torch_shapes(params) | torch_shapes(batch_stats)
    return [*names, *counters(names)]


def imagenet_names(blocks: tuple[int, ...], layers: int) -> list[str]:
    """Of networks with blocks of so many layers, without making them: that takes seconds."""
    names = ["conv1.weight", "fc.weight", "fc.bias"]
    for s, n in enumerate(blocks):
        for b, layer in itertools.product(range(n), range(1, layers + 1)):
            names.append(f"stages.{s}.{b}.conv{layer}.weight")
            names += [f"stages.{s}.{b}.bn{layer}.{leaf}" for leaf in NORM]
        names.append(f"stages.{s}.0.shortcut.conv.weight")
    return names


def assert_one_to_one(names: list[str], layout: Layout, blocks: tuple[int, ...]) -> None:
    keys = [to_key(name, layout, blocks) for name in names]
    assert len(set(keys)) == len(set(names)) == len(names)
    assert [to_name(key, layout, blocks) for key in keys] == names
    assert [to_key(name, layout, blocks) for name in map_back(keys, layout, blocks)] == keys
    # DataParallel's prefix may be before any key.
    assert map_back([f"module.{key}" for key in keys], layout, blocks) == names


def map_back(keys: list[str], layout: Layout, blocks: tuple[int, ...]) -> list[str]:
    return [to_name(key, layout, blocks) or "" for key in keys]


@pytest.mark.parametrize(("layout", "family", "shortcut"), CASES)
def test_to_the_key_and_back(layout: Layout, family: str, shortcut: Shortcut) -> None:
    for depth in (8, 20):
        names = names_of(family, shortcut, depth)
        n = (depth - 2) // 6
        assert_one_to_one(names, layout, (n, n, n))
        # The keys alone tell the layout, and how many blocks there are.
        state = {to_key(name, layout, (n, n, n)): np.zeros(1) for name in names}
        assert recognize(state) is first_with_the_keys(layout, family, shortcut)
        assert by_name(state, layout) == dict(zip(names, state, strict=True))


def first_with_the_keys(layout: Layout, family: str, shortcut: Shortcut) -> Layout:
    """The layout itself, but for one: without projections torchvision's keys are the same."""
    has_projection = shortcut in (Shortcut.B, Shortcut.C)
    is_same = layout is Layout.AKAMASTER_FC and not has_projection
    return Layout.TORCHVISION if is_same else layout


@pytest.mark.parametrize("layout", Layout, ids=lambda x: x.value)
@pytest.mark.parametrize(
    "blocks", [(18, 18, 18), (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)], ids=str
)
def test_other_numbers_of_blocks(layout: Layout, blocks: tuple[int, ...]) -> None:
    layers = 2 if layout is Layout.TANJEFFREYZ else 3
    names = imagenet_names(blocks, layers)
    assert_one_to_one(names, layout, blocks)
    state = {to_key(name, layout, blocks): np.zeros(1) for name in names}
    if blocks == (3, 4, 6, 3):
        assert by_name(state, layout) == dict(zip(names, state, strict=True))
        assert recognize(state) is (Layout.KUANGLIU if layout is Layout.AKAMASTER else layout)


BY_HAND = {
    Layout.TWIN: {
        "conv1.weight": "conv1.weight",
        "stages.2.1.bn1.running_var": "stages.2.1.bn1.running_var",
        "fc.bias": "fc.bias",
    },
    Layout.TORCHVISION: {
        "bn1.running_mean": "bn1.running_mean",
        "stages.0.0.conv1.weight": "layer1.0.conv1.weight",
        "stages.2.1.bn2.num_batches_tracked": "layer3.1.bn2.num_batches_tracked",
        "stages.1.0.shortcut.conv.weight": "layer2.0.downsample.0.weight",
        "stages.1.0.shortcut.bn.bias": "layer2.0.downsample.1.bias",
        "fc.bias": "fc.bias",
    },
    Layout.AKAMASTER: {
        "conv1.weight": "conv1.weight",
        "stages.0.2.conv2.weight": "layer1.2.conv2.weight",
        "stages.2.0.shortcut.conv.weight": "layer3.0.shortcut.0.weight",
        "stages.2.0.shortcut.bn.weight": "layer3.0.shortcut.1.weight",
        "fc.weight": "linear.weight",
    },
    Layout.KUANGLIU: {
        "bn1.weight": "bn1.weight",
        "stages.3.2.conv3.weight": "layer4.2.conv3.weight",
        "stages.0.0.shortcut.conv.weight": "layer1.0.shortcut.0.weight",
        "stages.3.0.shortcut.bn.bias": "layer4.0.shortcut.1.bias",
        "fc.bias": "linear.bias",
    },
    Layout.AKAMASTER_FC: {
        "stages.1.0.bn1.bias": "layer2.0.bn1.bias",
        "stages.1.0.shortcut.conv.weight": "layer2.0.shortcut.0.weight",
        "stages.1.0.shortcut.bn.running_var": "layer2.0.shortcut.1.running_var",
        "fc.weight": "fc.weight",
    },
    Layout.HUGGINGFACE: {
        "conv1.weight": "resnet.embedder.embedder.convolution.weight",
        "bn1.running_mean": "resnet.embedder.embedder.normalization.running_mean",
        "stages.0.2.conv1.weight": "resnet.encoder.stages.0.layers.2.layer.0.convolution.weight",
        "stages.3.0.bn3.bias": "resnet.encoder.stages.3.layers.0.layer.2.normalization.bias",
        "stages.1.0.shortcut.conv.weight": (
            "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"
        ),
        "stages.2.0.shortcut.bn.bias": (
            "resnet.encoder.stages.2.layers.0.shortcut.normalization.bias"
        ),
        "fc.bias": "classifier.1.bias",
    },
    Layout.TANJEFFREYZ: {  # of depth 20: blocks 1 to 9
        "conv1.bias": "model.0.bias",
        "stages.0.0.conv1.weight": "model.1.model.0.weight",
        "stages.0.2.bn1.weight": "model.3.model.1.weight",
        "stages.1.0.conv2.bias": "model.4.model.3.bias",
        "stages.2.2.bn2.running_mean": "model.9.model.4.running_mean",
        "stages.2.0.shortcut.conv.weight": "model.7.conv_downsample.weight",
        "fc.weight": "model.10.model.2.weight",
    },
}


@pytest.mark.parametrize("layout", Layout, ids=lambda x: x.value)
def test_keys_by_hand(layout: Layout) -> None:
    found = {name: to_key(name, layout, (3, 3, 3)) for name in BY_HAND[layout]}
    assert found == BY_HAND[layout]


def test_keys_by_hand_behind_a_max_pool() -> None:
    """tanjeffreyz's ImageNetResNet 18: the max-pool is model.1, the blocks are 2 to 9."""
    by_hand = {
        "conv1.weight": "model.0.weight",
        "stages.0.0.conv1.weight": "model.2.model.0.weight",
        "stages.1.0.shortcut.conv.bias": "model.4.conv_downsample.bias",
        "stages.3.1.bn2.running_var": "model.9.model.4.running_var",
        "fc.bias": "model.10.model.2.bias",
    }
    assert {name: to_key(name, Layout.TANJEFFREYZ, (2, 2, 2, 2)) for name in by_hand} == by_hand


@pytest.mark.parametrize("name", ["bn1.weight", "stages.1.0.shortcut.bn.bias", "fc2.weight", "fc"])
def test_a_name_that_the_layout_has_not(name: str) -> None:
    with pytest.raises(WeightsError, match=f"the tanjeffreyz layout has no key for {name}$"):
        to_key(name, Layout.TANJEFFREYZ, (3, 3, 3))


NO_NAME = {
    Layout.TWIN: [
        "stage.0.0.conv1.weight",
        "stages.0.0.shortcut.weight",
        "stages.0.0.conv.weight",
        "module.module.fc.weight",
    ],
    Layout.TORCHVISION: [
        "layer0.0.conv1.weight",  # would be stage -1
        "layer01.0.conv1.weight",
        "layer1.00.conv1.weight",
        "layer1.0.conv01.weight",
        "layer1.1\u0662.conv1.weight",  # an Arabic 2
        "layer1.99999999.conv1.weight",
        "layer2.0.downsample.2.weight",
        "layer2.0.shortcut.0.weight",
        "stages.0.0.conv1.weight",
        "conv1.0.weight",
        "fc.weight.extra",
        "weight",
        "",
    ],
    Layout.AKAMASTER: ["fc.weight", "module.fc.weight", "layer1.0.downsample.0.weight"],
    Layout.KUANGLIU: ["fc.weight", "module.fc.weight", "layer4.0.downsample.0.weight"],
    Layout.AKAMASTER_FC: ["linear.weight", "layer1.0.downsample.0.weight", "module.module.fc.bias"],
    Layout.HUGGINGFACE: [
        "embedder.embedder.convolution.weight",
        "resnet.embedder.embedder.convolutions.weight",
        "resnet.encoder.stages.0.layers.0.layer.convolution.weight",
        "resnet.encoder.stages.0.layers.0.layer.-1.convolution.weight",
        "classifier.0.weight",
        "classifier.weight",
        "fc.weight",
    ],
    Layout.TANJEFFREYZ: [
        "model.0.model.0.weight",  # the stem is no block, nor is the classifier, which is 10
        "model.10.model.0.weight",
        "model.9.model.2.weight",
        "model.11.model.2.weight",
        "model.01.model.0.weight",
        "model.1.model.5.weight",
        "model.1.conv_upsample.weight",
        "model.1.weight",
        "bn1.weight",
    ],
}


@pytest.mark.parametrize("layout", Layout, ids=lambda x: x.value)
def test_keys_that_no_name_has(layout: Layout) -> None:
    for key in NO_NAME[layout]:
        assert to_name(key, layout, (3, 3, 3)) is None, key


@pytest.mark.parametrize(
    "key", ["model.1.model.0.weight", "model.1.weight", "model.10.model.0.weight"]
)
def test_a_max_pool_is_no_block(key: str) -> None:
    assert to_name(key, Layout.TANJEFFREYZ, (2, 2, 2, 2)) is None


@pytest.mark.parametrize(
    ("places", "blocks"),
    [
        (range(1, 10), (3, 3, 3)),
        (range(1, 9), (2, 2, 4)),  # the last stage's are too many
        (range(2, 10), (2, 2, 2, 2)),
        (range(2, 18), (3, 4, 6, 3)),
        (range(2, 12), (2, 2, 2, 4)),
        (range(2, 4), (2, 2, 2, 0)),
        ([], ()),
    ],
    ids=str,
)
def test_one_list_is_cut_into_stages(places: Sequence[int], blocks: tuple[int, ...]) -> None:
    keys = [f"model.{place}.model.0.weight" for place in places]
    assert cut_into_stages(keys, Layout.TANJEFFREYZ) == blocks
    if keys:
        classifier = f"model.{max(places) + 1}.model.2.weight"
        assert cut_into_stages([keys[0], classifier], Layout.TANJEFFREYZ) == blocks


@pytest.mark.parametrize(
    ("layout", "told", "prefix"),
    [(layout, None, "") for layout in Layout if layout is not Layout.AKAMASTER]
    + [
        (Layout.AKAMASTER, None, "module."),  # as in its published files
        (Layout.AKAMASTER, "", ""),
        (Layout.TWIN, "module.", "module."),
        (Layout.KUANGLIU, "a.module.", "a.module."),
    ],
)
def test_what_stands_before_every_key(layout: Layout, told: str | None, prefix: str) -> None:
    assert prefix_to_write(layout, told) == prefix


@pytest.mark.parametrize("prefix", ["module", ".module", " "])
def test_a_prefix_without_its_dot_is_refused(prefix: str) -> None:
    with pytest.raises(WeightsError, match=f"prefix must be empty or end in a dot.*{prefix!r}$"):
        prefix_to_write(Layout.TWIN, prefix)


@functools.cache
def state_of(layout: Layout) -> dict[str, np.ndarray]:
    """Of depth 8 and shortcut A."""
    family = "tanjeffreyz" if layout is Layout.TANJEFFREYZ else "paper"
    config = getattr(ResNetConfig, family)(8, Shortcut.A)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(config)[1:])
    return to_state_dict(config.architecture, *zeros, layout=layout)


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (Layout.TWIN, "stage.0.0.conv1.weight"),
        (Layout.TWIN, "stages.3.0.bn1.weight"),
        (Layout.TORCHVISION, "layer1.0.conv01.weight"),
        (Layout.TORCHVISION, "layer4.0.conv1.weight"),
        (Layout.TORCHVISION, "layer1.0.conv3.weight"),
        (Layout.AKAMASTER, "fc.weight"),
        (Layout.AKAMASTER, "layer2.0.shortcut.0.weight"),
        (Layout.TANJEFFREYZ, "model.2.model.2.weight"),
        (Layout.TANJEFFREYZ, "bn1.weight"),
    ],
)
def test_an_unknown_key_is_refused_by_name(layout: Layout, key: str) -> None:
    state = state_of(layout) | {key: np.zeros((16, 16, 3, 3), np.float32)}
    with pytest.raises(WeightsError, match=rf"unknown key {re.escape(key)}$"):
        from_state_dict(state, shortcut=Shortcut.A)


def test_a_block_too_many_in_one_list() -> None:
    """The blocks are numbered through, so that the classifier's number has moved too."""
    state = dict(state_of(Layout.TANJEFFREYZ))
    for leaf in ("weight", "bias"):
        state[f"model.5.model.2.{leaf}"] = state.pop(f"model.4.model.2.{leaf}")
    state["model.4.model.0.weight"] = np.zeros((64, 64, 3, 3), np.float32)
    with pytest.raises(WeightsError, match=r"unknown key model\.4\.model\.0\.weight$"):
        from_state_dict(state, shortcut=Shortcut.A)


def test_a_missing_classifier_in_one_list_is_named() -> None:
    """Without the classifier's number the blocks alone tell how many there are."""
    keys = state_of(Layout.TANJEFFREYZ)
    state = {key: keys[key] for key in keys if not key.startswith("model.4.model.2.")}
    assert cut_into_stages(state, Layout.TANJEFFREYZ) == (1, 1, 1)
    with pytest.raises(WeightsError, match=r"missing key model\.4\.model\.2\.weight"):
        from_state_dict(state, shortcut=Shortcut.A)


def test_unused_projections_are_averages() -> None:
    found = unused_projections(ResNetConfig.tanjeffreyz(8, Shortcut.A).architecture)
    for stage, c_in in ((1, 16), (2, 32)):
        weight = found.pop(f"stages.{stage}.0.shortcut.conv.weight")
        np.testing.assert_array_equal(weight, np.full((2 * c_in, c_in, 1, 1), np.float32(1 / c_in)))
        bias = found.pop(f"stages.{stage}.0.shortcut.conv.bias")
        np.testing.assert_array_equal(bias, np.zeros(2 * c_in))
    assert found == {}


@pytest.mark.parametrize("text", ["", "a", "a, b, c", "a, b, c and 1 more", "a, b, c and 5 more"])
def test_a_list_in_a_message_is_short(text: str) -> None:
    start, _, more = text.partition(" and ")
    items = start.split(", ") if start else []
    assert listed(items + ["x"] * int(more[:1] or 0)) == text


@pytest.mark.parametrize(("keys", "shown"), [([], "none"), (["b.weight", "a"], "a, b.weight")])
def test_keys_of_no_layout_are_shown(keys: list[str], shown: str) -> None:
    with pytest.raises(WeightsError, match=f"known layout .* got {shown}$"):
        recognize(dict.fromkeys(keys, np.zeros(1)))
