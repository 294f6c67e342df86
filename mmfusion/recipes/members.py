"""A member of an ensemble, and the rows that it is trained on."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion import baselines, layers
from mmfusion.cmml import CMML
from mmfusion.recipes.evidence import SHALLOW, ForestEvidence, ShallowEvidence, shallow_kinds

METHODS: dict[str, type[nn.Module]] = {
    "CMML": CMML,
    **{name: getattr(baselines, name) for name in baselines.__all__},
}


class Features(NamedTuple):
    """Modality to features: all columns standardised, for forests, and projected, for all else."""

    columns: Mapping[str, Tensor]
    scaled: Mapping[str, Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """All of them changed alike."""
        return Features(*({name: change(x) for name, x in some.items()} for some in self))

    def of(self, shallow: ShallowEvidence) -> Mapping[str, Tensor]:
        """Those that it reads."""
        return self.columns if isinstance(shallow, ForestEvidence) else self.scaled


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


def method_named(method: str) -> type[nn.Module]:
    """CMML or a baseline, however its name is written.

    Raises:
        ValueError: If there is none.
    """
    named = {name.lower(): kind for name, kind in METHODS.items()}
    kind = named.get(method.replace("_", "").lower())
    if kind is None:
        raise ValueError(f"method={method!r}: it is one of {sorted(METHODS)}. Choose one.")
    return kind


def build(
    method: str,
    widths: Mapping[str, int],
    *,
    num_outputs: int,
    target: str,
    dim: int,
    dropout: float,
    num_slots: int,
    num_neighbours: int,
    shallow: Sequence[str] | None,
    options: Mapping[str, Any],
) -> Member:
    """A new member; what a method does not take is left out, and ``options`` go first.

    Raises:
        ValueError: If method or shallow evidence is unknown, or ``options`` holds what is known.
    """
    kind = method_named(method)
    known = shallow_kinds(target)
    if isinstance(shallow, str) or set(shallow or ()) - set(known):
        raise ValueError(
            f"shallow={shallow!r}: for {target} it lists some of {known}. Name those, or pass () "
            "for none."
        )
    if ours := sorted({"modalities", "num_classes", "target", "dim"} & set(options)):
        raise ValueError(
            f"options={ours}: these come from the data, or are an argument of the estimator. Leave "
            "them out."
        )
    sizes: dict[str, Any] = {"num_context": 4, "num_blocks": 2}
    if kind is CMML:  # no slot holds an old copy of a row that another holds anew
        kept = min(512, num_slots), dim, min(8, num_neighbours)
        num_labels = 1 if target == "multiclass" else num_outputs
        sizes["memory"] = layers.MemoryBank(len(widths), *kept, num_labels=num_labels)
        sizes["evidence"] = layers.ModalityEvidence(
            len(widths), dim, num_outputs, target, dropout=dropout
        )
    taken = inspect.signature(kind).parameters
    sizes = {name: size for name, size in sizes.items() if name in taken}
    sizes |= {"num_tokens": 1, "dropout": dropout, "check_values": False}  # looked at already
    sizes |= copy.deepcopy(dict(options))  # no layer is shared by members
    model = kind(widths, num_classes=num_outputs, target=target, dim=dim, **sizes)
    beside = (known if kind is CMML else ()) if shallow is None else shallow
    return Member(model, {name: SHALLOW[name](widths, num_outputs, target) for name in beside})
