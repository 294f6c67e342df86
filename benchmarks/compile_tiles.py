"""Compile every entry of the tile table without a GPU, and report what each one uses.

Writes ``results/compile/tiles.csv``: registers per thread, stack (spilled) bytes, shared memory and
CPU time of compiling. ``--record`` writes the shared memory back into the table, where the lookup
needs it.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfusion.kernels import (
    contrastive,
    presence_attention,
    retrieve,
    retrieve_bwd,
    retrieve_fwd,
)
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
        common |= {"DH": width, "BLOCK_DH": width, "HAS_ALLOW": False, "HAS_DROPOUT": False}
        if op == "attention_fwd":
            return [(presence_attention.presence_attention_fwd_kernel, common)]
        one = {"ONE_BLOCK": row["size"] <= row["constants"]["BLOCK_N"]}
        return [(presence_attention.presence_attention_bwd_kernel, common | one)]
    if op == "contrastive_fwd":
        return [(contrastive.contrastive_fwd_kernel, common)]
    if op == "contrastive_bwd":
        kernel = contrastive.contrastive_bwd_kernel
        return [(kernel, common | {"ANCHORS": anchors}) for anchors in (True, False)]
    return _lookup(op, row["size"], common)


def _lookup(op: str, size: int, common: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    asked = {"HAS_ORDER": True, "WANTED": True}
    scored = asked | {"COSINE": True, "EXCLUDE": 2}
    if op == "retrieve_pool":
        kernel = retrieve_fwd.retrieve_pool_kernel
        raster = {"RASTER": retrieve.RASTER}
        return [(kernel, scored | raster | common | {"GROUP": group}) for group in (8, 32)]
    common |= {"KP": size}
    cut = {"BLOCK_S": 128, "GROUP": 8}
    if op == "retrieve_select":
        return [(retrieve_fwd.retrieve_select_kernel, cut | asked | common)]
    if op == "retrieve_merge":
        return [(retrieve_fwd.retrieve_merge_kernel, asked | common)]
    if op == "retrieve_stream":
        return [(retrieve_fwd.retrieve_stream_kernel, {"ONE_SPLIT": False} | scored | common)]
    if op == "retrieve_read":
        saves = {"HAS_VALUES": True, "SAVE": True}
        return [(retrieve_fwd.retrieve_read_kernel, cut | saves | scored | common)]
    backward = {"COSINE": True, "WANT_KEYS": True, "HAS_BETA": True} | common
    return [
        (retrieve_bwd.retrieve_bwd_kernel, backward),
        (retrieve_bwd.retrieve_scatter_kernel, backward),
        (retrieve_bwd.retrieve_gather_kernel, backward),
    ]


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
        start = sum(os.times()[:4])  # CPU time, ptxas included: others may use the machine
        built = build(
            kernel,
            ELEMENT[row["dtype"]],
            constants,
            row["arch"],
            row["num_warps"],
            row["num_stages"],
        )
        seconds = sum(os.times()[:4]) - start
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


def variants(row: dict[str, Any]) -> int:
    """Compile what the table does not list: sizes of 1, which Triton folds, and other flags."""
    built = 0
    ones = ("K", "D", "Dv", "keys_slot", "keys_bank", "k_token", "v_token", "q_token", "q_head")
    flips = (
        {"HAS_ALLOW": True, "HAS_DROPOUT": True},
        {"EXCLUDE": 0, "COSINE": False, "HAS_ORDER": False, "WANTED": False, "SAVE": False},
        {"EXCLUDE": 1, "ONE_SPLIT": True, "HAS_VALUES": False, "HAS_BETA": False},
        {"WANT_KEYS": False, "COSINE": False, "HAS_BETA": False},
    )
    for kernel, constants in cases(row):
        changes = [dict.fromkeys((n for n in ones if n not in constants), 1), *flips]
        for change in changes:
            known = {name: x for name, x in change.items() if name in kernel.arg_names}
            if known:
                build(
                    kernel,
                    ELEMENT[row["dtype"]],
                    constants | known,
                    row["arch"],
                    row["num_warps"],
                    row["num_stages"],
                )
                built += 1
    return built


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
    part = path.with_suffix(".part")
    part.write_text(json.dumps(head)[:-1] + (", " if head else "") + f'"tiles": [\n{rows}\n]}}\n')
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression on the op")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--variants", action="store_true", help="other flags, one entry per op")
    parser.add_argument("--out", type=Path, default=RESULTS / "tiles.csv")
    arguments = parser.parse_args()
    rows = [row for row in table() if re.search(arguments.only, row["op"])]
    if arguments.variants:
        newest = {row["op"]: row for row in rows if row["arch"] == 90}
        with ProcessPoolExecutor(arguments.jobs) as pool:
            print(f"{sum(pool.map(variants, newest.values()))} variants compiled")
        return 0
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
