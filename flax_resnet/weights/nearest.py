"""Which layout a state dict of unknown keys is nearest to, and the renames that would make it fit.

The shapes of the convolutions, in their order, tell which network it is; so each module's key in
each layout is known. What turns one into the other is then looked for: a few regular expressions
with what to put in their place, for `--rename`. What is found is tried on every key.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flax_resnet.config import TABLE_1, WIDTHS, Block, Shortcut, Stages
from flax_resnet.errors import WeightsError
from flax_resnet.weights.layouts import Layout, StateDict, to_key

MOST_RENAMES = 6
MOST_TRIED = 40  # modules of other names, for each rename
NORM = ("weight", "bias", "running_mean", "running_var")
# What may stand before all keys: `wrappings` takes it away.
PREFIX = re.compile(r"((module|_orig_mod|model|net|network|backbone)\.)*")


class Suggestion(NamedTuple):
    """What a state dict would be."""

    renames: list[str]  # each OLD=NEW
    layout: Layout
    depth: int

    def __str__(self) -> str:
        options = " ".join(f"--rename '{rename}'" for rename in self.renames)
        return f"with {options} it is {self.layout.value}'s ResNet-{self.depth}"


class Candidate(NamedTuple):
    """A network that the state dict may be, by the names of its modules in their order."""

    depth: int
    blocks: tuple[int, ...]
    convolutions: list[tuple[str, tuple[int, int, int]]]  # name, channels out and in, size


@contextlib.contextmanager
def suggesting(state_dict: StateDict) -> Iterator[None]:
    """Adds to a refusal of the state dict the renames that would help, if there are any."""
    try:
        yield
    except WeightsError as e:
        if suggestion := suggest(state_dict):
            raise WeightsError(f"{e}; {suggestion}") from e
        raise


def suggest(state_dict: StateDict) -> Suggestion | None:
    """The renames that make a state dict one of a layout's; None if none are found, or needed."""
    for order in orders(state_dict):
        arrays = {key: state_dict[key] for key in order}
        for candidate in candidates(arrays):
            names = aligned(arrays, candidate)
            if names is not None:
                return shortest(list(arrays), names, candidate)
    return None


def orders(state_dict: StateDict) -> Iterator[list[str]]:
    """The keys as a module has them; else sorted, as in safetensors, but for the stem."""
    yield list(state_dict)
    found = sorted(state_dict, key=natural)
    # The stem's convolution alone sees images, which have few channels.
    found.sort(key=lambda key: not (np.ndim(state_dict[key]) == 4 and is_of_stem(state_dict[key])))
    yield found
    if norms := [key for key in found if key.endswith(".running_mean")]:
        yield [norms[-1], *(key for key in found if key != norms[-1])]


def is_of_stem(kernel: np.ndarray) -> bool:
    return kernel.shape[1] < min(WIDTHS[Stages.CIFAR])


def shortest(
    keys: Sequence[str], names: Mapping[str, str], candidate: Candidate
) -> Suggestion | None:
    """With the fewest renames, of all layouts.

    Args:
        names: of each module of the state dict, ours.
    """
    best: Suggestion | None = None
    prefix = common_prefix(keys)
    for layout in Layout:
        try:
            theirs = {
                module: to_key(f"{name}.weight", layout, candidate.blocks).removesuffix("weight")
                for module, name in names.items()
            }
        except WeightsError:  # the layout has no such module
            continue
        pairs = {f"{module}.": prefix + key for module, key in theirs.items()}
        renames = find_renames(pairs, prefix, MOST_RENAMES if best is None else len(best.renames))
        if renames is None or not renames_fit(keys, pairs, renames):
            continue
        if best is None or len(renames) < len(best.renames):
            best = Suggestion(renames, layout, candidate.depth)
    return best if best and best.renames else None


def common_prefix(keys: Sequence[str]) -> str:
    """What stands before all keys and is no part of any layout."""
    found = [match[0] for key in keys if (match := PREFIX.match(key))]
    shortest = min(found, key=len, default="")
    return shortest if all(key.startswith(shortest) for key in keys) else ""


# --- The network ----------------------------------------------------------------------------------


