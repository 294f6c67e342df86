"""Missing modalities in three lines, for whoever has feature vectors: scikit-learn conventions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mmfusion.recipes.ensemble import Ensemble, RowExplanation
from mmfusion.recipes.members import METHODS
from mmfusion.recipes.targets import class_targets, number_targets

__all__ = ["METHODS", "CMMLClassifier", "CMMLRegressor", "RowExplanation"]


class CMMLClassifier(ClassifierMixin, Ensemble):  # type: ignore[misc]
    """Classify rows of feature vectors of which any may be missing: fit, predict, explain.

    An ensemble by cross-fitting: each of ``num_members`` models is trained without one fold, and
    the rows left out decide how far to trust the fused vector, each modality's own evidence, and
    shallow models of each modality (``decisions_`` says what came out). Features are
    standardised, and projected on principal components where wide, on observed training rows alone;
    forests get them before that projection. Rows outside ``fit`` decide nothing; the same
    ``random_state`` gives the same predictions.

    Args:
        method: ``"cmml"``, or the name of any class in ``mmfusion.baselines``; case and underscores
            do not matter.
        dim: Width of a token, ``D``.
        num_members: Models, and folds.
        epochs: Passes of each over its rows.
        learning_rate: The highest of a one-cycle schedule.
        hide_rate: Share of observed modalities hidden in training; see ``missingness.hide``.
        dropout: Inside the models.
        input_dropout: Of feature cells, in training.
        num_components: Most principal components of a modality; None keeps all columns.
        shallow: Evidence of shallow models mixed in, one model per modality: ``"linear"`` (a
            regularised linear model), ``"forest"`` (randomised trees) or, but for regression,
            ``"discriminant"``; None is all of them for CMML and none for a baseline.
        options: More arguments for the method's constructor, such as ``{"num_tokens": 2}``.
        device: ``"auto"`` takes a GPU if there is one.
        random_state: Of folds, weights, hiding and dropout: a seed, a ``RandomState``, or None.
        progress: Show a bar.

    Attributes:
        classes_: Sorted classes; label numbers for multi-label targets.
        decisions_: Settings of the shallow evidence, weights of fused vector, evidence and shallow
            evidence in the mixture, and the out-of-fold losses that decided.

    Shape:
        - ``inputs[name]``: ``(rows, features)``; ``y``: ``(rows,)``, or ``(rows, labels)`` of 0/1
        - ``predict_proba``: ``(rows, classes)``

    Raises:
        ValueError: On inputs that ``presence.normalise`` refuses, an unknown method, settings out
            of their range, fewer than two classes, fewer rows than twice ``num_members``, fewer
            groups than ``num_members``, or numbers too large to answer with a number.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(2, size=60)
        >>> inputs = {name: rng.normal(y[:, None], 1, size=(60, 3)) for name in ("photo", "table")}
        >>> inputs["photo"][::3] = np.nan  # absent
        >>> model = CMMLClassifier(dim=8, num_members=2, epochs=2, progress=False).fit(inputs, y)
        >>> model.predict_proba({"photo": None, "table": inputs["table"]}).shape
        (60, 2)
        >>> sorted(model.decisions_["weights"])
        ['discriminant', 'evidence', 'forest', 'fusion', 'linear']

    References:
        CMML: arXiv 2605.25968. Shallow evidence, cross-fitting and the mixture are our design.
    """

    _KEPT = ("widths_", "target_", "num_outputs_", "num_rows_", "decisions_", "labels_")

    @property
    def classes_(self) -> np.ndarray:
        """Sorted classes, in the order of the columns of ``predict_proba``."""
        check_is_fitted(self, "labels_")
        return np.asarray(self.labels_)

    def _encode_targets(self, y: Any) -> Tensor:
        y = class_targets(y)
        if y.ndim == 2:
            self.target_, self.labels_ = "multilabel", list(range(y.shape[1]))
            self.num_outputs_ = y.shape[1]
            return torch.from_numpy(y)
        classes, numbers = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"y holds {len(classes)} class: a classifier tells at least two apart. Pass rows "
                "of another class too."
            )
        self.target_, self.labels_, self.num_outputs_ = "multiclass", classes.tolist(), len(classes)
        return torch.from_numpy(numbers)

    def predict_proba(self, inputs: Mapping[str, Any], present: Any = None) -> np.ndarray:
        """Probabilities; for multi-label targets of each label."""
        return self._predicted(inputs, present)

    def predict(self, inputs: Mapping[str, Any], present: Any = None) -> np.ndarray:
        """The most probable class, or each label at 0.5."""
        probabilities = self._predicted(inputs, present)
        if self.target_ == "multilabel":
            return (probabilities >= 0.5).astype(int)
        return self.classes_[probabilities.argmax(1)]

    def score(
        self, inputs: Mapping[str, Any], y: Any, present: Any = None, sample_weight: Any = None
    ) -> float:
        """Accuracy; for multi-label targets of whole rows, as in scikit-learn."""
        answers = self.predict(inputs, present)
        return float(accuracy_score(y, answers, sample_weight=sample_weight))


class CMMLRegressor(RegressorMixin, Ensemble):  # type: ignore[misc]
    """Predict one number or several from feature vectors of which any may be missing.

    Arguments, and what is decided how, are those of ``CMMLClassifier``; targets are standardised.

    Shape:
        - ``inputs[name]``: ``(rows, features)``; ``y`` and ``predict``: ``(rows,)`` or
          ``(rows, targets)``

    Raises:
        ValueError: On inputs that ``presence.normalise`` refuses, or targets that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> inputs = {"lab": rng.normal(size=(40, 2)), "photo": rng.normal(size=(40, 3))}
        >>> y = inputs["lab"][:, 0] + 5
        >>> model = CMMLRegressor(dim=8, num_members=2, epochs=2, progress=False).fit(inputs, y)
        >>> model.predict(inputs).shape
        (40,)
    """

    _KEPT = (
        *("widths_", "target_", "num_outputs_", "num_rows_", "decisions_"),
        *("y_mean_", "y_scale_", "flat_"),
    )

    def _encode_targets(self, y: Any) -> Tensor:
        y = number_targets(y)
        self.flat_ = y.ndim == 1
        y = y.reshape(len(y), -1)
        self.target_, self.num_outputs_ = "regression", y.shape[1]
        self.y_mean_, spread = y.mean(0).tolist(), y.std(0)
        self.y_scale_ = np.where(spread > 0, spread, 1).tolist()
        return torch.from_numpy((y - self.y_mean_) / self.y_scale_).float()

    def predict(self, inputs: Mapping[str, Any], present: Any = None) -> np.ndarray:
        """Predicted values."""
        values = self._predicted(inputs, present) * self.y_scale_ + self.y_mean_
        return values[:, 0] if self.flat_ else values

    def score(
        self, inputs: Mapping[str, Any], y: Any, present: Any = None, sample_weight: Any = None
    ) -> float:
        """R2."""
        return float(r2_score(y, self.predict(inputs, present), sample_weight=sample_weight))
