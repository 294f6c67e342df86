"""The tables of the page, as plain values for its template."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmfusion.evaluation.contributions import contributions, losses, shares_known
from mmfusion.evaluation.lines import (
    RATE_KINDS,
    Line,
    condition_name,
    lines,
    metric_name,
    subset_name,
)
from mmfusion.evaluation.numbers import shown
from mmfusion.evaluation.report import Condition, MissingnessReport
from mmfusion.evaluation.scores import higher_is_better
from mmfusion.evaluation.summary import miscalibration

__all__ = ["adds", "errors", "every_number", "heat", "matrices", "patterns", "reasons"]

Reports = Sequence[MissingnessReport]
KINDS = {
    "subset": "Subsets",
    "per_modality": "Rates, each modality by itself",
    "sample_rate": "Sample rates",
    "slot_rate": "Slot rates",
    "always_missing": "One modality always missing",
    "not_at_random": "Missing not at random",
}
Cells = list[tuple[str, float | None]]


def _levels(
    values: Sequence[Sequence[float]], higher: bool, text: Callable[[float], str]
) -> list[Cells]:
    """Each value as printed, and how good it is within the table: 0 the worst, 1 the best."""
    known = [value for row in values for value in row if not math.isnan(value)]
    low, span = (min(known), max(known) - min(known)) if known else (0.0, 0.0)

    def level(value: float) -> float | None:
        if math.isnan(value):
            return None
        place = (value - low) / span if span else 0.5
        return round(place if higher else 1 - place, 3)

    return [[(text(value), level(value)) for value in row] for row in values]


def heat(columns: Sequence[Line], metric: str) -> list[dict[str, Any]]:
    """Rows of the map over subsets."""
    return _by_subset(
        columns,
        lambda line, one: line.report.estimate(one, metric).mean,
        higher_is_better(metric),
        partial(shown, metric=metric),
    )


def errors(columns: Sequence[Line]) -> list[dict[str, Any]]:
    """The same of calibration, in percentage points, the largest subsets first."""
    rows = _by_subset(
        columns,
        lambda line, one: 100 * miscalibration(line.report, one)[0],
        False,
        lambda value: "-" if math.isnan(value) else f"{value:.1f}",
    )
    return rows[::-1]


def _by_subset(
    columns: Sequence[Line],
    value: Callable[[Line, Condition], float],
    higher: bool,
    text: Callable[[float], str],
) -> list[dict[str, Any]]:
    patterns = [one.pattern for one in columns[0].conditions("subset") if one.pattern]
    values = [
        [value(line, one) if (one := line.subset(pattern)) else math.nan for line in columns]
        for pattern in patterns
    ]
    names = columns[0].report.names
    return [
        {"name": subset_name(names, pattern), "pattern": pattern, "cells": cells}
        for pattern, cells in zip(patterns, _levels(values, higher, text), strict=True)
    ]


def matrices(reports: Reports, metric: str) -> list[dict[str, Any]]:
    """Train rate by test rate, for reports that have several of both."""
    found = []
    for report in reports:
        own = lines([report])
        for kind, meaning in RATE_KINDS.items():
            rates = sorted({one.rate for one in report.conditions(kind) if one.rate is not None})
            if len(own) < 2 or not rates:
                continue
            scored = [
                {one.rate: report.estimate(one, metric).mean for one in line.conditions(kind)}
                for line in own
            ]
            values = [[of.get(rate, math.nan) for rate in rates] for of in scored]
            rows = zip(
                [line.train_rate for line in own],
                _levels(values, higher_is_better(metric), partial(shown, metric=metric)),
                strict=True,
            )
            found.append(
                {"method": report.method, "meaning": meaning, "rates": rates, "rows": list(rows)}
            )
    return found


def adds(line: Line, metric: str) -> list[tuple[str, float, float]]:
    """Modality, what is lost without it, and its Shapley value (NaN where it is not known)."""
    report, sign = line.alone(), 1 if higher_is_better(metric) else -1
    lost = losses(report, metric)
    if all(map(math.isnan, lost)):
        return []
    parts = contributions(report, metric) if shares_known(report, metric) else {}
    return [
        (name, sign * loss, sign * parts[name]["shapley"] if parts else math.nan)
        for name, loss in zip(report.names, lost, strict=True)
    ]


def every_number(columns: Sequence[Line]) -> list[dict[str, Any]]:
    """Every number, a table for each kind of condition."""
    found = []
    for kind, title in KINDS.items():
        rows = [
            _row(line, one)
            for place in range(max(len(line.conditions(kind)) for line in columns))
            for line in columns
            if place < len(line.conditions(kind)) and (one := line.conditions(kind)[place])
        ]
        if rows:
            found.append({"title": title, "rows": rows})
    return found


def _row(line: Line, condition: Condition) -> dict[str, Any]:
    scores = [one for one in line.report.scores if one.condition == condition]
    cases = sorted({one.cases for one in scores})
    return {
        "name": condition_name(line.report, condition),
        "method": line.label,
        "cases": str(cases[0]) if len(cases) == 1 else f"{cases[0]} to {cases[-1]}",
        "estimates": {m: line.report.estimate(condition, m) for m in line.report.metrics},
    }


def reasons(reports: Reports) -> list[str]:
    """Why a score has no value, each once."""
    found = [
        f"{report.method}, {condition_name(report, one.condition)}, {metric_name(metric)}: {why}"
        for report in reports
        for one in report.scores
        for metric, why in one.undefined.items()
    ]
    return list(dict.fromkeys(found))


def patterns(reports: Reports) -> list[tuple[str, int, dict[str, float], str]]:
    """Condition, seed, realised rates and hash of the patterns, each once."""
    found = {
        (one.condition.name, one.seed, one.sha256): one.realised
        for report in reports
        for one in report.scores
        if one.condition.rate is not None
    }
    return [(name, seed, realised, sha) for (name, seed, sha), realised in found.items()]
