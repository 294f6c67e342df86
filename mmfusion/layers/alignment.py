"""Reference-guided alignment: one semantic reference per sample, and every modality drawn to it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.layers.attention import PresenceAttention
from mmfusion.layers.reset import reset_children
from mmfusion.layers.tokens import per_sample
from mmfusion.presence import check_table

__all__ = ["ReferenceAlignment"]


class ReferenceAlignment(nn.Module):
    """Build this sample's semantic reference, then let every modality attend to it.

    The context tokens read the completed modalities and become the reference; the modalities'
    tokens then read the reference. Synthesised modalities count like observed ones: pass
    ``present`` only to leave modalities out (they are not read, and come out as zeros).

    Args:
        dim: Width of a token, ``D``.
        num_heads: Attention heads, ``H``; divides ``dim``.
        dropout: Dropout on both residual branches.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``completed``, ``aligned``: ``(B, M, L, D)``
        - ``context``: ``(C, D)`` or ``(B, C, D)``; ``reference``: ``(B, C, D)``
        - ``present``: ``(B, M)``, True = take part; None is everything

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, or ``context`` or ``present`` has
            another shape.

    Example:
        >>> align = ReferenceAlignment(8, num_heads=2)
        >>> aligned, reference = align(torch.ones(2, 3, 1, 8), torch.ones(5, 8))
        >>> tuple(aligned.shape), tuple(reference.shape)
        ((2, 3, 1, 8), (2, 5, 8))

    References:
        Context-guided alignment: arXiv 2605.25968. Norms and feed-forward parts are our design.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_tokens = nn.LayerNorm(dim, **kind)
        self.norm_context = nn.LayerNorm(dim, **kind)
        self.norm_reference = nn.LayerNorm(dim, **kind)
        self.gather = PresenceAttention(dim, num_heads, **kind)
        self.guide = PresenceAttention(dim, num_heads, **kind)
        self.norm_hidden = nn.LayerNorm(dim, **kind)
        self.expand = nn.Linear(dim, 2 * dim, **kind)
        self.contract = nn.Linear(2 * dim, dim, **kind)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def forward(
        self, completed: Tensor, context: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Aligned tokens, and the reference they were aligned to."""
        x, tokens, context, present = self._prepare(completed, context, present)
        lengths = (completed.shape[2],) * completed.shape[1]
        read = self.gather(self.norm_context(context), tokens, present, lengths=lengths)
        reference = context + self.dropout(read)  # (B, C, D)
        keys = self.norm_reference(reference)
        everything = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        x = x + self.dropout(self.guide(tokens, keys, everything))
        hidden = F.gelu(self.expand(self.norm_hidden(x)))
        x = x + self.dropout(self.contract(self.dropout(hidden)))
        aligned = torch.where(present[:, :, None, None], x.reshape(completed.shape), 0)
        return aligned, reference

    def modality_weights(
        self, completed: Tensor, context: Tensor, present: Tensor | None = None
    ) -> Tensor:
        """How much each reference token reads from each modality, ``(B, C, M)``; rows sum to 1."""
        _, tokens, context, present = self._prepare(completed, context, present)
        lengths = (completed.shape[2],) * completed.shape[1]
        return self.gather.modality_weights(self.norm_context(context), tokens, present, lengths)

    def _prepare(
        self, completed: Tensor, context: Tensor, present: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if present is None:
            present = torch.ones(completed.shape[:2], dtype=torch.bool, device=completed.device)
        check_table("present", present, completed.shape[:2])
        x = torch.where(present[:, :, None, None], completed, 0).flatten(1, 2)  # (B, N, D)
        return x, self.norm_tokens(x), per_sample(context, x.shape[0], x.shape[-1]), present
