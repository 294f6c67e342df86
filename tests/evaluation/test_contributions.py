"""Shapley values against the definition, and what they need."""

from itertools import permutations, product

import numpy as np
import pytest

from mmfusion.evaluation import Condition, MissingnessReport, Scores
from mmfusion.evaluation.contributions import contributions


def report(values, metric="auc_macro"):
    """One seed; ``values`` by pattern."""
    size = len(next(iter(values)))
    scores = [
        Scores(Condition("subset", str(p), pattern=p), 0, 9, {metric: v}, {}, {}, {}, "", ())
        for p, v in values.items()
    ]
    names = tuple("abcdefgh"[:size])
    return MissingnessReport("CMML", names, ("0", "1"), "binary", (metric,), scores)


def drawn(size):
    rng = np.random.default_rng(0)
    return {p: rng.uniform(0.5, 1) for p in product((False, True), repeat=size) if any(p)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shapley_is_the_mean_gain_over_all_orders(size):
    values = drawn(size)
    found = contributions(report(values))
    worth = {(False,) * size: 0.5, **values}
    gains = np.zeros(size)
    orders = list(permutations(range(size)))
    for order in orders:
        here = [False] * size
        for m in order:
            before = worth[tuple(here)]
            here[m] = True
            gains[m] += (worth[tuple(here)] - before) / len(orders)
    whole = (True,) * size
    for m, part in enumerate(found.values()):
        assert part["shapley"] == pytest.approx(gains[m])
        rest = tuple(i != m for i in range(size))
        assert part["leave_one_out"] == pytest.approx(worth[whole] - worth[rest])
    total = sum(part["shapley"] for part in found.values())
    assert total == pytest.approx(worth[whole] - 0.5)


def test_of_a_metric_without_chance_the_worth_of_nothing_is_asked_for():
    found = report(drawn(2), "accuracy")
    with pytest.raises(
        ValueError, match=r"empty=None with metric='accuracy'.*not known.*Pass empty"
    ):
        contributions(found)
    total = sum(part["shapley"] for part in contributions(found, empty=0.25).values())
    assert total == pytest.approx(drawn(2)[True, True] - 0.25)


@pytest.mark.parametrize("undefined", [True, False])
def test_every_subset_needs_a_score(undefined):
    values = drawn(3)
    values[True, False, True] = float("nan")
    if not undefined:
        del values[True, False, True]
    with pytest.raises(ValueError, match=r"subset a \+ c has no auc_macro.*every subset.*Evaluate"):
        contributions(report(values))
