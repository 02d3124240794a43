"""What the text of a compiled program tells: the loops, the cycles and the talk between devices.

XLA writes its instructions in the order in which they run. Each is counted as often as the loops
around it go round.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Besides a loop and a call: what a device can be at while it waits for others.
WORK = ("convolution", "custom-call", "dot", "fusion", "gather", "reduce", "scatter", "sort")
CALLS = ("call", "conditional", "while")
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # where the name of a type does not say them
COSTLIEST = 3  # instructions that are named

HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*")
INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?)\s(?P<opcode>[a-z][\w-]*)\((?P<rest>.*)"
)
CALLED = re.compile(
    r"\b(?:body|calls|condition|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """A line of the text."""

    name: str
    result: str  # its type, such as f32[8,16]{1,0}
    opcode: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, or starts."""
        if self.opcode in ("async-update", "async-done"):
            return []
        groups = CALLED.findall(self.rest)
        return [name for group in groups for name in re.findall(r"[\w.-]+", group)]

    @property
    def of(self) -> str:
        """As in `Cost`."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    def is_finished_by(self, other: "Instruction") -> bool:
        """Whether the other waits for what this one starts."""
        is_end = other.opcode == f"{self.opcode.removesuffix('-start')}-done"
        return is_end and re.match(rf"[^%)]*%?{re.escape(self.name)}\b", other.rest) is not None


class Collectives(NamedTuple):
    """Exchanges between devices that are of one kind."""

    kind: str
    number: float
    num_bytes: float  # of all their results, on each device
    overlapping: float  # so many of them go on while the device computes


class Portion(NamedTuple):
    """Part of what a program does."""

    cycles: float  # the compiler's estimate, of the instructions that it has one for
    collectives: list[Collectives]


class Cost(NamedTuple):
    """An instruction that takes long."""

    cycles: float  # of a whole call, as the compiler estimates them
    opcode: str
    result: str  # its type, such as u8[50000,32,32,3]
    of: str  # what JAX calls it, such as jit(steps)/while/body/vmap()/gather; "" if it does not


class Reading(NamedTuple):
    """What a program of several steps does."""

    step: Portion  # in each step
    call: Portion  # beside the steps, once in each call
    costliest: list[Cost]  # first


def read(text: str, steps: int = 1) -> Reading:
    """What a compiled program does, on each device.

    Args:
        text: of a scheduled program, as `jax.stages.Compiled.as_text` gives it.
        steps: over which its outermost loop goes; of 1 there is no such loop.
    """
    computations, entry = parse(text)
    loop: Instruction | None = None
    if steps > 1:
        for instruction in computations[entry]:
            if instruction.opcode == "while" and trips(computations, instruction) == steps:
                loop = instruction
    tallies = [Tally(), Tally()]
    costs: list[Cost] = []
    for place in walk(computations, entry, loop):
        tallies[place.is_in_steps].add(place)
        if place.instruction.cycles:
            costs.append(place.cost())
    costliest = sorted(costs, reverse=True)[:COSTLIEST]
    once, each = (tally.portion() for tally in tallies)
    if loop is None:
        return Reading(scaled(once, 1 / steps), Portion(0, []), costliest)
    return Reading(scaled(each, 1 / steps), once, costliest)


class Place(NamedTuple):
    """An instruction and how often it runs."""

    instruction: Instruction
    result: str  # its type; of one that is started and finished, the type of the latter
    times: float
    is_overlapping: bool
    is_in_steps: bool
    of: str  # as in `Cost`

    def cost(self) -> Cost:
        line = self.instruction
        arrays = [f"{kind}[{shape}]" for kind, shape in ARRAY.findall(line.result)]
        more = f" and {len(arrays) - 1} more" if len(arrays) > 1 else ""
        return Cost(line.cycles * self.times, line.opcode, arrays[0] + more, self.of)


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Computations, str]:
    """All computations by name, and the name of the one where the program begins."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := HEADER.fullmatch(line):
                current = computations.setdefault(header["name"], [])
                if header["entry"]:
                    entry = header["name"]
        elif line.startswith("}"):
            current = None
        elif found := INSTRUCTION.match(line):
            current.append(
                Instruction(found["name"], found["type"], found["opcode"], found["rest"])
            )
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY")
    return computations, entry


