"""An ensemble by cross-fitting: each member leaves a fold out, and the folds judge the mixture.

Every row is predicted once by a member that never saw it. These predictions decide how strongly
shallow evidence is regularised and how much of it and of the fusion model goes into the mixture.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn

from mmfusion.missingness import hide
from mmfusion.recipes.batches import seeded
from mmfusion.recipes.members import Features, Member, Rows

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiclass": F.cross_entropy,
    "multilabel": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


def folds(rows: Rows, num_folds: int, target: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to train on and rows left out, by class where there is one, and never across a group.

    Raises:
        ValueError: If there are fewer groups than folds.
    """
    if rows.groups is not None and (num_groups := len(np.unique(rows.groups))) < num_folds:
        raise ValueError(
            f"groups holds {num_groups} values with num_members={num_folds}: a group is never "
            "parted, and each member leaves one out at least. Lower num_members, or pass finer "
            "groups."
        )
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


def _say(kind: str, member: Member, inputs: Features, present: Tensor) -> Tensor:
    shallow = member.shallow[kind]
    return shallow(inputs.of(shallow), present)


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
            batch, move = rows[part], functools.partial(Tensor.to, device=member.weights.device)
            inputs = batch.inputs.each(move)
            both = [score(member, inputs, move(p)) for p in (batch.present, further[part])]
            found.append(torch.stack(both, dim=1).flatten(0, 1).cpu())
        return torch.cat(found)

    report: dict[str, Any] = {"settings": {}}
    with seeded(seed, members[0].weights.device):
        for kind, first in members[0].shallow.items():
            losses, states = {}, {}
            for setting in first.SETTINGS:
                for member, (kept, _) in zip(members, parts, strict=True):
                    part, shallow = rows[kept], member.shallow[kind]
                    shallow.fit(part.inputs.of(shallow), part.present, part.labels, setting)
                scores = judged(functools.partial(_say, kind))
                losses[setting] = least_loss(scores.unsqueeze(2), labels, target)
                states[setting] = [copy.deepcopy(m.shallow[kind].state_dict()) for m in members]
            best = min(losses, key=losses.__getitem__)
            for member, state in zip(members, states[best], strict=True):
                member.shallow[kind].load_state_dict(state)
            report["settings"][kind] = best
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
    averaged and shallow models little, so that single members would be trusted too little.

    References:
        Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.
    """
    target = member.model.target
    for module in member.model.modules():
        module.train(isinstance(module, nn.Dropout))
    total = torch.zeros(())
    for _ in range(passes):
        dropped = {name: F.dropout(x, input_dropout) for name, x in inputs.scaled.items()}
        scores = member.own(dropped, present)
        total = total + (scores if target == "regression" else _probabilities(scores, target))
    member.eval()
    mean = total / passes
    if target == "multiclass":
        mean = mean.clamp(min=1e-12).log()
    elif target == "multilabel":
        mean = mean.logit(eps=1e-12)
    return member.beside(inputs, present, mean)


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


def least_loss(scores: Tensor, labels: Tensor, target: str) -> float:
    """The loss of scores as a mixture would weigh them: too sure is no harm there."""
    return float(mixture_loss(scores, labels, target, mixture_weights(scores, labels, target)))
