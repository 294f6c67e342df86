"""What every baseline does after its own idea."""

from typing import Protocol

import torch
from torch import Tensor

from mmfusion.layers import FusionOutput
from mmfusion.losses import check_labels, task_loss

__all__ = ["Trained", "fusion_output", "with_losses"]


class Trained(Protocol):
    """What ``with_losses`` asks a model for."""

    target: str
    check_values: bool
    training: bool
    loss_weights: dict[str, float]


def fusion_output(
    logits: Tensor,
    fused: Tensor,
    tokens: Tensor,
    completed: Tensor,
    present: Tensor,
    visible: Tensor,
    *,
    synthesised: Tensor | None = None,
    aligned: Tensor | None = None,
    neighbour_weights: Tensor | None = None,
    neighbour_ids: Tensor | None = None,
) -> FusionOutput:
    """A ``FusionOutput`` without losses, in which the stages that a baseline lacks are None."""
    return FusionOutput(
        logits=logits,
        fused=fused,
        tokens=tokens,
        synthesised=synthesised,
        completed=completed,
        context=None,
        reference=None,
        aligned=completed if aligned is None else aligned,
        present=present,
        visible=visible,
        neighbour_weights=neighbour_weights,
        neighbour_ids=neighbour_ids,
        losses={},
        loss=None,
    )


def with_losses(
    model: Trained, out: FusionOutput, labels: Tensor | None, **terms: Tensor
) -> FusionOutput:
    """The output with the task's loss, unless ``terms`` brings one, and the other terms."""
    if labels is None:
        return out
    check_labels(labels, out.logits, model.target, check_values=model.check_values)
    if "task" not in terms:
        terms["task"] = task_loss(
            out.logits, labels, model.target, gather=model.training, check_values=False
        )
    loss = torch.stack([weight * terms[name] for name, weight in model.loss_weights.items()]).sum()
    return out._replace(losses=terms, loss=loss)
