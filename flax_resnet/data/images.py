"""A file's bytes as a picture of red, green and blue, or the reason why they are none.

The pixels are those of torchvision's default loader, `PIL.Image.open(file).convert("RGB")`, but for
one kind of file (see `decode`). Which kind a file is, its first bytes say; its name says nothing.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

# Above it PIL itself raises an error, since a small file could fill the memory. Where PIL only
# warns, above half as many, photographs of this century are found: they are read without a word.
MOST_PIXELS = 178_956_970

KINDS = "JPEG, PNG, WebP, BMP and GIF"


class BadImageError(ValueError):
    """Bytes that are no image to learn from; the text is the reason, in a few words."""


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Nothing: dots per inch matter to no network, and a damaged EXIF block makes PIL warn."""


_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
}
# How files begin. What is not in _OPENERS is named in the complaint.
_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\x01\0": "ICO",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
}


def decode(content: bytes) -> Image.Image:
    """The picture in the bytes of a file, in mode RGB, its pixels in memory.

    Grey becomes three equal channels, CMYK and palettes become RGB, transparency is dropped (what
    lies under it shows), an animation is its first picture, and EXIF's orientation is ignored: all
    as in torchvision. Of 16 bits the upper 8 are kept. Of colour images PIL does so itself, while
    a grey one it, and so torchvision, makes almost white; this is the one difference.

    Many threads may decode at once. No warning is given.

    Raises:
        BadImageError: the bytes are empty, cut short, damaged, of another kind than JPEG, PNG,
            WebP, BMP and GIF, or have more than MOST_PIXELS.
    """
    kind = _kind(content)
    try:
        # The class of the kind, and not Image.open, which warns of many pixels.
        image = _OPENERS[kind](io.BytesIO(content))
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise BadImageError(
                f"{width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million"
            )
        image.load()
    except (BadImageError, MemoryError):
        raise
    # What PIL's decoders raise for damaged bytes is of a dozen types, and no list of them is given.
    except Exception as e:
        raise BadImageError(_complaint(kind, content, e)) from e
    if not width or not height:
        raise BadImageError(f"{kind} with no pixels")
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # of a palette, PIL would warn that it is dropped
    return image.convert("RGB")


def _kind(content: bytes) -> str:
    """That of _OPENERS; raises BadImageError for any other."""
    if not content:
        raise BadImageError("empty")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    found = [kind for start, kind in _BEGINNINGS.items() if content.startswith(start)]
    if content[4:8] == b"ftyp":
        found = ["AVIF" if content[8:11] == b"avi" else "HEIC or a film"]
    if found and found[0] in _OPENERS:
        return found[0]
    if found:
        raise BadImageError(f"{found[0]}, which is not read; {KINDS} are")
    size = f"{len(content):,} bytes"
    if content.startswith(b"version https://git-lfs"):
        raise BadImageError("a pointer of Git LFS: `git lfs pull` fetches the image")
    if not any(content[:512]):
        raise BadImageError(f"no image, {size} that begin with zeros")
    try:
        start = content[:512].decode("utf-8", "strict" if len(content) <= 512 else "ignore")
    except UnicodeDecodeError:
        start = "\0"
    is_text = all(letter.isprintable() or letter.isspace() for letter in start)
    if is_text and len(start.encode()) > len(content[:512]) - 4:
        is_page = start.lstrip().lower().startswith(("<!doctype html", "<html"))
        raise BadImageError(f"a web page of {size}" if is_page else f"{size} of text")
    raise BadImageError(f"no image, {size}")


def _complaint(kind: str, content: bytes, error: Exception) -> str:
    """What is wrong with a damaged file, whose decoder raised `error`."""
    text = " ".join(str(error).split()).lower()
    is_short = any(sign in text for sign in ("truncated", "eof", "no more images"))
    if kind == "WebP":  # its decoder tells nothing, its header the size
        is_short = len(content) < int.from_bytes(content[4:8], "little") + 8
    return f"truncated {kind}" if is_short else f"damaged {kind} ({text or type(error).__name__})"
