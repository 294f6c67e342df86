"""The nearest remembered sample stands in for what is absent."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.functional import retrieve
from mmfusion.layers import ConcatPool, FusionOutput, Head, MemoryBank, ModalityEncoders
from mmfusion.layers.encoders import observe
from mmfusion.layers.memory import check_query
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target

__all__ = ["RetrieveAndFill"]


class RetrieveAndFill(nn.Module):
    """Fill an absent modality with the tokens of the nearest training sample that has it.

    Nearest by cosine between the tokens of all modalities side by side, zeros where one is not
    visible. A training step with ``sample_ids`` reads first, then remembers what was observed; in
    ``eval()`` nothing is written, and no sample retrieves itself. What is retrieved carries no
    gradient. With nothing observed, or nothing remembered, the filling is zeros. The memory is a
    ``MemoryBank`` of whole samples, with what each of them has as its labels. Arguments without a
    line here are those of ``CMML``.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.
        num_slots: Samples remembered.

    Shape:
        As ``CMML``; one neighbour per modality, ``K = 1``.

    Raises:
        ValueError: If ``num_slots`` is below 1, or on what ``CMML`` refuses.

    Example:
        >>> model = RetrieveAndFill({"a": 4, "b": 4}, num_classes=2, dim=16)
        >>> a, b = torch.eye(4), torch.randn(4, 4)
        >>> seen = model({"a": a, "b": b}, sample_ids=torch.arange(4))  # training
        >>> out = model.eval()({"a": a[2:3]})
        >>> out.neighbour_ids[0, 1, 0].item(), torch.equal(out.completed[0, 1], seen.tokens[2, 1])
        (2, True)

    References:
        Hot-deck imputation (Andridge and Little, "A Review of Hot Deck Imputation for Survey
        Non-response", 2010), of tokens; retrieval of peers that have the modality: Lang et al.,
        "RAGPT", AAAI 2025, arXiv 2501.01120, which retrieves by pretrained features and learns to
        generate from what it found.
    """

    def __init__(
        self,
        modalities: Mapping[str, int | tuple[nn.Module, int]],
        *,
        num_classes: int,
        target: str = "multiclass",
        dim: int = 128,
        num_tokens: int = 4,
        num_heads: int = 4,
        dropout: float = 0.1,
        head: nn.Module | None = None,
        num_slots: int = 512,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {"task": 1.0}
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        width = len(self.names) * num_tokens * dim
        memory = MemoryBank(
            1,
            num_slots,
            width,
            num_neighbours=1,
            num_labels=len(self.names),  # what each remembered sample has
            check_values=check_values,
            device="meta",
            dtype=dtype,
        )
        memory.gate = None  # type: ignore[assignment]  # what is found is taken as it is
        self.memory = memory.to_empty(
            device=torch.get_default_device() if device is None else device
        )
        self.memory.reset()
        self.fuse = ConcatPool(len(self.names), dim, dropout=dropout, **kind)
        self.head = Head(dim, num_classes, dropout=dropout, **kind) if head is None else head

    def reset_parameters(self) -> None:
        """Draw all parameters anew, encoders and head included; forget memory."""
        reset_children(self)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"target={self.target!r}, loss_weights={self.loss_weights}"

    def forward(
        self,
        inputs: Mapping[str, Any],
        present: Tensor | None = None,
        visible: Tensor | None = None,
        labels: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> FusionOutput:
        """Classify; losses need ``labels``."""
        tokens, present, visible = observe(self.edge, inputs, present, visible, labels, sample_ids)
        rows = visible[:, :, None, None]
        slots, found = self._nearest(torch.where(rows, tokens, 0), visible, sample_ids)
        remembered = self.memory.slots[0].unflatten(1, tokens.shape[1:])  # (S, M, L, D)
        modality = torch.arange(len(self.names), device=slots.device)
        guess = torch.where(found[:, :, None, None], remembered[slots, modality], 0)
        ids = torch.where(found, self.memory.ids[0, slots], -1)
        completed = torch.where(rows, tokens, guess)
        fused = F.gelu(self.fuse(completed, torch.ones_like(visible)))
        out = fusion_output(
            self.head(fused),
            fused,
            tokens,
            completed,
            present,
            visible,
            synthesised=guess,
            neighbour_weights=found.float()[:, :, None, None].expand(-1, -1, tokens.shape[2], -1),
            neighbour_ids=ids[:, :, None, None].expand(-1, -1, tokens.shape[2], -1),
        )
        out = with_losses(self, out, labels)
        if self.training and sample_ids is not None:
            some = present.any(1, keepdim=True)
            self.memory.write(tokens.flatten(1).unsqueeze(1), some, sample_ids, present.float())
        return out

    @torch.no_grad()
    def _nearest(
        self, tokens: Tensor, visible: Tensor, sample_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, M) slots of the nearest samples that have each modality, and whether there is one."""
        bank, query = self.memory, tokens.flatten(1).unsqueeze(1)  # (B, 1, M * L * D)
        check_query(query, None, sample_ids, bank.slots)
        has = bank.labels == 1  # (1, S, M)
        _, _, order = retrieve(
            query,
            bank.slots,
            has.to(bank.slots.dtype),  # mixed for nothing, and narrower than the slots
            k=bank.slots.shape[1],
            temperature=bank.temperature,
            held=bank.held,
            exclude=None if sample_ids is None else (sample_ids, bank.ids),
        )
        order = order[:, 0]  # (B, S), nearest first, -1 for what may not be read
        usable = has[0, order.clamp(min=0)] & (order >= 0).unsqueeze(-1)  # (B, S, M)
        slots = order.gather(1, usable.int().argmax(1)).clamp(min=0)
        # who shows nothing has no neighbours
        return slots, usable.any(1) & ~visible & visible.any(1, keepdim=True)
