"""Figures of reports: matplotlib without its global state; a method looks the same in all."""

import io
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.evaluation.canvas import (
    INK,
    MUTED,
    WIDTH,
    drawing,
    legend,
    legend_height,
    panels,
    short,
)
from mmfusion.evaluation.contributions import CHANCE, contributions, losses, shares_known
from mmfusion.evaluation.lines import (
    COLOURS,
    RATE_KINDS,
    Line,
    calibration_axes,
    lines,
    metric_name,
    reliability,
    subset_name,
)
from mmfusion.evaluation.numbers import shown
from mmfusion.evaluation.report import Condition, MissingnessReport, write_whole
from mmfusion.evaluation.scores import higher_is_better

__all__ = [
    "calibration_figure",
    "contributions_figure",
    "projection_figure",
    "rate_figure",
    "subset_figure",
    "write_figure",
]

PANELS = 9
Reports = Sequence[MissingnessReport]


def subset_figure(reports: Reports, metric: str | None = None) -> Any:
    """Draw a heat map: subsets down, filled squares for what is present, a column per method.

    Args:
        reports: On the same modalities.
        metric: None is the main one of the first report.

    Raises:
        ValueError: If no subset was scored.
    """
    series = lines(reports)
    with drawing(max(3.5, _width(series)), _height(series)) as figure:
        _draw_subsets(figure, series, metric or reports[0].metrics[0])
    return figure


def rate_figure(reports: Reports, metric: str | None = None, kind: str = "per_modality") -> Any:
    """Draw a metric over the rates of a kind, with 95 % intervals, and chance where it is known.

    Args:
        reports: With rates of that kind scored.
        metric: None is the main one of the first report.
        kind: ``"per_modality"``, ``"sample_rate"`` or ``"slot_rate"``.

    Raises:
        ValueError: If no report has that kind.
    """
    series = lines(reports)
    with drawing(WIDTH, 2.9 + legend_height([line.label for line in series])) as figure:
        _draw_rates(figure, series, metric or reports[0].metrics[0], kind)
    return figure


def calibration_figure(reports: Reports) -> Any:
    """Draw how far probabilities hold, a panel for each subset (the nine largest of many).

    Args:
        reports: With subsets scored, and no regression.

    Raises:
        ValueError: If nothing has a calibration.
    """
    series = lines(reports)
    with drawing(WIDTH, _calibration_height(series)) as figure:
        _draw_calibration(figure, series)
    return figure


def contributions_figure(reports: Reports, metric: str | None = None) -> Any:
    """Draw what each modality adds, as Shapley values, or what is lost without it.

    The latter where not all subsets were scored, or chance is not known.

    Args:
        reports: On the same modalities.
        metric: None is the main one of the first report.
    """
    metric, series = metric or reports[0].metrics[0], lines(reports)
    names, alone = reports[0].names, [line.alone() for line in series]
    shapley = all(shares_known(one, metric) for one in alone)
    sign = 1 if higher_is_better(metric) else -1
    rows, thick = np.arange(len(names)), 0.8 / len(series)
    labels = [line.label for line in series]
    height = 0.7 + len(names) * (0.2 + 0.13 * len(series)) + legend_height(labels)
    with drawing(WIDTH, height) as figure:
        axes, handles = figure.subplots(), []
        for place, (line, report) in enumerate(zip(series, alone, strict=True)):
            values = losses(report, metric)
            if shapley:
                values = [part["shapley"] for part in contributions(report, metric).values()]
            heights = rows + thick * (place - (len(series) - 1) / 2)
            style: dict[str, Any] = {"color": line.colour, "linewidth": 0}
            style |= {"hatch": line.hatch, "edgecolor": "white"}  # the colour of the hatch
            handles.append(axes.barh(heights, sign * np.array(values), 0.85 * thick, **style))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(rows, [short(name) for name in names])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        what = "Shapley value" if shapley else "loss without it"
        axes.set_xlabel(f"{what}, {metric_name(metric)}")
        legend(figure, handles, labels)
    return figure


