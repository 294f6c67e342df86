"""Score predictions by the names of metrics; whatever has no value says why."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.evaluation.metrics import METRICS, Sample, higher_is_better, known_labels, table
from mmfusion.losses import IGNORE

__all__ = [
    "Classes",
    "calibrate",
    "check_metrics",
    "flat",
    "higher_is_better",
    "measure",
    "score",
    "youden",
]

Classes = Sequence[str] | Mapping[str, Sequence[str]]


def score(
    probabilities: np.ndarray,
    labels: np.ndarray,
    metrics: Sequence[str],
    target: str,
    classes: Classes,
    threshold: float = 0.5,
) -> tuple[dict[str, float], dict[str, str]]:
    """Score predictions.

    A metric is undefined where its formula has no value: an AUC without positives, say. Then it is
    NaN and the reason names the class or label. Missing labels, NaN or for classes also -100, are
    left out. The AUC of several classes is one against the rest; ``sensitivity`` and
    ``specificity`` of several classes or labels are their means over these; ``odir_score`` is that
    of the ODIR-2019 challenge.

    Args:
        probabilities: Of the classes, of the labels, of class 1, or predictions for a regression.
        labels: The truth.
        metrics: Their names.
        target: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``.
        classes: Names of the columns (of both classes, for ``"binary"``). Several multiclass tasks
            side by side are a mapping, task to its classes: a metric is then the mean over tasks.
        threshold: Above it a probability is a yes, for ``"binary"`` and ``"multilabel"``.

    Returns:
        Metric to value, and metric to the reason why it has none.

    Shape:
        - ``probabilities``: ``(B, Y)``; ``labels``: ``(B,)``, ``(B, Y)`` or ``(B, tasks)``

    Raises:
        ValueError: If a metric is unknown, shapes do not fit, a probability is NaN, or a label is
            none of the classes.

    Example:
        >>> score(np.eye(3)[:2], np.array([0, 1]), ("accuracy", "auc_macro"), "multiclass", "ABC")
        ({'accuracy': 1.0, 'auc_macro': nan}, {'auc_macro': 'none of 2 cases is C'})
    """
    whole = np.ones((1, len(probabilities)))
    found = measure(probabilities, labels, whole, metrics, target, classes, threshold)
    values = {metric: float(value[0]) for metric, value in found.items()}
    undefined = {}
    for metric in [metric for metric, value in values.items() if np.isnan(value)]:
        tasks = _tasks(probabilities, labels, whole, target, classes, threshold)
        for task, sample in tasks.items():
            if np.isnan(_apply(metric, sample)).any():
                named = classes[task] if isinstance(classes, Mapping) else classes
                undefined[metric] = f"{task}: " * bool(task) + _reason(sample, tuple(named))
                break
    return values, undefined


def measure(
    probabilities: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[str],
    target: str,
    classes: Classes,
    threshold: float = 0.5,
) -> dict[str, np.ndarray]:
    """Score many resamples at once: as ``score``, with how often each counts each case.

    Shape:
        - ``weights``: ``(R, B)``; each value: ``(R,)``

    Example:
        >>> labels, twice = np.array([0, 1, 1]), np.array([[1, 1, 1], [1, 2, 0]])
        >>> chances = np.array([[0.2], [0.9], [0.1]])
        >>> measure(chances, labels, twice, ["auc_macro"], "binary", ("no", "yes"))
        {'auc_macro': array([0.5, 1. ])}
    """
    check_metrics(metrics, target)
    tasks = _tasks(probabilities, labels, weights, target, classes, threshold).values()
    return {
        metric: np.mean([_apply(metric, sample) for sample in tasks], axis=0) for metric in metrics
    }


def calibrate(
    probabilities: np.ndarray, labels: np.ndarray, target: str, classes: Classes
) -> tuple[tuple[float, float, int], ...]:
    """Mean confidence, accuracy and count of each of 15 bins of confidence that holds something.

    Confidence is the highest probability of a case, or the probability of each label.

    Example:
        >>> calibrate(np.array([[0.7], [0.7]]), np.array([0, 1]), "binary", ("no", "yes"))
        ((0.7, 0.5, 2),)
    """
    if target == "regression":
        return ()
    tasks = _tasks(probabilities, labels, np.ones((1, len(labels))), target, classes)
    count, confidence, right = np.sum([sample.bins for sample in tasks.values()], axis=0)[:, 0]
    return tuple(
        (float(confidence[i] / count[i]), float(right[i] / count[i]), int(count[i]))
        for i in np.flatnonzero(count)
    )


def youden(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Choose the threshold with the largest sum of sensitivity and specificity.

    Choose it on validation data. It lies midway between two probabilities.

    Args:
        probabilities: Of class 1.
        labels: 0 or 1; -100 or NaN is missing.

    Shape:
        - ``probabilities``: ``(B,)`` or ``(B, 1)``; ``labels``: ``(B,)``

    Raises:
        ValueError: If one of the classes has no case, or all probabilities are the same.

    Example:
        >>> round(youden(np.array([0.1, 0.2, 0.4, 0.9]), np.array([0, 0, 1, 1])), 2)
        0.3
    """
    sample = Sample(np.reshape(probabilities, (-1, 1)), labels, "binary", np.ones((1, len(labels))))
    scores = np.unique(sample.scores[sample.known])
    positive, negative = (counts[0] for counts in sample.tied(0))
    if len(scores) < 2 or not positive.sum() or not negative.sum():
        raise ValueError(
            f"{int(negative.sum())} labels 0 and {int(positive.sum())} labels 1 with {len(scores)} "
            "distinct probabilities: a threshold is chosen between both classes. Validate on cases "
            "of both."
        )
    gain = negative.cumsum() / negative.sum() - positive.cumsum() / positive.sum()
    best = int(gain[:-1].argmax())
    return float(scores[best : best + 2].mean())


