"""A bank fills what is absent, and routed experts read the result."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import (
    AbsentTokens,
    ConcatPool,
    FusionOutput,
    Head,
    ModalityEncoders,
    PresenceAttention,
)
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target
from mmfusion.ranks import gather_rows
from mmfusion.reference import wide_type

__all__ = ["ExpertBank"]


class ExpertBank(nn.Module):
    """Fill absent modalities from a learned bank, and let routed experts read all tokens.

    The bank's entry is a learned token plus a vector for the pattern of visible modalities, which
    is a mean over them: ``O(M)`` parameters for all ``2^M - 1`` patterns. After self-attention each
    token goes to its ``num_active`` likeliest experts; all of them are computed, so shapes are
    static and no kernel is needed. Arguments without a line here are those of ``CMML``.

    Args:
        num_experts: Experts, two-layer perceptrons.
        num_active: Experts that a token is sent to.
        balance_weight: Weight of the load-balancing loss.

    Shape:
        As ``CMML``; ``aligned`` of the result holds the experts' tokens.

    Raises:
        ValueError: If ``num_active`` is not in ``1..num_experts``, or on what ``CMML`` refuses.

    Example:
        What the bank lends depends on what else was observed.

        >>> model = ExpertBank({"a": 2, "b": 2, "c": 2}, num_classes=2, dim=16)
        >>> present = torch.tensor([[True, False, False], [True, True, False]])
        >>> out = model({name: torch.ones(2, 2) for name in "abc"}, present)
        >>> torch.equal(out.completed[0, 2], out.completed[1, 2])
        False

    References:
        Yun et al., "Flex-MoE", NeurIPS 2024, arXiv 2410.08245. It has a bank entry per pattern and
        modality (``(2^M - 1) M`` of them), sends the tokens of each pattern also to an expert of
        its own, starts training with complete samples, and has 16 experts, of which 4 are active.
        Balance: Fedus et al., "Switch Transformers", JMLR 2022, equation 4.
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
        num_experts: int = 4,
        num_active: int = 2,
        balance_weight: float = 0.01,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        if not 1 <= num_active <= num_experts:
            raise ValueError(
                f"num_active={num_active} with num_experts={num_experts}: a token goes to 1 to "
                "num_experts of them. Lower num_active or raise num_experts."
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {"task": 1.0, "balance": balance_weight}
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        self.bank = AbsentTokens(len(self.names), num_tokens, dim, **kind)
        self.pattern = nn.Linear(len(self.names), dim, bias=False, **kind)
        self.norm = nn.LayerNorm(dim, **kind)
        self.attention = PresenceAttention(dim, num_heads, **kind)
        self.experts = _Experts(dim, num_experts, num_active, **kind)
        self.dropout = nn.Dropout(dropout)
        self.fuse = ConcatPool(len(self.names), dim, dropout=dropout, **kind)
        self.head = Head(dim, num_classes, dropout=dropout, **kind) if head is None else head

    def reset_parameters(self) -> None:
        """Draw all parameters anew, encoders and head included."""
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
        rows, everything = visible[:, :, None, None], torch.ones_like(visible)
        share = visible / visible.sum(1, keepdim=True).clamp(min=1)
        clue = self.pattern(share.to(self.pattern.weight.dtype))[:, None, None]
        completed = torch.where(rows, tokens, self.bank(tokens, visible) + clue)
        x = completed.flatten(1, 2)  # (B, N, D)
        h = self.norm(x)
        lengths = (tokens.shape[2],) * tokens.shape[1]
        x = x + self.dropout(self.attention(h, h, everything, lengths=lengths))
        mixed, probability, chosen = self.experts(x)
        aligned = (x + self.dropout(mixed)).reshape(tokens.shape)
        fused = F.gelu(self.fuse(aligned, everything))
        out = fusion_output(
            self.head(fused),
            fused,
            tokens,
            completed,
            present,
            visible,
            aligned=aligned,
        )
        if labels is None:
            return out
        return with_losses(self, out, labels, balance=_balance(probability, chosen, self.training))


class _Experts(nn.Module):
    """Norm, router, and the mix of each token's likeliest experts."""

    def __init__(self, dim: int, num_experts: int, num_active: int, **kind: Any) -> None:
        super().__init__()
        self.num_active = num_active
        self.norm = nn.LayerNorm(dim, **kind)
        self.router = nn.Linear(dim, num_experts, **kind)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, 2 * dim, **kind), nn.GELU(), nn.Linear(2 * dim, dim, **kind)
            )
            for _ in range(num_experts)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(tokens)
        scores = self.router(h)
        probability = scores.to(wide_type(scores)).softmax(-1)  # (B, N, experts)
        best = probability.topk(self.num_active).indices
        chosen = torch.zeros_like(probability).scatter(-1, best, 1.0)
        gate = probability * chosen
        gate = gate / gate.sum(-1, keepdim=True)
        answers = torch.stack([expert(h) for expert in self.experts], -1)  # (B, N, D, experts)
        return (answers * gate.unsqueeze(-2).to(answers.dtype)).sum(-1), probability, chosen


def _balance(probability: Tensor, chosen: Tensor, gather: bool) -> Tensor:
    """Mean probability times share of tokens, summed over experts; 1 where both are even.

    Both means are over the joint batch. What all ranks send to a gathered row is summed, and DDP
    takes the mean: the gradient is that of one process.
    """
    probability, chosen = probability.mean(1), chosen.mean(1)  # (B, experts)
    chosen = chosen / chosen.sum(1, keepdim=True)
    real = torch.ones_like(probability[:, 0], dtype=torch.bool)
    if gather:
        (probability, chosen), real = gather_rows(probability, chosen)
    likely, sent = (torch.where(real[:, None], x, 0).sum(0) for x in (probability, chosen))
    return len(likely) * (likely * sent).sum() / real.sum().clamp(min=1) ** 2
