"""The plain-PyTorch definition of every fused op: the specification, and the ``torch`` backend.

Both ops are pure and differentiable by autograd. Arguments are checked in ``functional.py``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from mmfusion.presence import visibility

__all__ = [
    "attention",
    "autocasts",
    "class_contrastive",
    "full_precision",
    "masked_softmax",
    "presence_attention",
    "retrieve",
    "unit",
]

CHUNK = 16384  # slots scored at once: bounds memory at (M, Q, CHUNK), whatever S is
_TINY = 1e-12  # a vector this short has no direction: it scores 0


def retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    k: int | None,
    temperature: float,
    held: Tensor | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    wanted: Tensor | None = None,
    similarity: str = "cosine",
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped exact memory lookup; ``functional.retrieve`` brings every call to this form.

    Slots are chosen without gradient; the chosen ones are then scored again with it.

    Shape:
        - ``query``: ``(M, Q, D)``; ``keys``: ``(M, S, D)``; ``values``: ``(M, S, Dv)``
        - ``held``: ``(M,)``; ``wanted``: ``(M, Q)``
        - ``exclude``: slot numbers ``(M, Q)``, or ids of queries ``(M, Q)`` and of slots ``(M, S)``
        - results: ``(M, Q, Dv)``, ``(M, Q, k)``, ``(M, Q, k)``

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> out = retrieve(torch.tensor([[[0.0, 1.0]]]), keys, None, k=1, temperature=1.0)
        >>> out[0].tolist(), out[2].tolist()
        ([[[0.0, 2.0]]], [[[1]]])
    """
    precision = wide_type(keys)
    if wanted is not None:
        wanted = wanted.unsqueeze(-1)
        query = torch.where(wanted, query, 0)  # what is not answered may hold anything
    wide = query.to(keys.dtype).to(precision)  # both backends rank the same numbers
    if similarity == "cosine":
        wide = unit(wide)
    if k is None:
        found = _read_all(wide, keys, values, temperature, held, exclude, wanted, similarity)
    else:
        learns = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not learns):
            scores, slots = _select(wide, keys, k, held, exclude, similarity, key_scale)
        whole = held is None and exclude is None and k <= keys.shape[1]
        allowed = _both(None if whole else scores > -torch.inf, wanted, slots)
        near = None
        if learns:  # score what was chosen again, so that autograd sees k slots and not S
            near = _take(keys, slots, allowed).to(precision)  # (M, Q, k, D)
            ruler = unit(near) if similarity == "cosine" else near
            scores = (ruler @ wide.unsqueeze(-1)).squeeze(-1)
        if near is None or values is not None:
            near = _take(keys if values is None else values, slots, allowed).to(precision)
        weights = masked_softmax(scores / temperature, allowed)
        found = (weights.unsqueeze(-2) @ near).squeeze(-2), weights, slots, allowed
    readout, weights, slots, allowed = found
    indices = slots if allowed is None else torch.where(allowed, slots, -1)
    return readout.to(query.dtype), weights.detach().float(), indices


def unit(vectors: Tensor) -> Tensor:
    """Scale to length 1 along the last axis; a vector without direction becomes 0, gradient 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * square.masked_fill(square <= _TINY**2, torch.inf).rsqrt()


def _read_all(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    temperature: float,
    held: Tensor | None,
    exclude: Tensor | tuple[Tensor, Tensor] | None,
    wanted: Tensor | None,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The dense form: two products, whatever M, Q and S."""
    slots = torch.arange(keys.shape[1], device=keys.device).expand(*query.shape[:2], -1)
    allowed = _both(_allowed(slots, keys.shape[1], held, exclude), wanted, slots)
    keys = _blank(keys, held).to(query.dtype)
    source = keys if values is None else _blank(values, held).to(query.dtype)
    scores = query @ (unit(keys) if similarity == "cosine" else keys).mT  # (M, Q, S)
    weights = masked_softmax(scores / temperature, allowed)
    return weights @ source, weights, slots, allowed


def _both(allowed: Tensor | None, wanted: Tensor | None, slots: Tensor) -> Tensor | None:
    """Slots allowed and asked for; None where that is all of them."""
    if allowed is None or wanted is None:
        return allowed if wanted is None else wanted.expand_as(slots)
    return allowed & wanted


