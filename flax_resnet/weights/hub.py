"""Weights of the Hugging Face Hub: hf://ORG/NAME, through huggingface_hub and its cache.

What has been fetched once is there without a network too; HF_HOME and HF_HUB_OFFLINE are heeded.
"""

import re
from pathlib import Path
from typing import Any

from flax_resnet.errors import WeightsError
from flax_resnet.places import HUB

NAME = re.compile(
    rf"{HUB}://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>[^?#]+))?/?"
)
# The file of a repository that is fetched: the first that there is. It may hold many others.
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def fetch(name: str) -> Path:
    """The local folder of `hf://ORG/NAME`, or the file of `hf://ORG/NAME/FILE`.

    Args:
        name: after NAME may stand `@` and a branch, tag or commit.

    Raises:
        WeightsError: it is no such name, there is none of that name, it cannot be fetched, or
            huggingface_hub is not installed.
    """
    parts = NAME.fullmatch(name)
    if parts is None:
        raise WeightsError(f"a name of the Hub must be {HUB}://ORG/NAME, got {name}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as e:
        raise WeightsError(f"{name} needs huggingface_hub: pip install 'flax-resnet[hub]'") from e
    where: dict[str, Any] = {"repo_id": parts["repository"], "revision": parts["revision"]}
    try:
        if parts["file"]:
            return Path(huggingface_hub.hf_hub_download(filename=parts["file"], **where))
        for weights in (SAFETENSORS, PICKLE):
            patterns = ["*.json", weights]
            folder = Path(huggingface_hub.snapshot_download(allow_patterns=patterns, **where))
            if (folder / weights).exists():
                return folder
        return folder
    except errors.RepositoryNotFoundError as e:
        raise WeightsError(
            f"{name}: the Hub has no such model, or shows it only to those who are logged in"
        ) from e
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as e:
        if isinstance(e, errors.LocalEntryNotFoundError):
            raise unreachable(name, e) from e
        what = "file" if parts["file"] else "branch, tag or commit"
        raise WeightsError(f"{name}: the model is on the Hub, but has no such {what}") from e
    # Besides its own it raises what its HTTP client and the file system do.
    except Exception as e:
        raise unreachable(name, e) from e


def unreachable(name: str, error: Exception) -> WeightsError:
    from huggingface_hub import constants

    cache, reason = constants.HF_HUB_CACHE, "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return WeightsError(f"{name} is not in the cache, {cache}, and cannot be fetched ({reason})")
