import math

import numpy as np
import pytest
from sklearn import metrics as sk

from mmfusion.evaluation.metrics import METRICS
from mmfusion.evaluation.scores import calibrate, check_metrics, flat, measure, score, youden

CLASSES = ("NEV", "MEL", "BCC")
TWO = [[0.2, 0.1], [0.7, 0.1]]


def chances(labels, seed=0, sure=2.0):
    draw = np.random.default_rng(seed).normal(size=(len(labels), len(CLASSES)))
    draw[np.arange(len(labels)), labels] += sure
    return np.exp(draw) / np.exp(draw).sum(1, keepdims=True)


def test_a_perfect_model_scores_one():
    labels = np.arange(30) % 3
    values, undefined = score(
        np.eye(3)[labels], labels, list(METRICS["multiclass"]), "multiclass", CLASSES
    )
    assert undefined == {}
    assert {name: value for name, value in values.items() if value != 1} == {"ece": 0, "brier": 0}


@pytest.mark.parametrize("target", METRICS)
def test_the_order_of_cases_does_not_matter(target):
    random = np.random.default_rng(0)
    width = {"multiclass": 3, "binary": 1}.get(target, 2)
    probabilities = random.random((40, width)).round(1)
    labels = random.integers(width if target == "multiclass" else 2, size=(40, width)) + 0.0
    labels = labels[:, 0] if target in ("multiclass", "binary") else labels
    classes = tuple("abc"[:width]) if target != "binary" else ("no", "yes")
    order = random.permutation(40)
    metrics = list(METRICS[target])
    one, _ = score(probabilities, labels, metrics, target, classes)
    other, _ = score(probabilities[order], labels[order], metrics, target, classes)
    assert not any(map(math.isnan, one.values()))
    assert one == pytest.approx(other)


def test_without_a_class_what_needs_it_is_undefined_and_says_which():
    labels = np.array([0, 0, 1, 1, 1])
    values, undefined = score(
        chances(labels), labels, list(METRICS["multiclass"]), "multiclass", CLASSES
    )
    lost = {"auc_macro", "auprc_macro", "balanced_accuracy", "f1_macro", "sensitivity"}
    assert {name for name, value in values.items() if math.isnan(value)} == lost
    assert undefined == dict.fromkeys(undefined, "none of 5 cases is BCC")
    assert set(undefined) == lost


@pytest.mark.parametrize("target", METRICS)
def test_without_a_case_nothing_has_a_value(target):
    names = {"multiclass": CLASSES, "binary": ("no", "yes")}.get(target, ("a", "b"))
    width = 1 if target == "binary" else len(names)
    columns = 2 if target in ("multilabel", "regression") else 1
    for labels in (np.zeros((0, columns)), np.full((4, columns), np.nan)):
        probabilities = np.full((len(labels), width), 0.5)
        values, undefined = score(probabilities, labels, list(METRICS[target]), target, names)
        assert all(map(math.isnan, values.values()))
        assert set(undefined.values()) == {"no case with a label was scored"}


@pytest.mark.parametrize(
    ("target", "probabilities", "labels", "metric", "reason"),
    [
        ("binary", [[0.2], [0.7]], [1, 1], "auc_macro", "none of 2 cases is no"),
        ("binary", [[0.2], [0.7]], [0, 0], "sensitivity", "none of 2 cases is yes"),
        ("binary", [[0.2], [0.3]], [0, 1], "mcc", "the decisions do not vary"),
        ("multilabel", TWO, [[0, 0], [1, 0]], "auc_macro", "none of 2 cases is yes"),
        ("multilabel", TWO, [[0, 1], [1, 1]], "auc_macro", "all cases are yes"),
        (
            "regression",
            TWO,
            [[1.0, 2.0], [2.0, 2.0]],
            "r2",
            "different labels or predictions of yes",
        ),
        ("regression", TWO, [[1.0, 2.0], [2.0, 3.0]], "pearson", "predictions of yes"),
        ("regression", [[0.2, 0.1]], [[1.0, 2.0]], "r2", "fewer than two different labels"),
    ],
)
def test_reasons(target, probabilities, labels, metric, reason):
    values, undefined = score(
        np.array(probabilities), np.array(labels), [metric], target, ("no", "yes")
    )
    assert math.isnan(values[metric])
    assert reason in undefined[metric]


