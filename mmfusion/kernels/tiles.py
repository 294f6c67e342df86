"""Tile sizes: a table that ships with the package, never a search at run time.

``tiles.json`` is written by ``benchmarks/tune.py``; its first version holds what compiles for each
architecture without spilling. A search on the public path would stall first calls and make timings
depend on what else the GPU was doing.
"""

import json
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import torch

__all__ = ["Tile", "table", "tiles"]


class Tile(NamedTuple):
    """One way to cut a problem.

    Attributes:
        constants: Compile-time sizes of the kernel.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    constants: dict[str, int]
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1)
def table() -> list[dict[str, Any]]:
    """All entries, as they stand in the file."""
    return json.loads(resources.files("mmfusion.kernels").joinpath("tiles.json").read_text())[
        "tiles"
    ]


@lru_cache(maxsize=4096)
def tiles(
    op: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    *,
    size: int,
    width: int = 0,
    shared_limit: int = 1 << 30,
) -> Tile:
    """The entry that fits: own or closest lower architecture, smallest sufficient bucket.

    Args:
        op: Name of the kernel family.
        capability: Of the device; an unknown one takes the closest lower entry.
        dtype: Of the operands; both half types share entries.
        size: Length that the kernel cuts (keys for attention, slots for retrieve).
        width: Width of a vector, where it is not looped over.
        shared_limit: Bytes of shared memory a program may use; larger tiles are dropped.

    Raises:
        ValueError: If the table has nothing for the op.

    Example:
        >>> tiles("attention_fwd", (9, 0), torch.bfloat16, size=20, width=64).constants
        {'BLOCK_M': 32, 'BLOCK_N': 32}
    """
    kind = "fp32" if dtype == torch.float32 else "half"
    number = capability[0] * 10 + capability[1]
    rows = [row for row in table() if row["op"] == op and row["dtype"] == kind]
    rows = [row for row in rows if row["shared"] <= shared_limit]
    archs = {row["arch"] for row in rows}
    arch = max((a for a in archs if a <= number), default=min(archs, default=0))
    rows = [row for row in rows if row["arch"] == arch]
    if not rows:
        raise ValueError(
            f"op={op!r} with {shared_limit} bytes of shared memory: the tile table has no entry "
            "for it. Use backend='torch'."
        )
    widths = {row["width"] for row in rows}
    enough = min((w for w in widths if w >= width), default=max(widths))
    rows = [row for row in rows if row["width"] == enough]
    sizes = {row["size"] for row in rows}
    bucket = min((s for s in sizes if s >= size), default=max(sizes))
    row = next(row for row in rows if row["size"] == bucket)
    return Tile(row["constants"], row["num_warps"], row["num_stages"])
