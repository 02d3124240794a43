"""JSON files that are written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from flax_resnet.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError unless it is a JSON object."""
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(tree).__name__}")
    return tree


def write_json(path: Path, tree: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree, indent=2) + "\n")
    temporary.replace(path)
