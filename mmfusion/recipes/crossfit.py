"""An ensemble by cross-fitting: each member leaves a fold out, and the folds judge the mixture.

Every row is predicted once by a member that never saw it. These predictions decide how strongly
linear evidence is regularised and how much of it and of the fusion model goes into the mixture.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn

from mmfusion.cmml import CMML
from mmfusion.missingness import hide
from mmfusion.recipes.evidence import STRENGTHS, LinearEvidence

Features = Mapping[str, Tensor]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiclass": F.cross_entropy,
    "multilabel": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


@dataclass(frozen=True)
class Rows:
    """Training rows: scaled features, what is present, labels, and a number per group if any."""

    inputs: Features
    present: Tensor
    labels: Tensor
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, rows: Tensor) -> "Rows":
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return Rows(inputs, self.present[rows], self.labels[rows])


class Member(nn.Module):
    """A trained model and linear evidence; weights make one prediction of what they say.

    CMML says two things, what its fused vector and what its modalities say; a baseline says one.
    """

    weights: Tensor

    def __init__(self, model: nn.Module, linear: LinearEvidence | None) -> None:
        super().__init__()
        self.model: Any = model
        self.linear: Any = linear
        own = isinstance(model, CMML) and model.evidence is not None
        self.kinds = ["fusion"] + ["evidence"] * own + ["linear"] * (linear is not None)
        even = torch.full((len(self.kinds),), 1 / len(self.kinds), dtype=torch.float64)
        self.register_buffer("weights", even)

    def scores(self, inputs: Features, present: Tensor) -> Tensor:
        """Log-probabilities (logits of labels, predictions) of each kind, ``(B, Y, kinds)``."""
        out = self.model(inputs, present=present)
        said = {"fusion": out.logits}
        if "evidence" in self.kinds:
            prior = self.model.evidence.prior()
            said |= {"fusion": out.fused_logits, "evidence": prior + out.evidence.sum(1)}
        if self.linear is not None:
            said["linear"] = self.linear(inputs, present)
        scores = torch.stack([said[kind] for kind in self.kinds], dim=2).double()
        return scores.log_softmax(1) if self.model.target == "multiclass" else scores

    def parts(self, inputs: Features, present: Tensor) -> Tensor:
        """What each modality adds on its own, as weighted: ``(B, M, Y)``."""
        weights = dict(zip(self.kinds, self.weights, strict=True))
        parts = torch.zeros((), device=self.weights.device)
        if "evidence" in weights:
            out = self.model(inputs, present=present)
            parts = parts + weights["evidence"] * out.evidence
        if self.linear is not None:
            parts = parts + weights["linear"] * self.linear.parts(inputs, present)
        return parts

    def forward(self, inputs: Features, present: Tensor) -> Tensor:
        """Probabilities, or predicted values, ``(B, Y)``."""
        mixed = self.scores(inputs, present) @ self.weights
        if self.model.target == "multiclass":
            return mixed.softmax(1)
        return mixed.sigmoid() if self.model.target == "multilabel" else mixed


def folds(rows: Rows, num_folds: int, target: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to train on and rows left out, by class where there is one, and never across a group."""
    kind: dict[str, Any] = {"n_splits": num_folds, "shuffle": True, "random_state": seed}
    if target == "multiclass" and rows.labels.bincount().max() >= num_folds:
        # A class with fewer rows than folds is absent from some: not worth the warning.
        rare = rows.labels.bincount()[rows.labels] < num_folds
        strata = torch.where(rare, -1, rows.labels) if rare.any() else rows.labels
        if (strata == -1).sum() < num_folds:
            strata = torch.where(strata == -1, rows.labels.mode().values, strata)
        splitter = StratifiedKFold(**kind) if rows.groups is None else StratifiedGroupKFold(**kind)
    else:
        strata = rows.labels
        splitter = KFold(**kind) if rows.groups is None else GroupKFold(**kind)
    parts = splitter.split(np.zeros(len(rows)), strata.numpy(), rows.groups)
    return [(torch.from_numpy(train), torch.from_numpy(held)) for train, held in parts]


def batch_size(num_rows: int) -> int:
    """About five steps an epoch on few rows, at most 256 rows on many; our design."""
    return int(min(256, max(32, 2 ** round(math.log2(max(1, num_rows / 5))))))


def train(
    model: nn.Module,
    rows: Rows,
    numbers: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    hide_rate: float,
    input_dropout: float,
    generator: Generator,
    after_epoch: Callable[[], None],
) -> None:
    """AdamW under one cycle of the learning rate; modalities hidden and cells dropped at random.

    Args:
        model: CMML or a baseline; left in eval mode.
        rows: All training rows; those in ``numbers`` are used.
        numbers: Which rows; they are also the ids a memory stores.
        epochs: Passes over the rows.
        learning_rate: The highest one.
        hide_rate: See ``missingness.hide``.
        input_dropout: Of feature cells.
        generator: For the order of rows and for hiding.
        after_epoch: Called after every epoch, for a progress bar.
    """
    size = batch_size(len(numbers))
    steps = epochs * -(-len(numbers) // size)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=0.15
    )
    model.train()
    for _ in range(epochs):
        for part in numbers[torch.randperm(len(numbers), generator=generator)].split(size):
            batch = rows[part]
            device = next(model.parameters()).device
            loss = model(
                {n: F.dropout(x.to(device), input_dropout) for n, x in batch.inputs.items()},
                present=batch.present.to(device),
                visible=hide(batch.present, hide_rate, generator).to(device),
                labels=batch.labels.to(device),
                sample_ids=part.to(device),
            ).loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        after_epoch()
    model.eval()


