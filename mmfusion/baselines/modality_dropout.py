"""Observed modalities are dropped at random while training."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import ConcatPool, FusionOutput, Head, ModalityEncoders
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target
from mmfusion.missingness import hide

__all__ = ["ModalityDropout"]


class ModalityDropout(nn.Module):
    """Drop observed modalities at random while training, so that absence is nothing new at test.

    Arguments without a line here are those of ``CMML``. Absent and dropped modalities are zeros in
    the concatenation, and those kept are multiplied by the number of modalities over the number
    kept, in training and evaluation alike. At least one observed modality is kept. Draws follow
    torch's RNG.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.
        modality_dropout: Probability that an observed modality is dropped.

    Shape:
        As ``CMML``; ``visible`` of the result says what was kept.

    Raises:
        ValueError: If ``modality_dropout`` is not in [0, 1), or on what ``CMML`` refuses.

    Example:
        >>> model = ModalityDropout({"a": 8, "b": 3}, num_classes=2, dim=16, modality_dropout=0.9)
        >>> inputs = {"a": torch.ones(500, 8), "b": torch.ones(500, 3)}
        >>> sorted(set(model(inputs).visible.sum(1).tolist()))
        [1, 2]
        >>> model.eval()(inputs).visible.all().item()
        True

    References:
        Neverova et al., "ModDrop: Adaptive Multi-Modal Gesture Recognition", TPAMI 2016, arXiv
        1501.00102. It drops inputs, after each modality has been trained on its own; here tokens
        are dropped, in one training. That one is always kept, and the factor, are our design.
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
        modality_dropout: float = 0.2,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        if not 0 <= modality_dropout < 1:
            raise ValueError(
                f"modality_dropout={modality_dropout}: it is a probability below 1. Use 0 <= "
                "modality_dropout < 1."
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {"task": 1.0}
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        self.modality_dropout = modality_dropout
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
        if self.training and self.modality_dropout:
            visible = hide(visible, self.modality_dropout)
        kept = visible.sum(1).clamp(min=1)
        completed = torch.where(visible[:, :, None, None], tokens, 0)
        scale = (len(self.names) / kept)[:, None, None, None].to(tokens.dtype)
        fused = F.gelu(self.fuse(completed * scale, visible))
        out = fusion_output(self.head(fused), fused, tokens, completed, present, visible)
        return with_losses(self, out, labels)
