"""Pictures as files: no display is needed, and none is opened, whatever the environment says."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def import_matplotlib() -> Any:
    """matplotlib, which takes a second to import, without looking at $MPLBACKEND.

    The variable names how figures come to a screen, which ours never do. In a notebook's terminal
    it may name a module that is not installed, and then the import itself would fail. It holds for
    whoever opens windows with pyplot later in this process.
    """
    is_new = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if is_new and backend:
        with contextlib.suppress(ValueError):  # no such backend
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches. It belongs to no window, and is drawn by Agg."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path, **settings: Any) -> None:
    """Writes a picture, whole or not at all; the path's ending says the kind: without one, PNG."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=path.suffix[1:] or "png", **settings)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def attempted(what: str) -> Iterator[None]:
    """Makes a warning of whatever keeps `what` from being drawn: numbers matter more."""
    try:
        yield
    # matplotlib raises anything: for a font, a style of the user's, a full disk.
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        log.warning("%s could not be drawn: %s", what, reason)
