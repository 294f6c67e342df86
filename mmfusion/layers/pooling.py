"""From the tokens of all modalities to one vector."""

import torch
from torch import Tensor, nn

from mmfusion.functional import presence_attention
from mmfusion.layers.reset import reset_children
from mmfusion.presence import check_table

__all__ = ["ConcatPool", "PresencePool"]


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

    Raises:
        ValueError: If ``tokens`` is not ``D`` wide, or ``present`` not bool ``(B, M)``.

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
        if tokens.ndim != 4 or tokens.shape[-1:] != self.query.shape:
            raise ValueError(
                f"tokens is {tuple(tokens.shape)}: this pool was built for D = {len(self.query)}, "
                "so they are (B, M, L, D). Rebuild it, or reshape them."
            )
        check_table("present", present, tokens.shape[:2])
        clean = torch.where(present[:, :, None, None], tokens, 0)
        keys = self.norm(clean).flatten(1, 2).unsqueeze(2)  # (B, N, 1, D)
        query = self.query.to(keys.dtype).expand(keys.shape[0], 1, 1, -1)
        lengths = (tokens.shape[2],) * tokens.shape[1]
        return presence_attention(query, keys, keys, present, lengths=lengths)[:, 0, 0]


class ConcatPool(nn.Module):
    """Put the modalities side by side and project: each has weights of its own in the result.

    Tokens are averaged per modality; one that is not present counts as zeros and gets zero
    gradient. Unlike ``PresencePool`` it knows which modality says what, and is tied to their number
    and order; with nothing present it gives its bias. Nothing is normalised: an unsure guess lies
    near the mean, is short therefore, and has less of a say.

    Args:
        num_modalities: How many modalities, ``M``.
        dim: Width of a token and of the result, ``D``.
        dropout: Dropout before the projection.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``tokens``: ``(B, M, L, D)``
        - ``present``: ``(B, M)``, True = counts
        - result: ``(B, D)``

    Raises:
        ValueError: If the tensors do not have ``M`` modalities of width ``D``.

    Example:
        The first modality votes for, the second against; an absent one has no vote.

        >>> pool = ConcatPool(2, dim=2)
        >>> with torch.no_grad():
        ...     _ = pool.project.weight.copy_(torch.cat([torch.eye(2), -torch.eye(2)], 1))
        ...     _ = pool.project.bias.zero_()
        >>> tokens = torch.tensor([[[[1.0, -1.0]], [[1.0, -1.0]]]])
        >>> pool(tokens, torch.tensor([[True, True]])).tolist()
        [[0.0, 0.0]]
        >>> pool(tokens, torch.tensor([[True, False]])).tolist()
        [[1.0, -1.0]]

    References:
        Our design.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(num_modalities * dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """One vector per sample."""
        sizes = tokens.shape[1] * tokens.shape[-1]
        if tokens.ndim != 4 or sizes != self.project.in_features:
            raise ValueError(
                f"tokens is {tuple(tokens.shape)}: this pool was built for M * D = "
                f"{self.project.in_features}, so they are (B, M, L, D). Rebuild it, or reshape "
                "them."
            )
        check_table("present", present, tokens.shape[:2])
        pooled = torch.where(present[:, :, None, None], tokens, 0).mean(2)
        fused: Tensor = self.project(self.dropout(pooled.flatten(1)))  # (B, D)
        return fused
