"""Compile every entry of the tile table without a GPU, and report what each one uses.

Writes ``results/compile/tiles.csv``: registers per thread, stack (spilled) bytes, shared memory and
compile time. ``--record`` writes the shared memory back into the table, where the lookup needs it.
Needs its own process, with the interpreter off:

    TRITON_INTERPRET=0 python benchmarks/compile_tiles.py
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfusion.kernels import contrastive, presence_attention, retrieve
from mmfusion.kernels.tiles import table

RESULTS = Path(__file__).parent / "results" / "compile"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 166912, 90: 232448}
ELEMENT = {"half": "bf16", "fp32": "fp32"}
BYTES = {"present_ptr", "wanted_ptr", "used_ptr", "real_ptr"}
I64 = {"held_ptr", "exclude_ptr", "ids_ptr", "count_ptr", "indices_ptr", "order_ptr", "seed_ptr"}
I64 |= {"allow_ptr", "row_label_ptr", "column_label_ptr", "packed_ptr", "merged_ptr", "starts_ptr"}
I32 = {"modality_ptr", "groups_ptr"}
FP32 = {"lse_ptr", "scale_ptr", "maxima_ptr", "tops_ptr", "weights_ptr", "alpha_ptr", "beta_ptr"}
FP32 |= {"positive_ptr", "number_ptr", "loss_ptr", "drow_ptr", "coefficient_ptr", "into_ptr"}
FP32 |= {"weight_ptr"}
STRIDES = {f"{x}_{axis}" for x in "qkv" for axis in ("sample", "token", "head")}
STRIDES |= {f"{x}_{axis}" for x in ("keys", "values") for axis in ("bank", "slot")}
ALIGNED = STRIDES | {"D", "Dv"}  # widths that are multiples of 16: the usual case
FLOATS = {"scale", "unscale", "dropout", "inverse_temperature"}


def signature(kernel: Any, element: str, constants: dict[str, Any]) -> dict[str, str]:
    """The type of each argument, told from its name."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            kinds = (("u8", BYTES), ("i64", I64), ("i32", I32), ("fp32", FP32))
            types[name] = "*" + next((kind for kind, names in kinds if name in names), element)
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    return types


def cases(row: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels that run with this entry, each with the flags that cost most."""
    common = {"PRECISION": "tf32x3", "UPCAST": False, **row["constants"]}
    width, op = row["width"], row["op"]
    if op.startswith("attention"):
        heads = {"DH": width, "BLOCK_DH": width, "HAS_ALLOW": False, "HAS_DROPOUT": False}
        if op == "attention_fwd":
            return [(presence_attention.presence_attention_fwd_kernel, heads | common)]
        one = {"ONE_BLOCK": row["size"] <= row["constants"]["BLOCK_N"]}
        return [(presence_attention.presence_attention_bwd_kernel, heads | one | common)]
    if op.startswith("contrastive"):
        return contrastive.compile_cases(op, common)
    if op not in ("retrieve_pool",):
        common["KP"] = row["size"]
    return retrieve.compile_cases(op, common)


def build(kernel: Any, element: str, constants: dict[str, Any], arch: int, warps: int, stages: int):
    """Compile for ``sm_<arch>``, with pointers and widths that are multiples of 16."""
    types = signature(kernel, element, constants)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    aligned = [
        (place,)
        for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or (name in ALIGNED and types[name] != "constexpr")
    ]
    source = ASTSource(
        kernel,
        types,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def measure(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per kernel of a table entry."""
    lines = []
    for kernel, constants in cases(row):
        start = time.perf_counter()
        built = build(
            kernel,
            ELEMENT[row["dtype"]],
            constants,
            row["arch"],
            row["num_warps"],
            row["num_stages"],
        )
        seconds = time.perf_counter() - start
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
        lines.append(
            {
                "op": row["op"],
                "kernel": kernel.__name__,
                "arch": f"sm_{row['arch']}",
                "dtype": row["dtype"],
                "size": row["size"],
                "width": row["width"],
                "tile": json.dumps(row["constants"]),
                "warps": row["num_warps"],
                "stages": row["num_stages"],
                "registers": int(found["REG"]),
                "stack": int(found["STACK"]),
                "shared": built.metadata.shared,
                "seconds": round(seconds, 2),
                "wgmma": "wgmma" in built.asm["ptx"],
                "narrow_offsets": len(narrow_offsets(built.asm["ttir"])),
            }
        )
    return lines


def narrow_offsets(ttir: str) -> list[str]:
    """32-bit products of a program number that feed an address: they wrap on large tensors.

    A product that was taken in 64 bits and then narrowed on purpose does not count.
    """
    definition = dict(re.findall(r"(%[\w#]+)(?::\d+)? = (.*)", ttir))

    def leads_to(name: str, goal: str, seen: set[str]) -> bool:
        line = definition.get(name, "")
        if name in seen or not line or line.startswith(("arith.trunci", "tt.load")):
            return False
        seen.add(name)
        return goal in line or any(leads_to(x, goal, seen) for x in re.findall(r"%[\w#]+", line))

    suspects: list[str] = []
    todo = re.findall(r"= tt\.addptr %[\w#]+, (%[\w#]+)", ttir)
    visited: set[str] = set()
    while todo:
        name = todo.pop()
        line = definition.get(name, "")
        if name in visited or not line or line.startswith("tt.load"):
            continue
        visited.add(name)
        narrow = line.startswith("arith.muli") and not re.search(r" : .*i64", line)
        if narrow and leads_to(name, "tt.get_program_id", set()):
            suspects.append(line)
        todo += re.findall(r"%[\w#]+", line)
    return suspects


def problems(lines: list[dict[str, Any]]) -> list[str]:
    """What breaks the limits of a shipped tile."""
    found = []
    for line in lines:
        what = f"{line['kernel']} {line['arch']} {line['dtype']} {line['size']} {line['tile']}"
        arch = int(line["arch"].removeprefix("sm_"))
        if line["stack"] or line["registers"] > 255:
            found.append(f"{what}: {line['registers']} registers, {line['stack']} bytes of stack")
        if line["shared"] > SHARED_LIMIT[arch]:
            found.append(f"{what}: {line['shared']} bytes of shared memory")
        if line["seconds"] > 10:
            found.append(f"{what}: {line['seconds']} s to compile")
        if line["narrow_offsets"]:
            found.append(f"{what}: {line['narrow_offsets']} offsets multiplied in 32 bits")
    return found


def record(lines: list[dict[str, Any]]) -> None:
    """Write the shared memory of each entry into the table."""
    path = Path(presence_attention.__file__).with_name("tiles.json")
    content = json.loads(path.read_text())
    for row in content["tiles"]:
        mine = [
            line["shared"]
            for line in lines
            if all(line[key] == row[key] for key in ("op", "dtype", "size", "width"))
            and line["arch"] == f"sm_{row['arch']}"
        ]
        row["shared"] = max(mine, default=row["shared"])
    head = {key: value for key, value in content.items() if key != "tiles"}
    rows = ",\n".join("  " + json.dumps(row) for row in content["tiles"])
    path.write_text(json.dumps(head)[:-1] + (", " if head else "") + f'"tiles": [\n{rows}\n]}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression on the op")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "tiles.csv")
    arguments = parser.parse_args()
    rows = [row for row in table() if re.search(arguments.only, row["op"])]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        lines = [line for part in pool.map(measure, rows) for line in part]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    if arguments.record:
        record(lines)
    found = problems(lines)
    print(*found, sep="\n")
    print(f"{len(lines)} kernels from {len(rows)} entries, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