@torch.no_grad()
def crossfit(
    members: list[Member],
    rows: Rows,
    parts: list[tuple[Tensor, Tensor]],
    hide_rate: float,
    input_dropout: float,
    seed: int,
) -> dict[str, Any]:
    """Fit the members' evidence and mixture weights on what each has left out; say what was found.

    The rows left out are judged as they are and once more with modalities hidden, because those to
    come may lack more.
    """
    target = members[0].model.target
    generator = Generator().manual_seed(seed)
    further = hide(rows.present, hide_rate, generator)
    held = [left_out for _, left_out in parts]
    labels = torch.cat([rows.labels[part] for part in held]).repeat_interleave(2, dim=0)

    def judged(score: Callable[[Member, Features, Tensor], Tensor]) -> Tensor:
        found = []
        for member, part in zip(members, held, strict=True):
            batch, device = rows[part], member.weights.device
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            both = [score(member, inputs, p.to(device)) for p in (batch.present, further[part])]
            found.append(torch.stack(both, dim=1).flatten(0, 1).cpu())
        return torch.cat(found)

    report: dict[str, Any] = {}
    if members[0].linear is not None:
        losses, states = {}, {}
        for strength in STRENGTHS:
            for member, (kept, _) in zip(members, parts, strict=True):
                part = rows[kept]
                member.linear.fit(part.inputs, part.present, part.labels, strength)
            scores = judged(lambda member, inputs, present: member.linear(inputs, present))
            alone = torch.ones(1, dtype=torch.float64)
            losses[strength] = float(mixture_loss(scores.unsqueeze(2), labels, target, alone))
            states[strength] = [copy.deepcopy(member.linear.state_dict()) for member in members]
        best = min(losses, key=losses.__getitem__)
        for member, state in zip(members, states[best], strict=True):
            member.linear.load_state_dict(state)
        report["linear_strength"] = best
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scores = judged(functools.partial(as_an_ensemble, input_dropout=input_dropout))
    weights = mixture_weights(scores, labels, target)
    for member in members:
        member.weights.copy_(weights)
    kinds = members[0].kinds
    report["weights"] = dict(zip(kinds, weights.numpy().round(4).tolist(), strict=True))
    each = torch.eye(len(kinds), dtype=torch.float64)
    report["out_of_fold_loss"] = {
        kind: float(mixture_loss(scores, labels, target, one))
        for kind, one in zip((*kinds, "mixture"), (*each, weights), strict=True)
    }
    return report


def as_an_ensemble(
    member: Member, inputs: Features, present: Tensor, input_dropout: float, passes: int = 16
) -> Tensor:
    """Scores of a member as if it were several: averaged over passes with dropout on.

    A row is left out by one member alone, but answered by all. Networks gain much from being
    averaged and linear models little, so that single members would be trusted too little.

    References:
        Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.
    """
    plain = member.scores(inputs, present)
    target = member.model.target
    for module in member.model.modules():
        module.train(isinstance(module, nn.Dropout))
    total = torch.zeros_like(plain)
    for _ in range(passes):
        dropped = {name: F.dropout(x, input_dropout) for name, x in inputs.items()}
        scores = member.scores(dropped, present)
        total += scores if target == "regression" else _probabilities(scores, target)
    member.eval()
    mean = total / passes
    if target == "multiclass":
        mean = mean.clamp(min=1e-12).log()
    elif target == "multilabel":
        mean = mean.logit(eps=1e-12)
    linear = torch.tensor([kind == "linear" for kind in member.kinds], device=mean.device)
    return torch.where(linear, plain, mean)


def _probabilities(scores: Tensor, target: str) -> Tensor:
    return scores.softmax(1) if target == "multiclass" else scores.sigmoid()


def mixture_loss(scores: Tensor, labels: Tensor, target: str, weights: Tensor) -> Tensor:
    """The mean loss of scores ``(B, Y, kinds)`` mixed with ``weights``, in double precision."""
    labels = labels if target == "multiclass" else labels.double()
    return LOSSES[target](scores.double() @ weights, labels)


def mixture_weights(scores: Tensor, labels: Tensor, target: str) -> Tensor:
    """Non-negative weights of least loss, drawn a little to an even mixture."""
    kinds = scores.shape[2]
    even = torch.full((kinds,), 1 / kinds, dtype=torch.float64)

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            weights = torch.tensor(values, requires_grad=True)
            pull = 10 / len(scores) * (weights - even).square().sum()
            loss = mixture_loss(scores, labels, target, weights) + pull
            (slope,) = torch.autograd.grad(loss, weights)
        return loss.item(), slope.numpy()

    found = minimize(
        objective, even.numpy(), jac=True, bounds=[(0, None)] * kinds, method="L-BFGS-B"
    )
    return torch.from_numpy(found.x)
