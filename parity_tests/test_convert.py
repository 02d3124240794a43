"""Claim: a file that is not a network's is refused in one line that names the key, and never run.

What a bad file could do is shown first: the same bytes given to `pickle` do run their code. The
tests of scripts/convert.py itself run it as a user does; they are few, since each costs seconds.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import flax_resnet
from flax_resnet.config import ChannelPad, ResNetConfig, Shortcut
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.training.converted import check_target, is_workdir_name
from flax_resnet.training.workdir import open_run
from flax_resnet.weights import account, files
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict
from parity_tests.pair import torch
from torch_ref.resnet import ResNet as TorchResNet

ROOT = Path(__file__).parent.parent
StateDict = dict[str, Any]


def make_state(config: ResNetConfig | None = None) -> StateDict:
    torch.manual_seed(0)
    return dict(TorchResNet(config or ResNetConfig.paper(8, Shortcut.B)).state_dict())


def assert_refused(act: Callable[[], Any], message: str) -> None:
    """With one line that has `message` in it."""
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        act()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# --- State dicts ----------------------------------------------------------------------------------


def rename(state: StateDict) -> None:
    state["stages.1.0.bn1.wieght"] = state.pop("stages.1.0.bn1.weight")


def replace(key: str, change: Callable[[Any], Any]) -> Callable[[StateDict], None]:
    def mutate(state: StateDict) -> None:
        state[key] = change(state[key])

    return mutate


def poison(value: float) -> Callable[[Any], Any]:
    return lambda x: x.flatten().index_fill(0, torch.tensor([3]), value).reshape(x.shape)


def add(key: str, like: str = "fc.bias") -> Callable[[StateDict], None]:
    return lambda state: state.update({key: state[like]})


def drop(start: str) -> Callable[[StateDict], None]:
    def mutate(state: StateDict) -> None:
        for key in [key for key in state if key.startswith(start)]:
            del state[key]

    return mutate


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (
            rename,
            "not the state dict of a network of depth 8 and shortcut B: missing key "
            "stages.1.0.bn1.weight (32,); unknown key stages.1.0.bn1.wieght",
        ),
        (drop("fc.bias"), "missing key fc.bias (10,)"),
        (drop("fc."), "missing key fc.weight"),
        (drop("conv1."), "missing key conv1.weight"),
        (drop("stages.2.0."), "missing keys stages.2.0.bn1.bias (64,), "),
        (drop("stages."), "keys must be of a known layout"),
        (drop(""), "there must be one state dict"),
        (add("fc.extra"), "unknown key fc.extra"),
        (add("stages.0.99999999.conv1.weight"), "unknown key stages.0.99999999.conv1.weight"),
        (add("module.fc.bias"), "fc.bias and module.fc.bias are two keys for one tensor"),
        (
            replace("fc.weight", lambda x: x.T.contiguous()),
            "fc.weight must have shape (64, 64) in a network of depth 8 and shortcut B, got (64, ",
        ),
        (
            replace("stages.0.0.conv2.weight", lambda x: x[:, :, :1, :1]),
            "stages.0.0.conv2.weight must have shape (16, 16, 3, 3) in a network of depth 8",
        ),
        (replace("conv1.weight", lambda x: x[0]), "conv1.weight must have 4 dimensions"),
        (replace("fc.bias", poison(np.nan)), "fc.bias must be finite, got nan"),
        (replace("bn1.bias", poison(-np.inf)), "bn1.bias must be finite, got -inf"),
        (replace("bn1.running_var", poison(-1)), "bn1.running_var must be a variance"),
        (replace("fc.bias", lambda x: x.int()), "fc.bias must have a type of floating point"),
        (replace("fc.bias", lambda x: x.cfloat()), "fc.bias must have a type of floating point"),
        (
            replace("fc.bias", lambda x: x.to(torch.float8_e4m3fn)),
            "fc.bias must have a type of floating point, got torch.float8_e4m3fn",
        ),
        (replace("fc.bias", lambda x: x.tolist()), "fc.bias must be a tensor, got list"),
        (replace("fc.bias", lambda x: x.to_sparse()), "fc.bias must be a dense tensor"),
        (replace("fc.bias", lambda x: x.to("meta")), "fc.bias must be a dense tensor"),
        (
            replace("bn1.num_batches_tracked", lambda x: x - 1),
            "bn1.num_batches_tracked must be an integer from 0 to 2147483647, got -1",
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_a_bad_state_dict(mutate: Callable[[StateDict], None], message: str) -> None:
    state = make_state()
    flax_resnet.from_torch(state)
    mutate(state)
    assert_refused(lambda: flax_resnet.from_torch(state), message)


def test_the_state_dict_of_another_depth() -> None:
    state = make_state(ResNetConfig.paper(14))
    flax_resnet.from_torch(state, depth=14)
    assert_refused(
        lambda: flax_resnet.from_torch(state, depth=20),
        "depth must be 20, got the state dict of a network of depth 14 and shortcut A: its last "
        "block is stages.2.1.conv2.weight",
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Shortcut.C, "missing keys stages.0.0.shortcut.bn.bias (16,)"),
        (Shortcut.A, "unknown keys stages.1.0.shortcut.conv.weight"),
    ],
)
def test_another_shortcut_than_told(told: Shortcut, message: str) -> None:
    state = make_state()
    assert_refused(lambda: flax_resnet.from_torch(state, shortcut=told), message)


def test_what_is_in_doubt_is_said() -> None:
    half = {key: x.half() if x.ndim else x for key, x in make_state().items()}
    half["bn1.num_batches_tracked"] += 5
    contents = files.unwrap(half)
    assert from_state_dict(contents.state_dict).assumed == {
        "batch_norm_epsilon": "batch_norm_epsilon 1e-05, as in PyTorch",
        "batch_norm_momentum": "batch_norm_momentum 0.1, as in PyTorch; it matters in training "
        "alone",
        "dtype": "float16 numbers widened to float32",
        "step": "step 0 (BatchNorm's counters disagree: 0 to 5)",
    }
    bfloat = {key: x.bfloat16() if x.ndim else x for key, x in make_state().items()}
    model = flax_resnet.from_torch(bfloat)
    back = flax_resnet.to_torch(model)
    assert all(torch.equal(back[key], x.to(back[key].dtype)) for key, x in bfloat.items())


@pytest.mark.parametrize("content", [[1], 3.0, {"a": 1}, {"a": make_state(), "b": make_state()}])
def test_what_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert_refused(lambda: files.read(path), "there must be one state dict")


# --- Files ----------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes the file that it names."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def bomb_raw(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, 2))  # torch.load's own protocol


def bomb_zip(path: Path, content: Any) -> None:
    torch.save(content, path)


def bomb_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [bomb_raw, bomb_zip, bomb_legacy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["alone", "beside", "inside"])
def test_a_pickle_that_would_run_code(
    where: str, save: Callable[[Path, Any], None], tmp_path: Path
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bomb.pt"
    bomb, state = Bomb(marker), make_state()
    save(
        path,
        {
            "alone": bomb,
            "beside": {"state_dict": state, "args": bomb},
            "inside": state | {"fc.bias": bomb},
        }[where],
    )
    assert_refused(lambda: flax_resnet.from_torch(path), "bomb.pt ")
    assert not marker.exists()
    # The bomb is a live one.
    if save is bomb_raw:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def write_pt(path: Path) -> None:
    torch.save(make_state(), path)


def write_legacy(path: Path) -> None:
    bomb_legacy(path, make_state())


def write_safetensors(path: Path) -> None:
    arrays = files.unwrap(make_state()).state_dict
    files.write(path, arrays, Layout.TWIN)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_pt, "a.pt"), (write_legacy, "a.th"), (write_safetensors, "a.safetensors")],
    ids=["zip", "legacy", "safetensors"],
)
def test_a_truncated_file(write: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    flax_resnet.from_torch(path)
    whole = path.read_bytes()
    for size in (1, 7, 8, 100, 5000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(lambda: files.read(path), f"{name} is no ")
    path.write_bytes(b"")
    assert_refused(lambda: files.read(path), f"{name} is empty")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"weights\n" * 99, b'{"fc.bias": [1, 2]}', bytes(999), b"PK\x03\x04" * 99]
)
def test_a_file_of_another_kind(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(lambda: files.read(path), f"{name} is no ")


@pytest.mark.parametrize("length", [2**40, 2**62, 0])
def test_a_safetensors_header_that_claims_terabytes(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"conv1.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(64))
    assert_refused(lambda: files.read(path), "a.safetensors is no safetensors file")


def test_a_tensor_that_is_larger_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(make_state() | {"fc.bias": torch.zeros(1).expand(2**40)}, path)
    assert path.stat().st_size < 2**20
    assert_refused(
        lambda: files.read(path),
        f"the largest is fc.bias, of shape ({2**40},)",
    )


def test_an_archive_that_grows(tmp_path: Path) -> None:
    small, path = tmp_path / "small.pt", tmp_path / "a.pt"
    torch.save({"fc.bias": torch.zeros(2**22)}, small)
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert_refused(lambda: files.read(path), "cannot hold")


def test_a_whole_module_is_not_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(TorchResNet(ResNetConfig.paper(8)), path)
    assert_refused(lambda: files.read(path), "ask for a state dict alone")


def test_without_torch_safetensors_still_work(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path)
    (tmp_path / "a.pt").write_bytes(b"x")
    program = f"""
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
import flax_resnet
model = flax_resnet.from_torch({str(path)!r})
for act in (lambda: flax_resnet.to_torch(model), lambda: flax_resnet.from_torch("a.pt")):
    try:
        act()
    except flax_resnet.errors.WeightsError as e:
        print(e)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    assert result.stdout.count("this needs PyTorch: pip install 'flax-resnet[torch]'") == 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flax_resnet.from_torch(tmp_path / "a.pt")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    path.write_text("old")

    def fail(content: Any, file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    arrays = files.unwrap(make_state()).state_dict
    with pytest.raises(OSError, match="disk full"):
        files.write(path, arrays, Layout.TWIN)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert path.read_text() == "old"


# --- The script -----------------------------------------------------------------------------------


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def convert(*arguments: object) -> str:
    """What scripts/convert.py prints."""
    result = run("convert.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(*arguments: object) -> str:
    """The one line with which scripts/convert.py refuses."""
    result = run("convert.py", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.slow
def test_there_and_back_with_the_script(tmp_path: Path) -> None:
    state = make_state(ResNetConfig.akamaster(8, Shortcut.A))
    for key in state:
        if key.endswith("num_batches_tracked"):
            state[key] += 7
    first, work, last = tmp_path / "first.pt", tmp_path / "work", tmp_path / "last.th"
    torch.save(state, first)

    table = convert(first, work, "--channel_pad=centre", "--preprocess=imagenet")
    rows = [line for line in table.splitlines() if "  ->  " in line]
    assert [row.split()[0] for row in rows] == list(state)
    assert "conv1.weight  " in rows[0]
    assert "->  conv1.kernel" in rows[0]
    assert "unused: nothing" in table
    assert "assumed: shortcut A. Plain networks have the same keys in the twin layout" in table
    assert "assumed: channel_pad" not in table
    match = re.search(r"float32 (\S+), float64 (\S+)", table)
    assert match
    assert float(match[1]) < 1e-5
    assert float(match[2]) < 1e-14
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["7"]
    # By its own count the optimizer knows where the learning rate falls.
    assert int(optax.tree.get(open_run(work).state.opt_state, "count")) == 7

    table = convert(work / "checkpoints" / "7", last, "--layout=akamaster")
    assert "->  module.linear.weight" in table
    content = torch.load(last, weights_only=True)
    assert (content["epoch"], content["best_prec1"]) == (0, 0.0)
    back = from_state_dict(files.read(last).state_dict)
    twin = TorchResNet(back.config)
    twin.load_state_dict(flax_resnet.to_torch(back.model(), step=back.step))
    assert all(torch.equal(x, state[key]) for key, x in twin.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pt", "last.th", "work"]


@pytest.mark.slow
def test_what_the_script_converted_evaluates_as_the_file_does(tmp_path: Path) -> None:
    first, work = tmp_path / "first.pt", tmp_path / "work"
    torch.save(make_state(ResNetConfig.akamaster(8, Shortcut.A)), first)
    convert(first, work, "--channel_pad=centre", "--preprocess=imagenet")
    data = ("--config.data.name=digits",)
    ours = run("evaluate.py", "--checkpoint", work, *data)
    theirs = run(
        "evaluate.py",
        *("--checkpoint", first, "--preprocess=imagenet", "--config.model.channel_pad=centre"),
        *data,
    )
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout.splitlines()[-1] == theirs.stdout.splitlines()[-1]


def test_the_script_runs_nothing_and_writes_nothing(tmp_path: Path) -> None:
    marker, path, target = tmp_path / "ran", tmp_path / "bomb.pt", tmp_path / "new" / "work"
    torch.save({"state_dict": Bomb(marker)}, path)
    assert "bomb.pt would run code (" in refusal(path, target)
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.pt"]


@pytest.mark.slow
def test_the_script_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_pt(path)
    content = path.read_bytes()
    assert "is there already; --overwrite replaces it" in refusal(path, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "is_workdir"),
    [("a.pt", False), ("a.safetensors", False), ("a", True), ("a.b/", True), ("a/b.th", False)],
)
def test_the_targets_ending_says_what_is_written(name: str, is_workdir: bool) -> None:
    assert is_workdir_name(name) is is_workdir


def test_a_target_with_another_ending_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DST must end in one of .pt, .pth, .*, got a\.npz"):
        is_workdir_name("a.npz")


def test_only_what_a_conversion_wrote_is_overwritten(tmp_path: Path) -> None:
    file, work = tmp_path / "a.pt", tmp_path / "work"
    check_target(file, is_workdir=False, overwrite=False)
    file.touch()
    (work / "checkpoints").mkdir(parents=True)
    (work / "config.json").touch()
    check_target(file, is_workdir=False, overwrite=True)
    check_target(work, is_workdir=True, overwrite=True)
    (work / "metrics.jsonl").touch()  # a run's
    for target, is_workdir in ((file, True), (work, False), (work, True)):
        with pytest.raises(ConfigError, match="nothing that convert"):
            check_target(target, is_workdir=is_workdir, overwrite=True)
        with pytest.raises(ConfigError, match="--overwrite replaces it"):
            check_target(target, is_workdir=is_workdir, overwrite=False)


def columns(text: str) -> list[list[str]]:
    """The lines of an account, without the spaces that align it."""
    return [re.split(r"  +", line) for line in text.splitlines()]


def test_the_account_names_every_key_and_what_is_not_used() -> None:
    state = files.unwrap(make_state(ResNetConfig.tanjeffreyz(8))).state_dict
    ours = from_state_dict(state, shortcut=Shortcut.A, channel_pad=ChannelPad.END)
    written = to_state_dict(
        ours.config.architecture, ours.params, ours.batch_stats, layout=Layout.TANJEFFREYZ
    )
    unused = [key for key in written if "downsample" in key]
    assert len(unused) == 4

    lines = columns(account.of_writing(ours, written, Layout.TANJEFFREYZ))
    assert [line[3] for line in lines] == list(written)
    assert [line[3] for line in lines if line[0] == "(unused projection)"] == unused
    assert ["conv1.kernel", "(3, 3, 3, 16)", "->", "model.0.weight", "(16, 3, 3, 3)"] in lines

    lines = columns(account.of_reading(from_state_dict(written), ["epoch"]))
    assert [line[0] for line in lines[: len(written)]] == list(written)
    assert ["model.0.weight", "(16, 3, 3, 3)", "->", "conv1.kernel", "(3, 3, 3, 16)"] in lines
    assert [f"unused: {', '.join([*unused, 'epoch'])}"] in lines
    assert lines[-1][0].startswith("network: depth 8, shortcut A, ")


@pytest.mark.parametrize("channel_pad", ChannelPad)
def test_a_network_that_akamaster_would_read_otherwise_is_noted(channel_pad: ChannelPad) -> None:
    state = files.unwrap(make_state(ResNetConfig.paper(8))).state_dict
    ours = from_state_dict(state, channel_pad=channel_pad)
    weights = ours.config.architecture, ours.params, ours.batch_stats
    for layout in (Layout.AKAMASTER, Layout.TORCHVISION):
        text = account.of_writing(ours, to_state_dict(*weights, layout=layout), layout)
        is_misread = layout is Layout.AKAMASTER and channel_pad is ChannelPad.END
        assert ("note: akamaster's own code pads at the centre" in text) is is_misread


def test_the_keys_are_told_as_they_are_written() -> None:
    ours = from_state_dict(files.unwrap(make_state()).state_dict)
    weights = ours.config.architecture, ours.params, ours.batch_stats
    text = account.of_writing(ours, to_state_dict(*weights), Layout.TWIN, "net.module.")
    assert ["fc.bias", "(10,)", "->", "net.module.fc.bias", "(10,)"] in columns(text)
