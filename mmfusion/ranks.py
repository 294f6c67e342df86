"""What crosses ranks: gathering rows with their gradient, and sums over the joint batch.

Without a process group every function here is the identity on this process. All of them keep static
shapes: ranks with fewer rows pad, and the padding says it is not real.
"""

from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["first_row", "gather_rows", "joint_mean", "joint_sum", "world_size"]


def world_size() -> int:
    """Ranks in the default process group; 1 without one.

    Example:
        >>> world_size()
        1
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def gather_rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Concatenate each tensor's rows over all ranks, in rank order, differentiably.

    Ranks may hold different numbers of rows. All are padded to the longest, and ``real`` tells rows
    from padding, so that shapes are the same on every rank. The gradient of a gathered row is the
    *sum* of what all ranks send to it.

    Returns:
        The gathered tensors, and ``real`` ``(R,)`` bool, True for rows that exist.

    Shape:
        - each of ``tensors``: ``(B, ...)``, gathered ``(R, ...)`` with ``R = ranks * max B``

    Example:
        >>> (rows,), real = gather_rows(torch.tensor([1.0, 2.0]))
        >>> rows.tolist(), real.tolist()
        ([1.0, 2.0], [True, True])
    """
    rows = tensors[0].shape[0]
    real = torch.ones(rows, dtype=torch.bool, device=tensors[0].device)
    if world_size() == 1:
        return tensors, real
    longest = torch.tensor(rows, device=real.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    missing = int(longest) - rows
    padded = [torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) for x in (*tensors, real)]
    *gathered, real = [_AllGather.apply(x) for x in padded]
    return tuple(gathered), real


def first_row(num_rows: int) -> int:
    """Where this rank's rows start among ``num_rows`` gathered ones.

    Example:
        >>> first_row(8)
        0
    """
    return distributed.get_rank() * (num_rows // world_size()) if world_size() > 1 else 0


def joint_mean(values: Tensor, where: Tensor, gather: bool = True) -> Tensor:
    """Mean of ``values`` where ``where`` holds, over the joint batch of all ranks; 0 if nowhere.

    Each rank returns its share times the number of ranks, so that DDP's averaging of gradients
    gives the gradient of the joint mean, with uneven batches too.

    Shape:
        - ``values``, ``where``: any one shape; the result is a scalar

    Example:
        >>> joint_mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False])).item()
        1.0
    """
    count = where.sum()
    ranks = world_size() if gather else 1
    if ranks > 1:
        distributed.all_reduce(count)
    return torch.where(where, values, 0).sum() * ranks / count.clamp(min=1)


def joint_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, without gradient.

    Example:
        >>> joint_sum(torch.tensor([1.0, 5.0])).tolist()
        [1.0, 5.0]
    """
    (parts,), _ = gather_rows(tensor.detach().unsqueeze(0))
    return parts.sum(0)


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums over ranks: works on every backend, gloo included."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        distributed.all_reduce(total)
        return total.chunk(world_size())[distributed.get_rank()]
