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
    """``mask`` kept from the first call on the same tensors, or built anew in each."""

    def __init__(self, lengths):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.lengths, self.mask = lengths, None
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.build = torch.compile(create_block_mask)

    def __call__(self, q, k, v, present):
        attend, heads = _masked(q, k, v, present, self.lengths)
        if self.mask is None or self.mask[0] is not present:
            self.mask = (present, self._block_mask(attend))
        return self._attend(attend, heads, self.mask[1])

    def with_its_mask(self, q, k, v, present):
        attend, heads = _masked(q, k, v, present, self.lengths)
        return self._attend(attend, heads, self._block_mask(attend))

    def _block_mask(self, attend):
        batch, tokens = attend.shape
        visible = lambda b, h, i, j: attend[b, j]  # noqa: E731
        return self.build(visible, batch, None, tokens, tokens, device=attend.device)

    def _attend(self, attend, heads, mask):
        out = self.attention(*heads, block_mask=mask)
        return torch.where(attend.any(-1)[:, None, None, None], out.transpose(1, 2), 0)


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


def light(lengths, gpu):
    """What needs no compiling."""
    found = {
        "mmfusion": partial(ours, lengths=lengths),
        "mmfusion torch": partial(ours, lengths=lengths, backend="torch"),
        "sdpa mask": partial(sdpa, lengths=lengths),
        "manual": partial(manual, lengths=lengths),
    }
    if gpu:
        from torch.nn.attention import SDPBackend

        efficient, cudnn = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
        found["sdpa efficient"] = partial(sdpa, lengths=lengths, kernel=efficient)
        found["sdpa cudnn"] = partial(sdpa, lengths=lengths, kernel=cudnn)
    return found


def heavy(lengths):
    """What compiles long, or waits for the device."""
    flex = Flex(lengths)
    return {
        "varlen": partial(varlen, lengths=lengths),
        "manual compiled": harness.compiled(partial(manual, lengths=lengths)),
        "flex": flex,
        "flex with its mask": flex.with_its_mask,
    }


def make_case(tokens, share, device):
    gpu = device == "cuda"
    batch, heads, width = (1024, 8, 64) if gpu else (64, 4, 32)
    dtype = torch.bfloat16 if gpu else torch.float32
    lengths = tuple(len(part) for part in torch.arange(tokens).chunk(4))

    def inputs(batch=batch):
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
        partial(inputs, 64) if tokens > 200 else None,  # scores in fp64 have no room for more
    )
    return case, lengths


def main():
    arguments = harness.arguments(__doc__)
    device, gpu = arguments.device, arguments.device == "cuda"
    recorder = harness.Recorder(arguments.out / "attention.csv", device)
    rates = harness.measure_rates(device)
    counts = TOKENS if gpu else TOKENS[:-2]
    counts = counts[1:4:2] if arguments.quick else counts
    seconds = 0.1 if not gpu else 0.05
    for tokens in counts:
        for share in (1.0, 0.5):
            case, lengths = make_case(tokens, share, device)
            harness.run(recorder, case, light(lengths, gpu), rates, seconds=seconds)
    for tokens in counts[1::2] if gpu else ():  # last, since time may end
        providers = heavy(make_case(tokens, 1.0, device)[1])  # compiled once for both shares
        for share in (1.0, 0.5):
            case, _ = make_case(tokens, share, device)
            harness.run(recorder, case, providers, rates, seconds=seconds, graphs=False)


if __name__ == "__main__":
    main()
