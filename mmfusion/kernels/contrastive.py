"""The class contrastive loss in Triton without the (A, C) matrix of scores.

Forward walks over the columns in blocks and keeps per anchor the log-sum-exp of its scores, the sum
of its positive scores and how many there are. Backward recomputes each block of scores from the
log-sum-exp: one kernel owns rows of the anchors' gradient, and with the operands exchanged it owns
rows of the columns' gradient, so nothing needs atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfusion.kernels.launch import on_device, options, pick, precision

__all__ = ["contrastive_backward", "contrastive_forward"]

_LOG2E = 1.4426950408889634


@triton.jit
def _block_scores(
    row_ptr,
    column_ptr,
    row,
    column,
    R,
    C,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 products of two blocks of vectors."""
    depth = tl.arange(0, BLOCK_D)
    scores = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, D, BLOCK_D):
        inside = (depth < D - done)[None, :]
        a = tl.load(
            row_ptr + row[:, None] * D + done + depth[None, :],
            mask=(row < R)[:, None] & inside,
            other=0.0,
        )
        b = tl.load(
            column_ptr + column[:, None] * D + done + depth[None, :],
            mask=(column < C)[:, None] & inside,
            other=0.0,
        )
        scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["R", "C", "start"])
def contrastive_fwd_kernel(
    row_ptr,
    column_ptr,
    row_label_ptr,
    column_label_ptr,
    used_ptr,
    real_ptr,
    lse_ptr,
    positive_ptr,
    number_ptr,
    scale,
    start,
    R,
    C,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = tl.load(used_ptr + row, mask=row < R, other=0) != 0
    label = tl.load(row_label_ptr + row, mask=row < R, other=0)
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    positive = tl.zeros([BLOCK_R], tl.float32)
    number = tl.zeros([BLOCK_R], tl.float32)
    if tl.max(used.to(tl.int32), 0) > 0:
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C).to(tl.int64)
            real = tl.load(real_ptr + column, mask=column < C, other=0) != 0
            if tl.max(real.to(tl.int32), 0) > 0:
                scores = _block_scores(
                    row_ptr, column_ptr, row, column, R, C, D, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
                )
                other = tl.load(column_label_ptr + column, mask=column < C, other=0)
                countable = real[None, :] & ((row + start)[:, None] != column[None, :])
                countable = countable & used[:, None]
                same = countable & (label[:, None] == other[None, :])
                positive += tl.sum(tl.where(same, scores, 0.0), 1)
                number += tl.sum(same.to(tl.float32), 1)
                scores = tl.where(countable, scores * scale, float("-inf"))  # base 2
                better = tl.maximum(best, tl.max(scores, 1))
                finite = tl.where(better == float("-inf"), 0.0, better)
                total = total * tl.exp2(best - finite)
                total += tl.sum(tl.exp2(scores - finite[:, None]), 1)
                best = better
    empty = total == 0
    lse = tl.where(empty, float("inf"), best + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + row, lse, mask=row < R)
    tl.store(positive_ptr + row, positive, mask=row < R)
    tl.store(number_ptr + row, number, mask=row < R)


