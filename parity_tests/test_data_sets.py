"""Claim: the tests take data from where a variable says, else from ../shared; a skip says how."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flax_resnet.data.cifar import CIFAR10, VERSION
from parity_tests import data_sets

CURVES = "CifarResNet-20-P-19_13_20/test_errors.npy"


def need_weights() -> Path:
    return data_sets.need_checkpoint("a.th", "the moon")


@pytest.fixture(params=["cifar10", "weights", "curves", "photos"])
def need(request: pytest.FixtureRequest) -> tuple[Callable[[], Path], str, str, str]:
    """The function, its variable, its folder of ../shared, and a file that must be there."""
    dataset = f"cifar10/{VERSION}/dataset_info.json"
    return {
        "cifar10": (data_sets.need_cifar10, "TFDS_DATA_DIR", "tfds", dataset),
        "weights": (need_weights, "FLAX_RESNET_TEST_CHECKPOINTS", "checkpoints", "a.th"),
        "curves": (
            data_sets.need_metrics,
            "FLAX_RESNET_TEST_METRICS",
            "reference/metrics",
            CURVES,
        ),
        "photos": (
            data_sets.need_photos,
            "FLAX_RESNET_TEST_PHOTOS",
            "photos",
            "val/cat/1.jpg",
        ),
    }[request.param]


def test_the_variables_place_comes_before_shared(
    need: tuple[Callable[[], Path], str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, variable, folder, content = need
    shared, told = tmp_path / "shared", tmp_path / "told"
    monkeypatch.setattr(data_sets, "SHARED", shared)
    for place in (shared / folder, told):
        (place / content).parent.mkdir(parents=True)
        (place / content).touch()
    monkeypatch.setenv(variable, str(told))
    assert told in [function(), *function().parents]
    monkeypatch.setenv(variable, str(tmp_path / "empty"))
    assert shared / folder in [function(), *function().parents]
    monkeypatch.delenv(variable)
    assert shared / folder in [function(), *function().parents]


def test_a_skip_names_the_variable_and_the_source(
    need: tuple[Callable[[], Path], str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, variable, *_ = need
    monkeypatch.setattr(data_sets, "SHARED", tmp_path)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(pytest.skip.Exception) as skipped:
        function()
    message = str(skipped.value)
    assert f"set {variable} to a directory" in message
    sources = CIFAR10.url, "from the moon", "github.com/", "Azure-Samples/"
    assert any(source in message for source in sources)
