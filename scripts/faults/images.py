"""Images are damaged, odd, or gone in the middle of a run; a decoding process is killed."""

import contextlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np

from faults import bad_images, small_tfds
from faults.bad_images import BAD, CLASSES, ODD
from faults.fault import Result
from faults.run import ROOT, environment
from flax_resnet.config import DataConfig, Dataset, Placement
from flax_resnet.data import images, source, stream
from flax_resnet.data.encoded import Images
from flax_resnet.errors import DatasetError

BATCH = 4
SECONDS = 60  # in which a stream must end


def settings(root: Path, allow_bad: int = 0) -> DataConfig:
    return DataConfig(
        name=Dataset.FOLDER,
        dir=str(root),
        resize=32,
        crop=32,
        placement=Placement.STREAMED,
        threads=2,
        allow_bad=allow_bad,
    )


def bad_image(runs: int, at: Path) -> Iterator[Result]:
    """Does one kind of damage after another; every tenth time the command itself must refuse."""
    kinds = [kind for kind in BAD if kind is not bad_images.no_permission or os.geteuid() != 0]
    for i in range(runs):
        root, rng, damage = at / f"bad_image{i}", random.Random(i), kinds[i % len(kinds)]
        with memory_of(root):
            path = some_image(root, rng)
            damage(path, rng)
            told = f"{path} ({BAD[damage]}"
            try:
                found = refused_by_command(root) if i % 10 == 9 else refused(root)
            except DatasetError as e:
                found = str(e)
            kept = source.load(settings(root, allow_bad=1))
            held = told in found and is_right(kept, without=path)
            yield Result(held, f"{damage.__name__}: {found}")


def odd_image(runs: int, at: Path) -> Iterator[Result]:
    for i in range(runs):
        root, rng, change = at / f"odd_image{i}", random.Random(i), ODD[i % len(ODD)]
        with memory_of(root):
            path = some_image(root, rng)
            change(path, rng)
            found = source.load(settings(root))
            colourless = change in (bad_images.grey, bad_images.sixteen_bits)
            held = is_right(found, grey=path if colourless else None)
            yield Result(held, change.__name__)


def bad_folder(runs: int, at: Path) -> Iterator[Result]:
    """A class in one split only, one without images, and none at all."""
    for i in range(runs):
        root, rng = at / f"bad_folder{i}", random.Random(i)
        with memory_of(root):
            some_image(root, rng)
            split, name = rng.choice(bad_images.SPLITS), rng.choice(CLASSES)
            kind = ("one split only", "no images in a class", "no images")[i % 3]
            if kind == "one split only":
                shutil.rmtree(root / split / name)
                told = f"only in {'val' if split == 'train' else 'train'}: {name}"
            elif kind == "no images in a class":
                for path in (root / split / name).iterdir():
                    path.rename(path.with_suffix(".txt"))
                told = f"{root / split / name} must hold images"
            else:
                shutil.rmtree(root)
                root.mkdir()
                told = f"{root} must hold a folder of images for each class"
            found = refused(root)
            yield Result(told in found, f"{kind}: {found}")


def bad_record(runs: int, at: Path) -> Iterator[Result]:
    """A bit in the middle of a shard of TFDS is flipped, or the shard is cut short or lost."""
    for i in range(runs):
        root, rng = at / f"bad_record{i}", random.Random(i)
        with memory_of(root):
            files = small_tfds.write(root)["train"]
            shard, harmed = small_tfds.shard(root), rng.randrange(len(files))
            config = DataConfig(name=Dataset.TFDS, tfds="small", dir=str(root), threads=2)
            kind = ("flipped", "flipped", "cut short", "lost")[i % 4]
            if kind == "flipped":
                small_tfds.damage_record(shard, files[harmed][0])
            elif kind == "cut short":
                content = shard.read_bytes()
                shard.write_bytes(content[: rng.randrange(len(content))])
            else:
                shard.unlink()
            found, held = "accepted", False
            try:
                source.load(config)
            except DatasetError as e:
                found, held = str(e), str(shard) in str(e)
            if held and kind == "flipped":
                config.allow_bad = 1
                config.placement, config.resize, config.crop = Placement.STREAMED, 32, 32
                held = records_are_right(source.load(config)["train"], files, harmed)
            yield Result(held, f"{kind}: {found}")


