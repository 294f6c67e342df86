"""Write the tile table that ships with the package.

Every entry has a list of candidates in order of preference. Without a GPU (``--compile-only``) the
first one that compiles without spilling is kept; on a GPU the ones that do not spill and whose
results are right are timed, and the fastest is kept for that architecture. The table says how it
was made; a reviewer sees the difference.

    TRITON_INTERPRET=0 python benchmarks/tune.py --compile-only
    python benchmarks/tune.py --only attention
"""

import argparse
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import compile_tiles
import harness
import torch
import triton

import mmfusion
from mmfusion.kernels import tiles as shipped

TABLE = Path(shipped.__file__).with_name("tiles.json")


def candidates() -> list[list[dict[str, Any]]]:
    """For each entry of the table, what may stand in it, best guess first."""
    return [
        entry
        for arch in (80, 90)
        for dtype in ("half", "fp32")
        for entry in (*_attention(arch, dtype), *_retrieve(arch, dtype), *_contrastive(arch, dtype))
    ]


def _entry(op: str, arch: int, dtype: str, size: int, width: int, choices: list[Any]) -> list[Any]:
    return [
        {
            "op": op,
            "arch": arch,
            "dtype": dtype,
            "size": size,
            "width": width,
            "constants": constants,
            "num_warps": warps,
            "num_stages": stages,
            "shared": 0,
        }
        for constants, warps, stages in choices
    ]


