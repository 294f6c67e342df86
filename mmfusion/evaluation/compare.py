"""Rank methods that were scored on the same cases under the same patterns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmfusion.evaluation.numbers import fixed
from mmfusion.evaluation.report import Condition, MissingnessReport, Scores, align
from mmfusion.evaluation.scores import higher_is_better, measure
from mmfusion.evaluation.statistics import (
    Difference,
    delong,
    holm,
    paired_bootstrap,
    resample,
    wilcoxon,
)

__all__ = ["Comparison", "Ranked", "compare"]

Key = tuple[Condition, int]
NO_TEST = "no test: one model per method, whose patterns are no replicates of it"


class Ranked(NamedTuple):
    """One method beside the best.

    Attributes:
        method: Its name.
        mean: The metric, averaged over conditions and seeds.
        difference: ``mean`` minus that of the best method.
        low: Lower end of the 95 % interval of the difference; NaN where the test has none.
        high: Upper end of it.
        p: Two-sided p value of no difference; NaN for the best itself.
        adjusted: The same, adjusted by Holm for the number of methods.
        marks: ``"*"`` for an adjusted p below .05, ``"**"`` below .01, ``"***"`` below .001.
    """

    method: str
    mean: float
    difference: float
    low: float
    high: float
    p: float
    adjusted: float
    marks: str


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        metric: What was compared.
        test: ``"DeLong"``, ``"paired bootstrap"``, ``"Wilcoxon over seeds"``, or why there is no
            test.
        conditions: Names of the conditions averaged over.
        ranked: The methods, the best first.

    Example:
        >>> row = Ranked("CMML", 0.9, 0.0, 0.0, 0.0, float("nan"), float("nan"), "")
        >>> print(Comparison("auc_macro", "DeLong", ("rate 0.5",), (row,)).table())
        method   mean  difference to best  95 % interval  p  p (Holm)
        CMML    0.900
        auc_macro, mean over rate 0.5; DeLong
    """

    metric: str
    test: str
    conditions: tuple[str, ...]
    ranked: tuple[Ranked, ...]

    def table(self) -> str:
        """Lay the ranking out as plain text."""
        rows = [["method", "mean", "difference to best", "95 % interval", "p", "p (Holm)", ""]]
        for place, one in enumerate(self.ranked):
            cells = [""] * 5
            if place:
                value, low, high = (
                    fixed(each, self.metric, "+") for each in (one.difference, one.low, one.high)
                )
                interval = "" if math.isnan(one.low) else f"[{low}, {high}]"
                chances = ["" if math.isnan(p) else f"{p:.3f}" for p in (one.p, one.adjusted)]
                cells = [value, interval, *chances, one.marks]
            rows.append([one.method, fixed(one.mean, self.metric), *cells])
        over = ", ".join(self.conditions)
        return "\n".join([*align(rows), f"{self.metric}, mean over {over}; {self.test}"])


def compare(
    reports: Sequence[MissingnessReport], metric: str | None = None, *, num_resamples: int = 1000
) -> Comparison:
    """Rank methods by the mean of a metric over the rates, or over everything if there are none.

    Rate 0 is left out of that mean, and so is a condition in which some method has no value. Every
    method is tested against the best: by DeLong's test for the AUC of a binary target on the same
    cases throughout, else by a paired bootstrap over cases; reports without predictions by
    Wilcoxon's test over the seeds of models, each averaged over conditions and patterns: five
    models or fewer never show it, and of a sole model there is no test.

    Args:
        reports: One per method.
        metric: By default the main one of the first report.
        num_resamples: Resamples of the bootstrap; its p values are at least ``2 / (1 + R)``.

    Raises:
        ValueError: If two methods have the same name, or the reports differ in modalities, target,
            classes, conditions, patterns, cases or labels.

    Example:
        >>> import torch
        >>> from mmfusion.evaluation import evaluate
        >>> labels = torch.arange(60) % 2
        >>> inputs = {"a": labels[:, None] + 0.0, "b": torch.randn(60, 1)}
        >>> data = {"inputs": inputs, "labels": labels}
        >>> def knows(inputs, present):
        ...     return inputs["a"] - 0.5 * present[:, :1]
        >>> def guesses(inputs, present):
        ...     return inputs["b"]
        >>> reports = [evaluate(model, data, target="binary") for model in (guesses, knows)]
        >>> [(one.method, one.marks) for one in compare(reports).ranked]
        [('knows', ''), ('guesses', '***')]
    """
    _check_alike(reports)
    metric = reports[0].metrics[0] if metric is None else metric
    entries = [{(one.condition, one.seed): one for one in report.scores} for report in reports]
    _check_same_cases(reports, entries)
    for report in reports:
        report.estimate(reports[0].scores[0].condition, metric)  # refuses an unknown metric
    rated = [key for key in entries[0] if key[0].rate]
    keys = [
        key
        for key in rated or entries[0]
        if not any(math.isnan(of[key].values[metric]) for of in entries)
    ]
    if not keys:
        raise ValueError(
            f"metric={metric!r} has no value under any condition: there is nothing to rank by. "
            "Read the reasons in report.table(), and choose another metric or more cases."
        )
    values = np.array([[of[key].values[metric] for key in keys] for of in entries])
    order = np.argsort(values.mean(1) * (-1 if higher_is_better(metric) else 1), kind="stable")
    test, differences = _test(
        [[entries[place][key] for key in keys] for place in order],
        values[order],
        metric,
        reports[0],
        num_resamples,
    )
    adjusted = holm([one.p for one in differences])
    ranked = [
        Ranked(
            reports[place].method,
            float(values[place].mean()),
            float(values[place].mean() - values[order[0]].mean()),
            found.low,
            found.high,
            found.p,
            p,
            "*" * sum(p < limit for limit in (0.05, 0.01, 0.001)),
        )
        for place, found, p in zip(order, differences, adjusted, strict=True)
    ]
    conditions = tuple(dict.fromkeys(condition.name for condition, _ in keys))
    return Comparison(metric, test, conditions, tuple(ranked))


