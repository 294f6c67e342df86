"""What modalities share stands in for what is absent."""

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
from mmfusion.ranks import joint_mean
from mmfusion.reference import wide_type

__all__ = ["SharedSpecific"]


class SharedSpecific(nn.Module):
    """Split modalities into shared and specific parts; shared ones stand in for what is absent.

    A modality's feature is its shared part plus a mix of both parts. Where it is absent, the mean
    of the visible modalities' shared parts takes its place (zeros if there are none). Two losses:
    shared parts of a sample come together, and specific parts tell which modality they are of.
    ``tokens`` of the result are the features, so that ``synthesised`` compares with them. Arguments
    without a line here are those of ``CMML``.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.
        alignment_weight: Weight of the distance between shared parts.
        domain_weight: Weight of the classification of specific parts by modality.

    Shape:
        As ``CMML``.

    Raises:
        ValueError: On what ``CMML`` refuses in its inputs and sizes.

    Example:
        >>> model = SharedSpecific({"photo": 8, "table": 3, "text": 5}, num_classes=2, dim=16)
        >>> out = model({"photo": torch.ones(4, 8)}, labels=torch.tensor([0, 1, 0, 1]))
        >>> torch.equal(out.completed[:, 1], out.completed[:, 2]), out.losses["alignment"].item()
        (True, 0.0)

    References:
        Wang et al., "Multi-modal Learning with Missing Modality via Shared-Specific Feature
        Modelling", CVPR 2023, arXiv 2307.14126. Its parts are convolutional encoders of volumes,
        ours perceptrons over tokens; its code takes the first available modality's shared part, the
        paper and we the mean; its distance (L1) is between pairs, ours to the mean. Same weights of
        the losses.
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
        alignment_weight: float = 0.1,
        domain_weight: float = 0.02,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {
            "task": 1.0,
            "alignment": alignment_weight,
            "domain": domain_weight,
        }
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        self.shared = _perceptron(dim, **kind)
        self.specific = nn.ModuleList(_perceptron(dim, **kind) for _ in self.names)
        self.mix = nn.Linear(2 * dim, dim, **kind)
        self.domain = nn.Linear(dim, len(self.names), **kind)
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
        rows = visible[:, :, None, None]
        shared = self.shared(tokens)
        specific = torch.stack([f(tokens[:, m]) for m, f in enumerate(self.specific)], 1)
        features = shared + self.mix(torch.cat([shared, specific], -1))  # (B, M, L, D)
        count = visible.sum(1).clamp(min=1)[:, None, None]
        guess = (torch.where(rows, shared, 0).sum(1) / count).unsqueeze(1).expand_as(features)
        completed = torch.where(rows, features, guess)
        fused = F.gelu(self.fuse(completed, torch.ones_like(visible)))
        out = fusion_output(
            self.head(fused),
            fused,
            torch.where(present[:, :, None, None], features, 0),
            completed,
            present,
            visible,
            synthesised=guess,
        )
        distance = shared - guess
        distance = distance.to(wide_type(distance)).abs().mean((2, 3))
        domain = self.domain(specific.mean(2))
        surprise = -domain.to(wide_type(domain)).log_softmax(-1).diagonal(dim1=1, dim2=2)
        return with_losses(
            self,
            out,
            labels,
            alignment=joint_mean(distance, visible, self.training),
            domain=joint_mean(surprise, visible, self.training),
        )


def _perceptron(dim: int, **kind: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, **kind), nn.GELU(), nn.Linear(dim, dim, **kind))
