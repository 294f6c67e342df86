"""Attention that reads only what is present."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfusion import reference
from mmfusion.functional import check_backend, presence_attention
from mmfusion.layers.reset import reset_children
from mmfusion.presence import visibility

__all__ = ["PresenceAttention"]


class PresenceAttention(nn.Module):
    """Multi-head attention in which hidden keys do not exist.

    Keys under ``attend`` False are replaced before any arithmetic: what they hold changes no bit of
    the result and gets exactly zero gradient. All queries are answered; a query that may attend to
    nothing reads zeros, so that the output there is the bias of the last projection. Queries are
    the caller's to keep finite, and so is, in a 4-D ``attend``, a key that any query reads. No
    residual and no norm inside.

    Args:
        dim: Width of a token, ``D``.
        num_heads: Heads, ``H``; divides ``dim``.
        dropout: Share of attention weights dropped in training, following torch's RNG.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, as in ``functional.presence_attention``.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``queries``: ``(B, Nq, D)``, and so is the result
        - ``keys``: ``(B, N, D)``
        - ``attend``: ``(B, N)`` bool, True = may be attended; or ``(B, 1, Nq, N)``
        - with ``lengths``: ``attend`` is ``present`` ``(B, M)``, and the keys are ``num_context``
          context tokens, then ``lengths[m]`` tokens of each modality

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, or shapes contradict each other.

    Example:
        >>> attention = PresenceAttention(4, num_heads=2)
        >>> keys = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [float("nan")] * 4]])
        >>> out = attention(keys[:, :1], keys, torch.tensor([[True, False]]))
        >>> bool(out.isfinite().all())
        True

    References:
        Vaswani et al., "Attention Is All You Need", 2017. The presence contract is our design.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} with dim={dim}: heads share the width evenly. Choose a "
                "divisor of dim."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: it is a share of weights. Use 0 <= dropout < 1.")
        check_backend(backend)
        self.num_heads = num_heads
        self.dropout = dropout
        self.backend = backend
        self.query = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.key_value = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"dim={self.query.in_features}, num_heads={self.num_heads}, dropout={self.dropout}"

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        attend: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        num_context: int = 0,
    ) -> Tensor:
        """Attend from ``queries`` to ``keys``; see the class for shapes."""
        _check_attend(queries, keys, attend)
        if attend.ndim == 4:
            if lengths is not None or num_context or self.backend == "triton":
                raise ValueError(
                    f"attend is 4-D with lengths={lengths}, num_context={num_context}, backend="
                    f"{self.backend!r}: such a table says all by itself, and plain PyTorch serves "
                    "it. Leave them out, with backend='auto'."
                )
            return self._attend_pairwise(queries, keys, attend)
        q, k, v = self._project(queries, _clean(keys, attend, lengths, num_context))
        out = presence_attention(
            q,
            k,
            v,
            attend,
            lengths=lengths,
            num_context=num_context,
            dropout=self.dropout if self.training else 0.0,
            seed=self._seed(q),
            backend=self.backend,
        )
        return self.out(out.flatten(2))

    def modality_weights(
        self, queries: Tensor, keys: Tensor, present: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """How much each query reads from each modality, ``(B, Nq, M)``: mean over heads.

        A row sums to 1, or is zero where nothing is present.
        """
        q, k, _ = self._project(queries, _clean(keys, present, lengths, 0))
        attend = visibility(present, lengths)[:, None, None, :]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * q.shape[-1] ** -0.5
        weights = reference.masked_softmax(scores, attend).mean(1)  # (B, Nq, N)
        return torch.stack([part.sum(-1) for part in weights.split(list(lengths), dim=-1)], dim=-1)

    def _attend_pairwise(self, queries: Tensor, keys: Tensor, attend: Tensor) -> Tensor:
        """``attend`` (B, 1, Nq, N): every query has its own keys."""
        read = attend.any(2).squeeze(1)  # (B, N), keys that anybody reads
        q, k, v = self._project(queries, torch.where(read.unsqueeze(-1), keys, 0))
        out = reference.attention(
            q, k, v, attend, self.dropout if self.training else 0.0, self._seed(q)
        )
        return self.out(out.flatten(2))

    def _project(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.num_heads, -1)
        k, v = self.key_value(keys).chunk(2, dim=-1)
        return (
            self.query(queries).unflatten(-1, heads),
            k.unflatten(-1, heads),
            v.unflatten(-1, heads),
        )

    def _seed(self, like: Tensor) -> Tensor | None:
        if not (self.training and self.dropout):
            return None
        return torch.randint(2**62, (), device=like.device)


def _check_attend(queries: Tensor, keys: Tensor, attend: Tensor) -> None:
    pairwise = (keys.shape[0], 1, queries.shape[1], keys.shape[1])
    fits = attend.ndim != 4 or (attend.shape == pairwise and queries.shape[0] == keys.shape[0])
    if attend.dtype != torch.bool or not fits:
        raise ValueError(
            f"attend is {tuple(attend.shape)} {attend.dtype} with queries {tuple(queries.shape)} "
            f"and keys {tuple(keys.shape)}: it is bool, (B, N) or (B, 1, Nq, N) = {pairwise}, True "
            "where a key may be read, in one batch. Convert it, with ~mask if True means hidden."
        )


def _clean(
    keys: Tensor, present: Tensor, lengths: Sequence[int] | None, num_context: int
) -> Tensor:
    """Zeros under hidden keys, before the projection: NaN would spoil its weight's gradient."""
    columns, tokens = present.shape[1], present.shape[1]
    if lengths is not None:
        columns, tokens = len(lengths), sum(lengths)
    if present.shape[1:] != (columns,) or num_context + tokens != keys.shape[1]:
        raise ValueError(
            f"attend is {tuple(present.shape)} with lengths={lengths}, num_context="
            f"{num_context} and {keys.shape[1]} keys: there is one column per modality (or per "
            "key, without lengths), and context and modality tokens make up all keys. Correct them."
        )
    return torch.where(visibility(present, lengths, num_context).unsqueeze(-1), keys, 0)
