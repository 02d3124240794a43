"""Claim: BatchNorm's statistics tell which network a checkpoint is and what it was fed with.

The truth table: networks that are trained here by each convention, so that the truth is known, and
everybody's that are at hand. Each must be read as it is, and every other reading must be at least
three times as far away (measured: 5.7 and more; of the order of the colours, where each image is
less its own mean, 2.2). docs/weights.md has the figures.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.config import (
    TABLE_1,
    WIDTHS,
    Block,
    ChannelPad,
    DataConfig,
    DType,
    Preprocess,
    ResNetConfig,
    Shortcut,
    Stages,
    Stride,
)
from flax_resnet.data import cifar, digits, pixels
from flax_resnet.errors import ConfigError
from flax_resnet.resnet import abstract
from flax_resnet.training import identified
from flax_resnet.weights import files
from flax_resnet.weights.identify import (
    PAD,
    Colours,
    Crop,
    Examination,
    Identified,
    Moments,
    Read,
    Reading,
    between,
    divergence,
    identify,
)
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import Imported, from_state_dict, to_state_dict
from flax_resnet.weights.trees import tree_from_torch
from parity_tests.data_sets import need_checkpoint, need_cifar10
from parity_tests.pair import torch
from torch_ref.resnet import ResNet as TorchResNet

STEPS, BATCH_SIZE = 200, 32


class Truth(NamedTuple):
    """How a network is trained."""

    model: ResNetConfig
    preprocess: Preprocess
    crop: Crop = Crop.ZEROS
    colours: Colours = Colours.RGB
    layout: Layout = Layout.TWIN

    @property
    def reading(self) -> dict[str, Any]:
        """What `identify` must say."""
        is_a = self.model.shortcut is Shortcut.A
        return {
            "shortcut": self.model.shortcut,
            "channel_pad": self.model.channel_pad if is_a else None,
            "stride": self.model.architecture.stride,
            "preprocess": self.preprocess.value,
            "colours": self.colours,
            "crop": self.crop,
        }


@functools.cache
def tinted() -> tuple[np.ndarray, np.ndarray]:
    """The digits, 16x16 pixels of colours that no reversal leaves as they are."""
    image, label = digits.load()["train"]
    image = image[:, ::2, ::2] * np.array([1.0, 0.7, 0.4]) + np.array([0, 20, 60])
    return np.round(image).clip(0, 255).astype(np.uint8), label


@functools.cache
def constants() -> dict[str, pixels.Normalization]:
    return {x.value: pixels.make_normalization(x, tinted()[0]) for x in pixels.NAMED}


def read_trained(name: str) -> Read:
    """A file of the network, as PyTorch would write it."""
    truth, state = CIFAR[name], trained_once(name)
    if truth.layout is Layout.TANJEFFREYZ:  # whose keys do not tell A from B
        ours = from_state_dict(state, shortcut=truth.model.shortcut)
        arrays = ours.params, ours.batch_stats
        state = to_state_dict(truth.model.architecture, *arrays, layout=truth.layout)
    return functools.partial(from_state_dict, state)


@functools.cache
def trained_once(name: str) -> dict[str, np.ndarray]:
    return trained(CIFAR[name])


def trained(truth: Truth) -> dict[str, np.ndarray]:
    """The state dict, by the twin's names, of a network that PyTorch has trained for 200 steps."""
    image, label = tinted()
    known = constants()[truth.preprocess.value]
    side, rng = image.shape[1], np.random.default_rng(0)
    border = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))

    def numbers(pixel: np.ndarray) -> np.ndarray:
        return np.asarray(pixels.normalize(jnp.asarray(pixel), known, jnp.float32))

    whole = numbers(image)
    if truth.crop is Crop.BLACK:
        whole = numbers(np.pad(image, border))
    if truth.crop is Crop.ZEROS:
        whole = np.pad(whole, border)
    torch.manual_seed(0)
    twin = TorchResNet(truth.model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer.param_groups[0]["lr"] = 0.005
        chosen = rng.integers(0, len(label), BATCH_SIZE)
        x = whole[chosen]
        if truth.crop is not Crop.NONE:
            corners = rng.integers(0, 2 * PAD + 1, (BATCH_SIZE, 2))
            x = np.stack(
                [a[t : t + side, u : u + side] for a, (t, u) in zip(x, corners, strict=True)]
            )
            x = np.where(rng.random(BATCH_SIZE)[:, None, None, None] < 0.5, x[:, :, ::-1], x)
        x = x[..., ::-1] if truth.colours is Colours.BGR else x
        logits = twin(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(label[chosen]).long()).backward()
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in twin.state_dict().items()}


