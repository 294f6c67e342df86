"""Linear evidence: one regularised linear model per modality, summed over those observed."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

STRENGTHS = (0.01, 0.1, 1.0)  # inverse regularisation, scikit-learn's C


class LinearEvidence(nn.Module):
    """Sum what each observed modality says on its own: log-probabilities over the class prior.

    With little data this is hard to beat, since each part has few, well-regularised weights; it
    cannot see interactions between modalities. Nothing observed gives the prior. For regression the
    observed modalities' predictions are averaged.

    Args:
        widths: Name to feature width.
        num_outputs: Classes, labels or target columns, ``Y``.
        target: ``"multiclass"``, ``"multilabel"`` or ``"regression"``.

    Shape:
        - ``inputs[name]``: ``(B, F)``; ``present``: ``(B, M)`` bool; result: ``(B, Y)``

    Example:
        >>> evidence = LinearEvidence({"lab": 1, "photo": 1}, 2, "multiclass")
        >>> inputs = {"lab": torch.tensor([[-1.0], [1.0]]), "photo": torch.zeros(2, 1)}
        >>> present = torch.ones(2, 2, dtype=torch.bool)
        >>> _ = evidence.fit(inputs, present, torch.tensor([0, 1]), strength=1.0)
        >>> evidence(inputs, present).argmax(1).tolist()
        [0, 1]
        >>> evidence(inputs, ~present).softmax(1)[0].tolist()
        [0.5, 0.5]

    References:
        Late fusion by the product rule: Kittler et al., "On Combining Classifiers", TPAMI 1998.
    """

    prior: Tensor
    seen: Tensor

    def __init__(self, widths: Mapping[str, int], num_outputs: int, target: str) -> None:
        super().__init__()
        self.target = target
        self.linear: Any = nn.ModuleList(nn.Linear(width, num_outputs) for width in widths.values())
        self.register_buffer("prior", torch.zeros(num_outputs))
        self.register_buffer("seen", torch.zeros(len(widths), num_outputs, dtype=torch.bool))
        self.requires_grad_(False)

    def fit(
        self, inputs: Mapping[str, Tensor], present: Tensor, labels: Tensor, strength: float
    ) -> "LinearEvidence":
        """Fit each modality on the rows that have it; with none, or one class, it stays silent."""
        self.prior.copy_(self._prior(labels))
        self.seen.zero_()
        for number, (linear, features) in enumerate(zip(self.linear, inputs.values(), strict=True)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            rows = present[:, number].cpu()
            if rows.any():
                self._fit_one(number, features.cpu()[rows].numpy(), labels.cpu()[rows], strength)
        return self

    def _prior(self, labels: Tensor) -> Tensor:
        if self.target == "regression":
            return labels.mean(0)
        if self.target == "multilabel":  # one count more of each kind: no label is certain
            return torch.special.logit((labels.sum(0) + 1) / (len(labels) + 2))
        counts = labels.bincount(minlength=len(self.prior)) + 1
        return (counts / counts.sum()).log()

    def _fit_one(self, number: int, features: np.ndarray, labels: Tensor, strength: float) -> None:
        linear = self.linear[number]
        if self.target == "regression":
            fitted = Ridge(alpha=1 / strength).fit(features, labels.numpy())
            self._put(number, torch.arange(len(self.prior)), fitted.coef_, fitted.intercept_)
            return
        if self.target == "multiclass":
            classes = labels.unique()
            if len(classes) > 1:
                fitted = _logistic(features, labels.numpy(), strength)
                weight, bias = fitted.coef_, fitted.intercept_
                if len(classes) == 2:  # one log-odds: the first class gets none of it
                    weight, bias = np.vstack([0 * weight, weight]), np.r_[0, bias]
                self._put(number, classes, weight, bias)
            return
        for label in range(linear.out_features):
            if len(labels[:, label].unique()) > 1:
                fitted = _logistic(features, labels[:, label].numpy(), strength)
                self._put(number, torch.tensor([label]), fitted.coef_, fitted.intercept_)

    def _put(self, number: int, outputs: Tensor, weight: np.ndarray, bias: np.ndarray) -> None:
        linear = self.linear[number]
        width = linear.in_features
        linear.weight[outputs] = (
            torch.from_numpy(weight).float().reshape(-1, width).to(linear.weight)
        )
        linear.bias[outputs] = torch.from_numpy(np.atleast_1d(bias)).float().to(linear.bias)
        self.seen[number, outputs] = True

    def parts(self, inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """What each modality adds, ``(B, M, Y)``: zero where it is absent or knows nothing."""
        scores = torch.stack(
            [linear(x) for linear, x in zip(self.linear, inputs.values(), strict=True)], dim=1
        )
        if self.target == "multiclass":
            scores = torch.where(self.seen, scores, -torch.inf).log_softmax(2)
        counts = present.unsqueeze(2) & self.seen
        parts = torch.where(counts, scores - self.prior, 0)
        if self.target == "regression":
            parts = parts / present.sum(1).clamp(min=1)[:, None, None]
        return parts

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """Unnormalised log-probabilities, logits, or predictions."""
        return self.prior + self.parts(inputs, present).sum(1)


def _logistic(features: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # Stopping early is one more regulariser here, and is what the cross-fit judges.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(features, labels)
