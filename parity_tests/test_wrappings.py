"""Claim: whatever people put around a network's weights, the same network is read, or it is said in
one line what the file is.

Every wrapping is put around the same state dict, and taken off again to the bit; beside it stands
the line that a user sees.
"""

import argparse
import functools
import io
import json
import pathlib
import pickle
import re
import tarfile
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import flax_resnet
from flax_resnet.config import ChannelPad, Preprocess, ResNetConfig, Shortcut
from flax_resnet.data.pixels import make_normalization
from flax_resnet.errors import ConfigError, UserError, WeightsError
from flax_resnet.resnet import abstract
from flax_resnet.weights import account, files, header
from flax_resnet.weights.header import Header
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import Imported, check_array, from_state_dict, to_state_dict
from flax_resnet.weights.wrappings import Bare, bare
from parity_tests.pair import torch
from torch_ref.resnet import ResNet as TorchResNet

safetensors_torch = pytest.importorskip("safetensors.torch")  # it needs torch

State = dict[str, Any]
UNTOLD = {  # by any file but our own
    "batch_norm_epsilon": "batch_norm_epsilon 1e-05, as in PyTorch",
    "batch_norm_momentum": "batch_norm_momentum 0.1, as in PyTorch; it matters in training alone",
}


@functools.cache
def make_state(layout: Layout = Layout.TWIN) -> State:
    """Of depth 8, with another number at every place; shortcut B, but tanjeffreyz's is A."""
    is_theirs = layout is Layout.TANJEFFREYZ
    config = ResNetConfig.tanjeffreyz(8) if is_theirs else ResNetConfig.paper(8, Shortcut.B)
    rng = np.random.default_rng(0)
    _, *trees = abstract(config)
    trees = [fill(tree, rng) for tree in trees]
    arrays = to_state_dict(config.architecture, *trees, step=7, layout=layout, prefix="")
    return {key: torch.tensor(array) for key, array in arrays.items()}


def fill(tree: Any, rng: np.random.Generator) -> Any:
    if isinstance(tree, Mapping):
        return {key: fill(x, rng) for key, x in tree.items()}
    return rng.uniform(0.5, 1.5, tree.shape).astype(tree.dtype)


STATE = make_state()
OTHER = {key: x + 1 for key, x in STATE.items()}  # such as averaged weights


def unwrapped(source: Any, entry: str | None = None, **told: Any) -> tuple[Bare, str]:
    """What is left of a state dict, and what a user is told of its wrappings."""
    is_file = isinstance(source, Path)
    contents = files.read(source, entry) if is_file else files.unwrap(source, entry=entry)
    found = bare(contents.state_dict, **told)
    return found, "; ".join([*contents.told, *found.told])


def imported(source: Any, **told: Any) -> tuple[Imported, str]:
    """The network, and the line that tells of wrappings."""
    contents = files.read(source) if isinstance(source, Path) else files.unwrap(source)
    found = from_state_dict(contents.state_dict, header=contents.header, **told)
    return found, "\n".join(account.unwrapping(found, contents.told))


def assert_is(found: Bare, state: State) -> None:
    """Every tensor, to the bit."""
    assert found.state_dict.keys() == state.keys()
    for key, array in found.state_dict.items():
        np.testing.assert_array_equal(array.astype("float32"), state[key].float().numpy())


def before(prefix: str, state: State = STATE) -> State:
    return {prefix + key: x for key, x in state.items()}


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- Prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "net.", "backbone.", "network."),
        *("module._orig_mod.", "_orig_mod.module.model.", "model.net.", "model.module.backbone."),
    ],
)
def test_a_stack_of_prefixes(prefix: str) -> None:
    found, line = unwrapped(before(prefix))
    assert_is(found, STATE)
    assert line == f"{prefix} before every key"
    assert list(found.keys.values()) == list(before(prefix))


def test_backbone_and_head() -> None:
    parts = {("head." if key.startswith("fc.") else "backbone.") + key for key in STATE}
    state = {key: STATE[key.partition(".")[2]] for key in parts}
    found, line = unwrapped(state)
    assert_is(found, STATE)
    assert "head. before 2 keys" in line
    assert "backbone. before 58 keys" in line or f"backbone. before {len(STATE) - 2} keys" in line


