"""What all figures of a page share: who is drawn, how it is called, in which colour."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mmfusion.evaluation.report import Condition, MissingnessReport

__all__ = [
    "COLOURS",
    "MARKERS",
    "RATE_KINDS",
    "Line",
    "calibration_axes",
    "condition_name",
    "lines",
    "metric_name",
    "reliability",
    "subset_name",
]

# Those of Okabe and Ito, which colour-blind eyes tell apart, darkened to 3:1 on white.
COLOURS = (
    "#0072b2",
    "#c75000",
    "#007a5a",
    "#b0458a",
    "#8a6d00",
    "#4a5560",
    "#3d8fd1",
    "#9c2f2f",
)
MARKERS = "osD^vPXphd<>"
HATCHES = ("", "////", "....", "xxxx")  # of bars, where colours come round again
DASHES = ("-", "--", ":", "-.")  # of curves
RATE_KINDS = {
    "per_modality": "chance of each modality to be absent",
    "sample_rate": "share of cases that lose a modality",
    "slot_rate": "share of all entries that are absent",
}
_NAMES = {
    "auc_macro": "AUC (macro)",
    "auc_micro": "AUC (micro)",
    "auprc_macro": "AUPRC (macro)",
    "f1_macro": "F1 (macro)",
    "f1_weighted": "F1 (weighted)",
    "mcc": "MCC",
    "ece": "calibration error",
    "brier": "Brier score",
    "mae": "mean absolute error",
    "rmse": "RMSE",
    "r2": "R²",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "odir_score": "ODIR score",
}


class Line(NamedTuple):
    """A report at one of its train rates, as every figure shows it."""

    label: str
    report: MissingnessReport
    train_rate: float | None
    colour: str
    marker: str
    hatch: str
    dash: str

    def conditions(self, kind: str) -> list[Condition]:
        """The conditions of a kind, at this train rate."""
        found = self.report.conditions(kind)
        return [one for one in found if one.train_rate == self.train_rate]

    def alone(self) -> MissingnessReport:
        """The report of this train rate without the others."""
        found = [one for one in self.report.scores if one.condition.train_rate == self.train_rate]
        return replace(self.report, scores=found)

    def subset(self, pattern: tuple[bool, ...]) -> Condition | None:
        """The condition with this pattern; None if it was not scored."""
        found = [one for one in self.conditions("subset") if one.pattern == pattern]
        return found[0] if found else None


def lines(reports: Sequence[MissingnessReport]) -> list[Line]:
    """One for each report and train rate, in order."""
    keys = [
        (report, rate)
        for report in reports
        for rate in dict.fromkeys(one.train_rate for one in report.conditions())
    ]
    return [
        Line(
            report.method if rate is None else f"{report.method} (trained at {rate:g})",
            report,
            rate,
            COLOURS[i % len(COLOURS)],
            MARKERS[i % len(MARKERS)],
            HATCHES[i // len(COLOURS) % len(HATCHES)],
            DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, (report, rate) in enumerate(keys)
    ]


def metric_name(metric: str) -> str:
    """What a reader calls a metric.

    Example:
        >>> metric_name("auc_macro"), metric_name("balanced_accuracy")
        ('AUC (macro)', 'balanced accuracy')
    """
    return _NAMES.get(metric, metric.replace("_", " "))


def subset_name(names: Sequence[str], pattern: Sequence[bool]) -> str:
    """What a reader calls a subset.

    Example:
        >>> subset_name("ab", (True, True)), subset_name("abcd", (True, False, True, True))
        ('a + b', 'all but b')
    """
    absent = [name for name, left in zip(names, pattern, strict=True) if not left]
    if len(names) < 3 or len(absent) > 1 or (absent and len(names) < 4):
        return " + ".join(name for name, left in zip(names, pattern, strict=True) if left)
    return f"all but {absent[0]}" if absent else f"all {len(names)}"


def calibration_axes(target: str) -> tuple[str, str]:
    """What a calibration compares: of several classes the decision, else each label by itself.

    Example:
        >>> calibration_axes("multiclass"), calibration_axes("binary")
        (('confidence', 'accuracy'), ('predicted probability', 'observed frequency'))
    """
    if target == "multiclass":
        return "confidence", "accuracy"
    return "predicted probability", "observed frequency"


def condition_name(report: MissingnessReport, condition: Condition) -> str:
    """What a reader calls a condition."""
    if condition.kind == "subset" and condition.pattern:
        return subset_name(report.names, condition.pattern)
    return condition.name


def reliability(report: MissingnessReport, condition: Condition) -> np.ndarray:
    """Mean confidence, accuracy and count of bins over all seeds, in order of confidence.

    Neighbouring bins are joined until each holds a tenth of the cases: less would be noise.

    Shape:
        - result: ``(bins, 3)``
    """
    scores = [one for one in report.scores if one.condition == condition]
    bins: dict[int, list[tuple[float, float, int]]] = {}
    for row in sorted(row for one in scores for row in one.calibration):
        bins.setdefault(int(15 * row[0]), []).append(row)  # that of all seeds
    least = sum(count for rows in bins.values() for *_, count in rows) / 10
    joined: list[list[tuple[float, float, int]]] = []
    for rows in bins.values():
        if joined and sum(count for *_, count in joined[-1]) < least:
            joined[-1] += rows
        else:
            joined.append(rows)
    if len(joined) > 1 and sum(count for *_, count in joined[-1]) < least:
        last = joined.pop()
        joined[-1] += last
    columns = [np.array(rows).T for rows in joined]
    return np.array([(*(x[:2] @ x[2] / x[2].sum()), x[2].sum()) for x in columns]).reshape(-1, 3)
