"""The formulas of the metrics, for many resamples at once.

A metric is computed under case weights, and a row of weights is one resample: a bootstrap of 200
costs a few matrix products, where scikit-learn takes 200 calls. The tests hold every one of them
equal to scikit-learn's or torchmetrics' of the same weights. Undefined is NaN.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from mmfusion.losses import IGNORE

__all__ = ["METRICS", "NUM_BINS", "Sample", "higher_is_better", "known_labels", "table"]

NUM_BINS = 15  # as in torchmetrics


class Sample:
    """Probabilities and labels of one task under case weights.

    Missing labels, NaN or for classes also -100, are left out, one by one for several labels.

    Args:
        probabilities: Of the classes, of the labels, of class 1, or predictions of a regression.
        labels: The truth.
        target: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``.
        weights: How often each case counts, one resample a row.
        threshold: Above it a probability is a yes; for ``"binary"`` and ``"multilabel"``.

    Shape:
        - ``probabilities``: ``(B, Y)``; ``labels``: ``(B,)`` or ``(B, Y)``; ``weights``: ``(R, B)``

    Example:
        >>> sample = Sample(np.eye(2), np.array([0, 1]), "multiclass", np.ones((1, 2)))
        >>> METRICS["multiclass"]["accuracy"](sample).tolist()
        [1.0]
    """

    def __init__(
        self,
        probabilities: np.ndarray,
        labels: np.ndarray,
        target: str,
        weights: np.ndarray,
        threshold: float = 0.5,
    ) -> None:
        self.target, self.threshold = target, threshold
        self.weights = np.asarray(weights, np.float64)
        self.scores = np.asarray(probabilities, np.float64)
        labels = table(np.asarray(labels, np.float64))
        known = known_labels(labels, target)
        self.labels = np.where(known, labels, 0)  # (B, Y), or (B, 1) for multiclass
        if target == "multiclass":
            self.classes = self.labels.astype(np.int64)  # (B, 1)
            self.truth = np.eye(self.scores.shape[1], dtype=bool)[self.classes[:, 0]]
            known = known.repeat(self.scores.shape[1], axis=1)
        else:
            self.truth = self.labels > 0.5
            self.classes = self.truth.astype(np.int64)
        self.known = known  # (B, Y)

    @cached_property
    def confusion(self) -> np.ndarray:
        """Truth by prediction for each decision, ``(R, G, K, K)``; G is 1 but for multilabel."""
        if self.target == "multiclass":
            decided, size = self.scores.argmax(1)[:, None], self.scores.shape[1]
        else:
            decided, size = (self.scores > self.threshold).astype(np.int64), 2
        codes = self.classes * size + decided  # (B, G)
        groups = codes.shape[1]
        cells = np.zeros((len(codes), groups, size * size))
        np.put_along_axis(cells, codes[..., None], self.known[:, :groups, None], axis=2)
        counts = self.weights @ cells.reshape(len(codes), groups * size * size)
        return counts.reshape(-1, groups, size, size)

    @cached_property
    def bins(self) -> np.ndarray:
        """Sums of count, confidence and accuracy in each bin of confidence, ``(3, R, bins)``.

        Confidence is the highest probability of a case, or that of each label.
        """
        if self.target == "multiclass":
            confidence = self.scores.max(1, keepdims=True)
            right = self.classes == self.scores.argmax(1)[:, None]
        else:
            confidence, right = self.scores, self.truth
        columns = confidence.shape[1]
        place = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        cells = np.zeros((3, len(confidence), NUM_BINS))
        for column in range(columns):
            rows = np.flatnonzero(self.known[:, column])
            where = rows, place[rows, column]
            cells[0][where] += 1
            cells[1][where] += confidence[rows, column]
            cells[2][where] += right[rows, column]
        return self.weights @ cells

    def tied(self, column: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Weight of positives and of negatives at each distinct score, ascending, ``(R, ...)``.

        Of one column, or for None of all of them together.
        """
        columns = slice(None) if column is None else slice(column, column + 1)
        known = self.known[:, columns]
        rows = known.nonzero()[0]
        scores, truth = self.scores[:, columns][known], self.truth[:, columns][known]
        order = scores.argsort(kind="stable")
        weights = self.weights[:, rows[order]]
        starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
        if not len(starts):
            return weights, weights
        positive = np.add.reduceat(weights * truth[order], starts, axis=1)
        return positive, np.add.reduceat(weights, starts, axis=1) - positive

    def means(self, values: np.ndarray) -> np.ndarray:
        """Weighted means of the known entries of ``(B, Y)`` values, ``(R, Y)``."""
        known = self.known
        return (self.weights @ np.where(known, values, 0)) / (self.weights @ known)


