"""A Transformer that attends to what is present."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import ContextTokens, FusionOutput, Head, ModalityEncoders, PresenceAttention
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target

__all__ = ["MaskedTransformer"]


class MaskedTransformer(nn.Module):
    """Read the visible modalities' tokens with a Transformer, and classify its class token.

    Arguments without a line here are those of ``CMML``. Nothing stands in for an absent modality:
    attention does not see it. With nothing observed the class token reads itself alone.

    Args:
        num_blocks: Pre-norm Transformer blocks.

    Shape:
        As ``CMML``; ``aligned`` of the result holds the tokens after the last block.

    Raises:
        ValueError: If ``num_blocks`` is below 1, or on what ``CMML`` refuses.

    Example:
        >>> model = MaskedTransformer({"a": 8, "b": 3}, num_classes=2, dim=16).eval()
        >>> garbage = torch.full((4, 3), 1e9)
        >>> out = model({"a": torch.ones(4, 8), "b": garbage}, torch.tensor([[True, False]] * 4))
        >>> torch.equal(out.logits, model({"a": torch.ones(4, 8)}).logits)
        True

    References:
        Zhang et al., "mmFormer", MICCAI 2022, arXiv 2206.02425: it zeroes absent features and
        attends to them; here they are masked. No convolutional decoders and no auxiliary ones.
        Blocks: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020.
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
        num_blocks: int = 3,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: there is at least one. Use 1 or more.")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {"task": 1.0}
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        self.class_token = ContextTokens(1, dim, **kind)
        self.blocks = nn.ModuleList(
            _Block(dim, num_heads, dropout=dropout, **kind) for _ in range(num_blocks)
        )
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
        completed = torch.where(visible[:, :, None, None], tokens, 0)
        x = torch.cat(
            [self.class_token(tokens.shape[0]), completed.flatten(1, 2)], dim=1
        )  # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x, visible)
        fused, read = x[:, 0], x[:, 1:].reshape(tokens.shape)
        out = fusion_output(
            self.head(fused),
            fused,
            tokens,
            completed,
            present,
            visible,
            aligned=torch.where(visible[:, :, None, None], read, 0),
        )
        return with_losses(self, out, labels)


class _Block(nn.Module):
    """Attend, then feed forward; norms before, residuals around."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float, **kind: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **kind)
        self.attention = PresenceAttention(dim, num_heads, **kind)
        self.norm_hidden = nn.LayerNorm(dim, **kind)
        self.expand = nn.Linear(dim, 2 * dim, **kind)
        self.contract = nn.Linear(2 * dim, dim, **kind)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """``x`` is one class token, then the tokens of each modality."""
        lengths = ((x.shape[1] - 1) // visible.shape[1],) * visible.shape[1]
        h = self.norm(x)
        x = x + self.dropout(self.attention(h, h, visible, lengths=lengths, num_context=1))
        hidden = F.gelu(self.expand(self.norm_hidden(x)))
        return x + self.dropout(self.contract(self.dropout(hidden)))