def few(image: np.ndarray) -> np.ndarray:
    return image[:: len(image) // 256][:256]


# --- The measure ----------------------------------------------------------------------------------


def test_the_divergence_is_that_of_normal_distributions() -> None:
    """Both directions of KL, as the integral says."""
    (m, v), (n, w) = (0.5, 2.0), (-1.0, 0.7)
    x = np.linspace(-30, 30, 200_001)
    log_p, log_q = (
        -((x - a) ** 2) / s / 2 - np.log(2 * np.pi * s) / 2 for a, s in ((m, v), (n, w))
    )
    inside = (np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)
    expected = np.trapezoid(inside, x)
    a, b = (Moments(np.array([mean]), np.array([var])) for mean, var in ((m, v), (n, w)))
    assert between(a, b) == pytest.approx([expected], rel=1e-4)  # FLOOR is 1e-5 of a variance
    assert between(a, b) == pytest.approx(between(b, a), rel=1e-12)
    assert between(a, a) == 0


def test_a_channel_that_is_dead_decides_nothing_and_every_layer_counts() -> None:
    one = np.ones(3)
    ours = {name: Moments(one * 0, one) for name in "abc"}
    theirs = {"a": Moments(np.array([0, 0, 9]), one), "b": Moments(one * 0, 3 * one)}
    apart = divergence(ours, ours | theirs)
    assert apart == pytest.approx((0 + (3 + 1 / 3 - 2) / 2 + 0) / 3, rel=1e-4)
    dead = {"a": Moments(one * 0, one * 1e-30)}
    assert divergence(dead, {"a": Moments(one * 0, one * 0)}) < 1e-12


def seen_by_pytorch(model: ResNetConfig, image: np.ndarray, scale: float = 1) -> Read:
    """A new network of the twin whose statistics are those of one batch, `imagenet` and BGR.

    Args:
        scale: of its kernels.
    """
    model = dataclasses.replace(model, batch_norm_momentum=1.0, dtype=DType.FLOAT64)
    torch.manual_seed(0)
    twin = TorchResNet(model).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter *= scale if parameter.ndim == 4 else 1
        x = np.asarray(pixels.normalize(jnp.asarray(image), constants()["imagenet"], jnp.float64))
        twin(torch.tensor(x[..., ::-1].transpose(0, 3, 1, 2).copy()))
    state = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    return functools.partial(from_state_dict, state)


def test_what_pytorch_saw_in_training_is_found_to_the_last_image() -> None:
    """The same images, so that nothing is left but rounding (measured: 1e-12).

    They are so few that a biased variance would be seen (1e-3).
    """
    image = few(tinted()[0])[:6]
    reading = Reading(Shortcut.A, ChannelPad.END, None, 1e-5, "imagenet", Colours.BGR, Crop.NONE)
    examination = Examination(seen_by_pytorch(ResNetConfig.paper(8), image), image, constants())
    assert examination.of(reading) < 1e-9
    assert examination.of(reading._replace(colours=Colours.RGB)) > 1e-3


@pytest.mark.slow
def test_an_epsilon_as_large_as_the_variances() -> None:
    """Kernels of a hundredth make them so."""
    image = few(tinted()[0])
    model = ResNetConfig.paper(8, batch_norm_epsilon=1e-3)
    read = seen_by_pytorch(model, image[:64], scale=0.01)
    truth = {"preprocess": "imagenet", "shortcut": Shortcut.A, "channel_pad": ChannelPad.END}
    result = identify(read, image[64:192], constants(), truth)
    assert result is not None
    assert (result.best.epsilon, result.best.colours) == (1e-3, Colours.BGR)


def test_a_network_that_saw_no_image_tells_nothing() -> None:
    state = TorchResNet(ResNetConfig.paper(8)).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert identify(functools.partial(from_state_dict, arrays), tinted()[0], constants()) is None


def found(*divergences: float) -> Identified:
    """Of networks A, plain and B, the nearest first."""
    shortcuts = (Shortcut.A, Shortcut.PLAIN, Shortcut.B)
    readings = [Reading(x, None, None, 1e-5, "imagenet", None, Crop.NONE) for x in shortcuts]
    return Identified(readings[0], dict(zip(readings, divergences, strict=False)))


@pytest.mark.parametrize(
    ("divergences", "verdict", "unsure", "near"),
    [
        ((0.001, 0.01), "clear", [], Shortcut.A),
        ((0.001, 0.0014, 0.01), "thin", ["shortcut"], Shortcut.PLAIN),
        ((0.5, 0.6, 0.7), "bad", ["shortcut"], Shortcut.PLAIN),
        ((float("nan"),), "bad", [], Shortcut.A),
    ],
)
def test_how_sure_a_result_is(
    divergences: tuple[float, ...], verdict: str, unsure: list[str], near: Shortcut
) -> None:
    result = found(*divergences)
    assert (result.verdict, result.unsure) == (verdict, unsure)
    # What is not settled stays as it was assumed, here plain.
    assert result.near({"shortcut": Shortcut.PLAIN}).shortcut is near
    assert result.to_dict()["second"] == (divergences[1] if len(divergences) > 1 else None)


def test_an_epsilon_that_is_not_told_stays() -> None:
    """It is not the nearest reading's, by a rounding, but the best one's."""
    best = found(0.001).best
    other = best._replace(epsilon=1e-3)
    result = Identified(best, {other: 0.00099, best: 0.001})
    assert result.near({"shortcut": Shortcut.A}) == best
    assert (result.verdict, result.to_dict()["epsilon"]) == ("clear", 1e-5)


@pytest.mark.parametrize(
    ("means", "stds", "message"),
    [
        (["1,2"], ["1,2,3"], "--mean must be three numbers, r,g,b, got '1,2'"),
        (["1,2,x"], ["1,2,3"], "--mean must be three numbers"),
        (["1,2,3"], ["1,2,nan"], "--std must be three numbers"),
        (["1,2,3"], ["1,0,3"], "--std must be above 0, got 1,0,3"),
        (["1,2,3"], [], "--mean and --std must be given together, got 1 and 0 of them"),
    ],
)
def test_a_mean_and_deviation_that_are_none(
    means: list[str], stds: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        identified.preprocessings(means, stds)


def test_a_mean_and_deviation_of_either_scale() -> None:
    small, large = identified.preprocessings(
        ["0.5,0.4,0.6", "127,120,110"], ["1,1,1", "60,61,62"]
    ).values()
    assert (small.scale, large.scale) == (1 / 255, 1.0)
    assert list(large.std) == [60, 61, 62]


# --- The truth table ------------------------------------------------------------------------------

CIFAR = {
    "plain": Truth(ResNetConfig.paper(8, Shortcut.PLAIN), Preprocess.MEAN_IMAGE),
    "A": Truth(ResNetConfig.paper(8), Preprocess.IMAGENET, Crop.NONE, Colours.BGR),
    "A, centred": Truth(ResNetConfig.akamaster(8), Preprocess.STANDARDIZE, Crop.BLACK),
    "B": Truth(
        ResNetConfig.tanjeffreyz(8, Shortcut.B), Preprocess.OWN_MEAN, layout=Layout.TANJEFFREYZ
    ),
}


def assert_found(result: Identified | None, reading: dict[str, Any], ratio: float = 3) -> None:
    """As the truth says, in every field, and nothing else near."""
    assert result is not None
    second = result.second
    assert second is not None
    print(f"{result.divergence:.5f}, second {second:.5f}, {second / result.divergence:.1f} times")
    assert {name: getattr(result.best, name) for name in reading} == reading
    assert result.verdict == "clear"
    assert second > ratio * result.divergence
    assert result.divergence < 0.002  # measured: at most 0.001


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_networks_that_we_trained(name: str) -> None:
    result = identify(read_trained(name), few(tinted()[0]), constants())
    assert_found(result, CIFAR[name].reading)


@pytest.mark.slow
def test_a_file_is_read_as_its_statistics_say_unless_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin's keys do not tell that it pads at the centre, nor what it was fed with."""
    read, data = read_trained("A, centred"), DataConfig()
    images = identified.Material(few(tinted()[0]), constants(), "digits")
    monkeypatch.setattr(identified, "material", lambda config: images)

    def settle(**told: Any) -> identified.Settled:
        return identified.settle(read, told, None, data)

    free = settle()
    assert free.imported.config.channel_pad is ChannelPad.CENTRE
    assert free.imported.config.batch_norm_epsilon == 1e-5
    assert free.preprocess is Preprocess.STANDARDIZE
    untold = {"shortcut", "channel_pad"}
    assert free.imported.assumed.keys().isdisjoint(untold)
    (line,) = free.lines
    assert "shortcut A, channel_pad centre, preprocess standardize (divergence 0.000" in line

    unseen = identified.settle(read, {}, None, None)
    assert (unseen.imported.config.channel_pad, unseen.preprocess) == (ChannelPad.END, None)
    assert unseen.imported.assumed.keys() >= untold
    assert unseen.lines == []

    right = {
        "shortcut": Shortcut.A,
        "channel_pad": ChannelPad.CENTRE,
        "preprocess": Preprocess.STANDARDIZE,
    }
    assert settle(**right).lines == []
    wrong = settle(**(right | {"channel_pad": ChannelPad.END}))
    assert wrong.imported.config.channel_pad is ChannelPad.END
    (line,) = wrong.lines
    assert line.startswith(
        "warning: its statistics contradict what was given; they say channel_pad c"
    )

    damaged = {
        name: array * 3 if name.endswith("_var") else array
        for name, array in trained_once("A, centred").items()
    }
    read = functools.partial(from_state_dict, damaged)
    bad = settle()
    assert (bad.imported.config.channel_pad, bad.preprocess) == (ChannelPad.END, None)
    (line,) = bad.lines
    assert line.startswith(
        "warning: no reading fits BatchNorm's statistics, on 256 images of digits"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stride", Stride)
def test_the_stride_of_bottlenecks(stride: Stride, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow ones, of one block a stage: the paper's (v1) and torchvision's (v1.5)."""
    monkeypatch.setitem(WIDTHS, Stages.IMAGENET, (4, 8, 16, 32))
    monkeypatch.setitem(TABLE_1, 14, (Block.BOTTLENECK, (1, 1, 1, 1)))
    model = ResNetConfig.kuangliu(14, stride=stride)
    truth = Truth(model, Preprocess.IMAGENET)
    arrays = trained(truth)

    def read(stride: Stride | None, **told: Any) -> Imported:
        told = {name: value for name, value in told.items() if value is not None}
        config = dataclasses.replace(model, stride=stride or Stride.CONV3X3, **told)
        assumed = {} if stride else {"stride": "assumed"}
        _, params, batch_stats = abstract(config)
        trees = (tree_from_torch(arrays, tree) for tree in (params, batch_stats))
        return Imported(config, *trees, STEPS, Layout.TWIN, [], assumed)

    assert_found(identify(read, few(tinted()[0]), constants()), truth.reading)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Test images do as well: the divergences are those of training images to 0.0001."""
    return cifar.load(str(need_cifar10()), ["test"])["test"].image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channel_pad", "preprocess", "crop", "ratio"),
    [
        ("akamaster-resnet20-12fca82f.th", ChannelPad.CENTRE, "imagenet", Crop.BLACK, 3),
        # Its images' own means hide most of the colours' order.
        ("reference-CifarResNet-20-R-A-final.pt", ChannelPad.END, "own_mean", Crop.ZEROS, 1.5),
    ],
    ids=["akamaster", "tanjeffreyz"],
)
def test_published_checkpoints(
    name: str,
    channel_pad: ChannelPad,
    preprocess: str,
    crop: Crop,
    ratio: float,
    photographs: np.ndarray,
) -> None:
    state = files.read(need_checkpoint(name, "see test_published_weights.py")).state_dict
    known = {x.value: pixels.make_normalization(x, photographs) for x in pixels.NAMED}
    read = functools.partial(from_state_dict, state)
    result = identify(read, few(photographs), known, {"epsilon": 1e-5})
    truth = {
        "shortcut": Shortcut.A,
        "channel_pad": channel_pad,
        "stride": None,
        "preprocess": preprocess,
        "colours": Colours.RGB,
        "crop": crop,
    }
    assert_found(result, truth, ratio)
