"""What figures are drawn on: settings, panels, legend; none of matplotlib's global state."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["GRID", "INK", "MUTED", "WIDTH", "drawing", "legend", "legend_height", "panels", "short"]

INK, MUTED, GRID = "#1b1f24", "#59626e", "#d5dae0"
WIDTH = 4.4  # inches: small enough that a phone shows the text at its size
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Open a figure on a canvas of its own; it keeps its settings outside."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.draw_without_rendering()  # makes what is made late, in these colours


def panels(figure: Any, count: int) -> list[Any]:
    """Axes in rows of three; what is left over in the last row is taken out."""
    columns = min(3, count)
    found = figure.subplots(math.ceil(count / columns), columns, squeeze=False)
    for axes in found.flat[count:]:
        axes.remove()
    return list(found.flat[:count])


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below all panels, unless there is one thing only."""
    if len(labels) > 1:
        shortened = [short(label, 36) for label in labels]
        columns = _columns(labels)
        figure.legend(handles, shortened, loc="outside lower center", ncols=columns)


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 18 else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches that ``legend`` takes."""
    return 0.2 * math.ceil(len(labels) / _columns(labels))


def short(name: str, most: int = 16) -> str:
    """A name that fits.

    Example:
        >>> short("dermatoscopy", 8)
        'dermato…'
    """
    return name if len(name) <= most else f"{name[: most - 1]}…"
