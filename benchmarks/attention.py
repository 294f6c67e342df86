"""Presence attention: ours, SDPA with a mask, FlexAttention, varlen attention, eager maths."""

from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Case

from mmfusion import functional
from mmfusion.presence import visibility

TOKENS = (4, 20, 37, 64, 128, 200, 512)


def ours(q, k, v, present, *, lengths, backend="auto"):
    return functional.presence_attention(q, k, v, present, lengths=lengths, backend=backend)


def _masked(q, k, v, present, lengths):
    attend = visibility(present, lengths)
    clean = (torch.where(attend[:, :, None, None], x, 0) for x in (k, v))
    return attend, [x.transpose(1, 2) for x in (q, *clean)]


def sdpa(q, k, v, present, *, lengths, kernel=None):
    """With a mask, and NaN under absent kept out as the contract asks."""
    attend, heads = _masked(q, k, v, present, lengths)
    mask = attend[:, None, None, :]
    if kernel is None:
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    else:
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    return torch.where(mask.any(-1, keepdim=True), out, 0).transpose(1, 2)


def manual(q, k, v, present, *, lengths):
    attend, (q, k, v) = _masked(q, k, v, present, lengths)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~attend[:, None, None, :], torch.finfo(torch.float32).min)
    weights = scores.softmax(-1) * attend[:, None, None, :]
    return (weights.to(q.dtype) @ v).transpose(1, 2)


class Flex:
    """``mask`` kept from the first call, or built anew in each."""

    def __init__(self, lengths, rebuild):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.lengths, self.rebuild, self.mask = lengths, rebuild, None
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.build = torch.compile(create_block_mask)

    def __call__(self, q, k, v, present):
        attend, heads = _masked(q, k, v, present, self.lengths)

        def visible(b, h, i, j):
            return attend[b, j]

        if self.rebuild or self.mask is None or self.mask[0] is not present:
            tokens = attend.shape[1]
            mask = self.build(visible, len(attend), None, tokens, tokens, device=q.device)
            self.mask = (present, mask)
        out = self.attention(*heads, block_mask=self.mask[1])
        return torch.where(attend.any(-1)[:, None, None, None], out, 0).transpose(1, 2)


def varlen(q, k, v, present, *, lengths):
    """Packing and unpacking included; half precision on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    attend = visibility(present, lengths)
    tokens = attend.sum(1, dtype=torch.int32)
    ends = F.pad(tokens.cumsum(0, dtype=torch.int32), (1, 0))
    starts = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], device=q.device)
    packed = [x[attend] for x in (k, v)]
    out = varlen_attn(q.flatten(0, 1), *packed, starts.int(), ends, q.shape[1], int(k.shape[1]))
    return torch.where(attend.any(-1)[:, None, None, None], out.unflatten(0, q.shape[:2]), 0)


def providers(lengths, gpu):
    found = {
        "mmfusion": partial(ours, lengths=lengths),
        "mmfusion torch": partial(ours, lengths=lengths, backend="torch"),
        "sdpa mask": partial(sdpa, lengths=lengths),
        "manual": partial(manual, lengths=lengths),
    }
    if gpu:
        from torch.nn.attention import SDPBackend

        found |= {
            "manual compiled": harness.compiled(partial(manual, lengths=lengths)),
            "sdpa efficient": partial(sdpa, lengths=lengths, kernel=SDPBackend.EFFICIENT_ATTENTION),
            "sdpa cudnn": partial(sdpa, lengths=lengths, kernel=SDPBackend.CUDNN_ATTENTION),
            "flex": Flex(lengths, rebuild=False),
            "flex with its mask": Flex(lengths, rebuild=True),
            "varlen": partial(varlen, lengths=lengths),
        }
    return found


def main():
    arguments = harness.arguments(__doc__)
    device, gpu = arguments.device, arguments.device == "cuda"
    recorder = harness.Recorder(arguments.out / "attention.csv", device)
    rates = harness.measure_rates(device)
    batch, heads, width = (1024, 8, 64) if gpu else (64, 4, 32)
    dtype = torch.bfloat16 if gpu else torch.float32
    counts = TOKENS if gpu else TOKENS[:-2]
    for tokens in counts[1:4:2] if arguments.quick else counts:
        lengths = tuple(len(part) for part in torch.arange(tokens).chunk(4))
        for share in (1.0, 0.5):

            def inputs(tokens=tokens, share=share, lengths=lengths):
                shape = (batch, tokens, heads, width)
                q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
                present = torch.rand(batch, len(lengths), device=device) < share
                return [x.requires_grad_() for x in (q, k, v)] + [present]

            x = batch * tokens * heads * width * torch.finfo(dtype).bits // 8
            lse = 4 * batch * tokens * heads
            flops = 4.0 * batch * heads * tokens**2 * share * width
            case = Case(
                "presence_attention",
                "N",
                tokens,
                {"B": batch, "H": heads, "Dh": width, "f": share, "dtype": str(dtype)},
                inputs,
                partial(ours, lengths=lengths, backend="torch"),
                2e-2 if gpu else 1e-4,
                {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops},
                {
                    "forward": (2 + 2 * share) * x + lse,
                    "backward": (6 + 2 * share) * x + lse,
                    "both": (8 + 4 * share) * x + 2 * lse,
                },
            )
            harness.run(
                recorder,
                case,
                providers(lengths, gpu),
                rates,
                seconds=0.1 if arguments.quick or not gpu else 0.2,
            )
    recorder.save()


if __name__ == "__main__":
    main()
