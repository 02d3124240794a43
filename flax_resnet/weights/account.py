"""What is told of a conversion: where every key went, what was assumed, what the network is."""

from collections.abc import Iterable, Sequence

from flax_resnet.config import ChannelPad, Experiment, ResNetConfig, Shortcut
from flax_resnet.weights.layouts import Layout, StateDict, to_key
from flax_resnet.weights.state_dict import COUNTER, UNUSED, Imported
from flax_resnet.weights.trees import flax_leaves

Shape = tuple[int, ...]
KeyRow = tuple[str, Shape, str, Shape]  # from where, of what shape; to where, of what shape


def of_reading(imported: Imported, ignored: Sequence[str], told: Sequence[str] = ()) -> str:
    """From each key of a PyTorch file to where it went in Flax.

    Args:
        ignored: what the file holds beside the state dict.
        told: how the state dict was found in the file.
    """
    leaves = leaves_of(imported)
    rows = [(key, shape, *leaves.get(name, (name, ()))) for key, name, shape in imported.placements]
    unused = [key for key, name, _ in imported.placements if name == UNUSED]
    return "\n".join(
        [
            table(rows),
            f"unused: {', '.join([*unused, *ignored]) or 'nothing'}",
            *unwrapping(imported, told),
            *(f"assumed: {assumption}" for assumption in imported.assumed.values()),
            f"network: {describe(imported.config)}",
        ]
    )


def unwrapping(imported: Imported, told: Sequence[str]) -> list[str]:
    """The line that says what was around the state dict; none if nothing was."""
    parts = [*told, *imported.told]
    return [f"unwrapped: {'; '.join(parts)}"] if parts else []


def of_writing(imported: Imported, state_dict: StateDict, layout: Layout, prefix: str = "") -> str:
    """From where it was in Flax to each key that is written, which has the prefix before it."""
    config = imported.config
    blocks = config.architecture.blocks
    origins = {to_key(name, layout, blocks): leaf for name, leaf in leaves_of(imported).items()}
    rows = []
    for key, array in state_dict.items():
        other = COUNTER if key.endswith("num_batches_tracked") else UNUSED
        rows.append((*origins.get(key, (other, ())), prefix + key, array.shape))
    pads_elsewhere = config.shortcut is Shortcut.A and config.channel_pad is not ChannelPad.CENTRE
    note = "note: akamaster's own code pads at the centre, this network at the end"
    is_misread = layout in (Layout.AKAMASTER, Layout.AKAMASTER_FC) and pads_elsewhere
    return "\n".join([table(rows), note] if is_misread else [table(rows)])


def table(rows: Iterable[KeyRow]) -> str:
    """Columns as wide as they need be, with an arrow in the middle."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        a, b, c, d = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"{a}  {b}  ->  {c}  {d}".rstrip())
    return "\n".join(lines)


def describe(config: ResNetConfig) -> str:
    """Such as "depth 20, shortcut A, ..."."""
    items = Experiment(model=config).to_dict()["model"].items()
    return ", ".join(f"{name} {value}" for name, value in items)


def leaves_of(imported: Imported) -> dict[str, tuple[str, Shape]]:
    return flax_leaves(imported.params) | flax_leaves(imported.batch_stats)