def candidates(arrays: StateDict) -> Iterator[Candidate]:
    """Networks of as many convolutions."""
    shapes = [np.shape(x) for x in arrays.values()]
    kernels = [shape for shape in shapes if len(shape) == 4]
    if not kernels:
        return
    count = len(kernels)
    rows: list[tuple[int, Block, tuple[int, ...], tuple[int, ...]]] = [
        (depth, block, WIDTHS[Stages.IMAGENET], blocks)
        for depth, (block, blocks) in TABLE_1.items()
    ]
    # 6n + 1 convolutions, and up to 3n of shortcuts.
    for n in range(max(1, (count - 1) // 9), (count - 1) // 6 + 1):
        rows.append((6 * n + 2, Block.BASIC, WIDTHS[Stages.CIFAR], (n,) * 3))
    for depth, block, widths, blocks in rows:
        for shortcut in (Shortcut.A, Shortcut.B, Shortcut.C):
            for is_first in (False, True):
                found = convolutions(block, widths, blocks, shortcut, kernels[0], is_first=is_first)
                if len(found) == count:
                    yield Candidate(depth, blocks, found)


def convolutions(
    block: Block,
    widths: Sequence[int],
    blocks: Sequence[int],
    shortcut: Shortcut,
    stem: Sequence[int],
    *,
    is_first: bool,
) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and shapes of a network's convolutions.

    Args:
        stem: the shape of the first, whose size and images are free.
        is_first: whether a block's shortcut comes before its other convolutions.
    """
    found = [("conv1", (widths[0], stem[1], stem[2]))]
    c_in = widths[0]
    for s, (width, n) in enumerate(zip(widths, blocks, strict=True)):
        for b in range(n):
            c_out = width * (4 if block is Block.BOTTLENECK else 1)
            inner = [(width, c_in, 3), (c_out, width, 3)]
            if block is Block.BOTTLENECK:
                inner = [(width, c_in, 1), (width, width, 3), (c_out, width, 1)]
            path = f"stages.{s}.{b}"
            own = [(f"{path}.conv{i}", shape) for i, shape in enumerate(inner, 1)]
            changes = c_in != c_out or (s > 0 and b == 0)
            if shortcut is Shortcut.C or (shortcut is Shortcut.B and changes):
                projection = (f"{path}.shortcut.conv", (c_out, c_in, 1))
                own = [projection, *own] if is_first else [*own, projection]
            found += own
            c_in = c_out
    return found


def aligned(arrays: StateDict, candidate: Candidate) -> dict[str, str] | None:
    """The name of each module of the state dict; None if it is not the candidate.

    Convolutions and BatchNorms each have their order, and the classifier is the only one.
    """
    kernels = {k: np.shape(x) for k, x in arrays.items() if np.ndim(x) == 4}
    norms = [key for key in arrays if key.endswith(".running_mean")]
    classifiers = [key for key, x in arrays.items() if np.ndim(x) == 2]
    expected = [shape for _, shape in candidate.convolutions]
    if [shape[:3] for shape in kernels.values()] != expected or len(classifiers) != 1:
        return None
    conv_names = [name for name, _ in candidate.convolutions]
    norm_names = [name.replace("conv", "bn") for name in conv_names]
    widths = [shape[0] for shape in expected]
    if len(norms) == len(norm_names) - 1:  # of tanjeffreyz: without one behind the stem
        norm_names, widths = norm_names[1:], widths[1:]
    if [len(arrays[key]) for key in norms] != widths:
        return None
    modules = [key.rpartition(".")[0] for key in [*kernels, *norms, *classifiers]]
    names = dict(zip(modules, [*conv_names, *norm_names, "fc"], strict=True))
    return names if are_complete(arrays, names) else None


def are_complete(arrays: StateDict, names: Mapping[str, str]) -> bool:
    """Whether each module has the tensors that it needs, and there are no others."""
    leaves: dict[str, set[str]] = {module: set() for module in names}
    for key in arrays:
        module, _, leaf = key.rpartition(".")
        if module not in leaves:
            return False
        leaves[module].add(leaf)
    for module, name in names.items():
        is_norm = name.rpartition(".")[2].startswith("bn")
        needed = set(NORM) if is_norm else {"weight", "bias"} if name == "fc" else {"weight"}
        allowed = needed | ({"num_batches_tracked"} if is_norm else {"bias"})
        if not needed <= leaves[module] <= allowed:
            return False
    return True


def natural(key: str) -> list[tuple[int, str]]:
    """Sorts 10 behind 9."""
    parts = re.split(r"(\d+)", key)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


# --- The renames ----------------------------------------------------------------------------------


def find_renames(pairs: Mapping[str, str], prefix: str, most: int) -> list[str] | None:
    """Renames one after another, each the one that brings the keys nearest; None if too many.

    Args:
        pairs: what each module's key is and what it is to be, both with a dot at the end.
    """
    renames: list[str] = []
    now = {key: key for key in pairs}
    while wrong := [key for key in pairs if now[key] != pairs[key]]:
        if len(renames) == most:
            return None
        far = sum(distance(now[key], pairs[key]) for key in wrong)
        best: tuple[int, int, str] | None = None
        tried: set[str] = set()
        for key in wrong[:MOST_TRIED]:
            for rename in rules(now[key], pairs[key], prefix):
                if rename in tried:
                    continue
                tried.add(rename)
                old, _, new = rename.rpartition("=")
                after = {k: re.sub(old, new, x) for k, x in now.items()}
                left = sum(distance(after[k], pairs[k]) for k in pairs)
                if left < far and (best is None or (left, len(rename)) < best[:2]):
                    best = left, len(rename), rename
        if best is None:
            return None
        renames.append(best[2])
        old, _, new = best[2].rpartition("=")
        now = {key: re.sub(old, new, x) for key, x in now.items()}
    return renames


def rules(old: str, new: str, prefix: str) -> Iterator[str]:
    """Renames that bring one key nearer to another, also for keys of other numbers."""
    a, b = old.removesuffix(".").split("."), new.removesuffix(".").split(".")
    start, end = alike(a, b)
    spans = [(a[start : len(a) - end], b[start : len(b) - end], start)]
    if len(a) == len(b):  # part by part
        spans += [([x], [y], i) for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    for x, y, i in spans:
        # What nothing stands for needs a neighbour to be found by.
        for more in range(2) if x and y else range(1, 2):
            left, right = a[max(0, i - more) : i], a[i + len(x) : i + len(x) + more]
            for u, v in ((left, []), ([], right)) if more else (([], []),):
                source = ".".join([*u, *x, *v]) + "."
                target = ".".join([*u, *y, *v]) + "." if [*u, *y, *v] else ""
                yield from spelled(
                    source, target, prefix if i - len(u) == prefix.count(".") else None
                )


def spelled(source: str, target: str, prefix: str | None) -> Iterator[str]:
    """A rename as it is, and with groups for its numbers; also for the beginning of keys alone."""
    numbers = re.findall(r"\d+", source)
    plain = re.escape(source), target.replace("\\", r"\\")
    found = [plain]
    if numbers and numbers == re.findall(r"\d+", target):
        texts, count = re.split(r"\d+", source), iter(range(1, len(numbers) + 1))
        pattern = r"(\d+)".join(map(re.escape, texts))
        found.insert(0, (pattern, re.sub(r"\d+", lambda _: rf"\{next(count)}", target)))
    for pattern, text in found:
        yield f"{pattern}={text}"
        if prefix is not None:
            yield f"^{re.escape(prefix)}{pattern}={prefix}{text}"


def distance(key: str, other: str) -> int:
    """How many parts of two keys are not alike, from both ends."""
    a, b = key.split("."), other.split(".")
    if len(a) == len(b):
        return sum(x != y for x, y in zip(a, b, strict=True))
    start, end = alike(a, b)
    return max(len(a), len(b)) - start - end


def alike(a: Sequence[str], b: Sequence[str]) -> tuple[int, int]:
    """How many parts two keys have in common at their beginning, and how many more at their end."""
    shorter = min(len(a), len(b))
    start = 0
    while start < shorter and a[start] == b[start]:
        start += 1
    end = 0
    while end < shorter - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return start, end


def renames_fit(keys: Sequence[str], pairs: Mapping[str, str], renames: Sequence[str]) -> bool:
    """Whether every key, with all renames made, is a layout's."""
    for key in keys:
        module, dot, leaf = key.rpartition(".")
        name = key
        for rename in renames:
            old, _, new = rename.rpartition("=")
            name = re.sub(old, new, name)
        if name != pairs.get(module + dot, "") + leaf:
            return False
    return True