def test_metrics_of_several_tasks_are_their_means():
    labels = np.stack([np.arange(30) % 3, np.arange(30) // 15], axis=1)
    blocks = [chances(labels[:, 0]), chances(labels[:, 1], seed=1)[:, :2]]
    tasks = {"diagnosis": CLASSES, "pigment": ("no", "yes")}
    metrics = ["auc_macro", "accuracy", "ece"]
    values, undefined = score(np.hstack(blocks), labels, metrics, "multiclass", tasks)
    each = [
        score(block, column, metrics, "multiclass", of)[0]
        for block, column, of in zip(blocks, labels.T, tasks.values(), strict=True)
    ]
    assert undefined == {}
    assert values == pytest.approx({m: np.mean([one[m] for one in each]) for m in metrics})
    labels[:, 1] = 0
    _, undefined = score(np.hstack(blocks), labels, metrics, "multiclass", tasks)
    assert undefined == {"auc_macro": "pigment: none of 30 cases is yes"}
    counts = [count for *_, count in calibrate(np.hstack(blocks), labels, "multiclass", tasks)]
    assert sum(counts) == 60
    assert flat(tasks)[2:4] == ("diagnosis: BCC", "pigment: no")


def test_measure_agrees_with_score_row_by_row():
    labels = np.arange(24) % 3
    probabilities = chances(labels)
    rows = np.random.default_rng(0).integers(24, size=(5, 24))
    weights = np.stack([np.bincount(row, minlength=24) for row in rows])
    metrics = list(METRICS["multiclass"])
    found = measure(probabilities, labels, weights, metrics, "multiclass", CLASSES)
    for place, row in enumerate(rows):
        values, _ = score(probabilities[row], labels[row], metrics, "multiclass", CLASSES)
        assert {m: found[m][place] for m in metrics} == pytest.approx(values)


def test_calibration_adds_up_to_the_error():
    labels = np.arange(60) % 3
    probabilities = chances(labels, sure=1.0)
    bins = calibrate(probabilities, labels, "multiclass", CLASSES)
    values, _ = score(probabilities, labels, ["ece", "accuracy"], "multiclass", CLASSES)
    count = np.array([count for *_, count in bins])
    confidence, right = (np.array([one[i] for one in bins]) for i in (0, 1))
    assert count.sum() == 60
    assert (count * np.abs(confidence - right)).sum() / 60 == pytest.approx(values["ece"])
    assert (count * right).sum() / 60 == pytest.approx(values["accuracy"])
    assert calibrate(probabilities, labels, "regression", CLASSES) == ()


@pytest.mark.parametrize("seed", range(5))
def test_youden_is_the_best_of_all_thresholds(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=50)
    probabilities = (0.2 * labels + 0.8 * random.random(50)).round(2)

    def gain(threshold):
        decided = probabilities > threshold
        return sk.balanced_accuracy_score(labels, decided)

    best = max(map(gain, np.arange(0.005, 1, 0.01)))
    assert gain(youden(probabilities, labels)) == pytest.approx(best)
    holes = np.append(labels, [-100])
    assert youden(np.append(probabilities, 0.5), holes) == youden(probabilities, labels)


def test_youden_needs_both_classes():
    with pytest.raises(ValueError, match=r"0 labels 0 and 2 labels 1.*between both.*Validate on"):
        youden(np.array([0.1, 0.2]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"1 distinct probabilities.*Validate on cases"):
        youden(np.array([0.2, 0.2]), np.array([0, 1]))


@pytest.mark.parametrize(
    ("metrics", "target", "words"),
    [
        (["auc"], "binary", r"metrics=\['auc'\].*it has auc_macro,.*brier\. Pass names"),
        (["odir_score"], "multiclass", r"odir_score.*it has auc_macro.*Pass names"),
        ("mae", "regression", r"metrics='mae'.*it has mae, rmse, r2, pearson, spearman.*list"),
        ([], "regression", r"metrics=\[\].*it has mae.*Pass"),
        (["mae"], "ordinal", r"target='ordinal': it is one of multiclass.*Choose one"),
    ],
)
def test_unknown_names(metrics, target, words):
    with pytest.raises(ValueError, match=words):
        check_metrics(metrics, target)


@pytest.mark.parametrize(
    ("probabilities", "labels", "target", "words"),
    [
        (np.ones((2, 2)), [0, 1], "multiclass", r"\(2, 2\) and labels.*3 columns.*Correct target"),
        (np.ones((2, 3)), [0, 1, 2], "multiclass", r"\(3,\) with.*are \(B, 3\) and \(B, 1\)"),
        (np.ones((2, 3)), [0, 1], "multilabel", r"they are \(B, 3\) and \(B, 3\)\. Correct"),
        ([[0.1, np.nan, 0]], [0], "multiclass", r"probabilities\[0, 1\] is nan: only num.*Look"),
        (np.ones((2, 3)), [0, 3], "multiclass", r"labels\[1, 0\] is 3.*0 to 2, a mis.*Correct"),
        (np.ones((2, 3)), [0, -1], "multiclass", r"labels\[1, 0\] is -1.*Correct"),
        (np.ones((1, 3)), [[0, 0.5, 1]], "multilabel", r"labels\[0, 1\] is 0.5.*are 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(probabilities, labels, target, words):
    with pytest.raises(ValueError, match=words):
        score(np.asarray(probabilities), np.array(labels), ["accuracy"], target, CLASSES)
