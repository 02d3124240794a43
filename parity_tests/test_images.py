"""Claim: bytes become the picture that torchvision's loader makes of them, or a reason why not.

Which picture that is, PIL says: `Image.open(file).convert("RGB")` is all that torchvision's loader
does. The exceptions are named here: 16-bit grey, and kinds of files that are not read.
"""

import contextlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flax_resnet.data.images import MOST_PIXELS, BadImageError, decode

RNG = np.random.default_rng(15)
COLOURS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
RGB = Image.fromarray(COLOURS)
HALF = RNG.integers(0, 256, (20, 30), np.uint8)  # transparency


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def with_alpha() -> Image.Image:
    image = RGB.copy()
    image.putalpha(Image.fromarray(HALF))
    return image


def frames(kind: str) -> bytes:
    others = [Image.new("RGB", RGB.size, colour) for colour in ("red", "blue")]
    return encode(RGB, kind, save_all=True, append_images=others)


def exif(orientation: int) -> Image.Exif:
    told = Image.Exif()
    told[0x0112] = orientation
    return told


def turned_jpeg() -> bytes:
    return encode(RGB, "JPEG", exif=exif(6))


def damaged_exif() -> bytes:
    """A JPEG without JFIF's dots per inch, and an EXIF block that points beyond its end."""
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x011A, 5, 1, 9999)
    content = encode(RGB, "JPEG")
    start = 4 + int.from_bytes(content[4:6], "big")  # after JFIF's own block
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[start:]


GOOD = {
    "jpeg": lambda: encode(RGB, "JPEG"),
    "progressive": lambda: encode(RGB, "JPEG", progressive=True),
    "grey jpeg": lambda: encode(RGB.convert("L"), "JPEG"),
    "CMYK jpeg": lambda: encode(RGB.convert("CMYK"), "JPEG"),
    "turned": turned_jpeg,
    "damaged EXIF": damaged_exif,
    "png": lambda: encode(RGB, "PNG"),
    "grey png": lambda: encode(RGB.convert("L"), "PNG"),
    "black and white png": lambda: encode(RGB.convert("1"), "PNG"),
    "transparent png": lambda: encode(with_alpha(), "PNG"),
    "grey and transparent png": lambda: encode(with_alpha().convert("LA"), "PNG"),
    "a transparent colour": lambda: encode(RGB, "PNG", transparency=(1, 2, 3)),
    "palette": lambda: encode(RGB.quantize(16), "PNG"),
    "palette, a transparent colour": lambda: encode(RGB.quantize(16), "PNG", transparency=3),
    "palette, half transparent": lambda: encode(RGB.quantize(4), "PNG", transparency=b"\0\x80"),
    "animated png": lambda: frames("PNG"),
    "webp": lambda: encode(RGB, "WEBP"),
    "transparent webp": lambda: encode(with_alpha(), "WEBP", lossless=True),
    "animated webp": lambda: frames("WEBP"),
    "bmp": lambda: encode(RGB, "BMP"),
    "palette bmp": lambda: encode(RGB.quantize(16), "BMP"),
    "gif": lambda: encode(RGB, "GIF"),
    "animated gif": lambda: frames("GIF"),
    "several pictures in a jpeg": lambda: frames("MPO"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_read_is_what_torchvisions_loader_reads(name: str) -> None:
    content = GOOD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_the_pictures_above_are_what_they_say() -> None:
    """PIL warns of two of them, and the first picture of an animation is not the last."""
    for name in ("damaged EXIF", "palette, half transparent"):
        with pytest.warns(UserWarning, match="Truncated File Read|Palette images"):
            Image.open(io.BytesIO(GOOD[name]())).convert("RGB")
    for kind in ("PNG", "WEBP", "GIF"):
        first = np.asarray(decode(frames(kind)))
        assert len(np.unique(first.reshape(-1, 3), axis=0)) > 100, "not red, and not blue"
        assert Image.open(io.BytesIO(frames(kind))).n_frames == 3  # pyright: ignore


def test_exif_turns_no_image() -> None:
    assert decode(turned_jpeg()).size == RGB.size


def test_of_16_bits_the_upper_8_are_kept() -> None:
    """PIL makes every grey above 255 of 65,535 white."""
    grey = RNG.integers(0, 1 << 16, (20, 30), np.uint16)
    content = encode(Image.fromarray(grey), "PNG")
    found = np.asarray(decode(content))
    np.testing.assert_array_equal(found, np.stack([grey >> 8] * 3, -1))
    assert np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).mean() > 250


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG that claims to be so large, in a file of a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not found\n" * 8, "80 bytes of text"),
    "text of another alphabet": ("नहीं मिला\n".encode() * 300, "7,800 bytes of text"),
    "page": (b"<!DOCTYPE html><p>404" + b" " * 1000, "a web page of 1,021 bytes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "zeros": (bytes(5000), "no image, 5,000 bytes that begin with zeros"),
    "noise": (bytes(range(128, 256)), "no image, 128 bytes"),
    "tiff": (encode(RGB, "TIFF"), "TIFF, which is not read; JPEG, PNG, WebP, BMP and GIF are"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC or a film, which is not read"),
    "pdf": (b"%PDF-1.7\n", "PDF, which is not read"),
    "bomb": (png_of(20_000, 10_000), "20000 x 10000 pixels, more than 179 million"),
    "no pixels": (encode(RGB, "GIF")[:6] + bytes(7) + b";", "truncated GIF"),
    "jpeg, first bytes only": (encode(RGB, "JPEG")[:3], "truncated JPEG|damaged JPEG"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_said(name: str) -> None:
    content, reason = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImageError, match=reason):
            decode(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_file_cut_anywhere_is_no_image(kind: str) -> None:
    """In halves, thirds and tenths it is named as truncated; nowhere is another picture made."""
    whole = encode(RGB, kind)
    expected = np.asarray(decode(whole))
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        try:
            found = np.asarray(decode(whole[:length]))
        except BadImageError:
            continue
        np.testing.assert_array_equal(found, expected)  # only what follows the pixels is missing
    for part in (2, 3, 10):
        with pytest.raises(BadImageError, match="truncated"):
            decode(whole[: -len(whole) // part])


def test_a_changed_byte_makes_no_other_error() -> None:
    """Whatever PIL raises for it."""
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        whole = np.frombuffer(encode(RGB, kind), np.uint8)
        for _ in range(60):
            content = whole.copy()
            content[RNG.integers(0, min(len(whole), 200))] ^= RNG.integers(1, 256, dtype=np.uint8)
            with contextlib.suppress(BadImageError):
                assert decode(content.tobytes()).mode == "RGB"


def test_many_pixels_are_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL warns from half of its limit on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # the images here have 600
    content = encode(RGB, "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(decode(content)), COLOURS)


def test_the_limit_is_pils() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == MOST_PIXELS


def test_threads_decode_at_once() -> None:
    contents = [make() for make in GOOD.values()]
    alone = [np.asarray(decode(content)) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, contents * 8))
    for i, found in enumerate(together):
        np.testing.assert_array_equal(np.asarray(found), alone[i % len(contents)])
