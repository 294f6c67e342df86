"""A score and its index in one sortable integer.

The high half orders like the fp32 score, the low half holds the index reversed: one integer sort
carries the index along, and equal scores go to the lowest index whatever the schedule was.
"""

import triton
import triton.language as tl

__all__ = ["merge_best", "pack", "packed_index", "packed_score"]


@triton.jit
def pack(score, index):
    """int64 that sorts like ``score``; among equals the lowest ``index`` is the largest."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards as integers
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def packed_score(packed):
    """The score; not above -inf where nothing was packed."""
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed_index(packed):
    """The index, int64."""
    return 0xFFFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def merge_best(best, packed, KP: tl.constexpr):
    """The ``KP`` largest of both along the last axis, largest first."""
    if packed.shape[len(packed.shape) - 1] > KP:
        packed = tl.topk(packed, KP)
    both = tl.join(best, packed)
    if len(best.shape) == 1:
        return tl.topk(tl.reshape(both, [2 * KP]), KP)
    else:
        return tl.topk(tl.reshape(both, [best.shape[0], 2 * KP]), KP)