@triton.jit(do_not_specialize=["R", "C", "start"])
def contrastive_bwd_kernel(
    row_ptr,
    column_ptr,
    row_label_ptr,
    column_label_ptr,
    used_ptr,
    real_ptr,
    lse_ptr,
    weight_ptr,
    number_ptr,
    drow_ptr,
    scale,
    inverse_temperature,
    start,
    R,
    C,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ANCHORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of rows, ``BLOCK_O`` features of it: rows are anchors, or else columns.

    ``used``, ``lse``, ``weight`` and ``number`` belong to the anchors, ``real`` to the columns.
    """
    parts = tl.cdiv(D, BLOCK_O)
    program = tl.program_id(0).to(tl.int64)
    row = program // parts * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = (program % parts * BLOCK_O).to(tl.int32) + tl.arange(0, BLOCK_O)
    label = tl.load(row_label_ptr + row, mask=row < R, other=0)
    if ANCHORS:
        active = tl.load(used_ptr + row, mask=row < R, other=0) != 0
        lse = tl.load(lse_ptr + row, mask=row < R, other=float("inf"))[:, None]
        weight = tl.load(weight_ptr + row, mask=row < R, other=0.0)[:, None]
        number = tl.load(number_ptr + row, mask=row < R, other=1.0)[:, None]
    else:
        active = tl.load(real_ptr + row, mask=row < R, other=0) != 0
    drow = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    if tl.max(active.to(tl.int32), 0) > 0:
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C).to(tl.int64)
            if ANCHORS:
                other_active = tl.load(real_ptr + column, mask=column < C, other=0) != 0
            else:
                other_active = tl.load(used_ptr + column, mask=column < C, other=0) != 0
                lse = tl.load(lse_ptr + column, mask=column < C, other=float("inf"))[None, :]
                weight = tl.load(weight_ptr + column, mask=column < C, other=0.0)[None, :]
                number = tl.load(number_ptr + column, mask=column < C, other=1.0)[None, :]
            if tl.max(other_active.to(tl.int32), 0) > 0:
                scores = _block_scores(
                    row_ptr, column_ptr, row, column, R, C, D, BLOCK_R, BLOCK_C, BLOCK_D, PRECISION
                )
                other = tl.load(column_label_ptr + column, mask=column < C, other=0)
                if ANCHORS:
                    countable = (row + start)[:, None] != column[None, :]
                else:
                    countable = row[:, None] != (column + start)[None, :]
                countable = countable & active[:, None] & other_active[None, :]
                same = countable & (label[:, None] == other[None, :])
                share = tl.exp2(tl.where(countable, scores * scale, float("-inf")) - lse)
                dscores = weight * (share - tl.where(same, 1.0 / number, 0.0))
                vector = tl.load(
                    column_ptr + column[:, None] * D + feature[None, :],
                    mask=other_active[:, None] & (feature < D)[None, :],  # others may hold NaN
                    other=0.0,
                )
                drow = tl.dot(dscores, vector, drow, input_precision=PRECISION)
    mask = (row < R)[:, None] & (feature < D)[None, :]
    tl.store(drow_ptr + row[:, None] * D + feature[None, :], drow * inverse_temperature, mask=mask)


def contrastive_forward(
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
    start: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per anchor: loss (A,) fp32, base-2 log-sum-exp, and number of positives."""
    rows = _rows(anchors, columns, labels, column_labels, used, real)
    new: dict[str, Any] = {"dtype": torch.float32, "device": anchors.device}
    lse, positive, number = (torch.empty(len(anchors), **new) for _ in range(3))
    if len(anchors):
        tile = pick("contrastive_fwd", rows[0], size=len(anchors))
        with on_device(anchors):
            contrastive_fwd_kernel[(triton.cdiv(len(anchors), tile.constants["BLOCK_R"]),)](
                *rows,
                lse,
                positive,
                number,
                _LOG2E / temperature,
                start,
                len(anchors),
                len(columns),
                anchors.shape[1],
                PRECISION=precision(rows[0])["PRECISION"],
                **tile.constants,
                **options(tile),
            )
    mean = positive / (temperature * number.clamp(min=1))
    return torch.where(number > 0, lse / _LOG2E - mean, 0), lse, number


def contrastive_backward(
    grad: Tensor,
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
    lse: Tensor,
    number: Tensor,
    start: int,
    temperature: float,
    want_columns: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the anchors and, if wanted, the columns."""
    a, c, label, column_label, used, real = _rows(
        anchors, columns, labels, column_labels, used, real
    )
    weight = torch.where(number > 0, grad, 0).float().contiguous()
    number = number.clamp(min=1).contiguous()
    danchors = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    dcolumns = torch.empty(c.shape if want_columns else (0,), dtype=torch.float32, device=a.device)
    jobs = [(True, a, c, label, column_label, danchors)]
    if want_columns:
        jobs.append((False, c, a, column_label, label, dcolumns))
    tile = pick("contrastive_bwd", a, size=len(a))
    cut = tile.constants
    for is_anchors, rows, others, row_label, other_label, into in jobs:
        grid = triton.cdiv(len(rows), cut["BLOCK_R"]) * triton.cdiv(a.shape[1], cut["BLOCK_O"])
        if not grid:
            continue
        with on_device(a):
            contrastive_bwd_kernel[(grid,)](
                rows,
                others,
                row_label,
                other_label,
                used,
                real,
                lse.contiguous(),
                weight,
                number,
                into,
                _LOG2E / temperature,
                1 / temperature,
                start,
                len(rows),
                len(others),
                a.shape[1],
                ANCHORS=is_anchors,
                PRECISION=precision(a)["PRECISION"],
                **cut,
                **options(tile),
            )
    return danchors.to(anchors.dtype), dcolumns.to(columns.dtype)


def _rows(
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
) -> tuple[Tensor, ...]:
    """Contiguous fp32 vectors, int64 labels, and bytes."""
    return (
        anchors.float().contiguous(),
        columns.float().contiguous(),
        labels.long().contiguous(),
        column_labels.long().contiguous(),
        used.contiguous().view(torch.uint8),
        real.contiguous().view(torch.uint8),
    )
