"""An ensemble by cross-fitting: each member leaves a fold out, and the folds judge the mixture.

Every row is predicted once by a member that never saw it. These predictions decide how strongly
shallow evidence is regularised and how much of it and of the fusion model goes into the mixture.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn

from mmfusion.cmml import CMML
from mmfusion.missingness import hide
from mmfusion.recipes.batches import seeded
from mmfusion.recipes.evidence import ForestEvidence, ShallowEvidence

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiclass": F.cross_entropy,
    "multilabel": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


class Features(NamedTuple):
    """Modality to features: as they came, for forests, and scaled, for all else."""

    raw: Mapping[str, Tensor]
    scaled: Mapping[str, Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """All of them changed alike."""
        return Features(*({name: change(x) for name, x in some.items()} for some in self))


@dataclass(frozen=True)
class Rows:
    """Training rows: features, what is present, labels, and a number per group if any."""

    inputs: Features
    present: Tensor
    labels: Tensor
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, rows: Tensor) -> "Rows":
        inputs = self.inputs.each(lambda x: x[rows])
        return Rows(inputs, self.present[rows], self.labels[rows])


class Member(nn.Module):
    """A trained model and shallow evidence; weights make one prediction of what they say.

    CMML says two things, what its fused vector and what its modalities say; a baseline says one.
    """

    weights: Tensor

    def __init__(self, model: nn.Module, shallow: Mapping[str, ShallowEvidence]) -> None:
        super().__init__()
        self.model: Any = model
        self.shallow: Any = nn.ModuleDict(shallow)
        own = isinstance(model, CMML) and model.evidence is not None
        self.kinds = ["fusion"] + ["evidence"] * own + list(shallow)
        even = torch.full((len(self.kinds),), 1 / len(self.kinds), dtype=torch.float64)
        self.register_buffer("weights", even)

    def own(self, inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """What the model says of scaled features: as ``scores``, of its kinds."""
        out = self.model(inputs, present=present)
        if "evidence" not in self.kinds:
            return self._stacked([out.logits])
        return self._stacked([out.fused_logits, self.model.evidence.prior() + out.evidence.sum(1)])

    def _stacked(self, said: list[Tensor]) -> Tensor:
        scores = torch.stack(said, dim=2).double()
        return scores.log_softmax(1) if self.model.target == "multiclass" else scores

    def beside(self, inputs: Features, present: Tensor, own: Tensor) -> Tensor:
        """Scores of all kinds, from what the model said."""
        said = [each(_for(each, inputs), present) for each in self.shallow.values()]
        return torch.cat([own, self._stacked(said)], dim=2) if said else own

    def scores(self, inputs: Features, present: Tensor) -> Tensor:
        """Log-probabilities (logits of labels, predictions) of each kind, ``(B, Y, kinds)``."""
        return self.beside(inputs, present, self.own(inputs.scaled, present))

    def parts(self, inputs: Features, present: Tensor) -> Tensor:
        """What each modality adds on its own, as weighted: ``(B, M, Y)``."""
        weights = dict(zip(self.kinds, self.weights, strict=True))
        parts = torch.zeros((), device=self.weights.device)
        if "evidence" in weights:
            out = self.model(inputs.scaled, present=present)
            parts = parts + weights["evidence"] * out.evidence
        for kind, shallow in self.shallow.items():
            parts = parts + weights[kind] * shallow.parts(_for(shallow, inputs), present)
        return parts

    def forward(self, inputs: Features, present: Tensor) -> Tensor:
        """Probabilities, or predicted values, ``(B, Y)``."""
        mixed = self.scores(inputs, present) @ self.weights
        if self.model.target == "multiclass":
            return mixed.softmax(1)
        return mixed.sigmoid() if self.model.target == "multilabel" else mixed


def _for(shallow: ShallowEvidence, inputs: Features) -> Mapping[str, Tensor]:
    return inputs.raw if isinstance(shallow, ForestEvidence) else inputs.scaled


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
                {n: F.dropout(x.to(device), input_dropout) for n, x in batch.inputs.scaled.items()},
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


def _say(kind: str, member: Member, inputs: Features, present: Tensor) -> Tensor:
    shallow = member.shallow[kind]
    return shallow(_for(shallow, inputs), present)


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
    alone = torch.ones(1, dtype=torch.float64)
    with seeded(seed, members[0].weights.device):
        for kind, first in members[0].shallow.items():
            losses, states = {}, {}
            for setting in first.SETTINGS:
                for member, (kept, _) in zip(members, parts, strict=True):
                    part, shallow = rows[kept], member.shallow[kind]
                    shallow.fit(_for(shallow, part.inputs), part.present, part.labels, setting)
                scores = judged(functools.partial(_say, kind))
                losses[setting] = float(mixture_loss(scores.unsqueeze(2), labels, target, alone))
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
