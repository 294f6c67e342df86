"""Exact memory lookup in Triton without the (Q, S) matrix.

The k best slots all lie in the k groups of slots with the largest group maximum, otherwise k other
groups would each hold something better. So the pass over the bank (``pool``) keeps one maximum per
group, and one per tile of groups; ``select`` applies the same argument twice, to tiles and then to
the groups inside them; ``read`` scores the slots of k groups again, exactly, and mixes values.
``stream`` replaces pool and select where the maxima would not fit or launches cost more than work:
it keeps a running best per query. Grouping the maximum before top-k: Chern et al., "TPU-KNN",
NeurIPS 2022, there approximate; here rescoring makes it exact.
"""

import triton
import triton.language as tl

from mmfusion.kernels.packed import merge_best, pack, packed_index, packed_score

__all__ = [
    "retrieve_merge_kernel",
    "retrieve_pool_kernel",
    "retrieve_read_kernel",
    "retrieve_select_kernel",
    "retrieve_stream_kernel",
]

_UNSPECIALISED = ["Q", "S", "P", "first", "tiles", "splits", "per_split"]
TINY = tl.constexpr(1e-12)  # a vector this short has no direction: it scores 0


@triton.jit
def _rows(order_ptr, wanted_ptr, bank, position, Q, HAS_ORDER: tl.constexpr, WANTED: tl.constexpr):
    """Query row at each position, and whether it is to be answered."""
    row = position
    if HAS_ORDER:  # wanted rows first, so that they fill whole tiles
        row = tl.load(order_ptr + bank * Q + position, mask=position < Q, other=0)
    asked = position < Q
    if WANTED:
        asked = tl.load(wanted_ptr + bank * Q + row, mask=asked, other=0) != 0
    return row, asked


