"""What people put around a state dict: dicts of entries, prefixes, averages, names of their own.

Two steps. `choose` finds the state dict among a file's entries; `bare` takes from its keys what
is no part of any layout. Both tell what they did, for one line of a conversion's account.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_resnet.errors import WeightsError
from flax_resnet.weights.layouts import Layout, StateDict, find, listed

# Wrappers of PyTorch's own, which no layout has anywhere: DataParallel, torch.compile, FSDP, ...
WITHIN = (
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
)
# What a user's own module calls the network, or its two parts. Only before a key, and only where no
# layout knows the key with it: tanjeffreyz's own keys begin with `model.`.
BEFORE = ("model", "net", "network", "backbone", "head")
# Entries of files that are usually the network to evaluate, the likeliest first.
USUAL = (
    *("state_dict", "model_state_dict", "model_state", "model", "net_state_dict", "net"),
    *("network", "weights", "params"),
)
AVERAGED = {"ema", "swa", "avg", "average", "averaged", "shadow", "teacher"}  # words of names
COUNT = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
DEEPEST = 2  # levels of entries that are looked into


# --- Entries --------------------------------------------------------------------------------------

Entry = tuple[str, ...]  # names, from the outermost; () is the whole content


class Chosen(NamedTuple):
    """The state dict of a file."""

    state_dict: Mapping[str, Any]  # of tensors
    ignored: list[str]  # what is beside it, such as best_prec1
    told: list[str]  # how it was found


def choose(content: Any, entry: str | None = None) -> Chosen:
    """The state dict that `content` is or holds.

    Args:
        entry: its name, such as "state_dict_ema" or "model.ema"; also the first part of its keys,
            where one state dict holds an averaged network too. Without it the plain one is taken.

    Raises:
        WeightsError: it holds none, or several, or none of that name.
    """
    found: dict[Entry, Mapping[str, Any]] = {}
    within: set[Entry] = set()
    for path, state in state_dicts(content):
        groups = averaged_groups(state)
        found[path] = {key: x for key, x in state.items() if first(key) not in groups}
        found |= {(*path, name): group for name, group in groups.items()}
        within |= {(*path, name) for name in groups}
    path = pick(content, found, entry)
    # Numbers, texts and dicts may stand beside the tensors, by names that no tensor has.
    state = {key: x for key, x in found[path].items() if is_tensor(x) or "." in str(key)}
    ignored = [str(key) for key in found[path] if key not in state]
    if top := path[: -1 if path in within else None]:
        ignored = [str(key) for key in content if key != top[0]] + ignored
    told = [f"entry {'.'.join(path)}"] if path else []
    if others := [".".join(x) for x in found if x not in ((), path)]:
        told.append(f"also there: {', '.join(others)} (--entry takes one)")
    return Chosen(state, ignored, told)


def state_dicts(content: Any, path: Entry = ()) -> Iterator[tuple[Entry, Mapping[str, Any]]]:
    """Every state dict in `content`, with the names that lead to it."""
    if callable(getattr(content, "state_dict", None)):  # a module
        content = content.state_dict()
    if not isinstance(content, Mapping) or "param_groups" in content:
        return
    # Those of a module have names with dots.
    if any(is_tensor(x) and "." in str(key) for key, x in content.items()):
        yield path, content
    if len(path) < DEEPEST:
        for key, value in content.items():
            yield from state_dicts(value, (*path, str(key)))


def is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | jax.Array) or hasattr(value, "detach")


def first(key: Any) -> str:
    """The first part of a key: `ema` of `ema.conv1.weight`."""
    return str(key).partition(".")[0]


def averaged_groups(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The averaged networks that a state dict holds beside a plain one, by their keys' first part.

    Of a state dict of averaged ones alone: none.
    """
    names = sorted({first(key) for key in state if "." in str(key) and is_averaged(first(key))})
    groups = {name: {k: x for k, x in state.items() if first(k) == name} for name in names}
    others = [key for key in state if first(key) not in groups and "." in str(key)]
    return groups if others else {}


