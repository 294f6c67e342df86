"""How sure a score is, and whether two models differ: bootstrap, DeLong, Wilcoxon, Holm."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmfusion.evaluation.scores import Classes, measure

__all__ = ["Difference", "bootstrap", "delong", "holm", "paired_bootstrap", "resample", "wilcoxon"]


class Difference(NamedTuple):
    """How much better the first of two is.

    Attributes:
        value: First minus second.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        p: Two-sided p value of no difference; NaN where the test has none.
    """

    value: float
    low: float
    high: float
    p: float


def resample(num_cases: int, num_resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw bootstrap weights: how often each resample holds each case, in chunks of bounded size.

    Shape:
        - each: ``(R, B)``, all chunks together ``num_resamples`` rows

    Example:
        >>> [weights] = resample(4, 3)
        >>> weights.shape, weights.sum(1).tolist()
        ((3, 4), [4, 4, 4])
    """
    generator = np.random.default_rng(seed)
    most = max(1, 2_000_000 // max(num_cases, 1))
    while num_resamples > 0:
        rows = min(most, num_resamples)
        num_resamples -= rows
        drawn = generator.integers(max(num_cases, 1), size=(rows, num_cases))
        drawn += np.arange(rows)[:, None] * num_cases
        yield np.bincount(drawn.ravel(), minlength=rows * num_cases).reshape(rows, num_cases)


def bootstrap(
    probabilities: np.ndarray,
    labels: np.ndarray,
    metrics: Sequence[str],
    target: str,
    classes: Classes,
    *,
    threshold: float = 0.5,
    ids: np.ndarray | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Find the 95 % percentile interval of each metric over cases.

    Resampling makes the bins of ``ece`` noisier, and so raises it: its percentiles are reflected at
    its value, which the interval holds. Resamples in which a metric is undefined are dropped and
    counted: without a rare class there is no macro AUC. If more than half are, the interval is NaN.

    Args:
        probabilities: As for ``score``, and so are the next four and ``threshold``.
        labels: The truth.
        metrics: Their names.
        target: What kind of labels.
        classes: Names of the columns.
        threshold: Above it a probability is a yes.
        ids: Of the cases; rows of one id are drawn together. None takes each row as a case.
        num_resamples: How many to draw.
        seed: Of the draw.

    Returns:
        Metric to the ends of its interval, and metric to the number of dropped resamples.

    Example:
        >>> chances, labels = np.array([[0.2], [0.4], [0.3], [0.9]]), np.array([0, 0, 1, 1])
        >>> bootstrap(chances, labels, ["accuracy", "auc_macro"], "binary", ("no", "yes"))
        ({'accuracy': (0.25, 1.0), 'auc_macro': (0.0, 1.0)}, {'accuracy': 0, 'auc_macro': 26})
    """
    ids = np.arange(len(labels)) if ids is None else np.unique(ids, return_inverse=True)[1]
    found = [
        measure(probabilities, labels, weights[:, ids], metrics, target, classes, threshold)
        for weights in resample(int(ids.max(initial=-1)) + 1, num_resamples, seed)
    ]
    whole = np.ones((1, len(labels)))
    asked = (metrics, target, classes, threshold)
    intervals, dropped = {}, {}
    for metric in metrics:
        values = np.concatenate([one[metric] for one in found]) if found else np.zeros(0)
        low, high = _interval(values)
        if metric == "ece" and not math.isnan(low):
            [value] = measure(probabilities, labels, whole, *asked)[metric]
            low, high = max(0.0, min(value, 2 * value - high)), max(value, 2 * value - low)
        intervals[metric] = low, high
        dropped[metric] = int(np.isnan(values).sum())
    return intervals, dropped


def paired_bootstrap(first: np.ndarray, second: np.ndarray) -> Difference:
    """Judge a difference by the values of two models in the same resamples.

    The p value is twice the share of resamples on the other side of zero, counting the data as a
    resample that shows no difference.

    Args:
        first: Values of the first model: on the data, then in each resample.
        second: Those of the second.

    Shape:
        - ``first``, ``second``: ``(1 + R,)``

    Example:
        >>> paired_bootstrap(np.array([0.9, 0.8, 0.9, 0.7]), np.array([0.5, 0.6, 0.5, 0.4])).p
        0.5
    """
    value, *drawn = (first - second).tolist()
    differences = np.array(drawn)
    low, high = _interval(differences)
    if math.isnan(low):
        return Difference(value, low, high, math.nan)
    differences = differences[~np.isnan(differences)]
    other = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(value, low, high, min(1.0, 2 * (1 + int(other)) / (1 + len(differences))))


def delong(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> Difference:
    """Test whether two binary AUCs on the same cases differ.

    With several columns, one per condition of the same cases, their mean AUCs are compared. Where
    the AUCs differ and no case contributes to a variance, there is no p value.

    Args:
        first: Scores of the first model.
        second: Scores of the second.
        labels: 0 or 1.

    Shape:
        - ``first``, ``second``: ``(B,)`` or ``(B, C)``; ``labels``: ``(B,)``

    Raises:
        ValueError: If there are not two cases of either class.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> good, poor = np.array([1, 2, 4, 3, 5, 6]), np.array([3, 5, 1, 4, 2, 6])
        >>> found = delong(good, poor, labels)
        >>> round(found.value, 3), round(found.p, 3)
        (0.222, 0.546)

    References:
        DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); the ranks are those of Sun and Xu,
        IEEE Signal Processing Letters 21 (2014).
    """
    labels = np.asarray(labels).reshape(-1) == 1
    counts = int(labels.sum()), int((~labels).sum())
    if min(counts) < 2:
        raise ValueError(
            f"labels hold {counts[0]} positives and {counts[1]} negatives: a variance needs two of "
            "each. Score more cases."
        )
    one, two = _components(first, labels), _components(second, labels)
    value = float(one[0].mean() - two[0].mean())
    variance = sum(np.var(a - b, ddof=1) / len(a) for a, b in zip(one, two, strict=True))
    error = math.sqrt(variance)
    if error < 1e-12:
        return Difference(value, value, value, 1.0 if abs(value) < 1e-12 else math.nan)
    p = math.erfc(abs(value) / error / math.sqrt(2))
    return Difference(value, value - 1.959964 * error, value + 1.959964 * error, p)


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> float:
    """Test paired values, such as those of several seeds; 1 if all are equal.

    Five pairs or fewer can never give p < 0.05.

    Example:
        >>> wilcoxon([0.9, 0.8, 0.7, 0.9, 0.8, 0.7], [0.8, 0.6, 0.4, 0.5, 0.3, 0.1])
        0.03125
    """
    # rounded, so that differences equal but for rounding error tie
    differences = (np.asarray(first, float) - np.asarray(second, float)).round(12)
    if not differences.any():
        return 1.0
    return float(_scipy().wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number, in the order given; NaN stays out.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise ImportError(
            'paired tests rank with scipy, which is missing: pip install "mmfusion[evaluation]"'
        ) from None
    return stats


def _interval(values: np.ndarray) -> tuple[float, float]:
    kept = values[~np.isnan(values)]
    if not len(kept) or 2 * len(kept) < len(values):
        return math.nan, math.nan
    low, high = np.percentile(kept, (2.5, 97.5))
    return float(low), float(high)


def _components(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each positive and each negative contributes to the AUC, averaged over columns."""
    rankdata = _scipy().rankdata
    columns = np.asarray(scores, np.float64).reshape(len(labels), -1)
    joint = rankdata(columns, axis=0)
    positives, negatives = (
        (joint[of] - rankdata(columns[of], axis=0)) / (len(labels) - of.sum())
        for of in (labels, ~labels)
    )
    return positives.mean(1), 1 - negatives.mean(1)