def known_labels(labels: np.ndarray, target: str) -> np.ndarray:
    """Which labels are not missing: NaN is, and -100 but for a regression, where it is a number.

    Example:
        >>> labels = np.array([1.0, np.nan, -100.0])
        >>> known_labels(labels, "binary").tolist(), known_labels(labels, "regression").tolist()
        ([True, False, False], [True, False, True])
    """
    known = ~np.isnan(labels)
    return known if target == "regression" else known & (labels != IGNORE)


def table(labels: np.ndarray) -> np.ndarray:
    """One column of labels as a table.

    Example:
        >>> table(np.zeros(3)).shape, table(np.zeros((3, 2))).shape
        ((3, 1), (3, 2))
    """
    return labels[:, None] if labels.ndim == 1 else labels


Metric = Callable[[Sample], np.ndarray]


def _auc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    hits = positive[:, ::-1].cumsum(1)
    taken = hits + negative[:, ::-1].cumsum(1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    return (precision * positive[:, ::-1]).sum(1) / positive.sum(1)


def _over_columns(curve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Metric:
    def metric(sample: Sample) -> np.ndarray:
        columns = range(sample.scores.shape[1])
        return np.mean([curve(*sample.tied(column)) for column in columns], axis=0)

    return metric


def _auc_micro(sample: Sample) -> np.ndarray:
    return _auc(*sample.tied(None))


def _counts(sample: Sample, both: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, support and predictions of every class, ``(R, ...)``; without ``both`` of yes alone."""
    cells = sample.confusion
    counts = np.stack([cells.diagonal(0, 2, 3), cells.sum(3), cells.sum(2)])  # (3, R, G, K)
    if not both and sample.target != "multiclass":
        counts = counts[..., 1:]
    hits, support, predicted = counts.reshape(*counts.shape[:2], -1)
    return hits, support, predicted


def _accuracy(sample: Sample) -> np.ndarray:
    cells = sample.confusion
    return (cells.trace(0, 2, 3) / cells.sum((2, 3))).mean(1)


def _balanced_accuracy(sample: Sample) -> np.ndarray:
    hits, support, _ = _counts(sample, both=True)
    return (hits / support).mean(1)


def _sensitivity(sample: Sample) -> np.ndarray:
    hits, support, _ = _counts(sample, both=False)
    return (hits / support).mean(1)


def _specificity(sample: Sample) -> np.ndarray:
    hits, support, predicted = _counts(sample, both=False)
    total = sample.confusion.sum((2, 3)).repeat(support.shape[1] // sample.confusion.shape[1], 1)
    return ((total - support - predicted + hits) / (total - support)).mean(1)


def _f1(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    hits, support, predicted = _counts(sample, both=sample.target != "multilabel")
    return np.where(support > 0, 2 * hits / (support + predicted), np.nan), support


def _f1_macro(sample: Sample) -> np.ndarray:
    return _f1(sample)[0].mean(1)


def _f1_weighted(sample: Sample) -> np.ndarray:
    f1, support = _f1(sample)
    return np.where(support > 0, f1 * support, 0).sum(1) / support.sum(1)


def _kappa_of(cells: np.ndarray) -> np.ndarray:
    total = cells.sum((-2, -1))
    agreed = cells.trace(0, -2, -1) / total
    expected = (cells.sum(-1) * cells.sum(-2)).sum(-1) / total**2
    return (agreed - expected) / (1 - expected)


def _kappa(sample: Sample) -> np.ndarray:
    return _kappa_of(sample.confusion).mean(1)


def _mcc(sample: Sample) -> np.ndarray:
    """Gorodkin's for several classes."""
    cells = sample.confusion
    total, hits = cells.sum((2, 3)), cells.trace(0, 2, 3)
    truth, decided = cells.sum(3), cells.sum(2)
    spread = [total**2 - (counts**2).sum(2) for counts in (truth, decided)]
    covariance = hits * total - (truth * decided).sum(2)
    return (covariance / np.sqrt(spread[0] * spread[1])).mean(1)


def _ece(sample: Sample) -> np.ndarray:
    count, confidence, right = sample.bins
    return np.abs(right - confidence).sum(1) / count.sum(1)


def _brier(sample: Sample) -> np.ndarray:
    squares = sample.means((sample.scores - sample.truth) ** 2)
    return squares.sum(1) if sample.target == "multiclass" else squares.mean(1)


def _odir_score(sample: Sample) -> np.ndarray:
    """Mean of kappa, F1 and AUC over all label decisions; that F1 is micro, hence the accuracy."""
    cells = sample.confusion.sum(1)
    accuracy = cells.trace(0, 1, 2) / cells.sum((1, 2))
    return (_kappa_of(cells) + accuracy + _auc_micro(sample)) / 3


def _mae(sample: Sample) -> np.ndarray:
    return sample.means(np.abs(sample.scores - sample.labels)).mean(1)


def _rmse(sample: Sample) -> np.ndarray:
    return np.sqrt(sample.means((sample.scores - sample.labels) ** 2)).mean(1)


def _r2(sample: Sample) -> np.ndarray:
    left = sample.means((sample.scores - sample.labels) ** 2)
    centred = sample.labels - sample.means(sample.labels)[0]
    spread = sample.means(centred**2) - sample.means(centred) ** 2
    return (1 - left / _unless_constant(spread, sample.means(sample.labels**2))).mean(1)


def _unless_constant(spread: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """NaN where the spread of values is rounding error beside their squares."""
    return np.where(spread > 1e-20 * squares, spread, np.nan)


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation over the last axis."""
    centred, spreads = [], []
    for values in (x, y):
        mean = (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
        centred.append(values - mean)
        spread = (weights * centred[-1] ** 2).sum(-1)
        spreads.append(_unless_constant(spread, (weights * values**2).sum(-1)))
    covariance = (weights * centred[0] * centred[1]).sum(-1)
    return covariance / np.sqrt(spreads[0] * spreads[1])


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean rank of each value where each counts as often as its weight says, ``(R, n)``."""
    order = values.argsort(kind="stable")
    first = np.diff(values[order], prepend=-np.inf) > 0
    counts = np.add.reduceat(weights[:, order], np.flatnonzero(first), axis=1)
    middles = counts.cumsum(1) - counts / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = middles[:, first.cumsum() - 1]
    return ranks


def _over_outputs(ranked: bool) -> Metric:
    def metric(sample: Sample) -> np.ndarray:
        found = []
        for column, known in enumerate(sample.known.T):
            x, y = sample.scores[known, column], sample.labels[known, column]
            weights = sample.weights[:, known]
            if ranked and len(x):
                x, y = _ranks(x, weights), _ranks(y, weights)
            found.append(_correlation(x, y, weights))
        return np.mean(found, axis=0)

    return metric


_DECISIONS: dict[str, Metric] = {
    "auc_macro": _over_columns(_auc),
    "auc_micro": _auc_micro,
    "auprc_macro": _over_columns(_average_precision),
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "f1_macro": _f1_macro,
    "f1_weighted": _f1_weighted,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "kappa": _kappa,
    "mcc": _mcc,
    "ece": _ece,
    "brier": _brier,
}
METRICS: dict[str, dict[str, Metric]] = {
    "multiclass": _DECISIONS,
    "multilabel": _DECISIONS | {"odir_score": _odir_score},
    "binary": _DECISIONS,
    "regression": {
        "mae": _mae,
        "rmse": _rmse,
        "r2": _r2,
        "pearson": _over_outputs(ranked=False),
        "spearman": _over_outputs(ranked=True),
    },
}


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better.

    Example:
        >>> higher_is_better("auc_macro"), higher_is_better("rmse")
        (True, False)
    """
    return metric not in ("ece", "brier", "mae", "rmse")