def _test(
    scores: Sequence[Sequence[Scores]],
    values: np.ndarray,
    metric: str,
    like: MissingnessReport,
    num_resamples: int,
) -> tuple[str, list[Difference]]:
    """The test that fits, and what it says of every method against the first."""
    itself = Difference(0.0, 0.0, 0.0, math.nan)
    kept = [[answer for one in row if (answer := _answer(one))] for row in scores]
    if min(map(len, kept)) < values.shape[1]:
        # Conditions and patterns share model and cases: a model is one observation.
        models = min(map(_models, scores), key=lambda row: len(set(row)))
        each = np.stack([values[:, np.equal(models, one)].mean(1) for one in set(models)], axis=1)
        sole = each.shape[1] < 2
        p_values = [math.nan if sole else wilcoxon(row, each[0]) for row in each[1:]]
        found = [Difference(math.nan, math.nan, math.nan, p) for p in p_values]
        return NO_TEST if sole else "Wilcoxon over seeds", [itself, *found]
    first = kept[0][0]
    same = len(np.unique(first.ids)) == len(first.ids) and all(
        np.array_equal(one.labels, first.labels) and np.array_equal(one.ids, first.ids)
        for one in kept[0]
    )
    enough = min(np.sum(first.labels == one) for one in (0, 1)) > 1
    if same and enough and like.target == "binary" and metric in ("auc_macro", "auc_micro"):
        best, *others = (np.concatenate([one.chances for one in row], axis=1) for row in kept)
        return "DeLong", [itself, *(delong(one, best, first.labels) for one in others)]
    ids = np.unique(np.concatenate([one.ids for one in kept[0]]))
    chunks = [np.ones((1, len(ids))), *resample(len(ids), num_resamples)]
    task = like.target, like.about.get("tasks", like.classes)

    def value(one: _Answer, weights: np.ndarray) -> np.ndarray:
        weights = weights[:, np.searchsorted(ids, one.ids)]
        found = measure(one.chances, one.labels, weights, [metric], *task, one.threshold)
        return found[metric]

    best, *others = (  # the mean over conditions: on the data, then in each resample of the cases
        np.concatenate(
            [np.mean([value(one, weights) for one in row], axis=0) for weights in chunks]
        )
        for row in kept
    )
    return "paired bootstrap", [itself, *(paired_bootstrap(one, best) for one in others)]


def _models(scores: Sequence[Scores]) -> list[int]:
    """The seed that stands for the model of each."""
    return [one.seed if one.model is None else one.model for one in scores]


class _Answer(NamedTuple):
    chances: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    threshold: float


def _answer(one: Scores) -> _Answer | None:
    if one.probabilities is None or one.labels is None or one.case_ids is None:
        return None
    return _Answer(one.probabilities, one.labels, one.case_ids, one.threshold)


def _check_alike(reports: Sequence[MissingnessReport]) -> None:
    methods = [report.method for report in reports]
    if not reports or len(set(methods)) < len(methods):
        raise ValueError(
            f"reports of the methods {methods}: each method has one report, and a name of its own. "
            "Pass evaluate another method=, or merge reports of one method."
        )
    for report in reports:
        for name in ("names", "target", "classes"):
            if getattr(report, name) != getattr(reports[0], name):
                raise ValueError(
                    f"{name} of {report.method!r} is {getattr(report, name)!r}, of "
                    f"{methods[0]!r} {getattr(reports[0], name)!r}: methods are compared on one "
                    "task. Evaluate them with the same arguments."
                )


def _check_same_cases(
    reports: Sequence[MissingnessReport], entries: Sequence[Mapping[Key, Scores]]
) -> None:
    for report, of in zip(reports, entries, strict=True):
        for condition, seed in [*entries[0], *of]:
            where = f"{condition.name}, seed {seed}"
            one, other = of.get((condition, seed)), entries[0].get((condition, seed))
            cure = "Evaluate all methods with the same data, kinds, rates and seeds."
            if one is None or other is None:
                lacks = report.method if one is None else reports[0].method
                raise ValueError(
                    f"{where} is not in the report of {lacks!r}: methods are compared under the "
                    f"same conditions. {cure}"
                )
            if one.sha256 != other.sha256:
                raise ValueError(
                    f"{where} has other patterns for {report.method!r} than for "
                    f"{reports[0].method!r}: methods are compared under the same. {cure}"
                )
            if one.cases != other.cases or not _same(one.case_ids, other.case_ids):
                raise ValueError(
                    f"{where} has other cases for {report.method!r} than for "
                    f"{reports[0].method!r}: methods are compared on the same. {cure}"
                )
            if not _same(one.labels, other.labels):
                raise ValueError(
                    f"{where} has other labels for {report.method!r} than for "
                    f"{reports[0].method!r}: methods are compared on the same truth. {cure}"
                )


def _same(given: np.ndarray | None, other: np.ndarray | None) -> bool:
    if given is None or other is None:
        return True
    return np.array_equal(given, other, equal_nan=given.dtype.kind == "f")
