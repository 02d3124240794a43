"""A prepared CIFAR-10 or its decoded copy is damaged, or four processes prepare it at once."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from faults import small_cifar
from faults.fault import Result
from flax_resnet.data import cifar
from flax_resnet.data.cifar import CIFAR10
from flax_resnet.errors import DatasetError

KINDS = ("shorten", "unlink", "flip_middle", "lose_record", "cache", "partial")


def dataset(runs: int, at: Path) -> Iterator[Result]:
    """Does one kind of damage after another; every tenth time four processes start at once."""
    for i in range(runs):
        root, kind = at / "dataset" / f"{i}", KINDS[i % len(KINDS)]
        right = small_cifar.digest(small_cifar.write_archive(root, seed=i))
        measured = small_cifar.measured(root)
        with (
            mock.patch.dict(os.environ, XDG_CACHE_HOME=str(root / "cache")),
            mock.patch.multiple(CIFAR10, **measured),
        ):
            yield four_at_once(root, right) if i % 10 == 9 else damage(root, kind, i, right)


def damage(root: Path, kind: str, seed: int, right: str) -> Result:
    """Whether a damaged dataset is prepared again; `right` is the digest that it must have."""
    cifar.load(str(root))
    shard = small_cifar.train_shard(root)
    if kind == "cache":
        small_cifar.flip(small_cifar.cache_entry(), random.Random(seed).randrange(-1000, 1000))
    elif kind == "partial":
        shards = sorted(shard.parent.glob("*array_record*"))
        shards[seed % len(shards)].write_bytes(b"")
    else:
        {damage.__name__: damage for damage in small_cifar.DAMAGES}[kind](shard)
    try:
        found = small_cifar.digest(cifar.load(str(root)))
    except DatasetError:
        return Result(False, f"{kind}: not prepared again")
    if found != right:
        return Result(False, f"{kind}: other images than in the archive")
    return Result(True, f"{kind}: prepared again")


def four_at_once(root: Path, right: str) -> Result:
    processes = [small_cifar.start_process(root) for _ in range(4)]
    outputs = [process.communicate("\n", timeout=120)[0] for process in processes]
    held = all(output.split() == ["ready", right] for output in outputs)
    prepared = (root / "calls").read_text().split().count("_fetch")
    return Result(held and prepared == 1, f"four at once, prepared {prepared} times")
