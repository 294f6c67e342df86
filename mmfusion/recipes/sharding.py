"""Weights that FSDP2 has split over ranks: whole for a file, split again from one."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is split over ranks, of which each has to ask; any other as it is.

    Example:
        >>> import torch
        >>> whole(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Split a whole tensor as ``pattern`` is split, on every rank; as it is where that is whole.

    Example:
        >>> import torch
        >>> split_like(torch.ones(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, ranks may call the model as often as each of them likes.

    Args:
        model: Split as one piece (``no_wrap``), or not at all.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> with gathered(model):
        ...     tuple(model(torch.ones(3, 1)).shape)
        (3, 1)
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
