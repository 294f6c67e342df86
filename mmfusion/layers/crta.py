"""CRTA: the cascade residual Transformer autoencoder that synthesises what is absent."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.layers.attention import PresenceAttention
from mmfusion.layers.reset import reset_children
from mmfusion.layers.tokens import AbsentTokens, per_sample

__all__ = ["CRTA", "CRTABlock", "CRTAOutput"]


class CRTAOutput(NamedTuple):
    """What ``CRTA`` returns.

    Attributes:
        synthesised: ``(B, M, L, D)``, the guess for every modality, observed ones included.
        completed: ``(B, M, L, D)``, observed tokens where present, else the guess.
        context: ``(B, C, D)``, the context updated by this sample.
        stages: One ``(B, M, L, D)`` per block, for deep supervision; the last is ``synthesised``.
    """

    synthesised: Tensor
    completed: Tensor
    context: Tensor
    stages: tuple[Tensor, ...]


class CRTABlock(nn.Module):
    """One Transformer autoencoder of the cascade: attend, squeeze, decode to a residual.

    No token of an absent modality is read. Absent tokens do query (that is how they are
    synthesised), so that what they hold decides their own row and no other; ``CRTA`` puts learned
    tokens there. All read and squeeze alike; the last projection belongs to each modality, and to
    the context, alone: one shared by all can shift a guess, but not shape it to its modality. It
    starts at zero: an untrained block returns zero residuals.

    Args:
        num_modalities: How many modalities, ``M``.
        dim: Width of a token, ``D``.
        num_heads: Attention heads, ``H``; divides ``dim``.
        bottleneck: Width between encoder and decoder; narrower than ``dim``. None is half of it.
        dropout: Dropout after attention and inside the decoder.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``tokens``, residual: ``(B, M, L, D)``
        - ``context``, residual: ``(B, C, D)``
        - ``present``: ``(B, M)``, True = may be read

    Raises:
        ValueError: If ``bottleneck`` is not narrower than ``dim``, heads do not divide it, or
            ``tokens`` does not have ``M`` modalities.

    Example:
        >>> block = CRTABlock(3, 8, num_heads=2, bottleneck=4)
        >>> tokens, context = torch.ones(1, 3, 2, 8), torch.ones(1, 5, 8)
        >>> d_tokens, d_context = block(tokens, context, torch.tensor([[True, False, True]]))
        >>> d_tokens.abs().sum().item(), tuple(d_context.shape)
        (0.0, (1, 5, 8))

    References:
        Residual autoencoders in cascade: Tran et al., "Missing Modalities Imputation via Cascaded
        Residual Autoencoder", CVPR 2017. As Transformer with context: arXiv 2605.25968; norms,
        bottleneck, the norm of the decoder and its share for each modality are our design.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_heads: int,
        bottleneck: int | None = None,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bottleneck = max(1, dim // 2) if bottleneck is None else bottleneck
        if not 0 < bottleneck < dim:
            raise ValueError(
                f"bottleneck={bottleneck} with dim={dim}: an autoencoder narrows. Choose a "
                "bottleneck between 1 and dim - 1, with dim 2 or more."
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **kind)
        self.attention = PresenceAttention(dim, num_heads, **kind)
        self.norm_code = nn.LayerNorm(dim, **kind)
        self.encode = nn.Linear(dim, bottleneck, **kind)
        self.decode = nn.Linear(bottleneck, 2 * dim, **kind)
        # A projection from zero grows by what it reads, and what comes out of two linear layers is
        # small: without this norm a few hundred steps leave the guess near its start.
        self.norm_hidden = nn.LayerNorm(2 * dim, **kind)
        # In the order of the sequence: context, then each modality. In one tensor, so that the
        # context's part has a gradient, zero, where nobody reads the context (DDP waits for it).
        self.residual_weight = nn.Parameter(torch.empty(1 + num_modalities, 2 * dim, dim, **kind))
        self.residual_bias = nn.Parameter(torch.empty(1 + num_modalities, dim, **kind))
        self.dropout = nn.Dropout(dropout)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.zeros_(self.residual_weight)
        nn.init.zeros_(self.residual_bias)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the last projection at zero."""
        reset_children(self)
        self._reset_own()

    def forward(self, tokens: Tensor, context: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals of tokens and context."""
        num_context, (modalities, length) = context.shape[1], tokens.shape[1:3]
        if modalities != (known := len(self.residual_weight) - 1):
            raise ValueError(
                f"tokens is {tuple(tokens.shape)}: this block was built for M = {known}, so they "
                "are (B, M, L, D). Rebuild it, or reshape them."
            )
        z = torch.cat([context, tokens.flatten(1, 2)], dim=1)  # (B, C + N, D)
        h = self.norm(z)
        read = self.attention(
            h, h, present, lengths=(length,) * modalities, num_context=num_context
        )
        code = F.gelu(self.encode(self.norm_code(z + self.dropout(read))))
        h = self.dropout(self.norm_hidden(F.gelu(self.decode(code))))  # (B, C + N, 2D)
        weight, bias = self.residual_weight.to(h.dtype), self.residual_bias.to(h.dtype)
        d_context = h[:, :num_context] @ weight[0] + bias[0]
        of_tokens = h[:, num_context:].unflatten(1, (modalities, length))
        d_tokens = torch.einsum("bmlh,mhd->bmld", of_tokens, weight[1:]) + bias[1:].unsqueeze(1)
        return d_tokens, d_context


class CRTA(nn.Module):
    """Synthesise the tokens of absent modalities from those observed, refined block by block.

    Block ``i`` reads ``z_i`` and returns a residual; ``z_{i+1}`` is ``z_0`` plus all residuals so
    far. In the first block nothing attends to absent tokens; later blocks may read what has been
    synthesised. Whatever the caller left under absent is replaced by learned tokens: it changes no
    bit and gets exactly zero gradient. Observed tokens pass to ``completed`` unchanged.

    Args:
        num_modalities: How many modalities, ``M``.
        num_tokens: Tokens per modality, ``L``.
        dim: Width of a token, ``D``.
        num_heads: Attention heads, ``H``; divides ``dim``.
        num_blocks: Blocks in the cascade.
        bottleneck: Width inside a block; None is half of ``dim``.
        dropout: Dropout in the blocks.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``tokens``: ``(B, M, L, D)``
        - ``context``: ``(C, D)`` or ``(B, C, D)``
        - ``present``: ``(B, M)``
        - result: ``CRTAOutput``

    Raises:
        ValueError: If ``num_blocks`` is below 1, ``tokens`` has other sizes than declared, or
            ``context`` has another shape.

    Example:
        Untrained, the cascade is the identity: the guess for the absent one is its learned token.

        >>> crta = CRTA(2, num_tokens=1, dim=4, num_heads=1, num_blocks=2)
        >>> tokens = torch.full((1, 2, 1, 4), float("nan"))
        >>> out = crta(tokens, torch.zeros(3, 4), torch.tensor([[False, False]]))
        >>> bool((out.completed[0] == crta.absent.tokens).all())
        True

    References:
        arXiv 2605.25968; what its public text leaves open (who may read what, deep supervision,
        learned absent tokens) is our design.
    """

    def __init__(
        self,
        num_modalities: int,
        num_tokens: int,
        dim: int,
        num_heads: int,
        num_blocks: int,
        *,
        bottleneck: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(
                f"num_blocks={num_blocks}: a cascade has at least one block. Use 1 or more, or "
                "leave CRTA out."
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(
            CRTABlock(num_modalities, dim, num_heads, bottleneck, dropout=dropout, **kind)
            for _ in range(num_blocks)
        )
        self.absent = AbsentTokens(num_modalities, num_tokens, dim, **kind)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def forward(self, tokens: Tensor, context: Tensor, present: Tensor) -> CRTAOutput:
        """Synthesise every modality and complete the absent ones."""
        z = self.absent(tokens, present)  # z_0
        c = per_sample(context, tokens.shape[0], tokens.shape[-1])
        readable = present
        stages = []
        for block in self.blocks:
            d_tokens, d_context = block(z, c, readable)
            z, c = z + d_tokens, c + d_context  # z_{i+1} = z_0 + sum of residuals
            stages.append(z)
            readable = torch.ones_like(present)
        return CRTAOutput(z, torch.where(present[:, :, None, None], tokens, z), c, tuple(stages))
