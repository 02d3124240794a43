"""Plausible mistakes, on which a test must fail: the default tests make one, `-m slow` the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def one_by_default(mutants: Iterable[Any] | Mapping[str, Any]) -> list[Any]:
    """The parameters of a test: the first as it is, all others marked slow."""
    if not isinstance(mutants, Mapping):
        mutants = {mutate.__name__: mutate for mutate in mutants}
    return [
        pytest.param(mutate, id=name, marks=() if i == 0 else pytest.mark.slow)
        for i, (name, mutate) in enumerate(mutants.items())
    ]
