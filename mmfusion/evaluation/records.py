"""The records of an evaluation: a condition, its scores with one seed, their estimate."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Condition", "Estimate", "Scores"]


@dataclass(frozen=True)
class Condition:
    """Under what a model was scored.

    Args:
        kind: ``"subset"``, ``"per_modality"``, ``"sample_rate"``, ``"slot_rate"``,
            ``"always_missing"`` or ``"not_at_random"``.
        name: What to print, such as ``"clinic + derm"`` or ``"rate 0.5"``.
        rate: The nominal rate, where ``kind`` has one.
        pattern: What is left of every sample, for a subset and an always missing modality.
        train_rate: The rate the model was trained at, if several are compared.

    Example:
        >>> Condition("per_modality", "rate 0.5", rate=0.5, train_rate=0.3).label
        'rate 0.5, trained at 0.3'
    """

    kind: str
    name: str
    rate: float | None = None
    pattern: tuple[bool, ...] | None = None
    train_rate: float | None = None

    @property
    def label(self) -> str:
        """The name, and the train rate if several are compared."""
        return (
            self.name if self.train_rate is None else f"{self.name}, trained at {self.train_rate}"
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """One model under one condition, with one seed.

    Args:
        condition: The condition.
        seed: Seed of the model and of the patterns.
        cases: How many were scored.
        values: Metric to value; NaN where undefined.
        intervals: Metric to its 95 % bootstrap interval over cases.
        undefined: Metric to the reason why it has no value.
        realised: ``sample_rate`` and ``slot_rate`` as they came out among the cases scored.
        sha256: Of the patterns drawn.
        calibration: Mean confidence, accuracy and count of each bin that holds something; of a
            binary or multilabel target mean probability and frequency of the label, and count.
        probabilities: Of the cases, or predictions for a regression; None if not kept.
        labels: Of the cases; None if not kept.
        case_ids: Which cases were scored; None if not kept.
        dropped: Metric to the number of resamples in which it was undefined.
        threshold: Above it a probability was a yes, for a binary or multilabel target.
        model: Seed that stands for the model, the same in all scores of one model under several
            seeds of the patterns; None for a model of each seed.

    Shape:
        - ``probabilities``: ``(B, Y)``; ``labels``: ``(B,)`` or ``(B, Y)``; ``case_ids``: ``(B,)``

    Example:
        >>> Scores(Condition("subset", "derm"), 0, 9, {"auc_macro": 0.75}, {}, {}, {}, "", ()).cases
        9
    """

    condition: Condition
    seed: int
    cases: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    undefined: dict[str, str]
    realised: dict[str, float]
    sha256: str
    calibration: tuple[tuple[float, float, int], ...]
    probabilities: np.ndarray | None = None
    labels: np.ndarray | None = None
    case_ids: np.ndarray | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    threshold: float = 0.5
    model: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A metric over seeds.

    Args:
        mean: Over the seeds in which it is defined; NaN if there is none.
        sd: Over those seeds; NaN for fewer than two.
        low: Lower end of the bootstrap interval over cases, averaged over seeds.
        high: Upper end of it.
        seeds: Seeds in which it is defined.

    Example:
        >>> Estimate(0.8, 0.01, 0.75, 0.84, seeds=3).mean
        0.8
    """

    mean: float
    sd: float
    low: float
    high: float
    seeds: int
