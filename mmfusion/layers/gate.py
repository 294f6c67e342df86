"""How much of a memory's readout is let in."""

import torch
from torch import Tensor, nn

from mmfusion.layers.reset import reset_children

__all__ = ["ReadoutGate"]


class ReadoutGate(nn.Module):
    """Add a memory's readout to the query, as much as a learned gate lets through.

    Args:
        dim: Width of a vector, ``D``.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``query``, ``readout``, result: ``(B, M, D)`` or ``(B, M, L, D)``; ``present``: ``(B, M)``

    Example:
        >>> gate = ReadoutGate(2)
        >>> query = torch.ones(1, 2, 2)
        >>> out = gate(query, query, torch.tensor([[True, False]]))
        >>> out[0, 0].tolist(), bool((out[0, 1] > 1).all())
        ([1.0, 1.0], True)

    References:
        Our design. The gate starts nearly closed (0.12), so that early, random memories do little.
    """

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.openness = nn.Linear(2 * dim, dim, device=device, dtype=dtype)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.constant_(self.openness.bias, -2.0)

    def reset_parameters(self) -> None:
        """Draw the weights anew, nearly closed."""
        reset_children(self)
        self._reset_own()

    def forward(self, query: Tensor, readout: Tensor, present: Tensor) -> Tensor:
        """``query`` plus the gated readout where absent, ``query`` itself where present."""
        absent = ~present.reshape(*present.shape, *[1] * (query.ndim - 2))
        clean = torch.where(absent, query, 0)
        opening = self.openness(torch.cat([clean, readout.to(clean.dtype)], dim=-1)).sigmoid()
        return torch.where(absent, clean + opening * readout, query)
