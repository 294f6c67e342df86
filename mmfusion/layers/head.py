"""From the fused vector to logits, and the tuple every model returns."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfusion.layers.reset import reset_children

__all__ = ["FusionOutput", "Head"]


class FusionOutput(NamedTuple):
    """What CMML and every baseline return; None where a model has no such stage.

    Attributes:
        logits: ``(B, Y)``, unnormalised class scores, or predicted values for regression.
        fused: ``(B, D)``, one vector per sample.
        tokens: ``(B, M, L, D)``, encoded modalities, zeros where absent.
        synthesised: ``(B, M, L, D)``, the guess for every modality, enriched by memory where
            hidden.
        completed: ``(B, M, L, D)``, tokens where visible, else the guess.
        context: ``(B, C, D)``, the context updated by this sample.
        reference: ``(B, C, D)``, this sample's semantic reference.
        aligned: ``(B, M, L, D)``, after alignment to the reference.
        present: ``(B, M)``, what was observed.
        visible: ``(B, M)``, what the model looked at; ``~visible`` was synthesised.
        neighbour_weights: ``(B, M, L, K)``, how much each remembered neighbour lent.
        neighbour_ids: ``(B, M, L, K)``, the samples they came from, or the numbers of the
            prototypes of a ``PrototypeMemory``; -1 where none.
        losses: Scalars by name; empty without labels.
        loss: Their weighted sum; None without labels.
        fused_logits: ``(B, Y)``, what the fused vector alone says, without evidence; None from
            baselines.
        evidence: ``(B, M, Y)``, what each modality adds to the prior on its own; None without a
            ``ModalityEvidence``.
    """

    logits: Tensor
    fused: Tensor
    tokens: Tensor
    synthesised: Tensor | None
    completed: Tensor
    context: Tensor | None
    reference: Tensor | None
    aligned: Tensor
    present: Tensor
    visible: Tensor
    neighbour_weights: Tensor | None
    neighbour_ids: Tensor | None
    losses: dict[str, Tensor]
    loss: Tensor | None
    fused_logits: Tensor | None = None
    evidence: Tensor | None = None


class Head(nn.Module):
    """Normalise, drop out, project: the default head.

    Args:
        dim: Width of the fused vector, ``D``.
        num_classes: Outputs, ``Y``.
        dropout: Dropout before the projection.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``fused``: ``(B, D)``; result: ``(B, Y)``

    Example:
        >>> tuple(Head(4, num_classes=3)(torch.ones(2, 4)).shape)
        (2, 3)
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def forward(self, fused: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classify(self.dropout(self.norm(fused)))
        return logits
