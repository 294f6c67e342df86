"""A classifier per modality; their evidence adds up."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import FusionOutput, ModalityEncoders, ModalityEvidence
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_labels, check_target, evidence_loss, is_known

__all__ = ["LateFusion"]


class LateFusion(nn.Module):
    """Classify each modality on its own, and add up the evidence of those observed.

    ``logits = log prior + sum of (log p_m - log prior)`` over visible modalities: Bayes' rule for
    modalities that are independent given the class. Binary and multilabel targets do the same with
    logits; regression takes the mean prediction. With nothing observed the prior answers. Each
    visible modality's classifier has a task loss of its own; the sum has none. Arguments without a
    line here are those of ``CMML``.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.
        head: A module from ``(B, D)`` to ``(B, Y)``, copied for each modality.

    Shape:
        As ``CMML``; ``fused`` of the result is the mean vector of the visible modalities.

    Raises:
        ValueError: On what ``CMML`` refuses in its inputs and sizes.

    Example:
        >>> model = LateFusion({"photo": 8, "table": 3}, num_classes=2, dim=16)
        >>> out = model({"photo": torch.ones(3, 8)}, labels=torch.tensor([0, 0, 0]))  # training
        >>> nothing = model.eval()({"photo": torch.full((1, 8), torch.nan)})
        >>> nothing.logits.softmax(1).tolist()  # 3 of class 0, none of class 1, and one each
        [[0.8..., 0.2...]]

    References:
        Product of experts over the prior: Kittler et al., "On Combining Classifiers", TPAMI 1998,
        section 2.1. The prior is the frequency of the labels seen in training, over all ranks, each
        class counted once more (regression: their mean): our design.
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
        self.evidence = ModalityEvidence(
            len(self.names), dim, num_classes, target, dropout=dropout, head=head, **kind
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew, encoders and head included; forget the prior."""
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
        said = self.evidence(tokens, visible)
        completed = torch.where(visible[:, :, None, None], tokens, 0)
        fused = completed.mean(2).sum(1) / visible.sum(1, keepdim=True).clamp(min=1)
        out = fusion_output(said.logits, fused, tokens, completed, present, visible)
        out = out._replace(evidence=said.evidence)
        if labels is not None:
            check_labels(labels, said.logits, self.target, check_values=self.check_values)
            loss = evidence_loss(
                said.scores,
                labels,
                visible,
                self.target,
                gather=self.training,
                check_values=False,  # they were looked at
            )
            out = with_losses(self, out, labels, task=loss)
            if self.training:
                self.evidence.count(labels, is_known(labels))
        return out
