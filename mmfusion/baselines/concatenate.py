"""Modality vectors side by side, through one hidden layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.layers.reset import reset_children

__all__ = ["Concatenate"]


class Concatenate(nn.Module):
    """From the tokens of all modalities to one vector: mean over tokens, drop out, mix.

    Shape:
        - tokens: ``(B, M, L, D)``; result: ``(B, D)``
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        dropout: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(num_modalities * dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """One vector per sample."""
        return F.gelu(self.mix(self.dropout(tokens.mean(2).flatten(1))))