def test_wrappers_within_the_keys() -> None:
    state = {key.replace("stages.0.", "stages.0._orig_mod."): x for key, x in STATE.items()}
    found, line = unwrapped(state)
    assert_is(found, STATE)
    assert "wrappers within 12 keys, such as stages.0._orig_mod.0." in line


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module."])
def test_keys_that_begin_like_a_prefix_by_themselves(prefix: str) -> None:
    """tanjeffreyz's own keys begin with `model.`."""
    state = make_state(Layout.TANJEFFREYZ)
    found, line = unwrapped(before(prefix, state))
    assert_is(found, state)
    assert line == (f"{prefix} before every key" if prefix else "")


def test_a_missing_key_is_named_with_its_neighbours_prefix() -> None:
    state = before("module.", {k: x for k, x in STATE.items() if k != "conv1.weight"})
    found, _ = unwrapped(state)
    assert found.in_file("conv1.weight") == "module.conv1.weight"
    state = {("head." if k[:3] == "fc." else "backbone.") + k: x for k, x in STATE.items()}
    del state["head.fc.bias"]
    found, _ = unwrapped(state)
    assert found.in_file("fc.bias") == "head.fc.bias"
    assert found.in_file("bn1.bias") == "backbone.bn1.bias"


@pytest.mark.slow
def test_a_message_names_keys_as_the_file_does() -> None:
    for key, prefix in (("conv1.weight", "module."), ("bn1.bias", "model.net."), ("fc.bias", "")):
        state = before(prefix, {k: x for k, x in STATE.items() if k != key})
        with pytest.raises(WeightsError, match=rf"missing key {re.escape(prefix + key)}[ ,]"):
            from_state_dict(files.unwrap(state).state_dict)
    state = before("module.") | {"module.fc.extra": STATE["fc.bias"]}
    with pytest.raises(WeightsError, match=r"unknown key module\.fc\.extra$"):
        from_state_dict(files.unwrap(state).state_dict)
    state = before("net.") | {"net.fc.bias": torch.zeros(3)}
    with pytest.raises(WeightsError, match=r"net\.fc\.bias must have shape"):
        from_state_dict(files.unwrap(state).state_dict)
    state = before("net.") | {"fc.bias": torch.zeros(3)}
    with pytest.raises(WeightsError, match=r"net\.fc\.bias and fc\.bias are two keys for one"):
        from_state_dict(files.unwrap(state).state_dict)


@pytest.mark.slow
def test_a_key_of_akamasters_that_is_missing_has_no_prefix_that_no_key_has() -> None:
    arrays = files.unwrap(STATE).state_dict
    ours = from_state_dict(arrays)
    weights = ours.config.architecture, ours.params, ours.batch_stats
    state = to_state_dict(*weights, layout=Layout.AKAMASTER, prefix="")
    del state["layer2.0.bn1.weight"]
    with pytest.raises(WeightsError, match=r"missing key layer2\.0\.bn1\.weight"):
        from_state_dict(state)


# --- Entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("state_dict", "model", "net", "model_state", "model_state_dict", "weights", "params"),
        "whatever",
    ],
)
def test_an_entry(name: str) -> None:
    contents = files.unwrap({name: STATE, "epoch": 3})
    assert (contents.told, contents.ignored) == ([f"entry {name}"], ["epoch"])
    found, _ = unwrapped({name: STATE, "epoch": 3})
    assert_is(found, STATE)
    found, line = unwrapped({"epoch": 3, name: {"state_dict": before("module."), "lr": 0.1}})
    assert_is(found, STATE)
    assert line == f"entry {name}.state_dict; module. before every key"


