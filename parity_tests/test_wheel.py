"""Claim: the wheel is enough: installed outside the checkout it converts, evaluates and trains.

The virtual environment holds the wheel alone. A .pth file shows it the dependencies of the Python
that runs the tests, so that nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

from flax_resnet.config import Dataset, Experiment, ResNetConfig
from flax_resnet.shipped import COMMANDS

pytest.importorskip("setuptools", "77", reason="pip install 'setuptools>=77' builds the wheel")
torch = pytest.importorskip("torch", reason="it writes the file to convert")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "flax_resnet", "torch_ref")
GOLDEN = Path(__file__).parent / "golden/weights"


class Installed(NamedTuple):
    """An environment with the wheel, and a folder to work in."""

    environment: Path
    home: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        hidden = ("PYTHONPATH", "FLAX_RESNET_WEIGHTS")
        return subprocess.run(
            [str(self.environment / "bin" / program), *arguments],
            cwd=self.home,
            env={name: value for name, value in os.environ.items() if name not in hidden},
            capture_output=True,
            text=True,
            check=False,
        )

    def output(self, program: str, *arguments: str) -> str:
        done = self.run(program, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from a copy of the checkout to which more published weights are added."""
    at = tmp_path_factory.mktemp("wheel")
    checkout = at / "checkout"
    checkout.mkdir()
    for part in (*PARTS, "scripts", "configs"):
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, checkout / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, checkout / part)
    shutil.copytree(ROOT / "results/weights", checkout / "results/weights")
    for ending in (".safetensors", ".json"):
        shutil.copy(GOLDEN / f"paper{ending}", checkout / f"results/weights/made-up{ending}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(at), "."]
    subprocess.run([*pip, *build], cwd=checkout, check=True)
    (wheel,) = at.glob("flax_resnet-*.whl")
    environment, home = at / "environment", at / "home"
    venv.create(environment)
    subprocess.run(
        [*pip, f"--python={environment}", "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home.mkdir()
    return Installed(environment, home)


def test_it_is_the_wheel_that_runs(installed: Installed) -> None:
    program = "import flax_resnet, torch_ref; print(flax_resnet.__file__, torch_ref.__file__)"
    for path in installed.output("python", "-c", program).split():
        assert Path(path).is_relative_to(installed.environment)


def test_every_module_is_there(installed: Installed) -> None:
    package = Path(
        installed.output("python", "-c", "import flax_resnet; print(flax_resnet.__file__)")
    )
    for name, root in [
        ("flax_resnet", package.parent),
        ("torch_ref", package.parents[1] / "torch_ref"),
    ]:
        ours = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*.py")}
        assert ours <= {path.relative_to(root) for path in root.rglob("*.py")}
    assert (package.parent / "py.typed").is_file()
    assert not list(package.parent.rglob("torture*"))
    assert not list(package.parent.rglob("mutation*"))


def test_commands_are_listed(installed: Installed) -> None:
    page = installed.output("flax-resnet", "--help")
    assert all(f"\n  {name} " in page for name in COMMANDS)


def test_it_converts_a_pytorch_file_and_evaluates_it(installed: Installed) -> None:
    from torch_ref.resnet import ResNet

    torch.manual_seed(0)
    torch.save(ResNet(ResNetConfig.paper(8)).state_dict(), installed.home / "theirs.pt")
    assert "written: imported" in installed.output(
        "flax-resnet", "convert", "theirs.pt", "imported"
    )
    # The digits with constants that need no images: the converted network's own are CIFAR-10's.
    digits = ["--config.data.name=digits", "--preprocess=imagenet"]
    results = [
        installed.output("flax-resnet", "evaluate", f"--checkpoint={name}", *digits)
        for name in ("theirs.pt", "imported")
    ]
    direct, converted = (json.loads(result.splitlines()[-1]) for result in results)
    assert converted["examples"] == 360
    assert converted == direct


def test_it_trains_a_config_by_name(installed: Installed) -> None:
    steps = ["--config.train.steps=2", "--config.train.batch_size=8"]
    installed.output("flax-resnet", "train", "--config", "quickstart", *steps)
    directory = installed.home / "runs/quickstart"
    assert json.loads((directory / "summary.json").read_text())["steps"] == 2
    config = Experiment.from_dict(json.loads((directory / "config.json").read_text()))
    assert config.data.name is Dataset.DIGITS


def test_an_experiment_starts_its_workers(installed: Installed) -> None:
    settings = ["--networks=A-8", "--steps=4", "--config.data.name=digits"]
    sizes = ["--config.train.batch_size=8", "--config.train.eval_batch_size=360"]
    installed.output("flax-resnet", "reproduce", "tanjeffreyz", *settings, *sizes)
    out = installed.home / "results/tanjeffreyz-4"
    assert (out / "A-8-s0/summary.json").is_file()
    assert "flax-resnet reproduce tanjeffreyz --networks=A-8" in (out / "README.md").read_text()


def test_published_weights_come_with_it(installed: Installed) -> None:
    program = "import flax_resnet; print(flax_resnet.load_pretrained('{}'))"
    for name in ("resnet20", "made-up"):
        assert "BasicBlock" in installed.output("python", "-c", program.format(name))
    other = installed.run("python", "-c", program.format("other"))
    assert "no weights called 'other'" in other.stderr
    assert "(there are: made-up, resnet20)" in other.stderr


def test_a_config_that_there_is_not(installed: Installed) -> None:
    done = installed.run("flax-resnet", "train", "--config", "configs/resnet20.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config must be a file or one of finetune, ")
    assert done.stderr.count("\n") == 1
