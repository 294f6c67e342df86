"""How much of a memory's readout is let in."""

import torch
from torch import Tensor, nn

from mmfusion.layers.reset import reset_children
from mmfusion.presence import check_table

__all__ = ["ReadoutGate"]


class ReadoutGate(nn.Module):
    """Move the query towards a memory's readout, as far as a learned gate lets it.

    It goes a part of the way, channel by channel, and never past the readout: added, a readout
    would raise the amplitude of a guess that points the same way already. A readout of nothing but
    zeros is what a memory gives that holds nothing, and moves nothing.

    Args:
        dim: Width of a vector, ``D``.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``query``, ``readout``, result: ``(B, M, D)`` or ``(B, M, L, D)``; ``present``: ``(B, M)``

    Raises:
        ValueError: If ``present`` is not bool ``(B, M)``.

    Example:
        >>> gate = ReadoutGate(2)
        >>> query, readout = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
        >>> out = gate(query, readout, torch.tensor([[True, False]]))
        >>> out[0, 0].tolist(), bool(((0 < out[0, 1]) & (out[0, 1] < 1)).all())
        ([0.0, 0.0], True)

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
        """Between ``query`` and ``readout`` where absent, ``query`` itself where present."""
        check_table("present", present, query.shape[:2])
        absent = ~present.reshape(*present.shape, *[1] * (query.ndim - 2))
        clean = torch.where(absent, query, 0)
        readout = readout.to(clean.dtype)
        both = torch.cat([clean, readout], dim=-1).to(self.openness.weight.dtype)
        opening = self.openness(both).sigmoid().to(clean.dtype)
        moved = clean + opening * (readout - clean)
        found = readout.ne(0).any(-1, keepdim=True)
        return torch.where(absent & found, moved, query)
