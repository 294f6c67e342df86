"""The fused ops as torch operators: schemas, shapes for tracing, batching rules, gradients.

Operators come in pairs, forward and backward, and an ``autograd.Function`` joins each pair. That
form, unlike ``custom_op`` with ``register_autograd``, composes with ``torch.func`` and refuses
forward mode instead of returning zeros. Arguments are checked in ``functional.py``; Triton is
imported by the first call on real tensors. Forward mode and double backward need
``backend="torch"``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ClassContrastive", "PresenceAttention", "Retrieve"]

_LIB = torch.library.Library("mmfusion", "FRAGMENT")  # must stay alive


def _register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    batch: Callable[..., Any],
) -> Any:
    """Define one operator; CPU serves Triton's interpreter, elsewhere the launcher refuses."""
    name = schema.split("(")[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _LIB.impl(name, run, device)
    torch.library.register_fake(f"mmfusion::{name}", fake, lib=_LIB)
    torch.library.register_vmap(f"mmfusion::{name}", batch, lib=_LIB)
    return getattr(torch.ops.mmfusion, name).default


def _front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped axis first; what carries none is expanded to it."""
    if x is None:
        return None
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _merge(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)


# --- presence attention: the mapped axis folds into the samples; no lengths: a column for each key


def _attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor,
    allow: Tensor | None,
    seed: Tensor | None,
    lengths: Sequence[int],
    num_context: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    from mmfusion import kernels

    return kernels.presence_attention_forward(
        q, k, v, present, allow, seed, lengths, num_context, dropout
    )


def _attention_fwd_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _width = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    present: Tensor,
    allow: Tensor | None,
    seed: Tensor | None,
    lengths: Sequence[int],
    num_context: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from mmfusion import kernels

    return kernels.presence_attention_backward(
        grad, q, k, v, out, lse, present, allow, seed, lengths, num_context, dropout
    )


def _attention_bwd_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_batch(num_tensors: int, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Batching rule of either operator: ``num_tensors`` carry samples, then allow and seed."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        if in_dims[num_tensors] is not None or in_dims[num_tensors + 1] is not None:
            raise ValueError(
                "allow or seed is mapped by vmap: the fused attention takes one for all samples. "
                "Map q, k, v and present only, or use backend='torch'."
            )
        size = info.batch_size
        tensors = [
            _merge(_front(x, dim, size))
            for x, dim in zip(args[:num_tensors], in_dims[:num_tensors], strict=True)
        ]
        outs = apply(*tensors, *args[num_tensors:])
        return tuple(x.unflatten(0, (size, -1)) for x in outs), (0,) * len(outs)

    return rule


_attention_backward: Any = _register(
    "presence_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor present, Tensor? allow, Tensor? seed, int[] lengths, int num_context, float dropout)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_bwd,
    _attention_bwd_fake,
    _attention_batch(7, lambda *args: _attention_backward(*args)),
)
_attention_forward: Any = _register(
    "presence_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor present, Tensor? allow, "
    "Tensor? seed, int[] lengths, int num_context, float dropout) -> (Tensor, Tensor)",
    _attention_fwd,
    _attention_fwd_fake,
    _attention_batch(4, lambda *args: _attention_forward(*args)),
)


class PresenceAttention(torch.autograd.Function):
    """``(q, k, v, present, allow, seed, lengths, num_context, dropout) -> (out, lse)``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Run the forward operator."""
        return _attention_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the operands and the log-sum-exp; weights are recomputed."""
        q, k, v, present, allow, seed, *ctx.rest = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, present, allow, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _lse: Any) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        if grad is None:
            return (None,) * 9
        grads = _attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
        return (*grads, *(None,) * 6)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into the samples."""
        return _attention_batch(4, PresenceAttention.apply)(info, in_dims, *args)


# --- memory lookup: the mapped axis folds into the queries, or into the banks if one is mapped


def _retrieve_fwd(*args: Any) -> tuple[Tensor, ...]:
    from mmfusion import kernels

    return kernels.retrieve_forward(*args)


def _retrieve_fwd_fake(
    query: Tensor, keys: Tensor, values: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    k, save = rest[5], rest[8]
    shape = (*query.shape[:2], k)
    read = keys if values is None else values
    return (
        query.new_empty((*query.shape[:2], read.shape[2])),
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.int64),
        keys.new_empty((*shape, keys.shape[2]) if save else (0,)),
        read.new_empty((*shape, read.shape[2]) if save and values is not None else (0,)),
    )


def _retrieve_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mmfusion import kernels

    return kernels.retrieve_backward(*args)


def _retrieve_bwd_fake(
    grad: Tensor,
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    weights: Tensor,
    indices: Tensor,
    num_slots: int,
    temperature: float,
    cosine: bool,
    want_keys: bool,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    banks, width = query.shape[0], query.shape[2]
    wants = want_values and near_values.ndim > 1
    values = near_values if near_values.ndim > 1 else near_keys
    return (
        query.new_empty(query.shape),
        near_keys.new_empty((banks, num_slots, width) if want_keys else (0,)),
        values.new_empty((banks, num_slots, values.shape[3]) if wants else (0,)),
    )


def _split(x: Tensor, size: int) -> Tensor:
    """Undo ``_merge``; a result that was not asked for stays empty."""
    return x.expand(size, 0) if x.ndim == 1 else x.unflatten(0, (size, -1))


def _retrieve_batch(apply: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = [_front(x, dim, size) for x, dim in zip(args[:8], in_dims[:8], strict=True)]
        per_bank = (1, 2, 3, 5, 7)  # keys, values, held, slot_ids, key_scale
        if any(in_dims[place] is not None for place in per_bank):
            outs = apply(*(_merge(x) for x in tensors), *args[8:])
            return tuple(_split(x, size) for x in outs), (0,) * len(outs)
        for place in (0, 4, 6):  # query, exclude, wanted: (V, M, Q, ...) -> (M, V * Q, ...)
            x = tensors[place]
            tensors[place] = None if x is None else x.movedim(0, 1).flatten(1, 2)
        shared = [args[i] if i in per_bank else x for i, x in enumerate(tensors)]
        outs = [
            x.expand(size, 0) if x.ndim == 1 else x.unflatten(1, (size, -1)).movedim(1, 0)
            for x in apply(*shared, *args[8:])
        ]
        return tuple(outs), (0,) * len(outs)

    return rule


def _retrieve_bwd_batch(
    info: Any, in_dims: Sequence[int | None], *args: Any
) -> tuple[Any, tuple[int, ...]]:
    size = info.batch_size
    tensors = [_front(x, dim, size) for x, dim in zip(args[:6], in_dims[:6], strict=True)]
    outs = _retrieve_backward(*(_merge(x) for x in tensors), *args[6:])
    return tuple(_split(x, size) for x in outs), (0, 0, 0)


_retrieve_backward: Any = _register(
    "retrieve_bwd(Tensor grad, Tensor query, Tensor near_keys, Tensor near_values, Tensor weights, "
    "Tensor indices, SymInt num_slots, float temperature, bool cosine, bool want_keys, "
    "bool want_values) -> (Tensor, Tensor, Tensor)",
    _retrieve_bwd,
    _retrieve_bwd_fake,
    _retrieve_bwd_batch,
)
_retrieve_forward: Any = _register(
    "retrieve_fwd(Tensor query, Tensor keys, Tensor? values, Tensor? held, Tensor? exclude, "
    "Tensor? slot_ids, Tensor? wanted, Tensor? key_scale, int k, float temperature, bool cosine, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _retrieve_fwd,
    _retrieve_fwd_fake,
    _retrieve_batch(lambda *args: _retrieve_forward(*args)),
)


class Retrieve(torch.autograd.Function):
    """The arguments of ``retrieve_fwd`` -> its results; only the readout carries gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Run the forward operator."""
        return _retrieve_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the rows that were read, not the bank: a write may follow before backward."""
        query, keys = inputs[:2]
        _, weights, indices, near_keys, near_values = output
        ctx.num_slots, ctx.rest = keys.shape[1], inputs[9:11]
        ctx.mark_non_differentiable(weights, indices, near_keys, near_values)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, near_keys, near_values, weights, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of query, keys and values."""
        if grad is None:
            return (None,) * 12
        wants = ctx.needs_input_grad
        grads = _retrieve_backward(
            grad, *ctx.saved_tensors, ctx.num_slots, *ctx.rest, wants[1], wants[2]
        )
        kept = [x if want else None for x, want in zip(grads, wants[:3], strict=True)]
        return (*kept, *(None,) * 9)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into queries or banks."""
        return _retrieve_batch(Retrieve.apply)(info, in_dims, *args)


