"""How figures look: colours, lines, markers and fonts.

Colours are Okabe and Ito's, which the colour-blind can tell apart; line styles and markers say the
same for greyscale.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax_resnet.config import Shortcut
from flax_resnet.drawing import import_matplotlib
from flax_resnet.studies.groups import Group, is_plain

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
SETTINGS: dict[Any, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "flax-resnet",  # so that the same runs give the same file
}


class Style(NamedTuple):
    color: str
    line: Any
    marker: str


SHORTCUT_STYLES = {
    Shortcut.PLAIN: Style(VERMILION, (0, (4, 1.5)), "s"),
    Shortcut.A: Style(BLUE, "-", "o"),
    Shortcut.B: Style(GREEN, (0, (6, 1.5, 1, 1.5)), "^"),
    Shortcut.C: Style(PURPLE, (0, (1, 1)), "D"),
}
DEPTH_STYLES = [
    Style(BLUE, "-", "o"),
    Style(VERMILION, (0, (4, 1.5)), "s"),
    Style(GREEN, (0, (6, 1.5, 1, 1.5)), "^"),
    Style(PURPLE, (0, (1, 1)), "D"),
    Style(BLACK, (0, (8, 2)), "v"),
    Style(ORANGE, (0, (3, 1, 1, 1, 1, 1)), "P"),
]


@contextlib.contextmanager
def settings() -> Iterator[None]:
    with import_matplotlib().rc_context(SETTINGS):
        yield


def response_styles(groups: Sequence[Group]) -> list[Style]:
    """Plain networks warm and broken, residual ones cold and solid but for the shallowest."""
    warm = iter([Style(ORANGE, (0, (1, 1)), "s"), Style(VERMILION, (0, (4, 1.5)), "D")])
    dashdot = (0, (6, 1.5, 1, 1.5))
    cold = iter([Style(SKY, dashdot, "^"), Style(BLUE, "-", "o"), Style(BLACK, "-", "v")])
    fallback = iter(DEPTH_STYLES * len(groups))
    return [next(warm if is_plain(group) else cold, next(fallback)) for group in groups]


def styles(groups: Sequence[Group], by_depth: Sequence[int] = ()) -> list[Style]:
    """Of each group, distinct: by depth if asked for, else by shortcut if that tells them apart."""
    if by_depth:
        order = [by_depth.index(group.config.model.depth) for group in groups]
        return [DEPTH_STYLES[i % len(DEPTH_STYLES)] for i in order]
    shortcuts = [group.config.model.shortcut for group in groups]
    if len(set(shortcuts)) == len(shortcuts):
        return [SHORTCUT_STYLES[shortcut] for shortcut in shortcuts]
    return [DEPTH_STYLES[i % len(DEPTH_STYLES)] for i in range(len(groups))]
