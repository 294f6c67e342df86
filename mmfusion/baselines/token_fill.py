"""A learned token stands in for what is absent."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import AbsentTokens, ConcatPool, FusionOutput, Head, ModalityEncoders
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target

__all__ = ["TokenFill"]


class TokenFill(nn.Module):
    """Put learned tokens where a modality is absent, concatenate, classify.

    Arguments without a line here are those of ``CMML``. The tokens are the same for every sample.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.

    Shape:
        As ``CMML``.

    Raises:
        ValueError: On what ``CMML`` refuses in its inputs and sizes.

    Example:
        >>> model = TokenFill({"photo": 8, "table": 3}, num_classes=2, dim=16)
        >>> out = model({"photo": torch.ones(4, 8), "table": None})
        >>> bool((out.completed[:, 1] == model.absent.tokens[1]).all())
        True

    References:
        The mask token of Devlin et al., "BERT", 2019, per modality; ``CMML(crta=None, memory=None,
        alignment=None)`` concatenates the same tokens, without the GELU behind, and has a
        contrastive loss besides.
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
        self.absent = AbsentTokens(len(self.names), num_tokens, dim, **kind)
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
        completed = self.absent(tokens, visible)
        fused = F.gelu(self.fuse(completed, torch.ones_like(visible)))
        out = fusion_output(self.head(fused), fused, tokens, completed, present, visible)
        return with_losses(self, out, labels)
