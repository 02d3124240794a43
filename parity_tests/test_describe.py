"""Claim: what a network is said to cost is the paper's count (table 1), and torchvision's number of
parameters; `flax-resnet describe` prints it, layer by layer.

The paper gives two digits. For 50 layers it has 3.8e9, where the count is 3.858e9: cut, not
rounded.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from flax_resnet.config import ResNetConfig, Shortcut, Stride
from flax_resnet.errors import ConfigError
from flax_resnet.resnet import ResNet, split
from flax_resnet.studies.description import describe
from flax_resnet.weights import files
from flax_resnet.weights.layouts import Layout
from flax_resnet.weights.state_dict import to_state_dict

ROOT = Path(__file__).parent.parent
SIZE = (224, 224)
PAPER = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}  # table 1's last line, in 1e9
TORCHVISION = {  # of its documentation
    18: 11_689_512,
    34: 21_797_672,
    50: 25_557_032,
    101: 44_549_160,
    152: 60_192_808,
}
DEPTHS = [pytest.param(x, marks=pytest.mark.slow if x > 50 else ()) for x in PAPER]


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_multiply_adds_are_the_papers(depth: int) -> None:
    shortcut = Shortcut.A if depth < 50 else Shortcut.B
    found = describe(ResNetConfig.imagenet(depth, shortcut), SIZE).multiply_adds / 1e8
    assert (math.floor(found) if depth == 50 else round(found)) == round(10 * PAPER[depth])


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_parameters_are_torchvisions(depth: int) -> None:
    config = ResNetConfig.imagenet(depth, stride=Stride.CONV3X3)
    assert describe(config, SIZE).parameters == TORCHVISION[depth]


def test_a_layers_row() -> None:
    """Worked out by hand: a 3x3 convolution that halves an odd image, with its projection."""
    rows = {row.name: row for row in describe(ResNetConfig.paper(8, Shortcut.B), (33, 29)).rows}
    row = rows["stages.1.0.conv1"]
    assert row.kind == "3x3, 16 -> 32, stride 2"
    assert (row.size, row.channels) == ((17, 15), 32)
    assert row.parameters == 3 * 3 * 16 * 32 + 2 * 32
    assert row.multiply_adds == 17 * 15 * 3 * 3 * 16 * 32
    assert rows["stages.1.0.shortcut.conv"].multiply_adds == 17 * 15 * 16 * 32
    assert rows["fc"].multiply_adds == 64 * 10


def test_a_network_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.depth must be 6n"):
        describe(ResNetConfig.paper(21), (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("scan_blocks", [False, True])
def test_flax_tabulates_the_same(scan_blocks: bool) -> None:
    config = ResNetConfig.paper(14 if scan_blocks else 8, Shortcut.B, scan_blocks=scan_blocks)
    model = ResNet(config, rngs=nnx.Rngs(0))
    size = {"console_kwargs": {"width": 200, "force_terminal": False}}
    text = nnx.tabulate(model, jnp.zeros((1, 32, 32, 3), jnp.float32), **size)
    assert "stages/2/0/shortcut/conv" in text
    assert f"{describe(config, (32, 32)).parameters:,}" in text


# --- The command ----------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flax_resnet", "describe", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_prints_a_config_as_json() -> None:
    tree = json.loads(run("--config=imagenet34", "--json").stdout)
    assert tree["network"] == "ResNet-34 A, images of 224 x 224 pixels"
    for name in ("parameters", "multiply_adds"):
        assert sum(layer[name] for layer in tree["layers"]) == tree[name]
    assert tree["multiply_adds"] == 3_644_493_824
    assert len(tree["layers"]) == 34 + 1  # and the max-pool


@pytest.mark.slow
def test_the_command_prints_the_table_of_a_pytorch_file(tmp_path: Path) -> None:
    config = ResNetConfig.paper(8, Shortcut.B)
    _, *arrays = split(ResNet(config, rngs=nnx.Rngs(0)))
    path = tmp_path / "x.safetensors"
    files.write(path, to_state_dict(config.architecture, *arrays), Layout.TWIN)
    title, _, head, *rows, total = run(f"--checkpoint={path}", "--size=33x29").stdout.splitlines()
    assert title == "ResNet-8 B, images of 33 x 29 pixels"
    assert head.split() == ["layer", "what", "output", "parameters", "multiply-adds"]
    assert [row.split()[0] for row in rows[-2:]] == ["stages.2.0.shortcut.conv", "fc"]
    assert total.split()[:2] == ["all", f"{describe(config, (33, 29)).parameters:,}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=224x"], "--size must be a number of pixels or HEIGHTxWIDTH, got '224x'"),
        (["--config=resnet20", "--checkpoint=runs/a"], "--checkpoint says what its network is"),
    ],
)
def test_the_commands_errors(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}")
