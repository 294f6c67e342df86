"""What ``tune.py`` times for an entry of the tile table: a typical problem of its bucket."""

from typing import Any

import harness
import torch

from mmfusion import functional
from mmfusion.kernels import retrieve

DTYPES = {"half": torch.bfloat16, "fp32": torch.float32}


def time_entry(row: dict[str, Any]) -> float | None:
    """Microseconds; None where the result is wrong."""
    op, dtype = row["op"], DTYPES[row["dtype"]]
    make = _attention if op.startswith("attention") else _retrieve
    if op.startswith("contrastive"):
        make = _contrastive
    inputs, call, tolerance = make(row, dtype)
    case = harness.Case(op, "size", row["size"], {}, lambda: inputs, _truth(call), tolerance)
    if not harness.parity(case, call) <= tolerance:
        return None
    backward = op.endswith("bwd")
    run = harness._in_mode(call, inputs, "backward" if backward else "forward")
    return harness.quantiles(run, "cuda", seconds=0.1)[0]


def _truth(call: Any) -> Any:
    return lambda *inputs: call(*inputs, backend="torch")


def _attention(row: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, float]:
    tokens = {16: 16, 32: 28, 64: 56, 512: 200}[row["size"]]
    lengths = (tokens // 2, tokens - tokens // 2)
    shape = (512, tokens, 8, row["width"])
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    present = torch.rand(512, 2, device="cuda") > 0.25

    def call(q: Any, k: Any, v: Any, backend: str = "triton") -> Any:
        return functional.presence_attention(q, k, v, present, lengths=lengths, backend=backend)

    return [x.requires_grad_() for x in (q, k, v)], call, 2e-2 if dtype != torch.float32 else 1e-5


def _retrieve(row: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, float]:
    pools = row["op"] == "retrieve_pool"
    k = 16 if pools or row["size"] == 16 else 64
    queries = 32 if pools and row["size"] == 32 else 1024
    slots = retrieve.SMALL if row["op"] in ("retrieve_stream", "retrieve_merge") else 65536
    query = torch.randn(queries, 256, device="cuda", dtype=dtype).requires_grad_()
    keys = torch.randn(slots, 256, device="cuda", dtype=dtype)

    def call(query: Any, keys: Any, backend: str = "triton") -> Any:
        return functional.retrieve(query, keys, k=k, temperature=0.1, backend=backend)[0]

    return [query, keys], call, 3e-2 if dtype != torch.float32 else 1e-4


def _contrastive(row: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, float]:
    vectors = torch.nn.functional.normalize(torch.randn(4096, 128, device="cuda"), dim=-1)
    labels = torch.randint(0, 10, (4096,), device="cuda")
    yes = torch.ones_like(labels, dtype=torch.bool)

    def call(vectors: Any, backend: str = "triton") -> Any:
        return functional.class_contrastive(
            vectors, vectors, labels, labels, yes, yes, backend=backend
        )[0].mean()

    return [vectors.requires_grad_()], call, 1e-4
