"""What a user writes for a place: a path, with `~` and `file://`, or a bucket's or model's URL."""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from flax_resnet.errors import ConfigError

BUCKETS = (
    "gs",
    "s3",
)  # schemes, of Google Cloud Storage and of Amazon's S3 and what speaks like it
HUB = "hf"  # scheme of the Hugging Face Hub
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
KNOWN = re.compile(rf"(file|{HUB}|{'|'.join(BUCKETS)}):", re.IGNORECASE)  # with one slash: a slip
NOT_IN_NAMES = re.compile(r"[\x00-\x1f*?\[\]{}#\\]")  # some store, or fsspec, reads more into these


class Url(NamedTuple):
    """A folder or an object in a bucket, or a model on the Hub."""

    scheme: str
    path: str  # BUCKET/NAME or ORG/NAME, without a slash at either end

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return self._replace(path=self.path.rpartition("/")[0])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def place(text: str | os.PathLike[str], what: str, *, hub: bool = False) -> Path | Url:
    """A local path, with the home directory in the place of `~`; or a URL of gs:// or s3://.

    Variables such as $HOME are the shell's affair.

    Args:
        what: the name of the flag or setting, for the message.
        hub: whether it may also be hf://ORG/NAME, which holds weights but no run.

    Raises:
        ConfigError: it is empty, a URL of another kind, or `~NAME` of a user that there is not.
    """
    text = os.fspath(text)
    scheme = scheme_of(text)
    if scheme in BUCKETS:
        return bucket_url(text, scheme, what)
    if scheme == HUB and hub:
        names = [name for name in text.partition("://")[2].split("/") if name]
        if len(names) < 2:
            raise ConfigError(f"{what} must be {HUB}://ORG/NAME, got {text}")
        return Url(HUB, "/".join(names))
    if scheme not in ("", "file"):
        known = " or ".join(f"{scheme}://" for scheme in BUCKETS + (HUB,) * hub)
        raise ConfigError(f"{what} must be a local path, or a URL of {known}, got {text}")
    return local_path(text, what)


def local_path(text: str | os.PathLike[str], what: str) -> Path:
    """As `place`, where no bucket will do. Raises ConfigError for one."""
    text = os.fspath(text)
    scheme = scheme_of(text)
    if scheme == "file":
        return file_url(text, what)
    if scheme:
        raise ConfigError(f"{what} must be a local path, got {text}")
    if not text:
        raise ConfigError(f"{what} must be a path, got ''")
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigError(f"{what} must be a path of a home that is known, got {text}") from e


def scheme_of(text: str) -> str:
    """Of a URL, in lower case; empty if it is none."""
    found = URL.match(text) or KNOWN.match(text)
    return found[1].lower() if found else ""


def file_url(text: str, what: str) -> Path:
    url = urlsplit(text)
    path = Path(unquote(url.path))
    is_here = url.netloc in ("", "localhost") and path.is_absolute()
    if not is_here or url.query or url.fragment:
        raise ConfigError(f"{what} must be file:///PATH, of this machine, got {text}")
    return path


def bucket_url(text: str, scheme: str, what: str) -> Url:
    bucket, *names = [name for name in text.partition("://")[2].split("/") if name] or [""]
    if not names or {".", ".."} & {bucket, *names} or NOT_IN_NAMES.search(text):
        raise ConfigError(f"{what} must be {scheme}://BUCKET/NAME, got {text}")
    return Url(scheme, "/".join([bucket, *names]))


def cache_directory() -> Path:
    """The user's own, for what can be made again: under XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax-resnet"