def projection_figure(projection: dict[str, Any]) -> Any:
    """Draw observed vectors and the guesses for them on their main axes, a panel per modality.

    Args:
        projection: What ``diagnostics.projection`` gave.
    """
    with drawing(WIDTH, 0.6 + 1.6 * math.ceil(len(projection) / 3)) as figure:
        drawn, kinds = panels(figure, len(projection)), ("observed", "synthesised")
        for axes, (name, part) in zip(drawn, projection.items(), strict=True):
            handles = []
            for key, marker, colour in zip(kinds, "ox", COLOURS, strict=False):
                points = np.array(part[key]).reshape(-1, 2).T
                style = {"color": colour, "markerfacecolor": "none", "linestyle": "none"}
                handles += axes.plot(*points, marker, markersize=3.5, alpha=0.8, **style)
            axes.set(xticks=[], yticks=[], title=short(name, 20))
        legend(figure, handles, kinds)
    return figure


def write_figure(reports: Reports, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Write subsets, rate curves and calibration as one image, as far as they were scored.

    Args:
        reports: On the same modalities.
        path: The file; its suffix is the format: ``.png``, ``.svg``, ``.pdf``.
        metric: None is the main one of the first report.

    Raises:
        ValueError: If nothing that could be drawn was scored.
    """
    metric, series = metric or reports[0].metrics[0], lines(reports)
    parts: list[Callable[[Any], None]] = []
    if series[0].conditions("subset"):
        parts.append(partial(_draw_subsets, series=series, metric=metric))
    for kind in RATE_KINDS:
        if any(line.conditions(kind) for line in series):
            parts.append(partial(_draw_rates, series=series, metric=metric, kind=kind))
    if _calibrated(series[0]):
        parts.append(partial(_draw_calibration, series=series))
    if not parts:
        raise ValueError(
            f"the report of {reports[0].method} has neither subsets nor rates: nothing can be "
            "drawn. Evaluate with kinds=('subset', 'per_modality')."
        )
    buffer = io.BytesIO()
    rows, columns = math.ceil(len(parts) / 3), min(3, len(parts))
    first = _width(series) if series[0].conditions("subset") else 0  # the map, if there is one
    widths = [max(5, first), *[5.0] * (columns - 1)]
    height = max(5, _height(series), 1.2 * _calibration_height(series))  # panels are wider here
    with drawing(sum(widths), rows * height) as figure:
        cells = figure.subfigures(rows, columns, squeeze=False, width_ratios=widths).flat
        for draw, cell in zip(parts, cells, strict=False):
            draw(cell)
        if title := reports[0].about.get("title"):
            figure.suptitle(title)
        figure.savefig(buffer, format=Path(path).suffix[1:] or "png", dpi=150)
    write_whole(Path(path), buffer.getvalue())


def _draw_subsets(figure: Any, series: Sequence[Line], metric: str) -> None:
    names = [short(name) for name in series[0].report.names]
    patterns = [one.pattern for one in series[0].conditions("subset") if one.pattern]
    if not patterns:
        raise _nothing(series, "subset")
    values = np.full((len(patterns), len(series)), math.nan)
    for row, pattern in enumerate(patterns):
        for column, line in enumerate(series):
            if condition := line.subset(pattern):
                values[row, column] = line.report.estimate(condition, metric).mean
    left, right = figure.subplots(1, 2, width_ratios=(len(names), 3 * len(series)))
    for present, face in ((True, INK), (False, "none")):
        down, across = np.nonzero(np.array(patterns) == present)
        left.scatter(across, down, marker="s", s=42, facecolor=face, edgecolor=INK)
    left.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(patterns) - 0.5, -0.5))
    left.set_xticks(range(len(names)), names, rotation=90)
    good = values if higher_is_better(metric) else -values  # deeper in colour is better
    low, high = np.nanmin(good, initial=math.inf), np.nanmax(good, initial=-math.inf)
    floor = low - 0.2 * (high - low) if low < high else None  # so that the lowest is not white
    image = right.imshow(good, aspect="auto", cmap="Blues", vmin=floor)
    right.set_xticks(range(len(series)), [short(line.label) for line in series], rotation=90)
    right.set_xlabel(metric_name(metric))
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if image.norm(good[row, column]) > 0.6 else INK
        right.text(column, row, shown(value, metric), ha="center", va="center", color=colour)
    for axes in (left, right):
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)


def _draw_rates(figure: Any, series: Sequence[Line], metric: str, kind: str) -> None:
    axes, handles = figure.subplots(), []
    rates = sorted({one.rate or 0.0 for line in series for one in line.conditions(kind)})
    if not rates:
        raise _nothing(series, kind)
    step = _step(rates, len(series))
    for place, line in enumerate(series):
        found = sorted(line.conditions(kind), key=lambda one: one.rate or 0.0)
        estimates = [line.report.estimate(one, metric) for one in found]
        means = np.array([one.mean for one in estimates])
        ends = np.array([(one.low, one.high) for one in estimates]).reshape(-1, 2).T
        shift = step * (place - (len(series) - 1) / 2)  # intervals side by side
        places = np.array([one.rate for one in found]) + shift
        # an end on the other side of the mean is no whisker
        reach = np.nan_to_num([means - ends[0], ends[1] - means]).clip(0)
        style: dict[str, Any] = {"color": line.colour, "marker": line.marker}
        style |= {"linestyle": line.dash, "capsize": 2, "elinewidth": 1}
        handles.append(axes.errorbar(places, means, reach, **style))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set(xlabel=RATE_KINDS[kind], ylabel=metric_name(metric))
    axes.grid(axis="y")
    if metric in CHANCE:
        _draw_chance(axes, CHANCE[metric])
    legend(figure, handles, [line.label for line in series])


def _step(rates: Sequence[float], count: int) -> float:
    """How far curves stand apart: all of them within 0.3 of the smallest distance of two rates."""
    nearest = min(np.diff(rates), default=rates[-1])
    return min(0.012 * rates[-1], 0.3 * nearest / max(1, count - 1))


def _draw_chance(axes: Any, chance: float) -> None:
    """A line where it does not squeeze the curves, else a word."""
    low, high = axes.get_ylim()
    place, text = (1, chance), "chance"
    where: Any = {"xycoords": axes.get_yaxis_transform()}
    if low - chance < 1.5 * (high - low):
        axes.axhline(chance, color=MUTED, linestyle="--", linewidth=1)
    else:
        axes.set_ylim(low - 0.12 * (high - low))  # room for the word
        place, text = (1, 0), f"chance is at {chance:g}, far below"
        where = {"xycoords": "axes fraction"}
    axes.annotate(text, place, (0, 3), textcoords="offset points", ha="right", color=MUTED, **where)


def _calibrated(line: Line) -> list[Condition]:
    """The subsets with a calibration, large ones first."""
    found = [one for one in line.conditions("subset") if len(reliability(line.report, one))]
    return found[::-1]


def _draw_calibration(figure: Any, series: Sequence[Line]) -> None:
    conditions = _calibrated(series[0])[:PANELS]
    if not conditions:
        raise _nothing(series, "subset")
    names = series[0].report.names
    drawn = panels(figure, len(conditions))
    for axes, condition in zip(drawn, conditions, strict=True):
        pattern, handles = condition.pattern or (), []
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        for line in series:
            one = line.subset(pattern)
            bins = np.empty((0, 3)) if one is None else reliability(line.report, one)
            style = {"color": line.colour, "marker": line.marker, "linestyle": line.dash}
            handles += axes.plot(bins[:, 0], bins[:, 1], linewidth=1, markersize=3.5, **style)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(short(subset_name(names, pattern)))
        axes.set_xticks((0, 0.5, 1), ("0", ".5", "1"))
        axes.set_yticks((0, 0.5, 1), ("0", ".5", "1"))
        axes.grid()
    across, up = calibration_axes(series[0].report.target)
    drawn[-1].set_xlabel(across)
    drawn[0].set_ylabel(up)
    legend(figure, handles, [line.label for line in series])


def _width(series: Sequence[Line]) -> float:
    """Inches of the map, whose columns are methods."""
    return 1.2 + 0.3 * len(series[0].report.names) + 0.9 * len(series)


def _height(series: Sequence[Line]) -> float:
    """Inches of the map, whose rows are subsets."""
    return 1.4 + 0.27 * len(series[0].conditions("subset"))


def _calibration_height(series: Sequence[Line]) -> float:
    """Inches of rows of panels, and of the legend below them."""
    rows = math.ceil(min(PANELS, len(_calibrated(series[0]))) / 3)
    return 0.4 + 1.55 * rows + legend_height([line.label for line in series])


def _nothing(series: Sequence[Line], kind: str) -> ValueError:
    return ValueError(
        f"the report of {series[0].report.method} has nothing to draw of kind {kind!r}: a figure "
        f"shows what was scored. Evaluate a classification with kinds=({kind!r},)."
    )
