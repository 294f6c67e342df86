"""What every launcher needs: the device to launch on, the tile, and the precision of products."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from mmfusion.kernels.tiles import Tile, tiles

__all__ = ["interpreted", "on_device", "options", "pick", "precision"]

NEWEST = (9, 0)  # what the interpreter pretends to be
_EVERY_BYTE = 1 << 30


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the *current* device; make it that of ``tensor``."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not interpreted():
        raise RuntimeError(
            f"the tensors are on {tensor.device.type}: fused kernels run on CUDA devices. Move the "
            "tensors, or use backend='torch'."
        )
    return nullcontext()


@lru_cache(maxsize=64)
def _limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory that a program may use."""
    if device.type != "cuda":
        return NEWEST, _EVERY_BYTE
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise RuntimeError(
            f"compute capability {capability[0]}.{capability[1]} < 8.0: the fused kernels need "
            "Ampere or newer. Use backend='torch'."
        )
    properties = torch.cuda.get_device_properties(device)
    return capability, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def pick(op: str, tensor: Tensor, *, size: int, width: int = 0) -> Tile:
    """The tile of ``op`` for a problem of this size on the tensor's device."""
    capability, limit = _limits(tensor.device)
    return tiles(op, capability, tensor.dtype, size=size, width=width, shared_limit=limit)


def precision(tensor: Tensor) -> dict[str, Any]:
    """Compile-time constants that say how products are taken.

    Three tf32 products are as good as fp32; one, Triton's default, errs by 1e-3 and would lose
    neighbours. The interpreter multiplies the raw bits of bf16 (triton#11584), so it gets fp32.
    """
    return {"PRECISION": "tf32x3", "UPCAST": interpreted() and tensor.dtype == torch.bfloat16}


def options(tile: Tile) -> dict[str, Any]:
    """Launch options; the fusion flag is explicit because its default changes between versions."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
