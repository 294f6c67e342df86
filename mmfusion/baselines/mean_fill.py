"""The mean of what was observed stands in for what is absent."""

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
from mmfusion.ranks import joint_sum

__all__ = ["MeanFill"]


class MeanFill(nn.Module):
    """Put the training mean where a modality is absent, concatenate, classify.

    Arguments without a line here are those of ``CMML``. The mean of each modality's observed tokens
    is a buffer: in training every step moves it, after use, a tenth of the way to the mean of the
    joint batch of all ranks (the first ten steps weigh alike), because the encoders move too. In
    ``eval()`` it stands still.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.

    Shape:
        As ``CMML``.

    Raises:
        ValueError: On what ``CMML`` refuses in its inputs and sizes.

    Example:
        >>> model = MeanFill({"photo": 8, "table": 3}, num_classes=2, dim=16)
        >>> first = model({"photo": torch.ones(4, 8), "table": torch.ones(4, 3)})  # training
        >>> out = model({"photo": torch.ones(4, 8), "table": None})
        >>> torch.allclose(out.completed[0, 1], first.tokens[:, 1].mean(0))
        True

    References:
        Mean imputation as in scikit-learn's ``SimpleImputer``, of tokens instead of features.
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
        size = (len(self.names), num_tokens, dim)
        self.register_buffer("mean", torch.empty(size, **kind))
        self.register_buffer("steps", torch.empty(size[0], dtype=torch.int64, device=device))
        self._reset_own()
        self.fuse = ConcatPool(len(self.names), dim, dropout=dropout, **kind)
        self.head = Head(dim, num_classes, dropout=dropout, **kind) if head is None else head

    def reset_parameters(self) -> None:
        """Draw all parameters anew, encoders and head included; forget the mean."""
        reset_children(self)
        self._reset_own()

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
        completed = torch.where(visible[:, :, None, None], tokens, self.mean)
        fused = F.gelu(self.fuse(completed, torch.ones_like(visible)))
        out = fusion_output(self.head(fused), fused, tokens, completed, present, visible)
        out = with_losses(self, out, labels)
        if self.training:
            self._follow(tokens, present)
        return out

    mean: Tensor
    steps: Tensor

    def _reset_own(self) -> None:
        self.mean.zero_()
        self.steps.zero_()

    @torch.no_grad()
    def _follow(self, tokens: Tensor, present: Tensor) -> None:
        count = joint_sum(present.sum(0))  # (M,)
        batch_mean = (
            joint_sum(tokens.to(self.mean.dtype).sum(0)) / count.clamp(min=1)[:, None, None]
        )
        self.steps.add_(count > 0)
        rate = torch.where(count > 0, (1 / self.steps.clamp(min=1)).clamp(min=0.1), 0)
        self.mean.add_(rate[:, None, None].to(self.mean.dtype) * (batch_mean - self.mean))
