"""What a run would need on TPUs: `python scripts/compile_for.py --topology v5e:2x4`.

Compiles the training step and the evaluation of --config with TPU's own compiler (libtpu, in the
extra tpu) for TPUs that need not be there, nor the data set. Any setting can be overridden:
`--config.train.batch_size=1024`. It prints what each chip would need: memory, FLOP, bytes, and the
exchanges with other chips; what does not fit says which settings would need less. Nothing is run:
times and cycles are the compiler's estimates. It takes minutes for each program.

With --model nothing is compiled: from files that --json has written it tells how long a step would
take on 1, 8, 64 and 256 chips (docs/scale.md).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flax_resnet import cli, drawing
from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.studies import compiling, scaling, topology
from flax_resnet.studies.compiled_text import Collectives
from flax_resnet.studies.compiling import Compiled, TooLarge, in_gib
from flax_resnet.studies.scaling import Step
from flax_resnet.studies.topology import Chip

CONFIG = cli.define_config(
    default="resnet20", names=("model", "data", "optim", "train", "batch_norm")
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:1x1", f"a generation of TPUs and how its chips lie: {topology.EXAMPLES}"
)
EVALUATION = flags.DEFINE_bool("evaluation", True, "also compile the evaluation")
JSON = cli.define_path("json", None, "file for all numbers")
MODEL = cli.define_path("model", None, "folder with files of --json, for a model of more chips")
PNG = cli.define_path("png", None, "file for the picture of --model")


def main() -> None:
    if PNG.value and not MODEL.value:
        raise ConfigError("--png is of --model, which is not given")
    if MODEL.value:
        model(MODEL.value)
        return
    topology.prepare()
    config = cli.experiment(CONFIG)
    mesh = topology.mesh(TOPOLOGY.value)
    chip = topology.chip_of(mesh)
    compiling.check(config, mesh)
    print("\n".join(heading(config, mesh.size, chip)), flush=True)
    rows: list[dict[str, Any]] = []
    for task in compiling.tasks(config, mesh, evaluation=EVALUATION.value):
        found = compiling.compile_task(task)
        told = [*lines(found, chip), *advice(config, found, mesh.size, chip)]
        print("\n".join(["", *told]), flush=True)
        rows.append(as_row(found, chip))
    if JSON.value:
        about = {
            "topology": TOPOLOGY.value,
            "chips": mesh.size,
            "device_kind": mesh.devices.flat[0].device_kind,
            "jax": jax.__version__,
            "libtpu": topology.version_of_compiler(),
        }
        write_json(JSON.value, about | {"programs": rows, "config": config.to_dict()})


def model(folder: Path) -> None:
    """Tells of steps that were compiled earlier what they take on more chips."""
    found: list[Step] = []
    for path in sorted(folder.glob("*.json")):
        of_file = scaling.steps(path)
        if not of_file:
            print(f"{path.name} is left out: no training step of a {scaling.DEVICE_KIND}")
        found += of_file
    points = scaling.points(found)
    if not points:
        raise ConfigError(
            "--model must be a folder with files that compile_for.py --json has written for "
            f"several chips of a v5e, got {folder}"
        )
    print(scaling.table(points))
    if PNG.value:
        drawing.save(scaling.figure(points), PNG.value, dpi=200)


def heading(config: Experiment, chips: int, chip: Chip | None) -> list[str]:
    memory = f"{chip.name}, {in_gib(chip.memory)} each" if chip else "of unknown memory"
    number = f"{chips} chip{'s' * (chips > 1)}"
    return [
        f"{config.model.label}, batch {config.train.batch_size}, {config.model.dtype.value}, "
        f"{config.batch_norm.value} statistics, on {TOPOLOGY.value}: {number} ({memory})",
        "Nothing is run. Times and cycles are the compiler's estimates "
        f"(libtpu {topology.version_of_compiler()}). Each number is a chip's.",
    ]


def lines(found: Compiled | TooLarge, chip: Chip | None) -> Iterator[str]:
    task = found.task
    calls = f", {task.steps} steps a call" if task.steps > 1 else ""
    yield f"{task.name}: {task.images} images a step{calls}; compiled in {found.seconds:.0f} s"
    if isinstance(found, TooLarge):
        return
    memory, reading = found.memory, found.reading
    share = f" ({memory.total / chip.memory:.1%} of the chip's)" if chip else ""
    parts = ", ".join(f"{name} {in_gib(x)}" for name, x in memory._asdict().items())
    yield f"  memory      {in_gib(memory.total)}{share}: {parts}"
    yield f"  work        {found.flops:.3g} FLOP, {found.num_bytes:.3g} bytes"
    if found.optimal_seconds is None:
        yield "  estimate    none: the compiler does not know how long some instruction takes"
    else:
        used = ""
        if chip and (shares := found.utilisation(chip)):
            flops, bandwidth = shares
            used = f": {flops:.1%} of the chip's FLOP/s in bfloat16, {bandwidth:.1%} of its bytes/s"
        yield f"  estimate    {1000 * found.optimal_seconds:.3g} ms{used}"
        yield "              (of a step and what is done once a call; a loop within counts once)"
    once = ""
    if task.steps > 1:
        cycles = reading.call.cycles
        once = f"; {cycles:,.0f} once a call, or {cycles / task.steps:,.0f} a step"
    yield f"  cycles      {reading.step.cycles:,.0f} a step{once}"
    for portion, when in ((reading.step, "a step"), (reading.call, "a call")):
        for exchange in portion.collectives:
            yield f"  exchanges   {told(exchange, when)}"
    for cost in reading.costliest:
        of = f" of {cost.of}" if cost.of else ""
        yield f"  costliest   {cost.cycles:,.0f} cycles a call: {cost.opcode} to {cost.result}{of}"


def told(exchange: Collectives, when: str) -> str:
    number, overlapping = round(exchange.number), round(exchange.overlapping)
    overlap = f"{overlapping or 'none'} while the chip computes"
    return f"{number} {exchange.kind} {when}, {exchange.num_bytes:,.0f} bytes, {overlap}"


def advice(
    config: Experiment, found: Compiled | TooLarge, chips: int, chip: Chip | None
) -> Iterator[str]:
    """What could be better, and by which setting."""
    too_much = compiling.missing(found, chip)
    if too_much:
        needed, available = too_much
        yield (
            f"  DOES NOT FIT: {in_gib(needed)} of {in_gib(available)}, "
            f"{in_gib(needed - available)} too much. What needs less:"
        )
        for remedy in compiling.remedies(config, found.task, chips, needed, available):
            yield f"    {remedy}"
    elif found.task.name == "train" and compiling.exchanges_statistics(config, chips):
        yield "  --config.batch_norm=replica exchanges no statistics (they are then other ones)"


def as_row(found: Compiled | TooLarge, chip: Chip | None) -> dict[str, Any]:
    task = found.task
    row = {
        "phase": task.name,
        "images": task.images,
        "steps_per_call": task.steps,
        "compile_seconds": found.seconds,
        "fits": compiling.missing(found, chip) is None if chip else None,
    }
    if isinstance(found, TooLarge):
        return row | {"memory_needed": found.needed, "memory_available": found.available}
    used = (chip and found.utilisation(chip)) or (None, None)
    portions = {
        name: {
            "cycles": portion.cycles,
            "collectives": [exchange._asdict() for exchange in portion.collectives],
        }
        for name, portion in (("step", found.reading.step), ("call", found.reading.call))
    }
    return row | {
        "memory": found.memory._asdict() | {"total": found.memory.total},
        "memory_available": chip.memory if chip else None,
        "flops": found.flops,
        "bytes": found.num_bytes,
        "optimal_seconds": found.optimal_seconds,
        "flops_utilisation": used[0],
        "bandwidth_utilisation": used[1],
        **portions,
        "costliest": [cost._asdict() for cost in found.reading.costliest],
    }


if __name__ == "__main__":
    cli.run(main)
