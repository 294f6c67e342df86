"""Gradients of the memory lookup, from the k rows that forward kept: the bank is not read again."""

import triton
import triton.language as tl

__all__ = ["retrieve_bwd_kernel", "retrieve_gather_kernel", "retrieve_scatter_kernel"]

TINY = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["Q"])
def retrieve_bwd_kernel(
    grad_ptr,
    query_ptr,
    near_keys_ptr,
    near_values_ptr,
    weights_ptr,
    dq_ptr,
    alpha_ptr,
    beta_ptr,
    inverse_temperature,
    Q,
    D,
    Dv,
    K,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    WANT_KEYS: tl.constexpr,
):
    """Query gradient of one row; with ``WANT_KEYS``, ``dkey_j = alpha_j query - beta_j key_j``."""
    place = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, KP)
    rows = ((place * K + j) * D)[:, None]
    value_rows = ((place * K + j) * Dv)[:, None]
    depth = tl.arange(0, BLOCK_D)
    weight = tl.load(weights_ptr + place * K + j, mask=j < K, other=0.0)
    answered = tl.sum(weight, 0) > 0  # query and gradient of other rows may hold anything
    product = tl.zeros([KP], tl.float32)
    square_k = tl.zeros([KP], tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    for done in range(0, D, BLOCK_D):
        inside = depth < D - done
        q = query_ptr + place * D + done + depth
        q = tl.load(q, mask=depth < tl.where(answered, D - done, 0), other=0.0).to(tl.float32)
        k = tl.load(
            near_keys_ptr + rows + done + depth[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        product += tl.sum(k * q[None, :], 1)
        square_k += tl.sum(k * k, 1)
        square += q * q
    dweight = tl.zeros([KP], tl.float32)
    for done in range(0, Dv, BLOCK_D):
        inside = depth < Dv - done
        g = grad_ptr + place * Dv + done + depth
        g = tl.load(g, mask=depth < tl.where(answered, Dv - done, 0), other=0.0).to(tl.float32)
        v = tl.load(
            near_values_ptr + value_rows + done + depth[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        dweight += tl.sum(v * g[None, :], 1)
    # delta from the fp32 weights, not from the rounded readout: ten times less error in bf16
    delta = tl.sum(weight * dweight, 0)
    dscore = weight * (dweight - delta) * inverse_temperature
    scale_q = 1.0
    scale_k = tl.full([KP], 1.0, tl.float32)
    along = 0.0  # how much of the gradient points along the query: cosine does not see it
    if COSINE:
        norm = tl.sqrt_rn(tl.sum(square, 0))
        norm_k = tl.sqrt_rn(square_k)
        scale_q = 1.0 / tl.where(norm <= TINY, float("inf"), norm)
        scale_k = 1.0 / tl.where(norm_k <= TINY, float("inf"), norm_k)
        cosine = product * scale_q * scale_k
        along = tl.sum(dscore * cosine, 0) * scale_q
    for done in range(0, D, BLOCK_D):
        inside = depth < D - done
        q = query_ptr + place * D + done + depth
        q = tl.load(q, mask=depth < tl.where(answered, D - done, 0), other=0.0).to(tl.float32)
        k = tl.load(
            near_keys_ptr + rows + done + depth[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        dq = tl.sum((dscore * scale_k)[:, None] * k, 0)
        dq = scale_q * (dq - along * q)
        tl.store(dq_ptr + place * D + done + depth, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    if WANT_KEYS:
        beta = tl.zeros([KP], tl.float32)
        if COSINE:
            beta = dscore * cosine * scale_k * scale_k
        tl.store(alpha_ptr + place * K + j, dscore * scale_q * scale_k, mask=j < K)
        tl.store(beta_ptr + place * K + j, beta, mask=j < K)


@triton.jit(do_not_specialize=["Q", "S"])
def retrieve_scatter_kernel(
    source_ptr,
    coefficient_ptr,
    beta_ptr,
    near_keys_ptr,
    indices_ptr,
    into_ptr,
    Q,
    S,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """``into[slot_j] += coefficient_j * source``, by atomics: fast, sums in any order."""
    place = tl.program_id(0).to(tl.int64)
    bank = place // Q
    j = tl.arange(0, KP)
    depth = tl.arange(0, BLOCK_D)
    slot = tl.load(indices_ptr + place * K + j, mask=j < K, other=-1)
    coefficient = tl.load(coefficient_ptr + place * K + j, mask=j < K, other=0.0)
    found = (slot >= 0)[:, None]
    into = into_ptr + (bank * S + tl.maximum(slot, 0))[:, None] * D + depth[None, :]
    near = near_keys_ptr + ((place * K + j) * D)[:, None] + depth[None, :]
    if HAS_BETA:
        beta = tl.load(beta_ptr + place * K + j, mask=j < K, other=0.0)
    answered = tl.max(slot, 0) >= 0  # the source of other rows may hold anything
    for done in range(0, tl.where(answered, D, 0), BLOCK_D):
        mask = found & (depth < D - done)[None, :]
        source = tl.load(source_ptr + place * D + done + depth, mask=depth < D - done, other=0.0)
        part = coefficient[:, None] * source.to(tl.float32)[None, :]
        if HAS_BETA:
            k = tl.load(near + done, mask=mask, other=0.0).to(tl.float32)
            part -= beta[:, None] * k
        tl.atomic_add(into + done, part, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["Q", "S"])
def retrieve_gather_kernel(
    source_ptr,
    coefficient_ptr,
    beta_ptr,
    near_keys_ptr,
    order_ptr,
    starts_ptr,
    into_ptr,
    Q,
    S,
    D,
    K,
    BLOCK_D: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """The same sums, one program per slot in sorted order: the same bits on every run."""
    program = tl.program_id(0).to(tl.int64)
    bank, slot = program // S, program % S
    start = tl.load(starts_ptr + bank * (S + 1) + slot)
    stop = tl.load(starts_ptr + bank * (S + 1) + slot + 1)
    first = bank * Q * K
    depth = tl.arange(0, BLOCK_D)
    if start < stop:
        for done in range(0, D, BLOCK_D):
            inside = depth < D - done
            into = into_ptr + program * D + done + depth
            total = tl.load(into, mask=inside, other=0.0)
            for place in range(start, stop):
                entry = first + tl.load(order_ptr + first + place)
                source = source_ptr + entry // K * D + done + depth
                source = tl.load(source, mask=inside, other=0.0).to(tl.float32)
                total += tl.load(coefficient_ptr + entry) * source
                if HAS_BETA:
                    k = tl.load(near_keys_ptr + entry * D + done + depth, mask=inside, other=0.0)
                    total -= tl.load(beta_ptr + entry) * k.to(tl.float32)
            tl.store(into, total, mask=inside)
