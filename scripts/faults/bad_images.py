"""Folders of images in which one is damaged, odd or missing."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")
PER_CLASS = 4
SPLITS = ("train", "val")
Maker = Callable[[Path, random.Random], None]


def write(root: Path, seed: int = 0) -> None:
    """DIR/{train,val}/{blue,green,red}/*.jpg, each image in the colour of its class."""
    rng = random.Random(seed)
    for split in SPLITS:
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(PER_CLASS):
                save(folder / f"{i}.jpg", picture(name, rng))


def picture(name: str, rng: random.Random) -> Image.Image:
    """Of its class's colour, with some noise."""
    size = rng.randint(40, 90), rng.randint(40, 90)
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 60, (*size, 3), np.uint8)
    pixels[..., len(CLASSES) - 1 - CLASSES.index(name)] += 180
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, kind: str = "JPEG", **options: object) -> None:
    """Under whatever name."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    path.write_bytes(content.getvalue())


def truncated(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randint(1, len(content) * 9 // 10)])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def text(path: Path, rng: random.Random) -> None:
    path.write_text("<html>404 Not Found</html>")


def zeros(path: Path, rng: random.Random) -> None:
    """As a file system leaves a file behind when the power fails."""
    path.write_bytes(bytes(path.stat().st_size))


def tiff(path: Path, rng: random.Random) -> None:
    save(path, Image.open(path).convert("RGB"), "TIFF")


def bomb(path: Path, rng: random.Random) -> None:
    """A PNG of 300 KB that is 900 MB of pixels."""
    side = 30_000

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def dangling_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone.jpg"))


def endless_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def no_permission(path: Path, rng: random.Random) -> None:
    path.chmod(0)


def png(path: Path, rng: random.Random) -> None:
    """Called .jpg."""
    save(path, Image.open(path).convert("RGB"), "PNG")


def cmyk(path: Path, rng: random.Random) -> None:
    save(path, Image.open(path).convert("CMYK"))


def grey(path: Path, rng: random.Random) -> None:
    save(path, Image.open(path).convert("L"))


def sixteen_bits(path: Path, rng: random.Random) -> None:
    levels = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
    save(path, Image.fromarray(levels), "PNG")


def transparent(path: Path, rng: random.Random) -> None:
    image = Image.open(path).convert("RGBA")
    image.putalpha(rng.randint(0, 255))
    save(path, image, "PNG")


def turned(path: Path, rng: random.Random) -> None:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(2, 8)  # orientation
    save(path, Image.open(path).convert("RGB"), exif=exif)


def animated(path: Path, rng: random.Random) -> None:
    first = Image.open(path).convert("RGB")
    save(path, first, "WEBP", save_all=True, append_images=[first.rotate(90)] * 2)


def link_out(path: Path, rng: random.Random) -> None:
    """To an image outside the folder of the data set."""
    outside = path.parents[2].with_name(path.parents[2].name + "-outside.jpg")
    path.rename(outside)
    path.symlink_to(outside)


def no_utf8(path: Path, rng: random.Random) -> None:
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.jpg")


def upper_case(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name("IMAGE.JPEG"))


# With how the reason begins that a user is told.
BAD: dict[Maker, str] = {
    truncated: "",
    empty: "empty",
    text: "a web page of 26 bytes",
    zeros: "no image",
    tiff: "TIFF, which is not read",
    bomb: "30000 x 30000 pixels",
    dangling_link: "No such file",
    endless_link: "Too many levels of symbolic links",
    pipe: "no regular file",
    no_permission: "Permission denied",
}
# What is read as if nothing were odd about it.
ODD: list[Maker] = [
    *(png, cmyk, grey, sixteen_bits, transparent),
    *(turned, animated, link_out, no_utf8, upper_case),
]
