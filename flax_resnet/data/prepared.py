"""What holds for every set that tensorflow-datasets has prepared."""

import os
from pathlib import Path

from flax_resnet import places
from flax_resnet.errors import ConfigError, DatasetError


def directory(data_dir: str | None) -> Path:
    """TFDS's directory that is meant; None: TFDS's own choice. Raises DatasetError for no path."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        given = places.local_path(data_dir, "the data directory")
    except ConfigError as e:
        raise DatasetError(str(e)) from e
    if given.exists() and not given.is_dir():
        raise DatasetError(f"the data directory must be a directory, got the file {given}")
    return given


def reason(error: Exception) -> str:
    """One line: what TFDS and array_record raise may have several."""
    return " ".join(f"{type(error).__name__}: {error}".split())