def test_the_plain_network_of_several_and_others_by_name() -> None:
    content = {"epoch": 1, "state_dict_ema": OTHER, "state_dict": STATE, "net": OTHER}
    found, line = unwrapped(content)
    assert_is(found, STATE)
    assert line == ("entry state_dict; also there: state_dict_ema, net (--entry takes one)")
    found, line = unwrapped(content, "state_dict_ema")
    assert_is(found, OTHER)
    assert "entry state_dict_ema; also there: state_dict, net" in line
    found, _ = unwrapped({"emaNet": OTHER, "generator": STATE})
    assert_is(found, STATE)
    found, _ = unwrapped({"ema": {"module": OTHER}})  # there is no other
    assert_is(found, OTHER)
    with pytest.raises(WeightsError, match=r"\(state_dict_ema, state_dict, net\), got 'nets'"):
        files.unwrap(content, entry="nets")
    with pytest.raises(WeightsError, match="must be one state dict, or --entry to name it, got a"):
        files.unwrap({"a": STATE, "b": OTHER})


def test_an_averaged_network_within_the_same_state_dict() -> None:
    state = before("model.") | before("ema_model.module.", OTHER)
    found, line = unwrapped(state)
    assert_is(found, STATE)
    assert line.startswith("also there: ema_model (--entry takes one); model. before")
    found, line = unwrapped(state, "ema_model")
    assert_is(found, OTHER)
    assert "ema_model.module. before every key" in line


def test_the_counter_of_an_averaged_model() -> None:
    found, line = unwrapped(before("module.") | {"n_averaged": torch.tensor(5)})
    assert_is(found, STATE)
    assert "an average of 5 networks (n_averaged)" in line


def test_what_stands_beside_the_tensors() -> None:
    contents = files.unwrap(STATE | {"epoch": 3, "optimizer": {"param_groups": [], "a.b": OTHER}})
    assert contents.ignored == ["epoch", "optimizer"]
    assert list(contents.state_dict) == list(STATE)
    with pytest.raises(WeightsError, match="this is the state dict of an optimizer"):
        files.unwrap({"state": {}, "param_groups": []})


