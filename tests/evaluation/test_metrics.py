"""Every formula against scikit-learn, scipy or torchmetrics on data with weights and ties."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from mmfusion.evaluation.metrics import METRICS, NUM_BINS, Sample, higher_is_better

CASES, CLASSES = 70, 4


def draw(target, seed):
    """Scores with ties, labels, and how often a case counts."""
    random = np.random.default_rng(seed)
    weights = random.integers(0, 4, size=CASES)
    if target == "multiclass":
        labels = random.integers(CLASSES, size=CASES)
        scores = random.dirichlet(np.ones(CLASSES), size=CASES).round(2) * 0.999  # on no bin's edge
    elif target == "regression":
        labels = random.normal(5, 2, size=(CASES, 2)).round(1)
        scores = (labels + random.normal(size=(CASES, 2))).round(1)
    else:
        width = 1 if target == "binary" else 3
        labels = random.integers(2, size=(CASES, width))
        scores = (0.3 * labels + 0.6 * random.random((CASES, width))).round(2)
    return scores, labels, weights


def yes(scores):
    return (scores > 0.5).astype(int)


def odir(y, p):
    y, p = y.ravel(), p.ravel()
    f1 = sk.f1_score(y, yes(p), average="micro")
    return (sk.cohen_kappa_score(y, yes(p)) + f1 + sk.roc_auc_score(y, p)) / 3


def specificity(y, decided, classes):
    rest = [sk.recall_score(y != one, decided != one) for one in range(classes)]
    return np.mean(rest)


def one_hot(y):
    return np.eye(CLASSES)[y]


def torch_ece(function, p, y, **sizes):
    return function(torch.tensor(p), torch.tensor(y), n_bins=NUM_BINS, **sizes).item()


MULTICLASS = {
    "auc_macro": lambda y, p: sk.roc_auc_score(one_hot(y), p, average="macro"),
    "auc_micro": lambda y, p: sk.roc_auc_score(one_hot(y), p, average="micro"),
    "auprc_macro": lambda y, p: sk.average_precision_score(one_hot(y), p, average="macro"),
    "accuracy": lambda y, p: sk.accuracy_score(y, p.argmax(1)),
    "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, p.argmax(1)),
    "f1_macro": lambda y, p: sk.f1_score(y, p.argmax(1), average="macro"),
    "f1_weighted": lambda y, p: sk.f1_score(y, p.argmax(1), average="weighted"),
    "sensitivity": lambda y, p: sk.recall_score(y, p.argmax(1), average="macro"),
    "specificity": lambda y, p: specificity(y, p.argmax(1), CLASSES),
    "kappa": lambda y, p: sk.cohen_kappa_score(y, p.argmax(1)),
    "mcc": lambda y, p: sk.matthews_corrcoef(y, p.argmax(1)),
    "ece": lambda y, p: torch_ece(multiclass_calibration_error, p, y, num_classes=CLASSES),
    "brier": lambda y, p: ((p - one_hot(y)) ** 2).sum(1).mean(),
}
BINARY = {
    "auc_macro": sk.roc_auc_score,
    "auc_micro": sk.roc_auc_score,
    "auprc_macro": sk.average_precision_score,
    "accuracy": lambda y, p: sk.accuracy_score(y, yes(p)),
    "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, yes(p)),
    "f1_macro": lambda y, p: sk.f1_score(y, yes(p), average="macro"),
    "f1_weighted": lambda y, p: sk.f1_score(y, yes(p), average="weighted"),
    "sensitivity": lambda y, p: sk.recall_score(y, yes(p)),
    "specificity": lambda y, p: sk.recall_score(1 - y, 1 - yes(p)),
    "kappa": lambda y, p: sk.cohen_kappa_score(y, yes(p)),
    "mcc": lambda y, p: sk.matthews_corrcoef(y, yes(p)),
    "ece": lambda y, p: torch_ece(binary_calibration_error, p, y),
    "brier": sk.brier_score_loss,
}
OF_LABELS = ("auc_macro", "auprc_macro", "balanced_accuracy", "kappa", "mcc", "brier", "accuracy")
MULTILABEL = {
    name: lambda y, p, of=BINARY[name]: np.mean([of(a, b) for a, b in zip(y.T, p.T, strict=True)])
    for name in (*OF_LABELS, "sensitivity", "specificity")
} | {
    "auc_micro": lambda y, p: sk.roc_auc_score(y, p, average="micro"),
    "f1_macro": lambda y, p: sk.f1_score(y, yes(p), average="macro"),
    "f1_weighted": lambda y, p: sk.f1_score(y, yes(p), average="weighted"),
    "ece": lambda y, p: torch_ece(binary_calibration_error, p.ravel(), y.ravel()),
    "odir_score": odir,
}
REGRESSION = {
    "mae": sk.mean_absolute_error,
    "rmse": sk.root_mean_squared_error,
    "r2": sk.r2_score,
    "pearson": lambda y, p: np.mean([stats.pearsonr(y[:, i], p[:, i])[0] for i in (0, 1)]),
    "spearman": lambda y, p: np.mean([stats.spearmanr(y[:, i], p[:, i])[0] for i in (0, 1)]),
}
REFERENCE = {
    "multiclass": MULTICLASS,
    "binary": BINARY,
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
}
ROWS = [(target, metric) for target in METRICS for metric in METRICS[target]]


@pytest.mark.parametrize(("target", "metric"), ROWS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_the_libraries_say_of_the_cases_repeated(target, metric, seed):
    scores, labels, weights = draw(target, seed)
    sample = Sample(scores, labels, target, np.stack([np.ones(CASES), weights]))
    found = METRICS[target][metric](sample)
    for value, counts in zip(found, (np.ones(CASES, int), weights), strict=True):
        y, p = labels.repeat(counts, axis=0), scores.repeat(counts, axis=0)
        if target == "binary":
            y, p = y[:, 0], p[:, 0]
        assert value == pytest.approx(REFERENCE[target][metric](y, p), abs=1e-6)


@pytest.mark.parametrize(("target", "metric"), ROWS)
def test_a_case_with_a_missing_label_is_as_if_it_were_not_there(target, metric):
    scores, labels, weights = draw(target, 0)
    gone = np.arange(CASES) % 5 == 0
    holes = labels.astype(float)
    holes[gone] = np.nan
    found = METRICS[target][metric](Sample(scores, holes, target, weights[None]))
    left = Sample(scores[~gone], labels[~gone], target, weights[None, ~gone])
    np.testing.assert_allclose(found, METRICS[target][metric](left))


@pytest.mark.parametrize("metric", ["auc_macro", "f1_macro", "brier", "kappa", "sensitivity"])
def test_labels_are_missing_one_by_one(metric):
    scores, labels, weights = draw("multilabel", 1)
    labels = labels.astype(float)
    labels[::3, 1] = np.nan
    labels[1::4, 2] = -100
    known = ~np.isnan(labels) & (labels != -100)
    of = BINARY[metric] if metric != "f1_macro" else (lambda y, p: sk.f1_score(y, yes(p)))
    expected = [
        of(*(t[known[:, i], i].repeat(weights[known[:, i]]) for t in (labels, scores)))
        for i in range(3)
    ]
    found = METRICS["multilabel"][metric](Sample(scores, labels, "multilabel", weights[None]))
    assert found[0] == pytest.approx(np.mean(expected))


def test_the_threshold_decides():
    scores, labels, _ = draw("binary", 0)
    for threshold in (0.2, 0.7):
        sample = Sample(scores, labels, "binary", np.ones((1, CASES)), threshold)
        expected = sk.recall_score(labels, scores > threshold)
        assert METRICS["binary"]["sensitivity"](sample)[0] == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_correlation_and_r2_do_not_depend_on_the_unit(scale):
    scores, labels, weights = draw("regression", 0)
    for metric in ("r2", "pearson", "spearman"):
        one, other = (
            METRICS["regression"][metric](
                Sample(s * scores, s * labels, "regression", weights[None])
            )
            for s in (1, scale)
        )
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_less_of_an_error_is_better():
    lower = {name for of in METRICS.values() for name in of if not higher_is_better(name)}
    assert lower == {"ece", "brier", "mae", "rmse"}
