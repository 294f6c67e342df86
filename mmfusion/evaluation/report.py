"""What an evaluation found: ask it, print it, save it, read it again."""

import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.evaluation.numbers import fixed
from mmfusion.evaluation.records import Condition, Estimate, Scores
from mmfusion.evaluation.scores import higher_is_better
from mmfusion.evaluation.storage import decode, encode, write_whole

__all__ = ["Condition", "Estimate", "MissingnessReport", "Scores", "align", "write_whole"]


@dataclass(eq=False)
class MissingnessReport:
    """What ``evaluate`` found.

    Args:
        method: Name of the model.
        names: The modalities, in the order of the columns of a pattern.
        classes: The classes, labels or outputs.
        target: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``.
        metrics: The metrics scored, the main one first.
        scores: One entry per condition and seed.
        about: Plain data about the run: ``title``, ``synthetic``, ``versions`` and so on.
        diagnostics: Plain data of ``diagnostics``, empty without.

    Example:
        >>> seen = Condition("subset", "derm", pattern=(True,))
        >>> found = Scores(seen, 0, 9, {"accuracy": 0.75}, {"accuracy": (0.5, 1.0)}, {}, {}, "", ())
        >>> report = MissingnessReport("CMML", ("derm",), "AB", "multiclass", ["accuracy"], [found])
        >>> print(report.table())
        CMML, multiclass: value [95 % interval]
        what is present  cases              accuracy
        derm                 9  0.750 [0.500, 1.000]
    """

    method: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    target: str
    metrics: tuple[str, ...]
    scores: list[Scores]
    about: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def conditions(self, kind: str | None = None) -> list[Condition]:
        """List the conditions of a kind, or all, in order of first appearance."""
        found = dict.fromkeys(one.condition for one in self.scores)
        return [one for one in found if kind in (None, one.kind)]

    def estimate(self, condition: Condition, metric: str | None = None) -> Estimate:
        """Average a metric, by default the main one, over seeds."""
        metric = self._metric(metric)
        found = [
            one
            for one in self.scores
            if one.condition == condition and not math.isnan(one.values[metric])
        ]
        values = [one.values[metric] for one in found]
        ends = np.array([one.intervals.get(metric, (math.nan, math.nan)) for one in found])
        mean = float(np.mean(values)) if found else math.nan
        sd = float(np.std(values, ddof=1)) if len(found) > 1 else math.nan
        low, high = ends.mean(0).tolist() if found else (math.nan, math.nan)
        return Estimate(mean, sd, low, high, len(found))

    def area(self, kind: str = "per_modality", metric: str | None = None) -> float:
        """Area under the curve of a metric over the rates of a kind, divided by their span.

        With several train rates, the mean of their areas.

        Raises:
            ValueError: If fewer than two rates of that kind were scored.
        """
        curves: dict[float | None, list[tuple[float, float]]] = {}
        for one in self.conditions(kind):
            if one.rate is not None:
                point = (one.rate, self.estimate(one, metric).mean)
                curves.setdefault(one.train_rate, []).append(point)
        if not curves or min(map(len, curves.values())) < 2:
            raise ValueError(
                f"kind={kind!r} of a report with {[one.name for one in self.conditions(kind)]}: an "
                "area needs two rates or more. Evaluate with that kind and more rates."
            )
        areas = []
        for curve in curves.values():
            rates, values = np.array(sorted(curve)).T
            heights = (values[1:] + values[:-1]) / 2
            areas.append((heights @ np.diff(rates)) / (rates[-1] - rates[0]))
        return float(np.mean(areas))

    def violations(self, metric: str | None = None) -> list[tuple[str, str, float]]:
        """List where more modalities did worse: smaller subset, next larger one, loss.

        Subsets of incomplete data are scored on different cases, which can be a reason too.
        """
        metric = self._metric(metric)
        sign = 1 if higher_is_better(metric) else -1
        families: dict[float | None, dict[frozenset[int], tuple[str, float]]] = {}
        for one in self.conditions("subset"):
            kept = frozenset(np.flatnonzero(one.pattern or ()).tolist())
            value = sign * self.estimate(one, metric).mean
            families.setdefault(one.train_rate, {})[kept] = one.label, value
        found = []
        for subsets in families.values():
            for small, (less, value) in subsets.items():
                larger = [other for other in subsets if small < other]
                for large in larger:
                    more, other_value = subsets[large]
                    if value > other_value and not any(between < large for between in larger):
                        found.append((less, more, value - other_value))
        return sorted(found, key=lambda one: -one[2])

    def table(self) -> str:
        """Lay everything out as plain text, with reasons and realised rates below."""
        several, main = len({one.seed for one in self.scores}) > 1, self.metrics[0]
        what = "mean (sd) over seeds" if several else "value [95 % interval]"
        rows = [["what is present", "cases", *self.metrics]]
        for one in self.conditions():
            cases = sorted({s.cases for s in self.scores if s.condition == one})
            count = str(cases[0]) if len(cases) == 1 else f"{cases[0]}-{cases[-1]}"
            cells = [_cell(self.estimate(one, metric), several, metric) for metric in self.metrics]
            rows.append([one.label, count, *cells])
        lines = [f"{self.method}, {self.target}: {what}", *align(rows)]
        lines += [
            f"area under {kind}: {main} {fixed(self.area(kind), main)}"
            for kind in ("per_modality", "sample_rate", "slot_rate")
            if len({one.rate for one in self.conditions(kind)}) > 1
        ]
        lines += [
            f"more did worse: {small} -> {large}, {main} by {fixed(loss, main)}"
            for small, large, loss in self.violations()
        ]
        for found in self.scores:
            where = f"{found.condition.label}, seed {found.seed}"
            lines += [f"nan: {where}, {metric}: {why}" for metric, why in found.undefined.items()]
        lines += [self._drawn(one) for one in self.conditions() if one.pattern is None]
        lines += [f"note: {note}" for note in self.about.get("notes", ())]
        return "\n".join(lines)

    def to_json(self, path: str | os.PathLike[str], *, predictions: bool = True) -> None:
        """Write all of it, whole or not at all.

        Args:
            path: The file.
            predictions: Whether to write probabilities, labels and cases too: ``compare`` needs
                them for its tests, and labels may be nobody else's business.
        """
        left_out = () if predictions else ("probabilities", "labels", "case_ids")
        write_whole(Path(path), encode(self, left_out).encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "MissingnessReport":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: If the file is of another format, or not such a file.
        """
        return cls(**decode(Path(path).read_bytes(), path))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw subsets, rate curves and calibration as one image; its suffix is the format."""
        from mmfusion.evaluation import figures

        figures.write_figure([self], path)

    def to_html(
        self, path: str | os.PathLike[str], others: Sequence["MissingnessReport"] = ()
    ) -> None:
        """Write one self-contained page; ``others`` are shown beside this report."""
        from mmfusion.evaluation import page

        page.write_page([self, *others], path)

    def _drawn(self, condition: Condition) -> str:
        """What a nominal rate came to, and the patterns' hashes."""
        found = [one for one in self.scores if one.condition == condition]
        realised = ", ".join(
            f"{kind} {np.mean([one.realised[kind] for one in found]):.3f}"
            for kind in found[0].realised
        )
        hashes = ", ".join(f"{one.sha256[:12]} (seed {one.seed})" for one in found)
        return f"{condition.label}: realised {realised}; sha256 {hashes}"

    def _metric(self, metric: str | None) -> str:
        if metric not in (None, *self.metrics):
            raise ValueError(
                f"metric={metric!r}: this report holds {', '.join(self.metrics)}. Name one of "
                "them, or evaluate with that metric."
            )
        return metric or self.metrics[0]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells, the first column to the left and the others to the right.

    Example:
        >>> align([["method", "mean"], ["CMML", "0.9"]])
        ['method  mean', 'CMML     0.9']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _cell(found: Estimate, several: bool, metric: str) -> str:
    mean, sd, low, high = (fixed(value, metric) for value in astuple(found)[:4])
    if several:
        return f"{mean} ({sd})"
    return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"
