"""Buffers that count or number things keep their type when a model is cast."""

from torch import Tensor

__all__ = ["uncast"]


def uncast(before: Tensor, after: Tensor) -> Tensor:
    """``before`` on the device of ``after``, if the two differ in type; else ``after``.

    For ``_apply``, through which a module is moved and cast: bfloat16 has no 257, and float16 no
    number above 65504.

    Example:
        >>> import torch
        >>> uncast(torch.tensor(257.0), torch.tensor(257.0).bfloat16()).item()
        257.0
    """
    return after if after.dtype == before.dtype else before.to(after.device)
