"""A small CIFAR in place of the real one, and ways to damage it once it is prepared.

`flax_resnet.data.cifar` knows the real archives' sizes and digests. Whoever loads a small one first
sets them to what `measured` returns.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.data.cifar import CIFAR10, CIFAR100, VERSION, Cifar
from flax_resnet.data.examples import Examples

ROOT = Path(__file__).resolve().parents[2]
PER_BATCH = 8
NAMES = [f"class{i}" for i in range(10)]  # of CIFAR-10; the others have more
CLASSES = {CIFAR10.name: {"label": 10}, CIFAR100.name: {"coarse_label": 20, "label": 100}}


def write_archive(root: Path, seed: int, which: Cifar = CIFAR10) -> dict[str, Examples]:
    """Puts random images where a user puts the archive; returns what is in it.

    CIFAR-100's coarse label is the fine one modulo 20.
    """
    classes = CLASSES[which.name]
    sizes = {"train": 5 * PER_BATCH, "test": PER_BATCH}
    files = {
        file: "\n".join([*(f"class{i}" for i in range(classes[label])), "", ""]).encode()
        for label, file in which.names.items()
    }
    examples: dict[str, Examples] = {}
    for shift, (split, size) in enumerate(sizes.items()):
        examples[split] = random_examples(size, seed + shift, classes["label"])
        image, label = examples[split]
        labels = np.stack([label % number for number in classes.values()], 1).astype(np.uint8)
        channels_first = image.transpose(0, 3, 1, 2).reshape(size, -1)
        names = which.splits[split]
        for name, part in zip(
            names, np.split(np.hstack([labels, channels_first]), len(names)), strict=True
        ):
            files[name] = part.tobytes()
    path = archive_path(root, which)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{which.folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return examples


def random_examples(n: int, seed: int, classes: int) -> Examples:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    return Examples(image, rng.integers(0, classes, n, np.int32))


def measured(root: Path, which: Cifar = CIFAR10) -> dict[str, Any]:
    """Size and sha256 of the archive, by the names of the attributes of a Cifar."""
    data = archive_path(root, which).read_bytes()
    return {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def archive_path(root: Path, which: Cifar = CIFAR10) -> Path:
    return root / "downloads" / "manual" / Path(which.url).name


def dataset_path(root: Path, which: Cifar = CIFAR10) -> Path:
    return root / which.name / VERSION


def train_shard(root: Path) -> Path:
    return dataset_path(root) / "cifar10-train.array_record-00000-of-00001"


def cache_entry(split: str = "train") -> Path:
    """The one decoded copy that there is of a split."""
    (entry,) = (Path(os.environ["XDG_CACHE_HOME"]) / "flax-resnet").glob(f"*-{split}.npy")
    return entry


def digest(examples: Mapping[str, Examples]) -> str:
    """Sha256 of all images and labels, as the processes below print it."""
    data = b"".join(array.tobytes() for split in examples.values() for array in split)
    return hashlib.sha256(data).hexdigest()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def shorten(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_middle(shard: Path) -> None:
    flip(shard, shard.read_bytes().index(b"IDAT"))


def lose_record(shard: Path) -> None:
    """The shard is left with a record more than the dataset's description says."""
    path = shard.with_name("dataset_info.json")
    info = json.loads(path.read_text())
    (split,) = (split for split in info["splits"] if split["name"] == "train")
    split["shardLengths"] = [str(5 * PER_BATCH - 1)]
    path.write_text(json.dumps(info))


DAMAGES = [Path.unlink, shorten, flip_middle, lose_record]  # of a shard


START = """
import hashlib, os, signal, sys
from pathlib import Path
from flax_resnet.data import cifar
from flax_resnet.data.cifar import CIFAR10

root, size, CIFAR10.sha256, mode = sys.argv[1:]
CIFAR10.num_bytes = int(size)

def logged(name):
    function = getattr(cifar, name)
    def call(*args):
        with open(Path(root) / "calls", "a") as log:
            log.write(name + "\\n")
        return function(*args)
    setattr(cifar, name, call)

def killed(*args):
    for i, example in enumerate(read_split(*args)):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

logged("_fetch")
logged("_decode")
if mode == "killed":
    read_split, cifar._read_split = cifar._read_split, killed
print("ready", flush=True)
sys.stdin.readline()
examples = cifar.load(root)
print(hashlib.sha256(b"".join(a.tobytes() for e in examples.values() for a in e)).hexdigest())
"""


def start_process(root: Path, mode: str = "") -> subprocess.Popen[str]:
    """Starts a process that waits for a line on stdin, then loads and prints the digest.

    Args:
        mode: "killed" to have it killed while it prepares the dataset.
    """
    return subprocess.Popen(
        [sys.executable, "-c", START, str(root), str(CIFAR10.num_bytes), CIFAR10.sha256, mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