# --- class contrastive loss: all pairs of one call belong together, so a mapped axis is a loop


def _contrastive_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mmfusion import kernels

    return kernels.contrastive_forward(*args)


def _contrastive_fwd_fake(anchors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = anchors.shape[:1]
    loss, lse, number = (anchors.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return loss, lse, number


def _contrastive_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    from mmfusion import kernels

    return kernels.contrastive_backward(*args)


def _contrastive_bwd_fake(
    grad: Tensor, anchors: Tensor, columns: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = columns.shape if rest[-1] else (0,)
    return anchors.new_empty(anchors.shape), columns.new_empty(shape)


def _loop(apply: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        runs = [
            apply(
                *(
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        outs = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
        return outs, (0,) * len(outs)

    return rule


_contrastive_backward: Any = _register(
    "class_contrastive_bwd(Tensor grad, Tensor anchors, Tensor columns, Tensor labels, "
    "Tensor column_labels, Tensor used, Tensor real, Tensor lse, Tensor number, SymInt start, "
    "float temperature, bool want_columns) -> (Tensor, Tensor)",
    _contrastive_bwd,
    _contrastive_bwd_fake,
    _loop(lambda *args: _contrastive_backward(*args)),
)
_contrastive_forward: Any = _register(
    "class_contrastive_fwd(Tensor anchors, Tensor columns, Tensor labels, Tensor column_labels, "
    "Tensor used, Tensor real, SymInt start, float temperature) -> (Tensor, Tensor, Tensor)",
    _contrastive_fwd,
    _contrastive_fwd_fake,
    _loop(lambda *args: _contrastive_forward(*args)),
)


class ClassContrastive(torch.autograd.Function):
    """The arguments of ``class_contrastive_fwd`` -> its results; the loss carries gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the forward operator."""
        return _contrastive_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the vectors and the log-sum-exp; scores are recomputed."""
        _, lse, number = output
        ctx.rest = inputs[6:]
        ctx.mark_non_differentiable(lse, number)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], lse, number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of anchors and columns."""
        if grad is None:
            return (None,) * 8
        wants = ctx.needs_input_grad
        danchors, dcolumns = _contrastive_backward(grad, *ctx.saved_tensors, *ctx.rest, wants[1])
        return (danchors, dcolumns if wants[1] else None, *(None,) * 6)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """One call after the other."""
        return _loop(ClassContrastive.apply)(info, in_dims, *args)
