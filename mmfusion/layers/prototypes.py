"""A learned memory: prototypes instead of stored vectors."""

import torch
from torch import Tensor, nn

from mmfusion.functional import check_backend, check_temperature, retrieve
from mmfusion.layers.gate import ReadoutGate
from mmfusion.layers.memory import MemoryReadout, check_query
from mmfusion.layers.reset import reset_children

__all__ = ["PrototypeMemory"]


class PrototypeMemory(nn.Module):
    """Learned prototypes per modality, read like a bank: the alternative to compare with.

    Nothing is written; gradients reach the prototypes. Every read mixes all of them.

    Args:
        num_modalities: How many modalities, ``M``.
        num_slots: Prototypes per modality, ``S``.
        dim: Width of a prototype, ``D``.
        temperature: Softmax temperature over the cosine similarities.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, as in ``functional.retrieve``.
        device: Where the prototypes live.
        dtype: Type of the prototypes.

    Shape:
        - ``query``, readout: ``(B, M, D)`` or ``(B, M, L, D)``; ``present``: ``(B, M)``

    Raises:
        ValueError: If ``num_slots`` is below 1, or ``query`` is not ``D`` wide.

    Example:
        >>> memory = PrototypeMemory(2, num_slots=4, dim=3)
        >>> readout = memory.read(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
        >>> bool((readout[0, 0] == 0).all()), bool((readout[0, 1] != 0).any())
        (True, True)

    References:
        Weston et al., "Memory Networks", 2015 (soft reads); per modality: our design.
    """

    def __init__(
        self,
        num_modalities: int,
        num_slots: int,
        dim: int,
        *,
        temperature: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_slots < 1:
            raise ValueError(
                f"num_slots={num_slots}: there is at least one prototype. Use 1 or more."
            )
        check_temperature(temperature)
        check_backend(backend)
        self.temperature = temperature
        self.backend = backend
        self.gate = ReadoutGate(dim, device=device, dtype=dtype)
        sizes = (num_modalities, num_slots, dim)
        self.slots = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.slots)

    def reset_parameters(self) -> None:
        """Draw prototypes and gate anew."""
        reset_children(self)
        self._reset_own()

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        sizes = "num_modalities={}, num_slots={}, dim={}".format(*self.slots.shape)
        return f"{sizes}, temperature={self.temperature}"

    def lookup(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> MemoryReadout:
        """Mix all prototypes; the ids are their numbers, in order. ``sample_ids`` play no part."""
        check_query(query, present, None, self.slots)
        wanted = None if present is None else ~present
        return MemoryReadout(
            *retrieve(
                query,
                self.slots,
                k=None,
                temperature=self.temperature,
                wanted=wanted,
                backend=self.backend,
            )
        )

    def read(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> Tensor:
        """The readout alone: like ``query``, zero where the modality is present."""
        return self.lookup(query, present, sample_ids).readout

    def neighbours(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the prototypes."""
        return self.lookup(query, present, sample_ids)[1:]

    def forward(self, query: Tensor, present: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """``query`` enriched where absent, untouched where present."""
        return self.gate(query, self.read(query, present, sample_ids), present)