def _attention(arch: int, dtype: str) -> list[list[dict[str, Any]]]:
    def block(m: int, n: int) -> dict[str, int]:
        return {"BLOCK_M": m, "BLOCK_N": n}

    if dtype == "fp32":  # wider heads spill: three tf32 products keep split operands in registers
        small = [(block(16, 16), 4, 1), (block(16, 16), 8, 1), (block(32, 32), 8, 1)]
        large = [(block(32, 32), 4, 1), (block(32, 32), 8, 1), (block(16, 32), 8, 1)]
        return [
            _entry(op, arch, dtype, size, 64, choices)
            for size, choices in ((16, small), (512, large))
            for op in ("attention_fwd", "attention_bwd")
        ]
    entries = []
    for width in (64, 128):
        for size in (16, 32, 64, 512):
            side = min(size, 64)
            warps = side // 16
            stages = 2 if size > 64 else 1
            shapes = [(side, side), (max(16, side // 2), side)]
            forward = [(block(*x), w, stages) for w in (warps, 2 * warps) for x in shapes]
            tall = [(block(side, side), warps, 1), (block(*shapes[1]), warps, 1)]
            taller = [(block(*x), w, 1) for w in (2 * warps, 4 * warps) for x in shapes]
            backward = taller if width == 128 else tall + taller
            entries.append(_entry("attention_fwd", arch, dtype, size, width, forward))
            entries.append(_entry("attention_bwd", arch, dtype, size, width, backward))
    return entries


def _retrieve(arch: int, dtype: str) -> list[list[dict[str, Any]]]:
    def cut(q: int, s: int, d: int) -> dict[str, int]:
        return {"BLOCK_Q": q, "BLOCK_S": s, "BLOCK_D": d}

    wide = 64 if (dtype, arch) == ("half", 90) else 32
    pools = [(cut(128, 128, d), 8, 3) for d in dict.fromkeys((wide, 32))]
    pools += [(cut(128, 64, 32), 8, 3), (cut(64, 64, 32), 4, 3)]
    few = [(cut(32, 128, 64), 4, 3), (cut(32, 128, 32), 4, 3), (cut(32, 64, 32), 4, 2)]
    entries = [
        _entry("retrieve_pool", arch, dtype, 32, 0, few),
        _entry("retrieve_pool", arch, dtype, 128, 0, pools),
    ]
    for padded_k in (16, 64):
        group = {16: 8, 64: 2}[padded_k]
        streams = [
            (cut(q, s, d) | {"GROUP": g}, warps, 2)
            for q, s, d, g, warps in (
                (32, 128, 32, group, 8),
                (32, 64, 32, max(1, group // 2), 8),
                (16, 128, 32, group, 8),
                (16, 64, 32, max(1, group // 2), 8),
                (16, 64, 32, max(1, group // 2), 4),
            )
        ]
        reads = [({"BLOCK_C": 64, "BLOCK_D": d}, w, 1) for d in (64, 32) for w in (4, 8)]
        merges = [({"BLOCK_T": t}, w, 1) for t in (256, 128, 512) for w in (4, 2, 8)]
        backs = [({"BLOCK_D": d}, w, 1) for d in (64, 32) for w in (4, 8)]
        entries += [
            _entry("retrieve_stream", arch, dtype, padded_k, 0, streams),
            _entry("retrieve_select", arch, dtype, padded_k, 0, merges),
            _entry("retrieve_merge", arch, dtype, padded_k, 0, merges),
            _entry("retrieve_read", arch, dtype, padded_k, 0, reads),
            _entry("retrieve_bwd", arch, dtype, padded_k, 0, backs),
        ]
    return entries


def _contrastive(arch: int, dtype: str) -> list[list[dict[str, Any]]]:
    if dtype != "fp32":
        return []
    sizes = [(64, 64, 32, 8), (64, 64, 16, 8), (64, 32, 32, 8), (32, 64, 32, 8), (32, 32, 32, 4)]
    forward = [({"BLOCK_R": r, "BLOCK_C": c, "BLOCK_D": d}, w, 2) for r, c, d, w in sizes]
    backward = [
        ({"BLOCK_R": r, "BLOCK_C": c, "BLOCK_D": d, "BLOCK_O": o}, w, 1)
        for o in (64, 32)
        for r, c, d, w in sizes
    ]
    return [
        _entry("contrastive_fwd", arch, dtype, 0, 0, forward),
        _entry("contrastive_bwd", arch, dtype, 0, 0, backward),
    ]


def first_that_fits(entry: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first candidate within the limits of a shipped tile."""
    for row in entry:
        lines = compile_tiles.measure(row)
        if not compile_tiles.problems(lines):
            return row | {"shared": max(line["shared"] for line in lines)}
    print("no candidate fits:", entry[0])
    return None


def fastest(entry: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest candidate that neither spills nor errs, on this GPU."""
    import tune_cases

    timed = []
    for row in entry:
        lines = compile_tiles.measure(row)
        if compile_tiles.problems(lines):
            continue
        shipped.tiles.cache_clear()
        row = row | {"shared": max(line["shared"] for line in lines)}
        shipped.table.cache_clear()
        others = [x for x in shipped.table() if not _same(x, row)]
        content = [*others, row]
        original = shipped.table
        shipped.table = lambda content=content: content  # type: ignore[assignment]
        try:
            microseconds = tune_cases.time_entry(row)
        finally:
            shipped.table = original
            shipped.tiles.cache_clear()
        if microseconds is not None:
            timed.append((microseconds, row))
            print(f"{row['op']} {row['size']} {row['constants']}: {microseconds:.1f} us")
    return min(timed, key=lambda pair: pair[0], default=(0.0, None))[1]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("op", "arch", "dtype", "size", "width"))


def write(rows: list[dict[str, Any]], made: dict[str, Any]) -> None:
    """The table with these entries in place of theirs; the old one stays until all is written."""
    shipped.table.cache_clear()
    kept = [row for row in shipped.table() if not any(_same(row, new) for new in rows)]
    lines = ",\n".join("  " + json.dumps(row) for row in [*kept, *rows])
    part = TABLE.with_suffix(".part")
    part.write_text(f'{{"made": {json.dumps(made)},\n"tiles": [\n{lines}\n]}}\n')
    part.replace(TABLE)
    print(f"{len(rows)} entries written, {len(kept)} kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression on the op")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    entries = [entry for entry in candidates() if re.search(arguments.only, entry[0]["op"])]
    made: dict[str, Any] = {"triton": triton.__version__, "mmfusion": mmfusion.__version__}
    made |= {"commit": harness.commit(), "date": date.today().isoformat()}
    rows: list[dict[str, Any]] = []
    if arguments.compile_only:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            rows += [row for row in pool.map(first_that_fits, entries) if row is not None]
        write(rows, made | {"by": "first candidate that compiles without spilling; not timed"})
        return
    major, minor = torch.cuda.get_device_capability()
    arch = 90 if major >= 9 else 80
    made |= {"by": "timed", "gpu": torch.cuda.get_device_name(), "capability": [major, minor]}
    for entry in entries:
        best = fastest(entry) if entry[0]["arch"] == arch else None
        if best is not None:
            rows.append(best)
            write(rows, made)  # time may end before the last entry


if __name__ == "__main__":
    main()