def _select(
    query: Tensor,
    keys: Tensor,
    k: int,
    held: Tensor | None,
    exclude: Tensor | tuple[Tensor, Tensor] | None,
    similarity: str,
    key_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores and slots of the k best, best first; -inf where there are fewer."""
    best, slots = _select_chunk(0, query, keys, k, held, exclude, similarity, key_scale)
    for start in range(CHUNK, keys.shape[1], CHUNK):
        top, index = _select_chunk(start, query, keys, k, held, exclude, similarity, key_scale)
        best, order = torch.cat([best, top], -1).topk(min(k, best.shape[-1] + top.shape[-1]))
        slots = torch.cat([slots, index], -1).gather(-1, order)
    lacking = (0, k - best.shape[-1])
    if lacking[1]:  # k exceeds S
        best, slots = F.pad(best, lacking, value=-torch.inf), F.pad(slots, lacking)
    return best, slots


def _select_chunk(
    start: int,
    query: Tensor,
    keys: Tensor,
    k: int,
    held: Tensor | None,
    exclude: Tensor | tuple[Tensor, Tensor] | None,
    similarity: str,
    key_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The best of ``CHUNK`` slots from ``start`` on."""
    chunk = slice(start, start + CHUNK)
    part = keys[:, chunk].to(query.dtype)  # (M, s, D)
    if similarity == "cosine":
        scale = _inverse_norm(part) if key_scale is None else key_scale[:, chunk]
        part = part * scale.to(part.dtype).unsqueeze(-1)
    if held is None:
        scores = query @ part.mT  # (M, Q, s)
    else:
        usable = _numbers(start, part) < held.unsqueeze(-1)  # (M, s); what is not held may be NaN
        part = torch.where(usable.unsqueeze(-1), part, 0)
        bias = torch.where(usable, 0.0, -torch.inf).to(part.dtype).unsqueeze(1)
        scores = torch.baddbmm(bias, query, part.mT)
    if exclude is not None:
        if isinstance(exclude, tuple):
            exclude = (exclude[0], exclude[1][:, chunk])
        scores = scores.masked_fill(_excluded(_numbers(start, part), exclude), -torch.inf)
    top, index = scores.topk(min(k, part.shape[1]), dim=-1)
    return top, index + start if start else index


def _numbers(start: int, part: Tensor) -> Tensor:
    return torch.arange(start, start + part.shape[1], device=part.device)


def _allowed(
    slots: Tensor,
    num_slots: int,
    held: Tensor | None,
    exclude: Tensor | tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(M, Q, S) for the dense form: which slots a query may read."""
    allowed = torch.ones_like(slots, dtype=torch.bool)
    if held is not None:
        allowed = slots < held[:, None, None]
    if exclude is not None:
        allowed = allowed & ~_excluded(torch.arange(num_slots, device=slots.device), exclude)
    return allowed


def _excluded(number: Tensor, exclude: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """(M, Q, s) True for slots a query must not read, by number or id; negatives match none."""
    if isinstance(exclude, tuple):
        asker, owner = exclude
        return (asker.unsqueeze(-1) == owner.unsqueeze(-2)) & (asker >= 0).unsqueeze(-1)
    return number == exclude.unsqueeze(-1)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over what is allowed (None: everything); exact zeros elsewhere, and in empty rows.

    Example:
        >>> allowed = torch.tensor([[True, False], [False, False]])
        >>> masked_softmax(torch.ones(2, 2), allowed).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    if allowed is None:
        return scores.softmax(-1)
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed


def _blank(bank: Tensor, held: Tensor | None) -> Tensor:
    """A bank with zeros in the slots that are not held, whatever lies there."""
    if held is None:
        return bank
    usable = torch.arange(bank.shape[1], device=bank.device) < held.unsqueeze(-1)  # (M, S)
    return torch.where(usable.unsqueeze(-1), bank, 0)


def _take(bank: Tensor, slots: Tensor, allowed: Tensor | None) -> Tensor:
    """(M, Q, k, D) rows of each group's bank, zeros where not allowed, whatever lies there."""
    groups, num_slots, width = bank.shape
    rows = slots
    if groups > 1:
        rows = slots + torch.arange(groups, device=bank.device).reshape(-1, 1, 1) * num_slots
    near = bank.reshape(groups * num_slots, width).index_select(0, rows.flatten())
    near = near.reshape(*slots.shape, width)
    return near if allowed is None else torch.where(allowed.unsqueeze(-1), near, 0)


def _inverse_norm(vectors: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vectors, dim=-1)
    return norm.masked_fill(norm <= _TINY, torch.inf).reciprocal()  # 0 for a zero vector


def presence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    num_context: int = 0,
    allow: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention that never reads the tokens of an absent modality; see ``functional``.

    Shape:
        - ``q``: ``(B, Nq, H, Dh)``; ``k``, ``v``: ``(B, N, H, Dh)``; ``present``: ``(B, M)``

    Example:
        >>> v = torch.tensor([2.0, float("nan")]).reshape(1, 2, 1, 1)
        >>> present = torch.tensor([[True, False]])
        >>> presence_attention(v[:, :1], v, v, present, lengths=(1, 1)).item()
        2.0
    """
    readable = visibility(present, lengths, num_context)  # (B, N)
    attend = readable if allow is None else visibility(present, lengths, num_context, allow)
    k = torch.where(readable[:, :, None, None], k, 0)
    v = torch.where(readable[:, :, None, None], v, 0)
    return attention(q, k, v, attend, dropout, seed)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Softmax attention over clean keys; a query that may attend to nothing gives exact zeros.

    Shape:
        - ``q``: ``(B, Nq, H, Dh)``; ``k``, ``v``: ``(B, N, H, Dh)``, finite everywhere
        - ``attend``: ``(B, N)``, or ``(B, 1, Nq, N)``

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> attention(x, x, x, torch.tensor([[False]])).tolist()
        [[[[0.0, 0.0]]]]
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, Dh)
    if attend.ndim == 2:
        attend = attend[:, None, None, :]
    if dropout and seed is not None:
        precision = wide_type(q)
        with full_precision(q.device):
            scores = (q.to(precision) @ k.to(precision).mT) * q.shape[-1] ** -0.5
            kept = _uniform(seed, scores.shape) >= dropout
            weights = masked_softmax(scores, attend) * kept / (1 - dropout)
            out = (weights @ v.to(precision)).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        # torch gives such rows exact zeros by itself, an exported ONNX graph does not
        out = torch.where(attend.any(-1, keepdim=True), out, 0)
    return out.transpose(1, 2)


def class_contrastive(
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
    *,
    start: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Supervised contrastive loss of each anchor; see ``functional``.

    Shape:
        - ``anchors``: ``(A, D)``; ``columns``: ``(C, D)``; the rest ``(A,)`` or ``(C,)``

    Example:
        >>> vectors, yes = torch.eye(2), torch.tensor([True, True])
        >>> same = torch.tensor([3, 3])
        >>> loss, positives = class_contrastive(
        ...     vectors, vectors, same, same, yes, yes, start=0, temperature=1.0)
        >>> loss.tolist(), positives.tolist()
        ([0.0, 0.0], [1.0, 1.0])
    """
    precision = wide_type(anchors)
    # what does not count may hold anything, and zero times NaN is NaN in backward
    anchors = torch.where(used.unsqueeze(1), anchors, 0)
    columns = torch.where(real.unsqueeze(1), columns, 0)
    scores = anchors.to(precision) @ columns.to(precision).mT / temperature  # (A, C)
    row = torch.arange(len(anchors), device=scores.device) + start
    column = torch.arange(len(columns), device=scores.device)
    countable = real & (row.unsqueeze(1) != column)
    positive = countable & used.unsqueeze(1) & (labels.unsqueeze(1) == column_labels)
    # log softmax over all other vectors; a row with no other stays finite and has no positive
    scores = scores.masked_fill(~countable, torch.finfo(scores.dtype).min)
    loss = torch.where(positive, -scores.log_softmax(-1), 0).sum(-1)
    number = positive.sum(-1)
    return loss / number.clamp(min=1), number.float()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device.

    Example:
        >>> autocasts(torch.device("cpu"))
        False
    """
    return is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: scores and softmax keep their type.

    Example:
        >>> with full_precision(torch.device("cpu")):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def wide_type(x: Tensor) -> torch.dtype:
    """What scores, softmax and losses are computed in, whatever autocast says.

    Example:
        >>> wide_type(torch.ones(1).bfloat16()), wide_type(torch.ones(1).double())
        (torch.float32, torch.float64)
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _uniform(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) that depend on ``seed`` and their place alone (splitmix64, Steele 2014)."""
    place = torch.arange(1, 1 + torch.Size(shape).numel(), device=seed.device).reshape(tuple(shape))
    x = seed + place * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return _shift(x ^ _shift(x, 31), 40).float() * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, where int64 shifts arithmetically
