"""A small CIFAR-10 in place of the real one, and ways to damage it once it is prepared.

`flax_resnet.data.cifar10` knows the real archive's size and digest, ARCHIVE_BYTES and
ARCHIVE_SHA256. Whoever loads the small one first sets them to what `measured` returns.
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

import numpy as np

from flax_resnet.data import cifar10
from flax_resnet.data.examples import Examples

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = "cifar-10-binary.tar.gz"
PER_BATCH = 8
NAMES = [f"class{i}" for i in range(10)]


def write_archive(root: Path, seed: int) -> dict[str, Examples]:
    """Puts random images where a user puts the archive; returns what is in it."""
    examples = {
        "train": random_examples(5 * PER_BATCH, seed),
        "test": random_examples(PER_BATCH, seed + 1),
    }
    batches = [(f"data_batch_{i + 1}.bin", "train", i * PER_BATCH) for i in range(5)]
    files = {"batches.meta.txt": "\n".join([*NAMES, "", ""]).encode()}
    for name, split, start in [*batches, ("test_batch.bin", "test", 0)]:
        image, label = (array[start : start + PER_BATCH] for array in examples[split])
        channels_first = image.transpose(0, 3, 1, 2).reshape(PER_BATCH, -1)
        files[name] = np.hstack([label[:, None].astype(np.uint8), channels_first]).tobytes()
    path = archive_path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return examples


def random_examples(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    return Examples(image, rng.integers(0, 10, n, np.int32))


def measured(root: Path) -> tuple[int, str]:
    """Size and sha256 of the archive."""
    data = archive_path(root).read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def archive_path(root: Path) -> Path:
    return root / "downloads" / "manual" / ARCHIVE


def dataset_path(root: Path) -> Path:
    return root / "cifar10" / "3.0.2"


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
from flax_resnet.data import cifar10

root, size, cifar10.ARCHIVE_SHA256, mode = sys.argv[1:]
cifar10.ARCHIVE_BYTES = int(size)

def logged(name):
    function = getattr(cifar10, name)
    def call(*args):
        with open(Path(root) / "calls", "a") as log:
            log.write(name + "\\n")
        return function(*args)
    setattr(cifar10, name, call)

def killed(archive, split):
    for i, example in enumerate(read_split(archive, split)):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

logged("_fetch")
logged("_decode")
if mode == "killed":
    read_split, cifar10._read_split = cifar10._read_split, killed
print("ready", flush=True)
sys.stdin.readline()
examples = cifar10.load(root)
print(hashlib.sha256(b"".join(a.tobytes() for e in examples.values() for a in e)).hexdigest())
"""


def start_process(root: Path, mode: str = "") -> subprocess.Popen[str]:
    """Starts a process that waits for a line on stdin, then loads and prints the digest.

    Args:
        mode: "killed" to have it killed while it prepares the dataset.
    """
    size, sha256 = cifar10.ARCHIVE_BYTES, cifar10.ARCHIVE_SHA256
    return subprocess.Popen(
        [sys.executable, "-c", START, str(root), str(size), sha256, mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
