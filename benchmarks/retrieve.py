"""Memory lookup: ours, PyTorch eager and compiled, faiss on CPU. Sizes where we lose are shown."""

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


def main():
    arguments = harness.arguments(__doc__)
    device, gpu = arguments.device, arguments.device == "cuda"
    recorder = harness.Recorder(arguments.out / "retrieve.csv", device)
    rates = harness.measure_rates(device)
    sizes = GPU_SIZES if gpu else CPU_SIZES
    dtypes = [torch.bfloat16, torch.float32] if gpu else [torch.float32]
    for queries, banks, slots, width, k in sizes[:2] if arguments.quick else sizes:
        for dtype in dtypes:
            bank = torch.randn(banks, slots, width, device=device).to(dtype)

            def inputs(queries=queries, banks=banks, width=width, dtype=dtype, bank=bank):
                query = torch.randn(queries, banks, width, device=device).to(dtype)
                return [query.requires_grad_(), bank]

            flops, moved = cost(queries, banks, slots, width, k, bank.element_size())
            config = {"Q": queries, "M": banks, "S": slots, "D": width, "k": k}
            case = Case(
                "retrieve",
                "S",
                slots,
                config | {"dtype": str(dtype)},
                inputs,
                partial(ours, k=k, backend="torch"),
                1e-4 if dtype == torch.float32 else 3e-2,
                flops,
                moved,
            )
            providers = {
                "mmfusion": partial(ours, k=k),
                "mmfusion torch": partial(ours, k=k, backend="torch"),
                "naive": partial(naive, k=k),
                "naive compiled": harness.compiled(partial(naive, k=k)),
            }
            if gpu:
                options = {"mode": "max-autotune-no-cudagraphs"}
                providers["naive max-autotune"] = harness.compiled(partial(naive, k=k), **options)
            harness.run(recorder, case, providers, rates, seconds=0.15 if arguments.quick else 0.3)
            if not gpu and banks == 1:
                harness.run(
                    recorder, _without_gradient(case), {"faiss flat": faiss_flat(bank, k)}, rates
                )
    recorder.save()


def _without_gradient(case):
    from dataclasses import replace

    return replace(case, inputs=lambda: [x.detach() for x in case.inputs()])


if __name__ == "__main__":
    main()
