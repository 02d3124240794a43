"""Claim: a name of the Hugging Face Hub stands for the files in its cache, without a network; and
where it cannot, one line says why.

The cache is made by hand as huggingface_hub lays it out: refs/BRANCH names a commit, and
snapshots/COMMIT holds its files.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_resnet
from flax_resnet import places
from flax_resnet.config import Experiment, ResNetConfig, Shortcut
from flax_resnet.errors import ConfigError, UserError, WeightsError
from flax_resnet.training.mirror import fetch
from flax_resnet.weights import hub
from parity_tests.pair import torch
from torch_ref.resnet import ResNet as TorchResNet

safetensors_torch = pytest.importorskip("safetensors.torch")  # it needs torch

huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install 'flax-resnet[hub]'")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
ROOT = Path(__file__).parent.parent
COMMITS = {"main": "1" * 40, "old": "2" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def add(cache: Path, name: str, branch: str = "main", **files: bytes) -> Path:
    """The snapshot of a model that is there then."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / branch).write_text(COMMITS[branch])
    snapshot = model / "snapshots" / COMMITS[branch]
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file.replace("__", ".")).write_bytes(content)
    return snapshot


def test_the_folder_of_a_name(cache: Path) -> None:
    new = add(cache, "org/resnet-8", model__safetensors=b"x", config__json=b"{}")
    old = add(cache, "org/resnet-8", "old", pytorch_model__bin=b"x")
    assert hub.fetch("hf://org/resnet-8") == hub.fetch("hf://org/resnet-8@main") == new
    assert hub.fetch("hf://org/resnet-8@old") == old
    assert hub.fetch(f"hf://org/resnet-8@{COMMITS['old']}/pytorch_model.bin") == (
        old / "pytorch_model.bin"
    )


@pytest.mark.slow
def test_a_model_of_a_name(cache: Path) -> None:
    torch.manual_seed(0)
    state: dict[str, Any] = dict(TorchResNet(ResNetConfig.paper(8, Shortcut.B)).state_dict())
    add(cache, "org/resnet-8", model__safetensors=safetensors_torch.save(state))
    model = flax_resnet.from_torch("hf://org/resnet-8")
    np.testing.assert_array_equal(model.fc.bias[...], state["fc.bias"].numpy())


def test_where_a_name_is_taken_and_where_not(cache: Path) -> None:
    snapshot = add(cache, "org/resnet-8", model__safetensors=b"x")
    for what in ("SRC", "--checkpoint", "init"):
        place = places.place("hf://org/resnet-8", what, hub=True)
        assert str(place) == "hf://org/resnet-8"
        assert fetch(place) == snapshot
    config = Experiment(init="hf://org/resnet-8")
    config.validate()
    with pytest.raises(ConfigError, match=r"^--workdir must be a local path, or a URL of gs:// or"):
        places.place("hf://org/resnet-8", "--workdir")
    with pytest.raises(ConfigError, match=r"^SRC must be hf://ORG/NAME, got hf://resnet-8$"):
        places.place("hf://resnet-8", "SRC", hub=True)


@pytest.mark.parametrize("name", ["hf://org/none", "hf://org/none@old", "hf://org/none/a.pth"])
def test_what_the_cache_has_not(name: str, cache: Path) -> None:
    with pytest.raises(WeightsError) as error:
        hub.fetch(name)
    told = f"{name} is not in the cache, {cache}, and cannot be fetched (HF_HUB_OFFLINE is set)"
    assert str(error.value) == told


@pytest.mark.parametrize("name", ["hf://org", "hf://a/b c", "hf:/a/b", "hf://a/b@"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UserError, match="must be hf://ORG/NAME, got hf:"):
        hub.fetch(name)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = r"^hf://org/a needs huggingface_hub: pip install 'flax-resnet\[hub\]'$"
    with pytest.raises(WeightsError, match=told):
        hub.fetch("hf://org/a")


def refuse(error: Exception) -> Any:
    def act(**_: Any) -> None:
        raise error

    return act


def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, whatever it is."""
    for kind, message in (
        (errors.RepositoryNotFoundError, "the Hub has no such model, or shows it only to those"),
        (errors.RevisionNotFoundError, "has no such branch, tag or commit"),
    ):
        error = kind.__new__(kind)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
        with pytest.raises(WeightsError, match=message):
            hub.fetch("hf://org/a")
    error = OSError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
    with pytest.raises(WeightsError, match=r"cannot be fetched \(OSError: no route to host\)$"):
        hub.fetch("hf://org/a")


def test_only_one_kind_of_file_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer if there is one, and none for other frameworks."""
    asked: list[list[str]] = []

    def download(*, allow_patterns: list[str], there: str, **_: Any) -> str:
        asked.append(allow_patterns)
        if there in allow_patterns:
            (tmp_path / there).touch()
        return str(tmp_path)

    new, old = ["*.json", "model.safetensors"], ["*.json", "pytorch_model.bin"]
    for there, patterns in (("pytorch_model.bin", [new, old]), ("model.safetensors", [new])):
        asked.clear()
        (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", partial(download, there=there))
        assert hub.fetch("hf://org/a") == tmp_path
        assert asked == patterns


@pytest.mark.slow
def test_the_environment_is_heeded(tmp_path: Path) -> None:
    """HF_HOME and HF_HUB_OFFLINE, by a script."""
    torch.manual_seed(0)
    state: dict[str, Any] = dict(TorchResNet(ResNetConfig.paper(8, Shortcut.B)).state_dict())
    add(tmp_path / "hub", "org/a", model__safetensors=safetensors_torch.save(state))
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name, code, told in (
        ("hf://org/a", 0, "network: depth 8, shortcut B"),
        ("hf://org/b", 2, "error: hf://org/b is not in the cache"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "convert.py", name, tmp_path / "a.pt"],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert told in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == 1
