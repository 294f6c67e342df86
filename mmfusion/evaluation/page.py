"""One page of HTML that shows reports: no script, nothing loaded, light and dark, wide and narrow.

``page.html`` is its template; jinja2, which torch itself needs, fills and escapes it.
"""

import io
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmfusion.evaluation.canvas import GRID, INK, MUTED
from mmfusion.evaluation.compare import Comparison, compare
from mmfusion.evaluation.figures import (
    calibration_figure,
    contributions_figure,
    projection_figure,
    rate_figure,
)
from mmfusion.evaluation.lines import (
    COLOURS,
    RATE_KINDS,
    calibration_axes,
    lines,
    metric_name,
)
from mmfusion.evaluation.numbers import shown
from mmfusion.evaluation.report import MissingnessReport, write_whole
from mmfusion.evaluation.scores import higher_is_better
from mmfusion.evaluation.summary import shown_chance, summarise
from mmfusion.evaluation.tables import (
    adds,
    errors,
    every_number,
    heat,
    matrices,
    patterns,
    reasons,
)

__all__ = ["write_page"]

_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--line-{i}" for i, colour in enumerate(COLOURS)
}
Reports = Sequence[MissingnessReport]


def write_page(reports: Reports, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Write one self-contained page about one method, or about one beside others.

    Args:
        reports: The first is what the summary speaks of; all are on the same modalities.
        path: The file, written whole or not at all.
        metric: What figures and summary show; None is the main one of the first report.

    Raises:
        ValueError: If there is no report, they differ in modalities or target, or one lacks the
            metric.

    Example:
        >>> import tempfile, torch, mmfusion
        >>> from mmfusion.evaluation import evaluate
        >>> model = mmfusion.CMML({"clinic": 4, "derm": 3}, num_classes=2, dim=8)
        >>> inputs = {"clinic": torch.randn(20, 4), "derm": torch.randn(20, 3)}
        >>> report = evaluate(model, {"inputs": inputs, "labels": torch.arange(20) % 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page([report], Path(folder, "report.html"))
        ...     "clinic + derm" in Path(folder, "report.html").read_text()
        True
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    metric = _check(reports, metric)
    ranking, unranked = _ranking(reports, metric)
    tiles, sentences = summarise(reports, metric, ranking)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "chance": shown_chance}
    text = environment.get_template("page.html").render(
        reports=reports,
        lines=lines(reports),
        metric=metric,
        metric_name=metric_name,
        axes=calibration_axes(reports[0].target),
        better="higher" if higher_is_better(metric) else "lower",
        tiles=tiles,
        sentences=sentences,
        ranking=ranking,
        unranked=unranked,
        heat=heat(lines(reports), metric),
        errors=errors(lines(reports)),
        matrices=matrices(reports, metric),
        figures=_figures(reports, metric),
        adds=[(line.label, part) for line in lines(reports) if (part := adds(line, metric))],
        tables=every_number(lines(reports)),
        reasons=reasons(reports),
        patterns=patterns(reports),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        colours=COLOURS,
    )
    write_whole(Path(path), text.encode())


def _check(reports: Reports, metric: str | None) -> str:
    """The metric; refuses what cannot stand on one page."""
    if not reports:
        raise ValueError("reports is empty: a page shows one report or more. Pass evaluate's.")
    for report in reports:
        for name in ("names", "target"):
            if getattr(report, name) != getattr(reports[0], name):
                raise ValueError(
                    f"{name} of {report.method!r} is {getattr(report, name)!r}, of "
                    f"{reports[0].method!r} {getattr(reports[0], name)!r}: a page is about one "
                    "task. Write a page for each."
                )
    metric = metric or reports[0].metrics[0]
    for report in reports:
        report.estimate(report.scores[0].condition, metric)  # refuses an unknown metric
    return metric


def _ranking(reports: Reports, metric: str) -> tuple[Comparison | None, str]:
    """The comparison, or why there is none."""
    if len(reports) < 2:
        return None, ""
    try:
        return compare(reports, metric), ""
    except ValueError as error:
        return None, str(error)


def _figures(reports: Reports, metric: str) -> dict[str, Any]:
    """Those that the reports have data for."""
    found: dict[str, Any] = {"rates": [], "projections": [], "adds": None, "calibration": None}
    for kind, meaning in RATE_KINDS.items():
        if any(report.conditions(kind) for report in reports):
            label = f"{metric_name(metric)} over the {meaning}"
            drawn = _svg(rate_figure(reports, metric, kind), f"rate-{kind}", label)
            found["rates"].append((label, drawn))
    if all(adds(line, metric) for line in lines(reports)):
        drawn = contributions_figure(reports, metric)
        found["adds"] = _svg(drawn, "adds", "What each modality adds, as bars")
    if any(one.calibration for one in reports[0].scores if one.condition.kind == "subset"):
        drawn = calibration_figure(reports)
        across, up = calibration_axes(reports[0].target)
        found["calibration"] = _svg(drawn, "calibration", f"{up} over {across} by subset")
    for i, report in enumerate(reports):
        if projection := report.diagnostics.get("projection"):
            label = f"Observed and synthesised vectors of {report.method}"
            drawn = _svg(projection_figure(projection), f"projection-{i}", label)
            found["projections"].append((label, drawn))
    return found


def _svg(figure: Any, name: str, label: str) -> Any:
    """A figure as inline SVG in the colours and the font of the page, with ids of its own."""
    import matplotlib
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
