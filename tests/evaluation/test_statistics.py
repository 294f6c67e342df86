import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

from mmfusion.evaluation.scores import measure, score
from mmfusion.evaluation.statistics import (
    bootstrap,
    delong,
    holm,
    paired_bootstrap,
    resample,
    wilcoxon,
)

CLASSES = ("no", "yes")


def scored(seed, cases=40):
    """Labels, and the scores of a good and of a poor model, with ties."""
    random = np.random.default_rng(seed)
    labels = np.arange(cases) % 3 % 2
    good, poor = ((sure * labels + random.random(cases)).round(1) for sure in (0.8, 0.3))
    return labels, good, poor


def test_a_resample_holds_as_many_cases_as_the_data():
    [weights] = resample(30, 100, seed=1)
    assert weights.shape == (100, 30)
    assert (weights.sum(1) == 30).all()
    assert abs(weights.mean(0) - 1).max() < 0.5
    assert np.array_equal(weights, next(resample(30, 100, seed=1)))
    assert not np.array_equal(weights, next(resample(30, 100, seed=2)))


def test_many_cases_come_in_chunks():
    chunks = list(resample(700_000, 5))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert all((chunk.sum(1) == 700_000).all() for chunk in chunks)


def test_the_interval_is_that_of_scores_of_resampled_rows():
    labels, chances, _ = scored(0)
    chances = chances[:, None] / 2
    intervals, dropped = bootstrap(
        chances, labels, ["auc_macro", "brier"], "binary", CLASSES, seed=3
    )
    [weights] = resample(40, 200, seed=3)
    for metric, ends in intervals.items():
        values = []
        for counts in weights:
            rows = np.arange(40).repeat(counts)
            values.append(
                score(chances[rows], labels[rows], [metric], "binary", CLASSES)[0][metric]
            )
        assert ends == pytest.approx(np.percentile(values, (2.5, 97.5)))
    assert dropped == {"auc_macro": 0, "brier": 0}


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Mean error of a normal sample of 60: 95 % is nominal, a percentile interval gets near."""
    random, held = np.random.default_rng(0), 0
    truth = math.sqrt(2 / math.pi)
    for seed in range(200):
        labels = random.normal(size=60)
        low, high = bootstrap(np.zeros((60, 1)), labels, ["mae"], "regression", ("x",), seed=seed)[
            0
        ]["mae"]
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_interval_of_a_calibration_error_holds_it_and_does_not_lean_upwards():
    random, below = np.random.default_rng(0), 0
    for _ in range(10):  # calibrated, so the error that resampling sees is nearly all noise
        chances = random.random((200, 1))
        labels = (random.random(200) < chances[:, 0]).astype(int)
        asked = (["ece"], "binary", CLASSES)
        value = score(chances, labels, *asked)[0]["ece"]
        low, high = bootstrap(chances, labels, *asked)[0]["ece"]
        assert 0 <= low <= value <= high <= 1
        below += low < value - 0.01
    assert below == 10
    assert np.isnan(bootstrap(chances, labels, *asked, num_resamples=0)[0]["ece"]).all()


def test_resamples_without_a_value_are_dropped_and_counted():
    labels = np.array([1] + [0] * 9)
    chances = np.linspace(0.9, 0.1, 10)[:, None]
    intervals, dropped = bootstrap(
        chances, labels, ["auc_macro"], "binary", CLASSES, num_resamples=1000
    )
    assert dropped["auc_macro"] / 1000 == pytest.approx(0.9**10, abs=0.05)
    assert intervals["auc_macro"] == (1.0, 1.0)
    _, dropped = bootstrap(chances, labels, ["accuracy"], "binary", CLASSES)
    assert dropped == {"accuracy": 0}


@pytest.mark.parametrize(("labels", "num_resamples"), [([0] * 10, 50), ([0, 1] * 5, 0)])
def test_no_interval_without_resamples_that_have_a_value(labels, num_resamples):
    intervals, dropped = bootstrap(
        np.linspace(0, 1, 10)[:, None],
        np.array(labels),
        ["auc_macro"],
        "binary",
        CLASSES,
        num_resamples=num_resamples,
    )
    assert np.isnan(intervals["auc_macro"]).all()
    assert dropped == {"auc_macro": num_resamples}


def brute_delong(first, second, labels):
    """Structural components by comparing every positive with every negative."""
    placed = []
    for scores in (first, second):
        wins = np.sign(scores[labels == 1][:, None] - scores[labels == 0][None]) / 2 + 0.5
        placed.append((wins.mean(1), wins.mean(0), wins.mean()))
    (p1, n1, auc1), (p2, n2, auc2) = placed
    covariance = np.cov(p1, p2) / len(p1) + np.cov(n1, n2) / len(n1)
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return auc1 - auc2, error, 2 * stats.norm.sf(abs(auc1 - auc2) / error)


@pytest.mark.parametrize("seed", range(5))
def test_delong_is_the_comparison_of_all_pairs(seed):
    labels, good, poor = scored(seed)
    value, error, p = brute_delong(good, poor, labels)
    found = delong(good, poor, labels)
    assert found == pytest.approx((value, value - 1.959964 * error, value + 1.959964 * error, p))
    order = np.random.default_rng(seed).permutation(len(labels))
    assert delong(good[order], poor[order], labels[order]) == pytest.approx(found)
    assert delong(poor, good, labels) == pytest.approx((-value, -found.high, -found.low, p))
    assert delong(np.exp(good), 3 * poor - 7, labels) == pytest.approx(found)  # ranks alone matter


def test_delong_over_conditions_compares_mean_aucs():
    labels, *columns = scored(0)
    _, *others = scored(1)
    once = delong(columns[0], others[1], labels)
    twice = delong(np.stack([columns[0]] * 2, 1), np.stack([others[1]] * 2, 1), labels)
    assert twice == pytest.approx(once)
    mixed = delong(np.stack(columns, 1), np.stack(others, 1), labels)
    each = [delong(a, b, labels).value for a, b in zip(columns, others, strict=True)]
    assert mixed.value == pytest.approx(np.mean(each))


def test_delong_where_nothing_varies():
    labels = np.array([0, 0, 1, 1])
    assert delong(labels, labels, labels) == (0, 0, 0, 1)
    worst = delong(labels, 1 - labels, labels)
    assert worst.value == 1
    assert math.isnan(worst.p)
    with pytest.raises(ValueError, match=r"1 positives and 3 negatives.*two of each. Score more"):
        delong(labels, labels, np.array([0, 0, 0, 1]))


def test_delong_rejects_as_often_as_it_says_when_nothing_differs():
    random = np.random.default_rng(1)
    labels = np.arange(80) % 2
    p = [delong(*(labels + 1.5 * random.normal(size=(2, 80))), labels).p for _ in range(1000)]
    assert 0.035 <= np.mean(np.array(p) < 0.05) <= 0.065


def test_a_paired_bootstrap():
    better = paired_bootstrap(np.full(1000, 0.9), np.full(1000, 0.8))
    assert better == pytest.approx((0.1, 0.1, 0.1, 2 / 1000))
    assert paired_bootstrap(np.full(9, 0.5), np.full(9, 0.5)) == (0, 0, 0, 1)
    around = np.append(0.1, np.linspace(-1, 1, 999))
    assert paired_bootstrap(around, np.zeros(1000)).p == 1
    assert paired_bootstrap(-around, np.zeros(1000)).low == pytest.approx(-0.95)


def test_a_paired_bootstrap_rejects_as_often_as_it_says_when_nothing_differs():
    random, p = np.random.default_rng(0), []
    labels = np.arange(100) % 2
    for seed in range(300):
        chunks = [np.ones((1, 100)), *resample(100, 200, seed)]
        first, second = (
            np.concatenate(
                [
                    measure(chances, labels, w, ["accuracy"], "binary", CLASSES)["accuracy"]
                    for w in chunks
                ]
            )
            for chances in (labels[:, None] + random.normal(size=(2, 100, 1)))
        )
        p.append(paired_bootstrap(first, second).p)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08


def test_a_paired_bootstrap_drops_what_has_no_value():
    values = np.array([0.9, np.nan, 0.8, 0.7, 0.8])
    assert paired_bootstrap(values, np.zeros(5)) == pytest.approx((0.9, 0.705, 0.8, 0.5))
    mostly = np.array([0.9, np.nan, np.nan, 0.7])
    assert all(map(math.isnan, paired_bootstrap(mostly, np.zeros(4))[1:]))


def test_wilcoxon_counts_signed_ranks():
    """Against the distribution over all signs."""
    differences = np.array([0.1, -0.2, 0.3, 0.4, 0.5, -0.05])
    ranks = stats.rankdata(abs(differences))
    statistic = ranks[differences > 0].sum()
    every = [
        ranks[list(signs)].sum()
        for signs in map(np.array, itertools.product([True, False], repeat=6))
    ]
    share = np.mean(np.abs(np.array(every) - ranks.sum() / 2) >= abs(statistic - ranks.sum() / 2))
    assert wilcoxon(differences, np.zeros(6)) == pytest.approx(share)
    assert wilcoxon([0.5, 0.5], [0.5, 0.5]) == 1


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'rank with scipy.*pip install "mmfusion\[evaluation\]"'):
        wilcoxon([0.5], [0.4])


def test_holm():
    """The smallest times their number, never below the one before."""
    assert holm([0.04, 0.001, 0.03, 0.5]) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.02
    assert holm([]) == []