@triton.jit
def _scores(
    query_ptr,
    keys_ptr,
    scale_ptr,
    exclude_ptr,
    ids_ptr,
    row,
    asked,
    start,
    end,
    D,
    keys_slot,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 scores of one tile up to the query's norm; -inf for slots that must not be read.

    Pointers stand at the bank. The query's norm does not change the order of a row.
    """
    depth = tl.arange(0, BLOCK_D)
    local = tl.arange(0, BLOCK_S)
    slot = start + local
    usable = slot < end
    q_place = query_ptr + row[:, None] * D + depth[None, :]
    k_place = keys_ptr + start * keys_slot + (local[:, None] * keys_slot + depth[None, :])
    scores = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for done in range(0, D, BLOCK_D):
        inside = depth < D - done
        q = tl.load(q_place, mask=asked[:, None] & inside[None, :], other=0.0)
        k = tl.load(k_place, mask=usable[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        q_place += BLOCK_D
        k_place += BLOCK_D
    if COSINE:
        scores = scores * tl.load(scale_ptr + slot, mask=usable, other=0.0)[None, :]
    allowed = usable[None, :]
    if EXCLUDE == 1:
        own = tl.load(exclude_ptr + row, mask=asked, other=-1)
        allowed = allowed & (own[:, None] != slot[None, :])
    if EXCLUDE == 2:
        asker = tl.load(exclude_ptr + row, mask=asked, other=-1)
        owner = tl.load(ids_ptr + slot, mask=usable, other=-1)
        allowed = allowed & ((asker[:, None] != owner[None, :]) | (asker < 0)[:, None])
    return tl.where(allowed, scores, float("-inf"))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def retrieve_pool_kernel(
    query_ptr,
    keys_ptr,
    scale_ptr,
    exclude_ptr,
    ids_ptr,
    held_ptr,
    order_ptr,
    wanted_ptr,
    maxima_ptr,
    tops_ptr,
    first,
    P,
    Q,
    S,
    D,
    keys_bank,
    keys_slot,
    tiles,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    RASTER: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANTED: tl.constexpr,
    COSINE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum of every group (M, P, tiles * groups) and of every tile (M, P, tiles)."""
    PER_TILE: tl.constexpr = BLOCK_S // GROUP
    program = tl.program_id(0).to(tl.int64)
    row_tiles = tl.cdiv(P, BLOCK_Q).to(tl.int64)
    bank, rest = program // (row_tiles * tiles), program % (row_tiles * tiles)
    # neighbours in time share key tiles, and their query tiles stay in L2
    corner = rest // (RASTER * tiles) * RASTER
    height = tl.minimum(row_tiles - corner, RASTER)
    tile = rest % (RASTER * tiles) // height
    local = (corner + rest % (RASTER * tiles) % height) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    end = tl.minimum(tl.load(held_ptr + bank), S)
    row, asked = _rows(order_ptr, wanted_ptr, bank, first + local, Q, HAS_ORDER, WANTED)
    asked = asked & (local < P)
    if (tl.max(asked.to(tl.int32), 0) > 0) & (tile * BLOCK_S < end):
        scores = _scores(
            query_ptr + bank * Q * D,
            keys_ptr + bank * keys_bank,
            scale_ptr + bank * S,
            exclude_ptr + bank * Q,
            ids_ptr + bank * S,
            row,
            asked,
            tile * BLOCK_S,
            end,
            D,
            keys_slot,
            BLOCK_Q,
            BLOCK_S,
            BLOCK_D,
            COSINE,
            EXCLUDE,
            UPCAST,
            PRECISION,
        )
        # members of a group lie PER_TILE columns apart: a thread holds most of them itself
        maxima = tl.max(tl.reshape(scores, [BLOCK_Q, GROUP, PER_TILE]), 1)
        place = (bank * P + local) * tiles + tile
        group = tl.arange(0, PER_TILE)
        mask = asked[:, None] & (group < PER_TILE)[None, :]
        tl.store(maxima_ptr + place[:, None] * PER_TILE + group[None, :], maxima, mask=mask)
        tl.store(tops_ptr + place, tl.max(maxima, 1), mask=asked)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def retrieve_select_kernel(
    maxima_ptr,
    tops_ptr,
    groups_ptr,
    held_ptr,
    order_ptr,
    wanted_ptr,
    first,
    P,
    Q,
    S,
    tiles,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANTED: tl.constexpr,
):
    """The ``KP`` groups (M, P, KP) with the largest maxima of each query, -1 where none."""
    PER_TILE: tl.constexpr = BLOCK_S // GROUP
    program = tl.program_id(0).to(tl.int64)
    bank, local = program // P, program % P
    _, asked = _rows(order_ptr, wanted_ptr, bank, first + local, Q, HAS_ORDER, WANTED)
    if asked:
        end = tl.minimum(tl.load(held_ptr + bank), S)
        used = tl.cdiv(end, BLOCK_S)
        lane = tl.arange(0, BLOCK_T)
        best = tl.full([KP], -(2**63), tl.int64)
        for start in range(0, used, BLOCK_T):
            tile = start + lane
            top = tl.load(tops_ptr + program * tiles + tile, mask=tile < used, other=float("-inf"))
            best = merge_best(best, pack(top, tile), KP)
        tile = packed_index(best)
        group = tl.arange(0, PER_TILE)
        number = tile[:, None] * PER_TILE + group[None, :]
        real = (packed_score(best) > float("-inf"))[:, None] & (group < PER_TILE)[None, :]
        maxima = tl.load(
            maxima_ptr + program * tiles * PER_TILE + number, mask=real, other=float("-inf")
        )
        best = tl.topk(tl.reshape(pack(maxima, number), [KP * PER_TILE]), KP)
        found = tl.where(packed_score(best) > float("-inf"), packed_index(best), -1)
        tl.store(groups_ptr + program * KP + tl.arange(0, KP), found.to(tl.int32))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def retrieve_stream_kernel(
    query_ptr,
    keys_ptr,
    scale_ptr,
    exclude_ptr,
    ids_ptr,
    held_ptr,
    order_ptr,
    wanted_ptr,
    packed_ptr,
    groups_ptr,
    first,
    P,
    Q,
    S,
    D,
    keys_bank,
    keys_slot,
    splits,
    per_split,
    KP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANTED: tl.constexpr,
    COSINE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running best groups of a share of the bank: packed (M, P, splits, KP), or groups at once."""
    PER_TILE: tl.constexpr = BLOCK_S // GROUP
    program = tl.program_id(0).to(tl.int64)
    split, rest = program % splits, program // splits
    row_tiles = tl.cdiv(P, BLOCK_Q).to(tl.int64)
    bank = rest // row_tiles
    local = rest % row_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    end = tl.minimum(tl.load(held_ptr + bank), S)
    row, asked = _rows(order_ptr, wanted_ptr, bank, first + local, Q, HAS_ORDER, WANTED)
    asked = asked & (local < P)
    if tl.max(asked.to(tl.int32), 0) > 0:
        best = tl.full([BLOCK_Q, KP], -(2**63), tl.int64)
        last = tl.minimum((split + 1) * per_split, tl.cdiv(end, BLOCK_S))
        for tile in range(split * per_split, last):
            scores = _scores(
                query_ptr + bank * Q * D,
                keys_ptr + bank * keys_bank,
                scale_ptr + bank * S,
                exclude_ptr + bank * Q,
                ids_ptr + bank * S,
                row,
                asked,
                tile * BLOCK_S,
                end,
                D,
                keys_slot,
                BLOCK_Q,
                BLOCK_S,
                BLOCK_D,
                COSINE,
                EXCLUDE,
                UPCAST,
                PRECISION,
            )
            maxima = tl.max(tl.reshape(scores, [BLOCK_Q, GROUP, PER_TILE]), 1)
            number = tile * PER_TILE + tl.arange(0, PER_TILE)
            best = merge_best(best, pack(maxima, number[None, :]), KP)
        lane = tl.arange(0, KP)[None, :]
        if ONE_SPLIT:
            found = tl.where(packed_score(best) > float("-inf"), packed_index(best), -1)
            place = (bank * P + local)[:, None] * KP + lane
            tl.store(groups_ptr + place, found.to(tl.int32), mask=asked[:, None] & (lane < KP))
        else:
            place = ((bank * P + local) * splits + split)[:, None] * KP + lane
            tl.store(packed_ptr + place, best, mask=asked[:, None] & (lane < KP))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def retrieve_merge_kernel(
    packed_ptr,
    groups_ptr,
    order_ptr,
    wanted_ptr,
    first,
    P,
    Q,
    splits,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANTED: tl.constexpr,
):
    """The ``KP`` best groups over all shares of the bank."""
    program = tl.program_id(0).to(tl.int64)
    bank, local = program // P, program % P
    _, asked = _rows(order_ptr, wanted_ptr, bank, first + local, Q, HAS_ORDER, WANTED)
    if asked:
        best = tl.full([KP], -(2**63), tl.int64)
        lane = tl.arange(0, BLOCK_T)
        for start in range(0, splits * KP, BLOCK_T):
            there = start + lane < splits * KP
            packed = tl.load(
                packed_ptr + program * splits * KP + start + lane, mask=there, other=-(2**63)
            )
            best = merge_best(best, packed, KP)
        found = tl.where(packed_score(best) > float("-inf"), packed_index(best), -1)
        tl.store(groups_ptr + program * KP + tl.arange(0, KP), found.to(tl.int32))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def retrieve_read_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    groups_ptr,
    exclude_ptr,
    ids_ptr,
    held_ptr,
    order_ptr,
    wanted_ptr,
    readout_ptr,
    weights_ptr,
    indices_ptr,
    near_keys_ptr,
    near_values_ptr,
    inverse_temperature,
    first,
    P,
    Q,
    S,
    D,
    Dv,
    K,
    keys_bank,
    keys_slot,
    values_bank,
    values_slot,
    KP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANTED: tl.constexpr,
    COSINE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Score the slots of the chosen groups in fp32, take the exact top-k, mix their values.

    ``SAVE`` keeps the rows that were read: a bank may be overwritten before backward runs.
    """
    PER_TILE: tl.constexpr = BLOCK_S // GROUP
    program = tl.program_id(0).to(tl.int64)
    bank, local = program // P, program % P
    row, asked = _rows(order_ptr, wanted_ptr, bank, first + local, Q, HAS_ORDER, WANTED)
    end = tl.minimum(tl.load(held_ptr + bank), S)
    place = bank * Q + row
    depth = tl.arange(0, BLOCK_D)
    query_ptr += place * D
    keys_ptr += bank * keys_bank
    asker = tl.full([], -1, tl.int64)
    if EXCLUDE > 0:
        asker = tl.load(exclude_ptr + place)
    square = tl.zeros([BLOCK_D], tl.float32)
    for done in range(0, D, BLOCK_D):
        q = tl.load(query_ptr + done + depth, mask=depth < D - done, other=0.0).to(tl.float32)
        square += q * q
    norm = tl.sqrt_rn(tl.sum(square, 0))
    query_scale = 1.0 / tl.where(norm <= TINY, float("inf"), norm) if COSINE else 1.0

    lane = tl.arange(0, BLOCK_C)
    best = tl.full([KP], -(2**63), tl.int64)
    candidates = tl.where(asked, K * GROUP, 0)
    for start in range(0, candidates, BLOCK_C):
        number = start + lane
        group = tl.load(
            groups_ptr + program * KP + number // GROUP, mask=number < candidates, other=-1
        ).to(tl.int64)
        slot = group // PER_TILE * BLOCK_S + number % GROUP * PER_TILE + group % PER_TILE
        allowed = (group >= 0) & (slot < end)
        if EXCLUDE == 1:
            allowed = allowed & (slot != asker)
        if EXCLUDE == 2:
            owner = tl.load(ids_ptr + bank * S + slot, mask=allowed, other=-1)
            allowed = allowed & ((owner != asker) | (asker < 0))
        product = tl.zeros([BLOCK_C], tl.float32)
        square_k = tl.zeros([BLOCK_C], tl.float32)
        for done in range(0, D, BLOCK_D):
            inside = depth < D - done
            q = tl.load(query_ptr + done + depth, mask=inside, other=0.0).to(tl.float32)
            k = tl.load(
                keys_ptr + slot[:, None] * keys_slot + done + depth[None, :],
                mask=allowed[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            product += tl.sum(k * q[None, :], 1)
            square_k += tl.sum(k * k, 1)
        score = product
        if COSINE:
            norm_k = tl.sqrt_rn(square_k)
            score = product * query_scale / tl.where(norm_k <= TINY, float("inf"), norm_k)
        score = tl.where(allowed, score, float("-inf"))
        best = merge_best(best, pack(score, tl.where(allowed, slot, 0)), KP)

    j = tl.arange(0, KP)
    score = packed_score(best)
    found = (score > float("-inf")) & (j < K)
    slot = tl.where(found, packed_index(best), 0)
    score = tl.where(found, score, float("-inf"))
    top = tl.max(score, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((score - top) * inverse_temperature)
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    tl.store(weights_ptr + place * K + j, weight, mask=j < K)
    tl.store(indices_ptr + place * K + j, tl.where(found, slot, -1), mask=j < K)

    values_ptr += bank * values_bank
    for done in range(0, Dv, BLOCK_D):
        inside = depth < Dv - done
        value = tl.load(
            values_ptr + slot[:, None] * values_slot + done + depth[None, :],
            mask=found[:, None] & inside[None, :],
            other=0.0,
        )
        mixed = tl.sum(weight[:, None] * value.to(tl.float32), 0)
        mixed = mixed.to(readout_ptr.dtype.element_ty)
        tl.store(readout_ptr + place * Dv + done + depth, mixed, mask=inside)
        if SAVE:
            near = near_values_ptr if HAS_VALUES else near_keys_ptr
            into = (place * K + j)[:, None] * Dv + done + depth[None, :]
            tl.store(near + into, value, mask=(j < K)[:, None] & inside[None, :])
    if SAVE and HAS_VALUES:
        for done in range(0, D, BLOCK_D):
            inside = depth < D - done
            k = tl.load(
                keys_ptr + slot[:, None] * keys_slot + done + depth[None, :],
                mask=found[:, None] & inside[None, :],
                other=0.0,
            )
            into = (place * K + j)[:, None] * D + done + depth[None, :]
            tl.store(near_keys_ptr + into, k, mask=(j < K)[:, None] & inside[None, :])
