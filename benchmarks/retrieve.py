"""Memory lookup: ours, PyTorch eager and compiled, faiss on CPU. Sizes where we lose are shown."""

from dataclasses import replace
from functools import partial

import harness
import torch
from harness import Case

from mmfusion import functional

GPU_SIZES = [
    (4096, 1, 65536, 256, 16),
    (256, 1, 1_000_000, 128, 32),
    (3136, 3, 1024, 128, 8),
    (64, 1, 512, 128, 4),
    (1024, 1, 16384, 256, 16),
]
CPU_SIZES = [
    (64, 1, 512, 128, 4),
    (256, 3, 1024, 128, 8),
    (256, 1, 16384, 256, 16),
    (256, 1, 65536, 256, 16),
]
TEMPERATURE = 0.1


def ours(query, keys, *, k, backend="auto"):
    return functional.retrieve(query, keys, k=k, temperature=TEMPERATURE, backend=backend)[0]


def naive(query, keys, *, k):
    """What one writes: product, top-k, gather."""
    q = torch.nn.functional.normalize(query, dim=-1)  # (B, M, D)
    n = torch.nn.functional.normalize(keys, dim=-1)
    scores = torch.einsum("bmd,msd->bms", q, n)
    top, index = scores.float().topk(k, dim=-1)
    modality = torch.arange(keys.shape[0], device=keys.device)[:, None]
    near = keys[modality, index]  # (B, M, k, D)
    return (top.div(TEMPERATURE).softmax(-1).to(keys.dtype).unsqueeze(-2) @ near).squeeze(-2)


def naive_fp32_scores(query, keys, *, k):
    """For half precision on a GPU: rounded scores choose other neighbours, so these are fp32.

    The k that were chosen are scored again, so that no gradient passes through the large matrix.
    """
    with torch.no_grad():
        norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
        scores = torch.bmm(query.transpose(0, 1), keys.mT, out_dtype=torch.float32)
        index = (scores / norm.unsqueeze(1)).topk(k, dim=-1).indices.transpose(0, 1)  # (B, M, k)
    modality = torch.arange(keys.shape[0], device=keys.device)[:, None]
    near = keys[modality, index].float()
    q = torch.nn.functional.normalize(query.float(), dim=-1).unsqueeze(-1)
    top = (torch.nn.functional.normalize(near, dim=-1) @ q).squeeze(-1)
    weights = top.div(TEMPERATURE).softmax(-1)
    return (weights.unsqueeze(-2) @ near).squeeze(-2).to(query.dtype)


def faiss_flat(keys, k):
    """An exact index built outside the timing; it has no gradients, so forward only."""
    import faiss

    rows = torch.nn.functional.normalize(keys[0], dim=-1)
    index = faiss.IndexFlatIP(keys.shape[2])
    index.add(rows.detach().numpy())

    def call(query, keys):
        q = torch.nn.functional.normalize(query[:, 0], dim=-1)
        top, slots = (torch.from_numpy(x) for x in index.search(q.detach().numpy(), k))
        weights = top.div(TEMPERATURE).softmax(-1)
        return (weights.unsqueeze(1) @ keys[0][slots]).transpose(0, 1).transpose(0, 1)

    return call


def cost(queries, banks, slots, width, k, size):
    """Section "floors" of the kernel pages: each byte moved once, each product taken once."""
    reads = banks * slots * width * size + min(queries * k, slots) * banks * width * size
    small = queries * banks * 2 * width * size + 12 * queries * banks * k
    near = 2 * queries * banks * k * width * size
    flops = 2.0 * queries * banks * slots * width
    gradient = near / 2 + 3 * queries * banks * width * size
    return (
        {"forward": flops, "backward": 0.0, "both": flops},
        {"forward": reads + small, "backward": gradient, "both": reads + small + near + gradient},
    )


def make_case(sizes, dtype, device):
    queries, banks, slots, width, k = sizes
    bank = torch.randn(banks, slots, width, device=device).to(dtype)

    def inputs():
        query = torch.randn(queries, banks, width, device=device).to(dtype)
        return [query.requires_grad_(), bank]

    flops, moved = cost(*sizes, bank.element_size())
    return Case(
        "retrieve",
        "S",
        slots,
        {"Q": queries, "M": banks, "S": slots, "D": width, "k": k, "dtype": str(dtype)},
        inputs,
        partial(ours, k=k, backend="torch"),
        1e-4 if dtype == torch.float32 else 3e-2,
        flops,
        moved,
    )


def on_cpu(recorder, rates, sizes, seconds):
    case, k = make_case(sizes, torch.float32, "cpu"), sizes[-1]
    providers = {
        "mmfusion": partial(ours, k=k),
        "mmfusion torch": partial(ours, k=k, backend="torch"),
        "naive": partial(naive, k=k),
        "naive compiled": harness.compiled(partial(naive, k=k)),
    }
    harness.run(recorder, case, providers, rates, seconds=seconds)
    if sizes[1] == 1:
        faiss = {"faiss flat": faiss_flat(case.inputs()[1], k)}
        alone = replace(case, inputs=lambda: [x.detach() for x in case.inputs()])
        harness.run(recorder, alone, faiss, rates)


def on_gpu(recorder, rates, sizes, dtype, compiled):
    """What compiles long comes after everything else has been timed."""
    k = sizes[-1]
    best = naive if dtype == torch.float32 else naive_fp32_scores
    if compiled:
        providers = {"naive compiled": harness.compiled(partial(best, k=k))}
        if sizes == GPU_SIZES[0]:
            options = {"mode": "max-autotune-no-cudagraphs"}
            providers["naive max-autotune"] = harness.compiled(partial(best, k=k), **options)
    else:
        providers = {
            "mmfusion": partial(ours, k=k),
            "mmfusion torch": partial(ours, k=k, backend="torch"),
            "naive": partial(naive, k=k),
        }
        if best is not naive:
            providers["naive, fp32 scores"] = partial(best, k=k)
    case = make_case(sizes, dtype, "cuda")
    harness.run(recorder, case, providers, rates, seconds=0.05, graphs=not compiled)


def main():
    arguments = harness.arguments(__doc__)
    recorder = harness.Recorder(arguments.out / "retrieve.csv", arguments.device)
    rates = harness.measure_rates(arguments.device)
    if arguments.device == "cuda":
        some = GPU_SIZES[:2] if arguments.quick else GPU_SIZES
        for dtype in (torch.bfloat16, torch.float32):
            for sizes in some:
                on_gpu(recorder, rates, sizes, dtype, compiled=False)
        for sizes in some:
            on_gpu(recorder, rates, sizes, torch.bfloat16, compiled=True)
    else:
        for sizes in CPU_SIZES[:2] if arguments.quick else CPU_SIZES:
            on_cpu(recorder, rates, sizes, 0.15 if arguments.quick else 0.3)


if __name__ == "__main__":
    main()
