"""A cascade of residual autoencoders imagines what is absent."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.baselines.output import fusion_output, with_losses
from mmfusion.layers import ConcatPool, FusionOutput, Head, ModalityEncoders
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import check_target, reconstruction_loss

__all__ = ["CascadeAutoencoder"]


class CascadeAutoencoder(nn.Module):
    """Imagine absent modalities with a cascade of residual autoencoders over the concatenation.

    All modalities' tokens side by side, zeros where hidden, pass ``num_blocks`` autoencoders, each
    adding to what it was given. A second cascade maps the result back to what was visible (cycle
    consistency). The reconstruction loss lives on ``present & ~visible``. Arguments without a line
    here are those of ``CMML``.

    Args:
        num_heads: Unused, since nothing attends: one call builds every method.
        num_blocks: Autoencoders in each cascade.
        reconstruction_weight: Weight of the loss of imagined modalities that were hidden.
        cycle_weight: Weight of the loss of visible ones mapped back.

    Shape:
        As ``CMML``.

    Raises:
        ValueError: If ``num_blocks`` is below 1, or on what ``CMML`` refuses.

    Example:
        >>> model = CascadeAutoencoder({"photo": 8, "table": 3}, num_classes=2, dim=16)
        >>> out = model({"photo": torch.ones(4, 8), "table": None})
        >>> torch.equal(out.completed[:, 1], out.synthesised[:, 1])
        True

    References:
        Zhao, Li, Jin, "Missing Modality Imagination Network", ACL 2021: same blocks, cycle, and
        widths (256, 128, 64, for ``dim=128``). It classifies the blocks' codes, imagines what a
        teacher trained on complete data sees, has one more layer after the blocks, and weighs
        squared errors with 4 and 2 against the task's 1. Here imagined tokens fill absent ones, and
        CMML's reconstruction loss compares them with the encoders' own.
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
        num_blocks: int = 5,
        reconstruction_weight: float = 1.0,
        cycle_weight: float = 0.5,
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
        self.loss_weights = {
            "task": 1.0,
            "reconstruction": reconstruction_weight,
            "cycle": cycle_weight,
        }
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        self.names = self.edge.names
        width = len(self.names) * num_tokens * dim
        self.imagine, self.recall = (
            nn.ModuleList(_autoencoder(width, dim, **kind) for _ in range(num_blocks))
            for _ in range(2)
        )
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
        imagined = _cascade(self.imagine, torch.where(rows, tokens, 0))
        completed = torch.where(rows, tokens, imagined)
        fused = F.gelu(self.fuse(completed, torch.ones_like(visible)))
        out = fusion_output(
            self.head(fused),
            fused,
            tokens,
            completed,
            present,
            visible,
            synthesised=imagined,
        )
        if labels is None:
            return out
        recalled = _cascade(self.recall, imagined)
        return with_losses(
            self,
            out,
            labels,
            reconstruction=reconstruction_loss(
                imagined, tokens, present & ~visible, gather=self.training
            ),
            cycle=reconstruction_loss(recalled, tokens, visible, gather=self.training),
        )


def _autoencoder(width: int, dim: int, **kind: Any) -> nn.Sequential:
    sizes = (width, 2 * dim, dim, max(1, dim // 2), dim, 2 * dim, width)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, **kind), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _cascade(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Each block reads the input plus all residuals so far."""
    x = tokens.flatten(1)
    for block in blocks:
        x = x + block(x)
    return x.reshape(tokens.shape)