def flat(classes: Classes) -> tuple[str, ...]:
    """Name every column.

    Example:
        >>> flat({"colour": ("red", "blue"), "size": ("big",)})
        ('colour: red', 'colour: blue', 'size: big')
    """
    if isinstance(classes, Mapping):
        return tuple(f"{task}: {name}" for task, of in classes.items() for name in of)
    return tuple(classes)


def check_metrics(metrics: Sequence[str], target: str) -> None:
    """Refuse metrics that ``target`` does not have.

    Raises:
        ValueError: If ``target`` or a metric is unknown.

    Example:
        >>> check_metrics(["rmse"], "regression")
    """
    if target not in METRICS:
        raise ValueError(f"target={target!r}: it is one of {', '.join(METRICS)}. Choose one.")
    unknown = [metric for metric in metrics if metric not in METRICS[target]]
    if unknown or not metrics or isinstance(metrics, str):
        raise ValueError(
            f"metrics={metrics!r} with target={target!r}: it has {', '.join(METRICS[target])}. "
            "Pass names of these, in a list."
        )


def _apply(metric: str, sample: Sample) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return METRICS[sample.target][metric](sample)


def _tasks(
    probabilities: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    target: str,
    classes: Classes,
    threshold: float = 0.5,
) -> dict[str, Sample]:
    """The sample of each task; one without a name if ``classes`` are no mapping."""
    split = classes if isinstance(classes, Mapping) else {"": classes}
    _check(probabilities, labels, target, split)
    ends = np.cumsum([len(of) for of in split.values()])[:-1]
    blocks = np.split(probabilities, ends, axis=1) if len(split) > 1 else [probabilities]
    columns = np.split(labels, len(split), axis=1) if len(split) > 1 else [labels]
    return {
        task: Sample(block, column, target, weights, threshold)
        for task, block, column in zip(split, blocks, columns, strict=True)
    }


def _check(
    probabilities: np.ndarray,
    labels: np.ndarray,
    target: str,
    split: Mapping[str, Sequence[str]],
) -> None:
    width = 1 if target == "binary" else sum(map(len, split.values()))
    columns = {"multiclass": len(split), "binary": 1}.get(target, width)
    flat = (len(probabilities),) if columns == 1 else None
    if probabilities.shape != (len(labels), width) or labels.shape not in (
        flat,
        (len(probabilities), columns),
    ):
        raise ValueError(
            f"probabilities of shape {probabilities.shape} and labels of shape {labels.shape} with "
            f"target={target!r} and {width} columns: they are (B, {width}) and (B, {columns}). "
            "Correct target or classes."
        )
    bad = ~np.isfinite(probabilities)
    if bad.any():
        row, column = (int(place[0]) for place in bad.nonzero())
        raise ValueError(
            f"probabilities[{row}, {column}] is {probabilities[row, column]}: only numbers can be "
            "scored. Look for the case that the model answers with it."
        )
    tops = [len(of) - 1 for of in split.values()] if target == "multiclass" else [1]
    if target != "regression":
        cells = table(labels)
        wrong = known_labels(cells, target)
        wrong &= (cells < 0) | (cells > tops) | (cells != np.round(cells))
        if wrong.any():
            row, column = (int(place[0]) for place in wrong.nonzero())
            raise ValueError(
                f"labels[{row}, {column}] is {cells[row, column]}: {target} labels are 0 to "
                f"{max(tops)}, a missing one {IGNORE} or NaN. Correct it, or name more classes."
            )


def _reason(sample: Sample, classes: tuple[str, ...]) -> str:
    """Why a metric of this sample, all weights one, is undefined."""
    cases = sample.known.sum(0)
    if not cases.any():
        return "no case with a label was scored"
    if sample.target == "regression":
        columns = zip(classes, sample.known.T, sample.labels.T, sample.scores.T, strict=True)
        flat = [
            name
            for name, known, *values in columns
            if min(len(set(one[known])) for one in values) < 2
        ]
        return f"fewer than two different labels or predictions of {', '.join(flat)}"
    yes = (sample.truth & sample.known).sum(0)
    if sample.target == "multilabel":
        none = [name for name, count in zip(classes, yes, strict=True) if not count]
        every = [name for name, a, b in zip(classes, yes, cases, strict=True) if a == b and a]
    else:
        if sample.target == "binary":
            yes = np.array([cases[0] - yes[0], yes[0]])
        none = [name for name, count in zip(classes, yes, strict=True) if not count]
        every = []
    if none:
        return f"none of {cases.max()} cases is {', '.join(none)}"
    if every:
        return f"all cases are {', '.join(every)}"
    return "the decisions do not vary"