def test_objects_that_hold_no_code_beside_the_tensors(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
        "more": types.SimpleNamespace(a=1),
        "best": np.float64(0.9),
        "half": np.float16(1),
        "classes": np.arange(10),
    }
    path = save({"state_dict": STATE} | beside, tmp_path / "a.pth")
    found, _ = unwrapped(path)
    assert_is(found, STATE)
    assert files.read(path).ignored == list(beside)
    # They are not allowed for everybody from now on.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    files.read(path)
    assert argparse.Namespace in torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.float(), "float32"),
        (lambda x: x.half(), "float16"),
        (lambda x: x.bfloat16(), "bfloat16"),
        (lambda x: x.reshape(1), "int64 of one element"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_counters_of_other_types(change: Callable, told: str) -> None:
    state = {k: change(x) if k.endswith("tracked") else x for k, x in STATE.items()}
    found, line = imported(state)
    assert found.step == 7
    assert line == f"unwrapped: BatchNorm's counters are {told}"


def test_counters_that_are_none() -> None:
    key = "bn1.num_batches_tracked"
    for value in (0.5, -1, np.nan, [0, 0], True):
        with pytest.raises(WeightsError, match=rf"^{re.escape(key)} must "):
            check_array(key, key, np.array(value), (), "a network")
    every = {k: x.half() + 1e6 if k.endswith("tracked") else x for k, x in STATE.items()}
    found, _ = imported(every)
    assert found.step == 0
    assert found.assumed == UNTOLD | {
        "step": "step 0 (BatchNorm's counters are too large for float16)"
    }


def test_bfloat16_in_either_kind_of_file(tmp_path: Path) -> None:
    state = {key: x.bfloat16() if x.ndim else x for key, x in STATE.items()}
    path = tmp_path / "a.safetensors"
    safetensors_torch.save_file(state, path)
    for source in (path, save(state, tmp_path / "a.pth"), state):
        assert_is(unwrapped(source)[0], state)
    theirs = files.tensors(files.read(path).state_dict)["fc.bias"]  # for the twin
    assert torch.equal(theirs, state["fc.bias"].float())
    found, _ = imported(path)
    assert found.assumed == UNTOLD | {"dtype": "bfloat16 numbers widened to float32"}
    np.testing.assert_array_equal(found.params["fc"]["bias"], state["fc.bias"].float().numpy())


def test_jax_arrays_numpy_arrays_and_a_module() -> None:
    twin = TorchResNet(ResNetConfig.paper(8, Shortcut.B))
    twin.load_state_dict(STATE)
    arrays = {key: x.numpy() for key, x in STATE.items()}
    ours = {key: jnp.array(x) for key, x in arrays.items()}
    for source in (twin, arrays, ours, {"model": twin}):
        found, _ = unwrapped(source)
        assert_is(found, STATE)


# --- Other names ----------------------------------------------------------------------------------


def test_other_names_by_expressions() -> None:
    state = {k.replace("conv", "c").replace("fc", "out"): x for k, x in STATE.items()}
    state["criterion.weight"] = state["other.buffer"] = torch.zeros(2)
    rename = [r"\bc(\d)=conv\1", "shortcut.c.=shortcut.conv.", "^out=fc"]
    found, line = unwrapped(state, rename=rename, ignore=["^criterion", r"\.buffer$"])
    assert_is(found, STATE)
    assert "ignored 1 key by '^criterion'; ignored 1 key by '\\\\.buffer$'; renamed 7 keys" in line
    assert list(found.keys.values()) == [k for k in state if "." in k][:-2]
    more = state | {"out.weird": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"unknown key out\.weird$"):  # as the file has it
        imported(more, rename=rename, ignore=["^criterion", r"\.buffer$"])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"rename": ["fc"]}, "rename must be 'OLD=NEW', a regular expression, got 'fc'"),
        ({"rename": ["(=x"]}, "rename '(=x' is no regular expression (missing )"),
        ({"rename": [r"fc=\3"]}, r"rename 'fc=\\3' is no regular expression and text (invalid"),
        ({"rename": ["zz=x"]}, "rename 'zz=x' must find a key, got bn1.bias, bn1.weight"),
        ({"rename": ["bn2=bn1"]}, "are two keys for one tensor"),
        ({"ignore": ["["]}, "ignore '[' is no regular expression (unterminated"),
        ({"ignore": ["zz"]}, "ignore 'zz' must find a key, got bn1.bias, bn1.weight"),
    ],
)
def test_an_expression_that_is_wrong_or_finds_nothing(told: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        unwrapped(STATE, **told)
    assert "\n" not in str(error.value)


# --- What a file is -------------------------------------------------------------------------------


def test_a_file_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    safetensors_torch.save_file(STATE, path)
    found, line = unwrapped(path)
    assert_is(found, STATE)
    assert line == "a safetensors file, whatever its name says"
    found, line = unwrapped(save(STATE, tmp_path / "a.safetensors"))
    assert_is(found, STATE)
    assert line == "a PyTorch file, whatever its name says"
    found, line = unwrapped(save(STATE, tmp_path / "model_best.pth.tar"))
    assert_is(found, STATE)
    assert line == ""


class Zip(dict[str, bytes]):
    """The entries of a zip archive."""

    def bytes(self) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in self.items():
                archive.writestr(name, content)
        return file.getvalue()


def tar(*names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return file.getvalue()


def saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def plain_pickle() -> bytes:
    return pickle.dumps({key: x.numpy() for key, x in list(STATE.items())[:2]})


WHOLE = "holds a whole pickled model (torch_ref.resnet.ResNet), which would run code"
KINDS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "whole model": ("a.pth", lambda: saved(TorchResNet(ResNetConfig.paper(8))), WHOLE),
    "whole model in an entry": (
        "a.pth",
        lambda: saved({"model": TorchResNet(ResNetConfig.paper(8))}),
        WHOLE,
    ),
    "whole model, legacy": (
        "a.pth",
        lambda: saved(TorchResNet(ResNetConfig.paper(8)), _use_new_zipfile_serialization=False),
        WHOLE,
    ),
    "TorchScript": (
        "a.pt",
        lambda: Zip({"a/data.pkl": b"", "a/code/x.py": b"", "a/constants.pkl": b""}).bytes(),
        "is a TorchScript archive, which holds a program: save the",
    ),
    "torch.export": (
        "a.pt2",
        lambda: Zip({"a/archive_format": b"pt2", "a/models/model.json": b"{}"}).bytes(),
        "is a program of torch.export: save the state_dict of",
    ),
    "HDF5": ("a.h5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "is a Keras model (HDF5): only"),
    "Keras": (
        "a.keras",
        lambda: Zip({"config.json": b"", "model.weights.h5": b""}).bytes(),
        "is a Keras model (HDF5): only PyTorch's",
    ),
    "ONNX": ("a.onnx", lambda: b"\x08\x07\x12\x07pytorch" + bytes(99), "is an ONNX model: ask"),
    "SavedModel": ("saved_model.pb", lambda: b"\x08\x01\x12\x99" + bytes(99), "is a SavedModel of"),
    "TensorFlow's index": (
        "a.ckpt.index",
        lambda: bytes(99) + bytes.fromhex("57fb808b247547db"),
        "is a TensorFlow checkpoint: only",
    ),
    "TensorFlow's data": (
        "a.ckpt.data-00000-of-00001",
        lambda: bytes(99),
        "is a TensorFlow checkpoint: only",
    ),
    "old tar": (
        "a.pth",
        lambda: tar("sys_info", "pickle", "storages", "tensors"),
        "is in PyTorch's tar format of before 0.1.10, whose reading may run code: if",
    ),
    "tar": ("a.tar", lambda: tar("resnet.pth"), "is a tar archive: unpack it, and give the file"),
    "zip": ("a.zip", lambda: Zip({"resnet.pth": b""}).bytes(), "is a zip archive of something"),
    "NumPy": ("a.npz", lambda: Zip({"a.npy": b""}).bytes(), "is an archive of NumPy (.npz): give"),
    "gzip": ("a.pth.gz", lambda: b"\x1f\x8b\x08" + bytes(99), "is packed by gzip: unpack it"),
    "Git LFS": (
        "a.pth",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer, not the file itself: run git lfs pull",
    ),
    "HTML": ("a.pth", lambda: b"\n<!DOCTYPE html><p>" + bytes(99), "is a web page (HTML), not the"),
    "plain pickle": ("a.pkl", plain_pickle, "is a pickle, but not of torch.save: if you trust it"),
    "optimizer": (
        "a.pth",
        lambda: saved({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}),
        ": this is the state dict of an optimizer, not of a network",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_says_what_the_file_is(kind: str, tmp_path: Path) -> None:
    name, content, message = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(
        UserError, match=re.escape(f"{name}{'' if message[0] == ':' else ' '}")
    ) as e:
        flax_resnet.from_torch(path)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


# --- from_torch -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_stand_for_options() -> None:
    state = {key: x for key, x in STATE.items() if "shortcut" not in key}
    model = flax_resnet.from_torch(state, shortcut="plain")
    assert model.architecture.shortcut is Shortcut.PLAIN
    model = flax_resnet.from_torch(state, shortcut="a", channel_pad="centre")
    assert model.architecture.channel_pad is ChannelPad.CENTRE
    with pytest.raises(ConfigError, match=r"^shortcut must be one of 'plain', 'A', 'B', 'C' or No"):
        flax_resnet.from_torch(state, shortcut="D")


@pytest.mark.slow
def test_arguments_of_from_torch(tmp_path: Path) -> None:
    path = save({"a": before("x.") | {"zz.w": STATE["fc.bias"]}, "b": OTHER}, tmp_path / "a.pth")
    model = flax_resnet.from_torch(str(path), entry="a", rename=r"^x\.=", ignore="^bn2|zz")
    np.testing.assert_array_equal(model.fc.bias[...], STATE["fc.bias"].numpy())


@pytest.mark.parametrize("source", [[1], None, 3.0, b"a.pth"], ids=str)
def test_a_source_that_is_none_is_named(source: Any) -> None:
    message = (
        f"^source must be a file, a state dict or a module of PyTorch, got {type(source).__name__} "
    )
    with pytest.raises(WeightsError, match=message):
        flax_resnet.from_torch(source)


# --- The header of our own files ------------------------------------------------------------------


def written(tmp_path: Path, head: Header | None, config: ResNetConfig, **metadata: str) -> Path:
    _, *trees = abstract(config)
    trees = [fill(tree, np.random.default_rng(0)) for tree in trees]
    state = to_state_dict(config.architecture, *trees)
    path = tmp_path / "a.safetensors"
    files.write(path, state, Layout.TWIN, head)
    if metadata:
        safetensors.numpy.save_file(state, path, {"format": "pt"} | metadata)
    return path


PLAIN = ResNetConfig.paper(8, Shortcut.PLAIN, batch_norm_epsilon=1e-3)
NORMALIZATION = make_normalization(Preprocess.IMAGENET)


def test_our_own_file_says_what_no_key_tells(tmp_path: Path) -> None:
    told = Header(PLAIN.architecture, Preprocess.IMAGENET, NORMALIZATION, batch_norm_momentum=0.2)
    path = written(tmp_path, told, PLAIN)
    found, _ = imported(path)
    assert found.config.architecture == PLAIN.architecture
    assert found.config.batch_norm_momentum == 0.2
    assert found.assumed == {}
    contents = files.read(path)
    assert contents.preprocess is Preprocess.IMAGENET
    assert contents.header is not None
    back = contents.header.normalization
    assert back is not None
    np.testing.assert_array_equal(back.std, NORMALIZATION.std)
    # PyTorch reads the same file.
    theirs = safetensors_torch.load_file(path)
    TorchResNet(PLAIN).load_state_dict(theirs)
    # Without the header it would be taken for another network.
    assert "shortcut" in imported(written(tmp_path, None, PLAIN))[0].assumed


@pytest.mark.slow
def test_flags_and_tensors_must_agree_with_the_header(tmp_path: Path) -> None:
    path = written(tmp_path, Header(PLAIN.architecture), PLAIN)
    assert_same = flax_resnet.from_torch(path, shortcut="plain").architecture
    assert assert_same == PLAIN.architecture
    with pytest.raises(
        WeightsError, match=r"shortcut must be plain, as the file's header says, go"
    ):
        flax_resnet.from_torch(path, shortcut="A")
    other = ResNetConfig.paper(8, Shortcut.PLAIN, num_classes=7)
    path = written(tmp_path, Header(PLAIN.architecture), other)
    with pytest.raises(WeightsError, match="another network than the tensors: num_classes 10, not"):
        flax_resnet.from_torch(path)


@pytest.mark.slow
def test_what_was_assumed_when_a_file_was_written_is_still_assumed(tmp_path: Path) -> None:
    assumed = {"shortcut": "shortcut A. As was said", "channel_pad": "x", "step": "step 0"}
    a = ResNetConfig.paper(8)
    path = written(tmp_path, Header(a.architecture, assumed=assumed), a)
    found, _ = imported(path)
    del assumed["step"]
    assert (found.config.shortcut, found.assumed) == (Shortcut.A, assumed)
    found, _ = imported(path, shortcut=Shortcut.PLAIN)
    assert (found.config.shortcut, found.assumed) == (Shortcut.PLAIN, {})
    head = Header(a.architecture, Preprocess.IMAGENET, assumes_preprocess=True)
    contents = files.read(written(tmp_path, head, a))
    assert contents.preprocess is None
    assert contents.likely_preprocess(found) is Preprocess.IMAGENET


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: "{",
        lambda tree: "[]",
        lambda tree: json.dumps(tree | {"version": 2}),
        lambda tree: json.dumps(tree | {"architecture": {}}),
        lambda tree: json.dumps(tree | {"preprocess": "other"}),
        lambda tree: json.dumps(tree | {"normalization": {}}),
        lambda tree: json.dumps(tree["architecture"]),
    ],
)
def test_a_header_that_is_damaged(change: Callable, tmp_path: Path) -> None:
    text = header.to_metadata(Header(PLAIN.architecture))[header.KEY]
    path = written(tmp_path, None, PLAIN, **{header.KEY: change(json.loads(text))})
    with pytest.raises(WeightsError, match=r"a\.safetensors: the header's 'flax_resnet' is not "):
        files.read(path)
