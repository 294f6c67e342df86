"""Memories that lend what was observed elsewhere to a modality that is absent here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfusion.functional import retrieve
from mmfusion.layers.reset import reset_children
from mmfusion.ranks import gather_rows

__all__ = ["MemoryBank", "MemoryReadout", "PrototypeMemory", "ReadoutGate"]


class MemoryReadout(NamedTuple):
    """What one lookup found; leading axes as those of the query.

    Attributes:
        readout: ``(..., D)``, the weighted mix; zeros where nothing was read.
        weights: ``(..., K)`` fp32, best first; they sum to 1, or are all 0.
        ids: ``(..., K)`` int64, the sample each neighbour came from; -1 where none.
    """

    readout: Tensor
    weights: Tensor
    ids: Tensor


class MemoryBank(nn.Module):
    """Remember vectors that were really observed, and lend the most similar ones.

    One ring of ``num_slots`` vectors per modality, filled only by ``write``, and only in training:
    in ``eval()`` the bank is frozen. Stored vectors carry no gradient; a read sends it to ``query``
    (and the gate) alone. No sample reads a slot with its own id. Where a process group exists, a
    write takes in the rows of all ranks, so that every rank holds the same bank.

    Args:
        num_modalities: How many modalities, ``M``.
        num_slots: Vectors kept per modality, ``S``; a full ring overwrites its oldest.
        dim: Width of a vector, ``D``.
        num_neighbours: Vectors mixed into a readout, ``K``; fewer while fewer are held.
        temperature: Softmax temperature over the cosine similarities.
        num_labels: Width of a label row: 1 for a class number or one target, else ``Y``.
        sync: ``"gather"`` exchanges rows over ranks in ``write``; ``"local"`` keeps a bank per
            rank.
        check_values: Refuse observed NaN and Inf in ``write``. It waits for a GPU.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, as in ``functional.retrieve``.
        device: Where the slots live.
        dtype: Type of the slots; what is written is cast to it.

    Shape:
        - ``vectors``: ``(B, M, D)``; ``query``, readout: ``(B, M, D)`` or ``(B, M, L, D)``
        - ``present``: ``(B, M)``, True where the modality was observed
        - ``sample_ids``: ``(B,)``, int64, not negative; ``labels``: ``(B,)`` or ``(B, Y)``

    Raises:
        ValueError: If ``num_neighbours`` is not in ``1..num_slots``, or a tensor is not ``D`` wide.

    Example:
        The second modality is absent: its NaN never enters, and its empty ring reads as zero.

        >>> bank = MemoryBank(2, num_slots=4, dim=2, num_neighbours=1)
        >>> vectors = torch.tensor([[[3.0, 4.0], [float("nan"), 0.0]]])
        >>> bank.write(vectors, torch.tensor([[True, False]]), sample_ids=torch.tensor([7]))
        >>> bank.held.tolist()
        [1, 0]
        >>> bank.read(torch.ones(1, 2, 2), sample_ids=torch.tensor([8])).tolist()
        [[[3.0, 4.0], [0.0, 0.0]]]

    References:
        Modality-specific memory: arXiv 2605.25968. Ring, ids and the gate are our design; a queue
        as
        dictionary: He et al., "Momentum Contrast", CVPR 2020.
    """

    def __init__(
        self,
        num_modalities: int,
        num_slots: int,
        dim: int,
        num_neighbours: int = 8,
        *,
        temperature: float = 0.1,
        num_labels: int = 1,
        sync: str = "gather",
        check_values: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_neighbours <= num_slots:
            raise ValueError(
                f"num_neighbours={num_neighbours} with num_slots={num_slots}: a readout mixes "
                "between 1 and num_slots vectors. Lower num_neighbours or raise num_slots."
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: it divides scores. Use a number above 0.")
        if sync not in ("gather", "local"):
            raise ValueError(
                f"sync={sync!r}: a bank is shared by 'gather' or kept 'local'. Choose one."
            )
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        self.sync = sync
        self.check_values = check_values
        self.backend = backend
        sizes = (num_modalities, num_slots)
        counts: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.register_buffer("slots", torch.empty(*sizes, dim, device=device, dtype=dtype))
        self.register_buffer("ids", torch.empty(sizes, **counts))
        self.register_buffer(
            "labels", torch.empty(*sizes, num_labels, device=device, dtype=torch.float32)
        )
        self.register_buffer("held", torch.empty(num_modalities, **counts))
        self.register_buffer("cursor", torch.empty(num_modalities, **counts))
        self.gate = ReadoutGate(dim, device=device, dtype=dtype)
        self.reset()

    slots: Tensor
    ids: Tensor
    labels: Tensor
    held: Tensor
    cursor: Tensor

    def reset(self) -> None:
        """Forget everything; the gate stays as it is."""
        self.slots.zero_()
        self.ids.fill_(-1)
        self.labels.fill_(torch.nan)
        self.held.zero_()
        self.cursor.zero_()

    def reset_parameters(self) -> None:
        """Forget everything, and draw the gate anew."""
        reset_children(self)
        self.reset()

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        sizes = "num_modalities={}, num_slots={}, dim={}".format(*self.slots.shape)
        return f"{sizes}, num_neighbours={self.num_neighbours}, temperature={self.temperature}"

    @torch.no_grad()
    def write(
        self,
        vectors: Tensor,
        present: Tensor,
        sample_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Keep the observed vectors, overwriting the oldest; in ``eval()`` nothing is kept.

        Ids let a sample never retrieve itself; without them a row matches no query. Labels go along
        for inspection. Costs one pass over the rows written, never over the bank.
        """
        if not self.training:
            return
        num_labels = self.labels.shape[-1]
        _check_rows(vectors, present, self.slots, sample_ids, labels, num_labels)
        if self.check_values and not torch.compiler.is_compiling():
            _check_finite(vectors, present)
        if sample_ids is None:
            sample_ids = torch.full_like(present[:, 0], -1, dtype=torch.int64)
        if labels is None:
            labels = vectors.new_full((len(vectors), num_labels), torch.nan)
        labels = labels.reshape(-1, num_labels).to(self.labels.dtype)
        if self.sync == "gather":
            rows, real = gather_rows(vectors, present, sample_ids, labels)
            vectors, present, sample_ids, labels = rows
            present = present & real.unsqueeze(-1)
        self._store(vectors.to(self.slots.dtype), present, sample_ids, labels)

    def _store(self, vectors: Tensor, present: Tensor, sample_ids: Tensor, labels: Tensor) -> None:
        """Static shapes: observed rows first, the others write back what their slot held."""
        batch_size, num_slots = len(vectors), self.slots.shape[1]
        order = present.mT.int().argsort(dim=1, descending=True, stable=True)  # (M, B)
        count = present.sum(0)  # (M,)
        width = min(batch_size, num_slots)
        first = (count - width).clamp(min=0)  # of more rows than slots only the last survive
        rank = first.unsqueeze(1) + torch.arange(width, device=count.device)  # (M, W)
        row = order.gather(1, rank)
        slot = (self.cursor.unsqueeze(1) + rank) % num_slots  # distinct within a modality
        new = rank < count.unsqueeze(1)
        modality = torch.arange(len(count), device=count.device).unsqueeze(1).expand_as(row)
        place = (modality, slot)
        kept = torch.where(new.unsqueeze(-1), vectors[row, modality], self.slots[place])
        self.slots.index_put_(place, kept)
        self.ids.index_put_(place, torch.where(new, sample_ids[row], self.ids[place]))
        kept = torch.where(new.unsqueeze(-1), labels[row], self.labels[place])
        self.labels.index_put_(place, kept)
        self.cursor.copy_((self.cursor + count) % num_slots)
        self.held.copy_((self.held + count).clamp(max=num_slots))

    def lookup(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> MemoryReadout:
        """Read the nearest held vectors for each absent modality (for all without ``present``)."""
        _check_width("query", query, self.slots)
        readout, weights, indices = retrieve(
            query,
            self.slots,
            k=self.num_neighbours,
            temperature=self.temperature,
            held=self.held,
            exclude=None if sample_ids is None else (sample_ids, self.ids),
            wanted=None if present is None else ~present,
            backend=self.backend,
        )
        per_modality = self.ids.reshape(1, len(self.ids), *[1] * (indices.ndim - 3), -1)
        ids = per_modality.expand(*indices.shape[:-1], -1).gather(-1, indices.clamp(min=0))
        return MemoryReadout(readout, weights, torch.where(indices >= 0, ids, -1))

    def read(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> Tensor:
        """The readout alone: zero where nothing is held or the modality is present."""
        return self.lookup(query, present, sample_ids).readout

    def neighbours(
        self, query: Tensor, present: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights and sample ids of what ``read`` mixes, best first; id -1 where there is none."""
        return self.lookup(query, present, sample_ids)[1:]

    def forward(self, query: Tensor, present: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """``query`` enriched where absent, untouched where present."""
        return self.gate(query, self.read(query, present, sample_ids), present)


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
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: it divides scores. Use a number above 0.")
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
        _check_width("query", query, self.slots)
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


def _check_width(name: str, tensor: Tensor, slots: Tensor) -> None:
    sizes = (slots.shape[0], slots.shape[2])
    if tensor.ndim < 3 or (tensor.shape[1], tensor.shape[-1]) != sizes:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}: this memory holds M={sizes[0]} modalities of width "
            f"D={sizes[1]}, so it is (B, M, D) or (B, M, L, D). Reshape it, or rebuild the memory."
        )


def _check_rows(
    vectors: Tensor,
    present: Tensor,
    slots: Tensor,
    sample_ids: Tensor | None,
    labels: Tensor | None,
    num_labels: int,
) -> None:
    _check_width("vectors", vectors, slots)
    if vectors.ndim != 3 or present.dtype != torch.bool or present.shape != vectors.shape[:2]:
        raise ValueError(
            f"vectors is {tuple(vectors.shape)} and present {tuple(present.shape)} "
            f"{present.dtype}: one vector (B, M, D) and one bool (B, M) per modality. Pool tokens "
            "first."
        )
    if sample_ids is not None and (
        sample_ids.dtype != torch.int64 or sample_ids.shape != vectors.shape[:1]
    ):
        raise ValueError(
            f"sample_ids is {tuple(sample_ids.shape)} {sample_ids.dtype}: it is int64 (B,) = "
            f"({len(vectors)},). Number the samples of the data set."
        )
    if labels is not None and labels.numel() != len(vectors) * num_labels:
        raise ValueError(
            f"labels is {tuple(labels.shape)} for {len(vectors)} rows: this bank keeps num_labels="
            f"{num_labels} per row. Build it with num_labels=Y for labels (B, Y)."
        )


def _check_finite(vectors: Tensor, present: Tensor) -> None:
    bad = present & ~vectors.isfinite().all(-1)
    if bool(bad.any()):
        row, modality = bad.nonzero()[0].tolist()
        raise ValueError(
            f"vectors[{row}, {modality}] is observed but holds NaN or Inf: what is remembered is "
            "finite. Mark it absent, or find the encoder that made it."
        )
