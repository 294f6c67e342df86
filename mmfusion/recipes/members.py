"""A member of an ensemble, and the rows that it is trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.cmml import CMML
from mmfusion.recipes.evidence import ForestEvidence, ShallowEvidence


class Features(NamedTuple):
    """Modality to features: as they came, for forests, and scaled, for all else."""

    raw: Mapping[str, Tensor]
    scaled: Mapping[str, Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """All of them changed alike."""
        return Features(*({name: change(x) for name, x in some.items()} for some in self))

    def of(self, shallow: ShallowEvidence) -> Mapping[str, Tensor]:
        """Those that it reads."""
        return self.raw if isinstance(shallow, ForestEvidence) else self.scaled


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
        said = [each(inputs.of(each), present) for each in self.shallow.values()]
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
            parts = parts + weights[kind] * shallow.parts(inputs.of(shallow), present)
        return parts

    def forward(self, inputs: Features, present: Tensor) -> Tensor:
        """Probabilities, or predicted values, ``(B, Y)``."""
        mixed = self.scores(inputs, present) @ self.weights
        if self.model.target == "multiclass":
            return mixed.softmax(1)
        return mixed.sigmoid() if self.model.target == "multilabel" else mixed
