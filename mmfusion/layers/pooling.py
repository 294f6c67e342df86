"""From the tokens of all modalities to one vector."""

import torch
from torch import Tensor, nn

from mmfusion.functional import presence_attention
from mmfusion.layers.reset import reset_children

__all__ = ["PresencePool"]


class PresencePool(nn.Module):
    """Pool the tokens of present modalities with one learned query; nothing present gives zeros.

    Tokens are normalised first. The query starts at zero, which is the plain mean.

    Args:
        dim: Width of a token, ``D``.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``tokens``: ``(B, M, L, D)``
        - ``present``: ``(B, M)``, True = counts
        - result: ``(B, D)``

    Example:
        >>> pool = PresencePool(2)
        >>> tokens = torch.tensor([[[[1.0, -1.0]], [[float("nan"), 0.0]]]])
        >>> pool(tokens, torch.tensor([[True, False]])).round().tolist()
        [[1.0, -1.0]]
        >>> pool(tokens, torch.tensor([[False, False]])).tolist()
        [[0.0, 0.0]]

    References:
        Attention pooling: Lee et al., "Set Transformer", ICML 2019 (one seed vector). The presence
        contract is our design.
    """

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.query = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.zeros_(self.query)

    def reset_parameters(self) -> None:
        """Back to the plain mean."""
        reset_children(self)
        self._reset_own()

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """One vector per sample."""
        clean = torch.where(present[:, :, None, None], tokens, 0)
        keys = self.norm(clean).flatten(1, 2).unsqueeze(2)  # (B, N, 1, D)
        query = self.query.to(keys.dtype).expand(keys.shape[0], 1, 1, -1)
        lengths = (tokens.shape[2],) * tokens.shape[1]
        return presence_attention(query, keys, keys, present, lengths=lengths)[:, 0, 0]
