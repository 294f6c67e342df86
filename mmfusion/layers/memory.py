"""The memory that lends what was observed elsewhere to a modality that is absent here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfusion.functional import check_backend, check_temperature, retrieve
from mmfusion.layers.gate import ReadoutGate
from mmfusion.layers.reset import reset_children
from mmfusion.layers.uncast import uncast
from mmfusion.presence import may_look
from mmfusion.ranks import gather_rows

__all__ = ["MemoryBank", "MemoryReadout", "check_ids", "check_query"]


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
    (and the gate) alone. No sample reads a slot with its own id: pass ``sample_ids`` wherever rows
    that were written are read again, in evaluation of the training set too. Where a process group
    exists, a write takes in the rows of all ranks, so that every rank holds the same bank. When
    weights are averaged (EMA), copy the buffers: a mean of two banks is neither.

    Args:
        num_modalities: How many modalities, ``M``.
        num_slots: Vectors kept per modality, ``S``; a full ring overwrites its oldest. With more
            slots than samples per epoch it also keeps what the same samples were epochs ago.
        dim: Width of a vector, ``D``.
        num_neighbours: Vectors mixed into a readout, ``K``; fewer while fewer are held.
        temperature: Softmax temperature over the cosine similarities.
        num_labels: Width of a label row: 1 for a class number or one target, else ``Y``.
        sync: ``"gather"`` exchanges rows over ranks in ``write``; ``"local"`` keeps a bank per
            rank, and needs DDP's ``broadcast_buffers=False``, which else copies rank 0's.
        check_values: Refuse observed NaN and Inf, and ids below -1, in ``write``. It waits for a
            GPU.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, as in ``functional.retrieve``.
        device: Where the slots live.
        dtype: Type of the slots; what is written is cast to it. Labels are float32, whatever the
            bank is cast to.

    Shape:
        - ``vectors``: ``(B, M, D)``; ``query``, readout: ``(B, M, D)`` or ``(B, M, L, D)``
        - ``present``: ``(B, M)``, True where the modality was observed
        - ``sample_ids``: ``(B,)``, int64, -1 is none; ``labels``: ``(B,)`` or ``(B, Y)``

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
        check_temperature(temperature)
        check_backend(backend)
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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        labels = self.labels
        super()._apply(fn, recurse)
        self.labels = uncast(labels, self.labels)
        return self

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
        if self.check_values and may_look(vectors):
            _check_values(vectors.to(self.slots.dtype), present, sample_ids)
        if sample_ids is None:
            sample_ids = torch.full_like(present[:, 0], -1, dtype=torch.int64)
        if labels is None:
            labels = vectors.new_full((vectors.shape[0], num_labels), torch.nan)
        labels = labels.reshape(-1, num_labels).to(self.labels.dtype)
        if self.sync == "gather":
            rows, real = gather_rows(vectors, present, sample_ids, labels)
            vectors, present, sample_ids, labels = rows
            present = present & real.unsqueeze(-1)
        self._store(vectors.to(self.slots.dtype), present, sample_ids, labels)

    def _store(self, vectors: Tensor, present: Tensor, sample_ids: Tensor, labels: Tensor) -> None:
        """Static shapes: observed rows first, the others write back what their slot held."""
        batch_size, num_slots = vectors.shape[0], self.slots.shape[1]
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
        check_query(query, present, sample_ids, self.slots)
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


def _check_width(name: str, tensor: Tensor, slots: Tensor) -> None:
    sizes = (slots.shape[0], slots.shape[2])
    if tensor.ndim < 3 or (tensor.shape[1], tensor.shape[-1]) != sizes:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}: this memory holds M={sizes[0]} modalities of width "
            f"D={sizes[1]}, so it is (B, M, D) or (B, M, L, D). Reshape it, or rebuild the memory."
        )


def check_query(
    query: Tensor, present: Tensor | None, sample_ids: Tensor | None, slots: Tensor
) -> None:
    """Refuse a query, presence or ids that do not fit a memory.

    Raises:
        ValueError: If one of them has another shape or type.

    Example:
        >>> check_query(torch.ones(1, 2, 3), None, None, torch.ones(2, 4, 3))
    """
    _check_width("query", query, slots)
    if present is not None and (present.dtype != torch.bool or present.shape != query.shape[:2]):
        raise ValueError(
            f"present is {tuple(present.shape)} {present.dtype}: it is bool (B, M) = "
            f"{tuple(query.shape[:2])}, and what is present is not looked up. Convert it with "
            "present.bool(), or pass None to look up everything."
        )
    check_ids(sample_ids, query.shape[0])


def check_ids(sample_ids: Tensor | None, batch_size: int) -> None:
    """Refuse ids that are not one int64 number per sample.

    Raises:
        ValueError: If they have another shape or type.

    Example:
        >>> check_ids(torch.tensor([7, 8]), batch_size=2)
    """
    if sample_ids is not None and (
        sample_ids.dtype != torch.int64 or sample_ids.shape != (batch_size,)
    ):
        raise ValueError(
            f"sample_ids is {tuple(sample_ids.shape)} {sample_ids.dtype}: it is int64 (B,) = "
            f"({batch_size},). Number the samples of the data set."
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
    check_ids(sample_ids, vectors.shape[0])
    shapes = [(len(vectors), num_labels)] + [(len(vectors),)] * (num_labels == 1)
    if labels is not None and labels.shape not in shapes:
        raise ValueError(
            f"labels is {tuple(labels.shape)} for {len(vectors)} rows: this bank keeps num_labels="
            f"{num_labels} per row. Build it with num_labels=Y for labels (B, Y)."
        )


def _check_values(vectors: Tensor, present: Tensor, sample_ids: Tensor | None) -> None:
    if sample_ids is not None and bool((sample_ids < -1).any()):
        raise ValueError(
            f"sample_ids hold {sample_ids.min().item()}: ids count from 0, -1 is none, and another "
            "negative one would match no query. Number the samples, or pass None."
        )
    bad = present & ~vectors.isfinite().all(-1)
    if bool(bad.any()):
        row, modality = bad.nonzero()[0].tolist()
        raise ValueError(
            f"vectors[{row}, {modality}] is observed but holds NaN or Inf as {vectors.dtype}: "
            "what is remembered is finite. Mark it absent, or find the encoder that made it."
        )
