"""Shallow evidence: a model per modality that is no network, summed over those observed."""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from mmfusion.recipes.discriminant import StudentClasses
from mmfusion.recipes.trees import Trees


class ShallowEvidence(nn.Module):
    """Sum what each observed modality says on its own: log-probabilities over the class prior.

    With little data this is hard to beat; it cannot see interactions between modalities. Nothing
    observed gives the prior. For regression the observed modalities' predictions are averaged.

    Args:
        widths: Name to feature width.
        num_outputs: Classes, labels or target columns, ``Y``.
        target: ``"multiclass"``, ``"multilabel"`` or ``"regression"``.

    Shape:
        - ``inputs[name]``: ``(B, F)``; ``present``: ``(B, M)`` bool; result: ``(B, Y)``

    References:
        Late fusion by the product rule: Kittler et al., "On Combining Classifiers", TPAMI 1998.
    """

    SETTINGS: tuple[float, ...]  # what ``fit`` may be told
    models: Any
    prior: Tensor
    seen: Tensor

    def __init__(self, widths: Mapping[str, int], num_outputs: int, target: str) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("prior", torch.zeros(num_outputs))
        self.register_buffer("seen", torch.zeros(len(widths), num_outputs, dtype=torch.bool))

    def fit(
        self, inputs: Mapping[str, Tensor], present: Tensor, labels: Tensor, setting: float
    ) -> Self:
        """Fit each modality on the rows that have it; with none, or one class, it stays silent."""
        self.prior.copy_(self._prior(labels))
        self.seen.zero_()
        for number, features in enumerate(inputs.values()):
            rows = present[:, number].cpu()
            self._fit_one(number, features.cpu()[rows].numpy(), labels.cpu()[rows], setting)
        return self

    def _fit_one(self, number: int, features: np.ndarray, labels: Tensor, setting: float) -> None:
        raise NotImplementedError

    def _say(self, number: int, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities, logits, or predictions of one modality."""
        return self.models[number](x)

    def _prior(self, labels: Tensor) -> Tensor:
        if self.target == "regression":
            return labels.mean(0)
        if self.target == "multilabel":  # one count more of each kind: no label is certain
            return torch.special.logit((labels.sum(0) + 1) / (len(labels) + 2))
        counts = labels.bincount(minlength=len(self.prior)) + 1
        return (counts / counts.sum()).log()

    def parts(self, inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """What each modality adds, ``(B, M, Y)``: zero where it is absent or knows nothing."""
        scores = torch.stack([self._say(m, x) for m, x in enumerate(inputs.values())], dim=1)
        if self.target == "multiclass":
            scores = torch.where(self.seen, scores, -torch.inf).log_softmax(2)
        counts = present.unsqueeze(2) & self.seen
        parts = torch.where(counts, scores - self.prior, 0)
        if self.target == "regression":
            parts = parts / counts.sum(1, keepdim=True).clamp(min=1)
        return parts

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """Unnormalised log-probabilities, logits, or predictions."""
        return self.prior + self.parts(inputs, present).sum(1)


class LinearEvidence(ShallowEvidence):
    """One regularised linear model per modality: few weights, each well determined.

    Arguments, shapes and sum are those of ``ShallowEvidence``; ``fit`` takes the inverse strength
    of the regularisation, scikit-learn's ``C``, one of ``SETTINGS``.

    Example:
        >>> evidence = LinearEvidence({"lab": 1, "photo": 1}, 2, "multiclass")
        >>> inputs = {"lab": torch.tensor([[-1.0], [1.0]]), "photo": torch.zeros(2, 1)}
        >>> present = torch.ones(2, 2, dtype=torch.bool)
        >>> _ = evidence.fit(inputs, present, torch.tensor([0, 1]), 1.0)
        >>> evidence(inputs, present).argmax(1).tolist()
        [0, 1]
        >>> evidence(inputs, ~present).softmax(1)[0].tolist()
        [0.5, 0.5]
    """

    SETTINGS = (0.01, 0.1, 1.0)

    def __init__(self, widths: Mapping[str, int], num_outputs: int, target: str) -> None:
        super().__init__(widths, num_outputs, target)
        self.models = nn.ModuleList(nn.Linear(width, num_outputs) for width in widths.values())
        self.requires_grad_(False)

    def _fit_one(self, number: int, features: np.ndarray, labels: Tensor, setting: float) -> None:
        linear = self.models[number]
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        if not len(features):
            return
        if self.target == "regression":
            fitted = Ridge(alpha=1 / setting).fit(features, labels.numpy())
            self._put(number, torch.arange(len(self.prior)), fitted.coef_, fitted.intercept_)
            return
        if self.target == "multiclass":
            classes = labels.unique()
            if len(classes) > 1:
                fitted = _logistic(features, labels.numpy(), setting)
                weight, bias = fitted.coef_, fitted.intercept_
                if len(classes) == 2:  # one log-odds: the first class gets none of it
                    weight, bias = np.vstack([0 * weight, weight]), np.r_[0, bias]
                self._put(number, classes, weight, bias)
            return
        for label in range(linear.out_features):
            if len(labels[:, label].unique()) > 1:
                fitted = _logistic(features, labels[:, label].numpy(), setting)
                self._put(number, torch.tensor([label]), fitted.coef_, fitted.intercept_)

    def _put(self, number: int, outputs: Tensor, weight: np.ndarray, bias: np.ndarray) -> None:
        linear = self.models[number]
        width = linear.in_features
        linear.weight[outputs] = (
            torch.from_numpy(weight).float().reshape(-1, width).to(linear.weight)
        )
        linear.bias[outputs] = torch.from_numpy(np.atleast_1d(bias)).float().to(linear.bias)
        self.seen[number, outputs] = True


class ForestEvidence(ShallowEvidence):
    """One forest of extremely randomised trees per modality: non-linear, and hard to overfit.

    Arguments, shapes and sum are those of ``ShallowEvidence``; ``fit`` takes the fewest rows of a
    leaf, and draws from torch's generator. Forests want features as they are: they look at one at a
    time, so that scales do not matter and principal components would mix what they tell apart. What
    they say is drawn a little to the prior, since what few rows lack is not impossible. A tree has
    less than 1000 leaves, however many rows there are.

    Example:
        >>> evidence = ForestEvidence({"lab": 1}, 2, "multiclass")
        >>> inputs = {"lab": torch.arange(8.0)[:, None]}
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])  # no line tells these apart
        >>> present = torch.ones(8, 1, dtype=torch.bool)
        >>> _ = torch.manual_seed(0)
        >>> _ = evidence.fit(inputs, present, labels, 2)
        >>> evidence(inputs, present).softmax(1)[:, 1].topk(2).indices.sort().values.tolist()
        [3, 4]

    References:
        Geurts et al., "Extremely randomized trees", Machine Learning 2006.
    """

    SETTINGS = (1, 2)
    NUM_TREES = 100
    PULL = 0.02  # share of the prior in what a forest says

    def __init__(self, widths: Mapping[str, int], num_outputs: int, target: str) -> None:
        super().__init__(widths, num_outputs, target)
        self.models = nn.ModuleList(Trees(num_outputs) for _ in widths)

    def _fit_one(self, number: int, features: np.ndarray, labels: Tensor, setting: float) -> None:
        if self.target == "multiclass":
            labels = nn.functional.one_hot(labels, len(self.prior)).float()
        varies = (labels != labels[:1]).any(0)  # nothing does where there is no row
        if not varies.any():
            return
        forest = ExtraTreesRegressor(  # of 0/1 targets the squared error is Gini's impurity
            self.NUM_TREES,
            min_samples_leaf=max(int(setting), len(labels) // 500),
            max_features=1.0 if self.target == "regression" else "sqrt",
            random_state=int(torch.randint(2**31, ())),
        ).fit(features, labels.numpy().squeeze(1) if labels.shape[1] == 1 else labels.numpy())
        self.models[number].take(forest)
        self.seen[number] = varies

    def _say(self, number: int, x: Tensor) -> Tensor:
        mean = self.models[number](x)
        if self.target == "regression":
            return mean
        many = self.target == "multilabel"
        prior = self.prior.sigmoid() if many else self.prior.exp()
        chances = mean.lerp(prior, self.PULL)
        return chances.logit() if many else chances.log()


class DiscriminantEvidence(ShallowEvidence):
    """One discriminant per modality, of classes about means of their own: for many classes.

    Arguments, shapes and sum are those of ``ShallowEvidence``, for classes or labels; ``fit`` takes
    the share of a round covariance in that within classes. See ``discriminant.StudentClasses``.

    Example:
        >>> evidence = DiscriminantEvidence({"lab": 1}, 3, "multiclass")
        >>> inputs = {"lab": torch.tensor([[-5.0], [-4.0], [0.0], [1.0], [4.0], [5.0]])}
        >>> present, labels = torch.ones(6, 1, dtype=torch.bool), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> evidence.fit(inputs, present, labels, 0.2)(inputs, present).argmax(1).tolist()
        [0, 0, 1, 1, 2, 2]
    """

    SETTINGS = (0.2, 0.4, 0.6)

    def __init__(self, widths: Mapping[str, int], num_outputs: int, target: str) -> None:
        super().__init__(widths, num_outputs, target)
        sizes = [num_outputs] if target == "multiclass" else [2] * num_outputs
        self.models = nn.ModuleList(
            nn.ModuleList(StudentClasses(width, size) for size in sizes)
            for width in widths.values()
        )

    def _fit_one(self, number: int, features: np.ndarray, labels: Tensor, setting: float) -> None:
        columns = labels.reshape(len(labels), -1).long().numpy()
        for column, model in enumerate(self.models[number]):
            fitted = model.take(features, columns[:, column], setting)
            self.seen[number, slice(None) if self.target == "multiclass" else column] = fitted

    def _say(self, number: int, x: Tensor) -> Tensor:
        said = [model(x) for model in self.models[number]]
        if self.target == "multiclass":
            return said[0] + self.prior
        return torch.stack([each[:, 1] - each[:, 0] for each in said], dim=1) + self.prior


SHALLOW: dict[str, type[ShallowEvidence]] = {
    "linear": LinearEvidence,
    "forest": ForestEvidence,
    "discriminant": DiscriminantEvidence,
}


def shallow_kinds(target: str) -> tuple[str, ...]:
    """Those that a target can be given to: a discriminant tells classes apart."""
    return tuple(kind for kind in SHALLOW if (kind, target) != ("discriminant", "regression"))


def _logistic(features: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # Stopping early is one more regulariser here, and is what the cross-fit judges.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(features, labels)