def lost_image(runs: int, at: Path) -> Iterator[Result]:
    """A file vanishes, or is cut short, after it was listed: the stream must end with its name."""
    for i in range(runs):
        root, rng = at / f"lost_image{i}", random.Random(i)
        with memory_of(root):
            path = some_image(root, rng, "train")
            config = settings(root)
            config.workers = 2 * (i % 5 == 4)
            train = source.load(config)["train"]
            if i % 2:
                bad_images.truncated(path, rng)
            else:
                path.unlink()
            found = drained(config, train)
            yield Result(f"{path} cannot be read" in found, found)


def killed_decoder(runs: int, at: Path) -> Iterator[Result]:
    """SIGKILL for one of the processes that decode."""
    for i in range(runs):
        root, rng = at / f"killed_decoder{i}", random.Random(i)
        with memory_of(root):
            some_image(root, rng)
            config = settings(root)
            config.workers = 2
            found = drained(config, source.load(config)["train"], kill_after=rng.randint(1, 5))
            yield Result(found.startswith("TrainingError: "), found)


def memory_of(root: Path) -> AbstractContextManager[object]:
    """Nothing is remembered from one run to the next."""
    return mock.patch.dict(os.environ, XDG_CACHE_HOME=str(root.with_name(f"{root.name}-cache")))


def some_image(root: Path, rng: random.Random, split: str = "") -> Path:
    """One of a new folder."""
    bad_images.write(root, rng.getrandbits(32))
    split = split or rng.choice(bad_images.SPLITS)
    return root / split / rng.choice(CLASSES) / f"{rng.randrange(bad_images.PER_CLASS)}.jpg"


def refused(root: Path) -> str:
    """The error; empty if there is none."""
    try:
        source.load(settings(root))
    except DatasetError as e:
        return str(e)
    return ""


def refused_by_command(root: Path) -> str:
    """What training says if it ends before its first step, in one line; else nothing."""
    workdir = root.with_name(f"{root.name}-run")
    flags = [
        f"--config={ROOT / 'configs/quickstart.py'}",
        f"--workdir={workdir}",
        "--config.data.name=folder",
        f"--config.data.dir={root}",
        f"--config.model.num_classes={len(CLASSES)}",
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train_flax.py"), *flags],
        capture_output=True,
        text=True,
        env=environment(root.parent) | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]},
        timeout=300,
    )
    is_one_line = run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    is_refused = run.returncode == 2 and is_one_line and not (workdir / "checkpoints").exists()
    return run.stderr.strip() if is_refused else ""


def is_right(
    found: dict[str, source.Split], without: Path | None = None, grey: Path | None = None
) -> bool:
    """Whether each image is there, but the bad one, and has the label of its folder and colour."""
    whole = len(bad_images.SPLITS) * len(CLASSES) * bad_images.PER_CLASS
    names: list[str] = []
    for split in found.values():
        assert isinstance(split, Images)
        for i, label in enumerate(split.label):
            name = split.name(i)
            names.append(name)
            colour = np.asarray(split.image(i)).mean((0, 1)).argmax()
            is_own = CLASSES[label] == ("red", "green", "blue")[colour] or name == str(grey)
            if not is_own or f"/{CLASSES[label]}/" not in name:
                return False
    return len(set(names)) == whole - (without is not None) and str(without) not in names


def records_are_right(split: source.Split, files: list[tuple[bytes, int]], harmed: int) -> bool:
    """Whether each record is there, but the damaged one, with its own label."""
    assert isinstance(split, Images)
    ours = [(np.asarray(split.image(i)).tobytes(), int(x)) for i, x in enumerate(split.label)]
    good = [file for i, file in enumerate(files) if i != harmed]
    theirs = [(np.asarray(images.decode(content)).tobytes(), x) for content, x in good]
    return sorted(ours) == sorted(theirs)


def drained(config: DataConfig, train: source.Split, kill_after: int = 0) -> str:
    """Streams ten epochs; how that ended.

    Args:
        kill_after: so many batches one of the processes is killed; 0: none is.
    """
    assert isinstance(train, Images)
    ended: list[str] = []

    def drain() -> None:
        steps = 10 * len(train) // BATCH
        places = np.arange(BATCH)
        try:
            with contextlib.closing(
                stream.training(config, train, 0, BATCH, places, 0, steps)
            ) as batches:
                for step, _ in enumerate(batches, 1):
                    if step == kill_after:
                        multiprocessing.active_children()[0].kill()
            ended.append("all images")
        except Exception as e:
            ended.append(f"{type(e).__name__}: {e}")

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return ended[0] if ended else "hangs"
