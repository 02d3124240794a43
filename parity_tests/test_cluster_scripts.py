"""Claim: the scripts for TPU VMs and Slurm are sound shell, and say what they would do.

What they call is not here, so that is all that can be claimed.
"""

import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
GCLOUD = "gcloud compute tpus tpu-vm"


def tpu_vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "tpu_vm.sh"), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sh", "slurm_array.sh"])
def test_it_is_sound_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--zone", "z", "--spot", "--dry-run", "create", "pod"],
            f"{GCLOUD} create pod --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite "
            "--spot --zone=z",
        ),
        (
            ["--type", "v6e-16", "--runtime", "v2-alpha-tpuv6e", "--dry-run", "create", "pod"],
            f"{GCLOUD} create pod --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e",
        ),
        (
            ["--dry-run", "fetch", "pod"],
            f"{GCLOUD} scp pod:flax-resnet/runs . --recurse --worker=0",
        ),
        (
            ["--dry-run", "fetch", "pod", "a b"],
            f"{GCLOUD} scp pod:flax-resnet/runs 'a b' --recurse --worker=0",
        ),
        (["--zone", "z", "--dry-run", "delete", "pod"], f"{GCLOUD} delete pod --quiet --zone=z"),
    ],
)
def test_it_prints_the_commands(arguments: list[str], expected: str) -> None:
    result = tpu_vm(*arguments)
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout) == shlex.split(expected)


def test_every_host_runs_the_same_arguments() -> None:
    arguments = ["--config=configs/resnet20.py", "--config.optim.boundaries=(1, 2)"]
    words = shlex.split(tpu_vm("--dry-run", "run", "pod", "--", *arguments).stdout)
    assert words[:7] == [*GCLOUD.split(), "ssh", "pod", "--worker=all"]
    remote = words[7].removeprefix("--command=")
    folder, separator, *command = shlex.split(remote)[1:]
    assert (folder, separator) == ("flax-resnet", "&&")
    assert command == [".venv/bin/python", "scripts/train_flax.py", *arguments]


def test_copying_takes_what_is_committed_to_every_host() -> None:
    lines = [shlex.split(x) for x in tpu_vm("--dry-run", "copy", "pod").stdout.splitlines()]
    assert lines[0][3:5] == ["archive", "--format=tar.gz"]
    assert lines[1][4] == "scp"
    assert lines[1][-2:] == ["pod:flax-resnet.tar.gz", "--worker=all"]
    assert "-c constraints.txt -e '.[tpu,gcs]'" in lines[2][-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument must be create, copy, run, fetch or delete, got ''"),
        (["start", "pod"], "the first argument must be create, copy, run, fetch or delete"),
        (["create", "My_Pod"], "NAME must be lower-case letters, digits and hyphens"),
        (["delete", "pod; rm -rf /"], "NAME must be lower-case letters, digits and hyphens"),
        (["--zone"], "--zone needs a value"),
        (["--zone", "--spot", "create", "pod"], "--zone needs a value"),
        (["--sport", "create", "pod"], "no such option: --sport"),
        (["run", "pod"], "run NAME needs -- and the arguments of train_flax.py"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    result = tpu_vm("--dry-run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