def trips(computations: Computations, loop: Instruction) -> int:
    """How often a `while` goes round; 1 where the text does not say so."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    if condition is None:
        return 1
    lines = computations.get(condition[1], [])
    constants = {
        line.name: int(found[1])
        for line in lines
        if line.opcode == "constant" and (found := re.match(r"(\d+)\)", line.rest))
    }
    for line in lines:
        if line.opcode == "compare" and "direction=LT" in line.rest:
            operands = re.findall(r"%([\w.-]+)", line.rest.partition(")")[0])
            for operand in operands:
                if operand in constants:
                    return constants[operand]
    return 1


def walk(
    computations: Computations,
    name: str,
    steps: Instruction | None,
    times: float = 1.0,
    is_overlapping: bool = False,
    is_in_steps: bool = False,
    of: str = "",
) -> Iterator[Place]:
    """Every instruction that a computation runs, those of the computations that it calls too.

    Of the branches of a conditional all are counted.

    Args:
        steps: the loop over steps.
        times, is_overlapping, is_in_steps, of: what holds of the caller.
    """
    lines = computations.get(name, [])
    for i, line in enumerate(lines):
        end = finish(lines, i)
        overlaps = is_overlapping or (end is not None and does_work(lines[i + 1 : end]))
        result = line.result if end is None else lines[end].result
        yield Place(line, result, times, overlaps, is_in_steps, line.of or of)
        inner = times * (trips(computations, line) if line.opcode == "while" else 1)
        inside = is_in_steps or line is steps
        for called in line.called:
            yield from walk(computations, called, steps, inner, overlaps, inside, line.of or of)


def finish(lines: list[Instruction], start: int) -> int | None:
    """Which line waits for what the one at `start` starts, if that is what it does."""
    if not lines[start].opcode.endswith("-start"):
        return None
    later = range(start + 1, len(lines))
    return next((i for i in later if lines[start].is_finished_by(lines[i])), None)


def does_work(lines: Iterable[Instruction]) -> bool:
    return any(line.opcode in (*WORK, *CALLS) for line in lines)


class Tally:
    """Sums over places.

    TPU's compiler cuts an exchange into pieces, in order to compute between them: one in a fusion
    that starts it, one in another that goes on beside it, and so on. They have one channel.
    """

    def __init__(self) -> None:
        self.cycles = 0.0
        self.exchanges: dict[str, list[Place]] = defaultdict(list)  # by channel

    def add(self, place: Place) -> None:
        line = place.instruction
        self.cycles += place.times * line.cycles
        if line.opcode.removesuffix("-start") in KINDS:
            channel = re.search(r"channel_id=(\d+)", line.rest)
            self.exchanges[channel[1] if channel else line.name].append(place)

    def portion(self) -> Portion:
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for places in self.exchanges.values():
            first = places[0].instruction
            is_cut = any(place.instruction != first for place in places)
            for place in places:
                if place.instruction == first:
                    of_kind = sums[first.opcode.removesuffix("-start")]
                    more = 1, size(place.result), is_cut or place.is_overlapping
                    for i, x in enumerate(more):
                        of_kind[i] += place.times * x
        return Portion(self.cycles, [Collectives(kind, *x) for kind, x in sorted(sums.items())])


def scaled(portion: Portion, factor: float) -> Portion:
    return Portion(
        portion.cycles * factor,
        [Collectives(c.kind, *(x * factor for x in c[1:])) for c in portion.collectives],
    )


def size(type_: str) -> int:
    """Bytes of the arrays of a type, without padding."""
    total = 0
    for kind, shape in ARRAY.findall(type_):
        bits = BITS.get(kind) or int((re.search(r"\d+", kind) or ["0"])[0])
        elements = 1
        for length in filter(None, shape.split(",")):
            elements *= int(length)
        total += elements * bits
    return total // 8
