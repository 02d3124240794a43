"""Files that are made to do harm are loaded as a checkpoint or as weights."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import hostile_weights, hostile_workdirs
from faults.fault import Result
from faults.memory import megabytes, reset_peak
from faults.run import begun, newest
from flax_resnet.errors import UserError
from flax_resnet.step import init
from flax_resnet.training import checkpoint, workdir
from flax_resnet.weights import files

FILES: list[Callable[[Path, int, Path], Path]] = [
    hostile_weights.pickle_that_runs_code,
    hostile_weights.archive_that_runs_code,
    hostile_weights.archive_that_unpacks_elsewhere,
    hostile_weights.archive_bomb,
    hostile_weights.tensors_that_claim_terabytes,
    hostile_weights.safetensors_that_claim_terabytes,
    hostile_weights.safetensors_with_an_endless_header,
    hostile_workdirs.config_of_a_giant,
    hostile_workdirs.config_of_a_billion_classes,
    hostile_workdirs.config_of_wrong_types,
    hostile_workdirs.config_nested_too_deep,
    hostile_workdirs.meta_nested_too_deep,
    hostile_workdirs.meta_of_another_kind,
    hostile_workdirs.tree_metadata_of_huge_shapes,
    hostile_workdirs.arrays_of_huge_shapes,
    hostile_workdirs.handler_by_name,
    hostile_workdirs.step_that_is_a_link,
    hostile_workdirs.file_that_is_a_link,
    hostile_workdirs.temporary_that_is_a_link,
]


def hostile(runs: int, at: Path) -> Iterator[Result]:
    """Loads a file of FILES each time; the figure is by how many MB the largest memory use grew."""
    source, canary = begun(at).workdir, at / "canary"
    like = init(workdir.read_config(source))[1]
    step = newest(source)
    for i in range(runs):
        make = FILES[i % len(FILES)]
        directory = at / "hostile"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        outside = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        path = make(directory, step, canary)
        before = reset_peak()
        try:
            if path.is_dir():
                workdir.read_config(path)
                checkpoint.load_state(path, like, step)
            else:
                files.read(path)
            refused, said = False, "loaded"
        except Exception as e:
            # The scripts print these two kinds as one line.
            refused, said = isinstance(e, UserError | OSError), f"{type(e).__name__}: {e}"
        grown = megabytes("VmHWM") - before
        intact = outside == {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        held = refused and not canary.exists() and intact and grown < 500
        yield Result(held, f"{make.__name__}: {said}", grown)
