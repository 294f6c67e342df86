"""Presence attention in Triton: short sequences, absent keys never read, one owner per gradient.

A program of the forward owns a block of queries of one (sample, head) and walks over the keys in
blocks, skipping blocks that hold nothing visible; up to 64 keys it is one block. A program of the
backward owns a whole (sample, head), so that no gradient needs atomics and every run gives the same
bits. Online softmax: Milakov and Gimelshein 2018; backward from the log-sum-exp: Dao et al.,
"FlashAttention", NeurIPS 2022.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfusion.kernels.launch import on_device, options, pick, precision
from mmfusion.presence import visibility

__all__ = ["presence_attention_backward", "presence_attention_forward"]

_LOG2E = 1.4426950408889634


@triton.jit
def _visible(present_ptr, key, N):
    """Which keys may be read; the second comparison spares registers."""
    return (tl.load(present_ptr + key, mask=key < N, other=0) != 0) & (key < N)


@triton.jit
def _pairs(visible, allow_ptr, modality_ptr, query, key, Nq, N, HAS_ALLOW: tl.constexpr):
    """(queries, keys) True where the query may look at the key."""
    pair = (query < Nq)[:, None] & visible[None, :]
    if HAS_ALLOW:  # context carries the number M
        asker = tl.load(modality_ptr + query, mask=query < Nq, other=0)
        asked = tl.load(modality_ptr + key, mask=key < N, other=0)
        word = tl.load(allow_ptr + asker)  # one bit per modality that may be looked at
        pair = pair & (((word[:, None] >> asked[None, :]) & 1) != 0)
    return pair


@triton.jit
def _shift(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)  # logical, where int64 shifts arithmetically


@triton.jit
def _kept(seed, row, key, N, dropout):
    """The weights that dropout keeps: the numbers of ``reference._uniform``, bit for bit."""
    x = seed + (row[:, None] * N + key[None, :] + 1) * -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return _shift(x ^ _shift(x, 31), 40).to(tl.float32) * 5.9604644775390625e-08 >= dropout


@triton.jit(do_not_specialize=["Nq", "N", "H"])
def presence_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    present_ptr,
    modality_ptr,
    allow_ptr,
    seed_ptr,
    scale,
    dropout,
    q_sample,
    q_token,
    q_head,
    k_sample,
    k_token,
    k_head,
    v_sample,
    v_token,
    v_head,
    Nq,
    N,
    H,
    DH: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ALLOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # 1-D: the other grid axes end at 65535
    blocks = tl.cdiv(Nq, BLOCK_M)
    owner = program // blocks  # sample * H + head
    sample, head = owner // H, owner % H
    query = ((program % blocks) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    width = tl.arange(0, BLOCK_DH)
    q_mask = (query < Nq)[:, None] & (width < DH)[None, :]
    # 64-bit up to the head, 32-bit inside it: the launcher sees to it that a head's span fits
    q_ptr += sample * q_sample + head * q_head
    k_ptr += sample * k_sample + head * k_head
    v_ptr += sample * v_sample + head * v_head
    present_ptr += sample * N
    q = tl.load(q_ptr + query[:, None] * q_token + width[None, :], mask=q_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_DH], tl.float32)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        visible = _visible(present_ptr, key, N)
        if tl.max(visible.to(tl.int32), 0) > 0:
            mask = visible[:, None] & (width < DH)[None, :]
            k = tl.load(k_ptr + key[:, None] * k_token + width[None, :], mask=mask, other=0.0)
            v = tl.load(v_ptr + key[:, None] * v_token + width[None, :], mask=mask, other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            pair = _pairs(visible, allow_ptr, modality_ptr, query, key, Nq, N, HAS_ALLOW)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(pair, scores, float("-inf"))
            better = tl.maximum(best, tl.max(scores, 1))
            finite = tl.where(better == float("-inf"), 0.0, better)  # exp2(-inf - -inf) is NaN
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(best - finite)
            total = total * shrink + tl.sum(weights, 1)
            if HAS_DROPOUT:
                kept = _kept(tl.load(seed_ptr), owner * Nq + query, key, N, dropout)
                weights = tl.where(kept, weights, 0.0)
            mixed = mixed * shrink[:, None]
            mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = better
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    if HAS_DROPOUT:
        mixed = mixed / (1.0 - dropout)
    place = query[:, None] * (H * DH) + width[None, :]
    out_ptr += (sample * Nq * H + head) * DH
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=q_mask)
    # +inf for a row that sees nothing: backward then gets weights of exactly 0 without a branch
    lse = tl.where(sees, best + tl.log2(total), float("inf"))
    tl.store(lse_ptr + owner * Nq + query, lse, mask=query < Nq)


@triton.jit(do_not_specialize=["Nq", "N", "H"])
def presence_attention_bwd_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    present_ptr,
    modality_ptr,
    allow_ptr,
    seed_ptr,
    scale,
    unscale,
    dropout,
    q_sample,
    q_token,
    q_head,
    k_sample,
    k_token,
    k_head,
    v_sample,
    v_token,
    v_head,
    Nq,
    N,
    H,
    DH: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_ALLOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    owner = tl.program_id(0).to(tl.int64)
    sample, head = owner // H, owner % H
    width = tl.arange(0, BLOCK_DH)
    q_ptr += sample * q_sample + head * q_head
    k_ptr += sample * k_sample + head * k_head
    v_ptr += sample * v_sample + head * v_head
    present_ptr += sample * N
    first_query = (sample * Nq * H + head) * DH
    grad_ptr += first_query
    out_ptr += first_query
    dq_ptr += first_query
    dk_ptr += (sample * N * H + head) * DH
    dv_ptr += (sample * N * H + head) * DH
    lse_ptr += owner * Nq
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        visible = _visible(present_ptr, key, N)
        dk = tl.zeros([BLOCK_N, BLOCK_DH], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DH], tl.float32)
        needed = tl.max(visible.to(tl.int32), 0)
        if ONE_BLOCK:
            needed = 1  # dq is written on the way
        if needed > 0:
            mask = visible[:, None] & (width < DH)[None, :]
            k = tl.load(k_ptr + key[:, None] * k_token + width[None, :], mask=mask, other=0.0)
            v = tl.load(v_ptr + key[:, None] * v_token + width[None, :], mask=mask, other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            for first in range(0, Nq, BLOCK_M):
                query = first + tl.arange(0, BLOCK_M)
                q_mask = (query < Nq)[:, None] & (width < DH)[None, :]
                place = query[:, None] * q_token + width[None, :]
                q = tl.load(q_ptr + place, mask=q_mask, other=0.0)
                place = query[:, None] * (H * DH) + width[None, :]
                grad = tl.load(grad_ptr + place, mask=q_mask, other=0.0)
                out = tl.load(out_ptr + place, mask=q_mask, other=0.0)
                delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
                if UPCAST:
                    q = q.to(tl.float32)
                    grad = grad.to(tl.float32)
                lse = tl.load(lse_ptr + query, mask=query < Nq, other=float("inf"))
                pair = _pairs(visible, allow_ptr, modality_ptr, query, key, Nq, N, HAS_ALLOW)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                weights = tl.exp2(tl.where(pair, scores, float("-inf")) - lse[:, None])
                dweights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                mix = weights
                if HAS_DROPOUT:
                    kept = _kept(tl.load(seed_ptr), owner * Nq + query, key, N, dropout)
                    mix = tl.where(kept, weights / (1.0 - dropout), 0.0)
                    dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)
                dv += tl.dot(tl.trans(mix.to(grad.dtype)), grad, input_precision=PRECISION)
                dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
                dk += tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
                dq = tl.dot(dscores, k, input_precision=PRECISION) * unscale
                if not ONE_BLOCK:  # fp32 scratch that this program alone touches
                    tl.debug_barrier()  # another of its threads may have stored what one loads
                    dq += tl.load(dq_ptr + place, mask=q_mask, other=0.0)
                tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=q_mask)
        # keys that nobody read get zeros: their memory comes from torch.empty
        mask = (key < N)[:, None] & (width < DH)[None, :]
        place = key[:, None] * (H * DH) + width[None, :]
        tl.store(dk_ptr + place, (dk * unscale).to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def presence_attention_forward(
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
    """``out`` like ``q`` but contiguous, and the base-2 log-sum-exp ``(B, H, Nq)`` of each row."""
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    batch, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.fill_(torch.inf)
    tile = pick("attention_fwd", q, size=max(queries, k.shape[1]), width=width)
    grid = (batch * heads * triton.cdiv(queries, tile.constants["BLOCK_M"]),)
    with on_device(q):
        presence_attention_fwd_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            *_visibility(present, lengths, num_context, allow, seed),
            width**-0.5 * _LOG2E,
            dropout,
            *_strides(q, k, v),
            queries,
            k.shape[1],
            heads,
            DH=width,
            BLOCK_DH=max(16, triton.next_power_of_2(width)),
            HAS_ALLOW=allow is not None,
            HAS_DROPOUT=dropout > 0,
            **precision(q),
            **tile.constants,
            **options(tile),
        )
    return out, lse


def presence_attention_backward(
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
    """Contiguous gradients of ``q``, ``k`` and ``v``, the same bits on every run."""
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()  # may come expanded
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    batch, queries, heads, width = q.shape
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if q.numel() == 0 or k.shape[1] == 0:
        return q.new_zeros(q.shape), dk.zero_(), dv.zero_()
    tile = pick("attention_bwd", q, size=max(queries, k.shape[1]), width=width)
    cut = tile.constants
    one_block = k.shape[1] <= cut["BLOCK_N"]
    if one_block:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    with on_device(q):
        presence_attention_bwd_kernel[(batch * heads,)](
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            *_visibility(present, lengths, num_context, allow, seed),
            width**-0.5 * _LOG2E,
            width**-0.5,
            dropout,
            *_strides(q, k, v),
            queries,
            k.shape[1],
            heads,
            DH=width,
            BLOCK_DH=max(16, triton.next_power_of_2(width)),
            ONE_BLOCK=one_block,
            HAS_ALLOW=allow is not None,
            HAS_DROPOUT=dropout > 0,
            **precision(q),
            **cut,
            **options(tile),
        )
    return dq.to(q.dtype), dk, dv


def _visibility(
    present: Tensor,
    lengths: Sequence[int],
    num_context: int,
    allow: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A byte per key; for ``allow`` each token's modality, and its words; and the seed.

    Made on the device: a copy from the host waits, and no CUDA graph can hold one, nor may a table
    outlive the call inside of it.
    """
    visible = visibility(present, lengths or None, num_context).contiguous().view(torch.uint8)
    modality = words = visible  # unused pointers still have to be valid
    if allow is not None:
        num_modalities = allow.shape[1]
        bits = torch.arange(num_modalities, device=allow.device)
        context = 1 << num_modalities
        words = (allow.long() << bits).sum(1) + context
        words = torch.cat([words, words.new_full((1,), 2 * context - 1)])
        sizes = [num_context, *(lengths or [1] * num_modalities)]
        numbers = [num_modalities, *range(num_modalities)]
        parts = [bits.new_full((n,), m) for n, m in zip(sizes, numbers, strict=True)]
        modality = torch.cat(parts).int()  # (N,)
    return visible, modality, words, visible if seed is None else seed.reshape(1).long()


def _addressable(x: Tensor) -> Tensor:
    """Contiguous last axis, and tokens of one head less than 2^31 elements apart."""
    near = x.shape[1] * max(x.stride(1), x.shape[2] * x.shape[3]) < 2**31
    if not near or (x.stride(-1) != 1 and x.shape[-1] != 1):
        x = x.contiguous()
    if x.shape[1] * x.shape[2] * x.shape[3] >= 2**31:
        raise ValueError(
            f"a sample of shape {tuple(x.shape[1:])} has 2^31 elements or more: offsets inside one "
            "sample are 32 bits wide. Use backend='torch'."
        )
    return x


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Sample, token and head strides; int64 in the kernel, since program numbers are."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])