def is_averaged(name: str) -> bool:
    """Whether a name has a word of AVERAGED in it: model_ema, emaModel, swa."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return not AVERAGED.isdisjoint(word.lower() for word in words)


def pick(content: Any, found: Mapping[Entry, Any], entry: str | None) -> Entry:
    """The path of the state dict that is meant. Raises WeightsError as `choose` does."""
    names = [".".join(path) for path in found if path]
    if entry is not None:
        named = [path for path in found if path and entry in (".".join(path), path[-1])]
        if len(named) != 1:
            there = listed(names, 10) or "none"
            raise WeightsError(f"entry must be one that holds tensors ({there}), got {entry!r}")
        return named[0]
    plain = [path for path in found if not any(map(is_averaged, path))] or list(found)
    best = min(map(rank, plain), default=None)
    if best is not None and (len(plain) == 1 or best < (len(USUAL), 0)):
        plain = [path for path in plain if rank(path) == best]
    if len(plain) == 1:
        return plain[0]
    if names:
        raise WeightsError(
            f"there must be one state dict, or --entry to name it, got {listed(names, 10)}"
        )
    entries = [str(key) for key in content] if isinstance(content, Mapping) else []
    if "param_groups" in entries:
        raise WeightsError("this is the state dict of an optimizer, not of a network")
    got = listed(entries) or type(content).__name__
    raise WeightsError(f"there must be one state dict, of names and tensors, got {got}")


def rank(path: Entry) -> tuple[int, int]:
    """How usual a path is: less is better."""
    ranks = (USUAL.index(name) for name in path if name in USUAL)
    return min(ranks, default=len(USUAL) if path else -1), len(path)


# --- Keys -----------------------------------------------------------------------------------------


class Bare(NamedTuple):
    """A state dict by a layout's own keys."""

    state_dict: dict[str, np.ndarray]
    keys: dict[str, str]  # the file's own key of each
    prefixes: dict[str, str]  # what each key had before it in the file
    told: list[str]  # what was done, in a few words each

    def in_file(self, key: str) -> str:
        """What a key that is missing would be called in the file: with its neighbours' prefix."""
        parts = key.split(".")
        for n in range(len(parts) - 1, -1, -1):
            near = [x for x in self.prefixes if x.split(".")[:n] == parts[:n]]
            if near:
                (prefix, _), *_ = Counter(self.prefixes[x] for x in near).most_common(1)
                return prefix + key
        return key


def bare(state_dict: StateDict, *, rename: Sequence[str] = (), ignore: Sequence[str] = ()) -> Bare:
    """A state dict without prefixes, with keys renamed or left out as the user says.

    Args:
        rename: each `OLD=NEW`, a regular expression and what to put in place of all that it finds
            in a key, as `re.sub` does; one after another.
        ignore: regular expressions; a key that one of them finds something in is left out.

    Raises:
        WeightsError: an expression is wrong or finds nothing, or two keys become one.
    """
    told: list[str] = []
    for text in ignore:
        pattern = compiled(text, f"ignore {text!r}")
        found = [key for key in state_dict if pattern.search(key)]
        if not found:
            raise WeightsError(f"ignore {text!r} must find a key, got {listed(list(state_dict))}")
        told.append(f"ignored {counted(found)} by {text!r}")
        state_dict = {key: x for key, x in state_dict.items() if key not in set(found)}
    names = {key: key for key in state_dict}  # as renamed
    for text in rename:
        old, given, new = text.rpartition("=")
        if not given:
            raise WeightsError(f"rename must be 'OLD=NEW', a regular expression, got {text!r}")
        pattern = compiled(old, f"rename {text!r}")
        try:
            changed = {key: pattern.sub(new, name) for key, name in names.items()}
        except (re.error, IndexError) as e:
            raise WeightsError(f"rename {text!r} is no regular expression and text ({e})") from e
        found = [key for key, name in names.items() if pattern.search(name)]
        if not found:
            raise WeightsError(f"rename {text!r} must find a key, got {listed(list(state_dict))}")
        told.append(f"renamed {counted(found)} by {text!r}")
        names = changed
    counts = [key for key, name in names.items() if name.split(".")[-1] == COUNT]
    for key in counts:
        if np.size(state_dict[key]) != 1:
            continue
        del names[key]
        told.append(f"an average of {int(np.asarray(state_dict[key]).item())} networks ({key})")
    stripped = strip(names)
    keys: dict[str, str] = {}
    for key, name in stripped.items():
        if name in keys:
            raise WeightsError(f"{keys[name]} and {key} are two keys for one tensor")
        keys[name] = key
    prefixes = dict.fromkeys(keys, "")
    for name, key in keys.items():
        if names[key].endswith(name):
            prefixes[name] = names[key].removesuffix(name)
    kinds = Counter(prefix for prefix in prefixes.values() if prefix)
    for prefix, count in kinds.items():
        where = "every key" if count == len(keys) else counted(range(count))
        told.append(f"{prefix} before {where}")
    if within := [key for key, name in stripped.items() if not names[key].endswith(name)]:
        told.append(f"wrappers within {counted(within)}, such as {within[0]}")
    return Bare({name: state_dict[key] for name, key in keys.items()}, keys, prefixes, told)


def strip(names: Mapping[str, str]) -> dict[str, str]:
    """Each key's name without wrappers: those that make the most keys known to one layout."""
    short = {key: without(name) for key, name in names.items()}
    tries = [{key: nearest(name, layout) for key, name in short.items()} for layout in Layout]
    known = [sum(found is not None for found in found.values()) for found in tries]
    best = tries[known.index(max(known))]
    return {key: best[key] or names[key] for key in names}


def without(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WITHIN)


def nearest(name: str, layout: Layout) -> str | None:
    """The name without the fewest parts before it that the layout knows; None if it knows none."""
    while find(name, layout) is None:
        start, _, name = name.partition(".")
        if start not in BEFORE and not is_averaged(start):
            return None
    return name


def compiled(text: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise WeightsError(f"{what} is no regular expression ({e})") from e


def counted(keys: Sequence[Any]) -> str:
    return f"{len(keys)} key{'s' * (len(keys) != 1)}"
