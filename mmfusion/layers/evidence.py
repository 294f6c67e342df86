"""What each modality says on its own, added up."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.layers.head import Head
from mmfusion.layers.reset import reset_children
from mmfusion.layers.uncast import uncast
from mmfusion.presence import check_table
from mmfusion.ranks import joint_sum
from mmfusion.reference import wide_type

__all__ = ["EvidenceOutput", "ModalityEvidence"]

TARGETS = ("multiclass", "multilabel", "binary", "regression")


class EvidenceOutput(NamedTuple):
    """What the modalities say, each on its own and together.

    Attributes:
        scores: ``(B, M, Y)``, each modality's own logits or predictions, for
            ``losses.evidence_loss``; those of absent ones mean nothing.
        evidence: ``(B, M, Y)``, what each adds to the prior; zeros where absent.
        logits: ``(B, Y)``, the prior plus all evidence.
    """

    scores: Tensor
    evidence: Tensor
    logits: Tensor


class ModalityEvidence(nn.Module):
    """Classify each modality on its own, and add up the evidence of those present.

    A modality's classifier is a hidden layer and a head, over the mean of its tokens.
    ``logits = log prior + sum of (log p_m - log prior)`` over present modalities: Bayes' rule for
    modalities that are independent given the class. Binary and multilabel targets do the same with
    log odds; regression takes the mean prediction. Nothing present leaves the prior.

    The prior has no gradient: it is the frequency of the labels that ``count`` saw, over all ranks,
    each class counted once more (regression: their mean). ``forward`` does not count; the models
    of this library call ``count`` in training.

    Args:
        num_modalities: How many modalities, ``M``.
        dim: Width of a token, ``D``.
        num_classes: Outputs, ``Y``.
        target: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``.
        dropout: Dropout before each hidden layer, and in the default head.
        head: A module from ``(B, D)`` to ``(B, Y)``, copied for each modality; None is a ``Head``.
        device: Where parameters and counts live.
        dtype: Type of the parameters; counts are float32, whatever the model is cast to.

    Shape:
        - ``tokens``: ``(B, M, L, D)``; ``present``: ``(B, M)``, True = counts
        - result: ``EvidenceOutput``

    Raises:
        ValueError: If ``target`` is unknown, the tensors do not have ``M`` modalities of width
            ``D``, or labels to count have another shape.

    Example:
        >>> evidence = ModalityEvidence(2, dim=4, num_classes=3, target="multiclass")
        >>> evidence.count(torch.tensor([0, 0, 0]), known=torch.ones(3, dtype=torch.bool))
        >>> tokens = torch.full((1, 2, 1, 4), torch.nan)
        >>> nothing = evidence(tokens, torch.tensor([[False, False]]))
        >>> nothing.logits.softmax(1)[0, 0].item()  # three of class 0, and one of each
        0.666...

    References:
        Product of experts over the prior: Kittler et al., "On Combining Classifiers", TPAMI 1998,
        section 2.1. How the prior is counted is our design.
    """

    tally: Tensor

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_classes: int,
        target: str,
        *,
        dropout: float = 0.0,
        head: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target={target!r}: it is one of {TARGETS}. Choose one.")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.dim = dim
        self.num_classes = num_classes
        self.hidden = nn.ModuleList(nn.Linear(dim, dim, **kind) for _ in range(num_modalities))
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(
            Head(dim, num_classes, dropout=dropout, **kind) if head is None else copy.deepcopy(head)
            for _ in range(num_modalities)
        )
        # Labels summed, and labels known, per class; exact counts up to 2^24 of each.
        tally = torch.empty(2, num_classes, device=device, dtype=torch.float32)
        self.register_buffer("tally", tally)
        self._reset_own()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        tally = self.tally
        super()._apply(fn, recurse)
        self.tally = uncast(tally, self.tally)
        return self

    def _reset_own(self) -> None:
        self.tally.zero_()

    def reset_parameters(self) -> None:
        """Draw all parameters anew; forget the prior."""
        reset_children(self)
        self._reset_own()

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"target={self.target!r}"

    def forward(self, tokens: Tensor, present: Tensor) -> EvidenceOutput:
        """What each says, what it adds, and the sum."""
        sizes = (len(self.heads), self.dim)
        if tokens.shape[1::2] != sizes:
            raise ValueError(
                f"tokens is {tuple(tokens.shape)}: this layer was built for M = {sizes[0]} "
                f"modalities of width D = {sizes[1]}, so they are (B, M, L, D). Rebuild it, or "
                "reshape them."
            )
        check_table("present", present, tokens.shape[:2])
        rows = present.unsqueeze(-1)
        pooled = torch.where(rows.unsqueeze(-1), tokens, 0).mean(2)  # (B, M, D)
        scores = torch.stack(
            [
                head(F.gelu(hidden(self.dropout(pooled[:, m]))))
                for m, (hidden, head) in enumerate(zip(self.hidden, self.heads, strict=True))
            ],
            dim=1,
        )
        wide = scores.to(wide_type(scores))
        prior = self.prior().to(wide.dtype)
        said = wide.log_softmax(-1) if self.target == "multiclass" else wide
        evidence = torch.where(rows, said - prior, 0)
        if self.target == "regression":
            evidence = evidence / present.sum(1).clamp(min=1)[:, None, None]
        logits = (prior + evidence.sum(1)).to(scores.dtype)
        return EvidenceOutput(scores, evidence.to(scores.dtype), logits)

    @torch.no_grad()
    def count(self, labels: Tensor, known: Tensor) -> None:
        """Take labels, and those of other ranks, into the prior, where they are ``known``.

        Shape:
            - ``labels``: ``(B,)`` or ``(B, Y)``, as for ``losses.task_loss``; ``known``: likewise
        """
        rows, several = labels.shape[:1], self.target != "multiclass"
        shapes = [(*rows, self.num_classes)] * several
        shapes += [tuple(rows)] * (not several or self.num_classes == 1)
        if labels.shape not in shapes or known.shape != labels.shape:
            raise ValueError(
                f"labels is {tuple(labels.shape)} and known {tuple(known.shape)}: with target="
                f"{self.target!r} and num_classes={self.num_classes} both are "
                f"{' or '.join(map(str, shapes))}. Reshape them."
            )
        hits = torch.where(known, labels, 0)
        if self.target == "multiclass":
            hits = F.one_hot(hits.long(), self.num_classes) * known.unsqueeze(1)
            known = known.unsqueeze(1).expand_as(hits)
        both = torch.stack([hits.to(self.tally.dtype), known.to(self.tally.dtype)])
        self.tally.add_(joint_sum(both.reshape(2, labels.shape[0], self.num_classes).sum(1)))

    def prior(self) -> Tensor:
        """Log frequency of each class; log odds of several; mean label: ``(Y,)``."""
        hits, known = self.tally.unbind(0)
        if self.target == "regression":
            return hits / known.clamp(min=1)
        if self.target == "multiclass":
            return ((hits + 1) / (known + len(hits))).log()
        return ((hits + 1) / (known - hits + 1)).log()
