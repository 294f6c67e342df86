import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from mmfusion.kernels.tiles import table, tiles

ROOT = Path(__file__).parents[2]
HALF, FP32 = torch.bfloat16, torch.float32


def pick(op, capability=(9, 0), dtype=HALF, **sizes):
    return tiles(op, capability, dtype, **{"size": 64, "width": 64} | sizes)


def test_the_smallest_bucket_that_is_enough():
    assert pick("attention_fwd", size=17).constants == {"BLOCK_M": 32, "BLOCK_N": 32}
    assert pick("attention_fwd", size=16).constants == {"BLOCK_M": 16, "BLOCK_N": 16}
    assert pick("attention_fwd", size=9999) == pick("attention_fwd", size=512)
    assert pick("attention_fwd", width=24) == pick("attention_fwd", width=64)


def test_unknown_architectures_take_the_closest_lower_one():
    for capability, like in (((12, 0), (9, 0)), ((8, 9), (8, 0)), ((7, 5), (8, 0))):
        for op in ("attention_bwd", "retrieve_pool"):
            assert pick(op, capability) == pick(op, like)


def test_a_tile_over_the_shared_memory_limit_is_dropped():
    large = next(r for r in table() if r["op"] == "attention_bwd" and r["shared"] > 60000)
    found = pick(
        "attention_bwd",
        (large["arch"] // 10, 0),
        size=large["size"],
        width=large["width"],
        shared_limit=large["shared"] - 1,
    )
    assert found.constants != large["constants"]
    with pytest.raises(ValueError, match="Use backend='torch'"):
        pick("attention_bwd", shared_limit=1)
    with pytest.raises(ValueError, match="no entry"):
        pick("something_else")


def test_every_family_fits_a_small_device():
    for op in {row["op"] for row in table()}:
        for dtype in (HALF, FP32):
            if any(row["op"] == op and row["dtype"] == "half" for row in table()) or dtype == FP32:
                assert pick(op, (8, 6), dtype, shared_limit=99 << 10)


def compile_tiles(tmp_path, *options):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",  # kernels made by the interpreter do not compile
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compile_tiles.py", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.compile
@pytest.mark.slow
def test_sizes_of_one_and_other_flags_compile(tmp_path):
    assert "variants compiled" in compile_tiles(tmp_path, "--variants")


@pytest.mark.compile
def test_every_entry_compiles_without_spilling(tmp_path):
    out = tmp_path / "tiles.csv"
    compile_tiles(tmp_path, "--out", out)
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert {(line["op"], line["arch"]) for line in lines} == {
        (row["op"], f"sm_{row['arch']}") for row in table()
    }
    for line in lines:
        tall = json.loads(line["tile"]).get("BLOCK_M", 0) >= 64
        if line["op"] == "attention_fwd" and line["arch"] == "sm_90" and tall:
            assert line["wgmma"] == "True", line
        assert line["narrow_offsets"] == "0", line
