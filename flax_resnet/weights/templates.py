"""Names with numbers in them: filled in, and read back.

In a template such as `layer{s+1}.{b}` a number stands in braces, by its name. It may be shifted by
a constant: where s is 0 the text of `{s+1}` says 1.
"""

import functools
import re
from collections.abc import Mapping

FIELD = re.compile(r"\{(\w+)([+-]\d+)?\}")
# One spelling for each number, so that no two texts are one; and none is absurdly long.
DIGITS = r"0|[1-9]\d{0,5}"


def fill(template: str, numbers: Mapping[str, int]) -> str:
    """The text of a template with these numbers."""
    return FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), template)


def parse(template: str, text: str) -> dict[str, int] | None:
    """Inverse of `fill`: the template's numbers, at least 0; None if it has no such text."""
    pattern, shifts = compiled(template)
    match = pattern.fullmatch(text)
    if match is None:
        return None
    numbers = {name: int(match[name]) - shift for name, shift in shifts.items()}
    return numbers if min(numbers.values(), default=0) >= 0 else None


@functools.cache
def compiled(template: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """What matches the texts of a template, and by how much each of its numbers is shifted."""
    text, *rest = FIELD.split(template)
    pattern, shifts = re.escape(text), {}
    for name, shift, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        pattern += f"(?P<{name}>{DIGITS})" + re.escape(text)
        shifts[name] = int(shift or 0)
    return re.compile(pattern, re.ASCII), shifts
