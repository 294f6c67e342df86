"""What each modality adds, from the scores of all subsets."""

import math

import numpy as np

from mmfusion.evaluation.report import MissingnessReport

__all__ = ["CHANCE", "contributions", "losses", "shares_known"]

# What is scored without any modality, where that does not hang on the data.
CHANCE = {
    **dict.fromkeys(("auc_macro", "auc_micro"), 0.5),
    **dict.fromkeys(("kappa", "mcc", "r2", "pearson", "spearman"), 0.0),
}


def contributions(
    report: MissingnessReport, metric: str | None = None, *, empty: float | None = None
) -> dict[str, dict[str, float]]:
    """What each modality adds to a score: left out of the whole, and as its exact Shapley value.

    Shapley values share the difference between all modalities and none fairly: each gets the mean
    of what it adds over all orders in which modalities could arrive. Where data are incomplete,
    subsets are scored on different cases, which enters here too.

    Args:
        report: With every subset scored.
        metric: One of the report; None is the main one.
        empty: The score of no modality at all; None is chance, where that is known.

    Returns:
        Modality to ``leave_one_out`` and ``shapley``, which sum to all minus ``empty``.

    Raises:
        ValueError: If a subset is missing or has no score, or chance is not known.

    Example:
        Alone ``a`` scores 0.7 and ``b`` 0.6, together 0.8, where guessing scores 0.5.

        >>> from mmfusion.evaluation import Condition, MissingnessReport, Scores
        >>> found = (((True, False), 0.7), ((False, True), 0.6), ((True, True), 0.8))
        >>> rows = [(Condition("subset", "", pattern=p), {"auc_macro": v}) for p, v in found]
        >>> scores = [Scores(where, 0, 9, value, {}, {}, {}, "", ()) for where, value in rows]
        >>> names, metrics = ("a", "b"), ("auc_macro",)
        >>> report = MissingnessReport("CMML", names, ("well", "ill"), "binary", metrics, scores)
        >>> {name: round(part["shapley"], 3) for name, part in contributions(report).items()}
        {'a': 0.2, 'b': 0.1}

    References:
        Shapley, "A value for n-person games", 1953.
    """
    metric = metric or report.metrics[0]
    size = len(report.names)
    known = _subset_values(report, metric)
    known[0] = CHANCE.get(metric, math.nan) if empty is None else empty
    if math.isnan(known[0]):
        raise ValueError(
            f"empty={empty} with metric={metric!r}: what is scored without any modality is not "
            f"known (it is for {', '.join(CHANCE)}). Pass empty, such as the share of the largest "
            "class for the accuracy."
        )
    if lacking := 2**size - sum(not math.isnan(value) for value in known.values()):
        first = next(bits for bits in range(2**size) if math.isnan(known.get(bits, math.nan)))
        names = [name for i, name in enumerate(report.names) if first >> i & 1]
        raise ValueError(
            f"the subset {' + '.join(names)} has no {metric} (nor have {lacking - 1} "
            "others): every subset counts. Evaluate all subsets, on data with every class."
        )
    subsets, value = np.arange(2**size), np.array([known[bits] for bits in range(2**size)])
    members = np.array([subset.bit_count() for subset in range(2**size)])
    # of all orders, the share in which exactly a subset of k comes before the modality
    weights = np.array([1 / (size * math.comb(size - 1, k)) for k in range(size)])
    found = {}
    for i, name in enumerate(report.names):
        without = subsets[subsets >> i & 1 == 0]
        gain = value[without | 1 << i] - value[without]
        found[name] = {
            "leave_one_out": float(gain[-1]),
            "shapley": float(gain @ weights[members[without]]),
        }
    return found


def losses(report: MissingnessReport, metric: str) -> list[float]:
    """How much higher the whole scores than without each modality; NaN where that is not known."""
    value, whole = _subset_values(report, metric), 2 ** len(report.names) - 1
    return [
        value.get(whole, math.nan) - value.get(whole - (1 << i), math.nan)
        for i in range(len(report.names))
    ]


def shares_known(report: MissingnessReport, metric: str) -> bool:
    """Whether all subsets have a score, and chance is known: then there are Shapley values."""
    known = [value for value in _subset_values(report, metric).values() if not math.isnan(value)]
    return metric in CHANCE and len(known) == 2 ** len(report.names) - 1


def _subset_values(report: MissingnessReport, metric: str) -> dict[int, float]:
    """The score of each subset that was scored, by its bits (the first modality is 1).

    Of several train rates, the first.
    """
    size, value = len(report.names), {}
    for one in report.conditions("subset"):
        if one.pattern is not None and one.train_rate == report.scores[0].condition.train_rate:
            bits = sum(1 << i for i in range(size) if one.pattern[i])
            value[bits] = report.estimate(one, metric).mean
    return value
