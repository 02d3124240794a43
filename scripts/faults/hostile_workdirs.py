"""Work directories that are made to do harm.

Each function here changes a whole one: its config, or its checkpoint of `step`. It returns the
directory. Code in it, if it is ever executed, makes the file `canary`.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.step import init
from flax_resnet.training import checkpoint, workdir


def config_of_a_giant(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config["model"].update(depth=6 * 10**9 + 2))


def config_of_a_billion_classes(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config["model"].update(num_classes=10**9))


def config_of_wrong_types(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config.update(model=["depth"]))


def config_nested_too_deep(directory: Path, step: int, canary: Path) -> Path:
    (directory / "config.json").write_text("[" * 10**6)
    return directory


def with_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def meta_nested_too_deep(directory: Path, step: int, canary: Path) -> Path:
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text("[" * 10**6)
    return directory


def meta_of_another_kind(directory: Path, step: int, canary: Path) -> Path:
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text("[1]")
    return directory


def tree_metadata_of_huge_shapes(directory: Path, step: int, canary: Path) -> Path:
    paths = [p for p in (directory / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    for path in paths:
        with contextlib.suppress(ValueError):
            text = json.dumps(enlarged(json.loads(path.read_text())))
            path.write_text(text)
    # Huge shapes alone do no harm here. The digest goes too, so that nothing may be believed.
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text('{"digest": "0"}')
    return directory


def enlarged(tree: Any) -> Any:
    """`tree` with every number of its lists of integers, such as shapes, made huge."""
    if isinstance(tree, dict):
        return {key: enlarged(value) for key, value in tree.items()}
    if isinstance(tree, list):
        is_shape = tree and all(isinstance(x, int) for x in tree)
        return [10**9 for _ in tree] if is_shape else [enlarged(x) for x in tree]
    return tree


def arrays_of_huge_shapes(directory: Path, step: int, canary: Path) -> Path:
    """Arrays of zeros that are really stored: a few MB on the disk, 0.5 GB in memory."""
    path = directory / "checkpoints" / str(step)
    config = workdir.read_config(directory)
    state = init(config)[1]
    state.params["fc"]["kernel"] = np.zeros((64, 2 * 10**6), np.float32)
    shutil.rmtree(path)
    with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(state._replace(step=np.int32(step)), None)
    return directory


def handler_by_name(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    tree = json.loads(path.read_text())
    tree["item_handlers"] = {"state": "os.system", "meta": f"os.system('touch {canary}')"}
    path.write_text(json.dumps(tree))
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text('{"digest": "0"}')
    return directory


def step_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step)
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    return directory


def file_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step) / "meta" / "metadata"
    path.unlink()
    path.symlink_to("/etc/passwd")
    return directory


def temporary_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    """Orbax removes what a killed run left behind: it must not remove what a link points to."""
    (directory / "checkpoints" / "99.orbax-checkpoint-tmp").symlink_to(directory.parent / "begun")
    return directory
