"""G1 to G4 for any pattern, size and type: hypothesis draws them, always the same ones."""

import torch
import torch.nn.functional as F
from contract_case import finite
from contract_layers import smaller_block
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmfusion import CMML, functional, layers

EXAMPLES = 60  # per test
DRAWN = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
NEAR = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}
FILLERS = st.sampled_from([float("nan"), float("inf"), -1e4])


def sizes(top):
    return st.integers(1, top)


@st.composite
def settings_of(draw, samples=5, modalities=4):
    """B, M, a pattern (B, M), a type, a generator and something to put under absent."""
    b, m = draw(sizes(samples)), draw(sizes(modalities))
    rows = st.lists(st.booleans(), min_size=m, max_size=m)
    present = torch.tensor(draw(st.lists(rows, min_size=b, max_size=b)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return b, m, present, dtype, generator, draw(FILLERS)


def under(where, x, filler):
    """``x`` with ``filler`` where nobody may read, as a leaf of autograd."""
    where = where.reshape(*where.shape, *[1] * (x.ndim - where.ndim))
    return torch.where(where, x, filler).requires_grad_()


@DRAWN
@given(settings_of(), st.lists(sizes(3), min_size=4, max_size=4), st.integers(0, 3), sizes(3))
def test_presence_attention(drawn, lengths, num_context, num_queries):
    b, m, present, dtype, generator, filler = drawn
    lengths, kind = lengths[:m], {"generator": generator, "dtype": dtype}
    n = num_context + sum(lengths)
    q = torch.randn(b, num_queries, 2, 4, **kind).requires_grad_()
    k, v = (torch.randn(b, n, 2, 4, **kind) for _ in range(2))
    read = present.repeat_interleave(torch.tensor(lengths), 1)
    read = torch.cat([torch.ones(b, num_context, dtype=torch.bool), read], 1)
    sized = {"lengths": lengths, "num_context": num_context}
    out = functional.presence_attention(q, k, v, present, **sized)
    dirty_k, dirty_v = under(read, k, filler), under(read, v, filler)
    dirty = functional.presence_attention(q, dirty_k, dirty_v, present, **sized)
    assert torch.equal(dirty, out)
    dirty.square().sum().backward()
    assert finite([q.grad, dirty_k.grad, dirty_v.grad])
    assert dirty_k.grad[~read].eq(0).all()
    assert dirty_v.grad[~read].eq(0).all()
    for i in range(b):
        row = [x[i : i + 1] for x in (q, k, v, present)]
        assert_close(functional.presence_attention(*row, **sized)[0], out[i], **NEAR[dtype])
        if not read[i].any():
            assert out[i].eq(0).all()
            continue
        heads = [x.transpose(0, 1) for x in (q[i], k[i, read[i]], v[i, read[i]])]
        cut = F.scaled_dot_product_attention(*heads).transpose(0, 1)
        assert_close(out[i], cut, **NEAR[dtype])


@DRAWN
@given(
    settings_of(),
    sizes(9),
    st.one_of(sizes(12), st.none()),
    st.sampled_from(["cosine", "dot"]),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_retrieve(drawn, num_slots, k, similarity, held):
    b, m, present, dtype, generator, filler = drawn
    kind = {"generator": generator, "dtype": dtype}
    query, keys = torch.randn(b, m, 5, **kind), torch.randn(m, num_slots, 5, **kind)
    values = torch.randn(m, num_slots, 2, **kind)
    held = torch.tensor(held[:m]).clamp(max=num_slots)
    own = torch.randint(-1, 3, (b,), generator=generator)
    slot_ids = torch.randint(-1, 3, (m, num_slots), generator=generator)
    options = {"k": k, "temperature": 0.3, "similarity": similarity}
    usable = torch.arange(num_slots) < held[:, None]
    dirty = [under(~present, query, filler)]
    dirty += [under(usable, bank, filler) for bank in (keys, values)]
    readout, weights, indices = functional.retrieve(
        *dirty, held=held, exclude=(own, slot_ids), wanted=~present, **options
    )
    readout.square().sum().backward()
    assert finite([readout, weights, *(x.grad for x in dirty)])
    assert dirty[0].grad[present].eq(0).all()
    assert all(x.grad[~usable].eq(0).all() for x in dirty[1:])
    assert_close(weights.sum(-1), (indices >= 0).any(-1).float(), rtol=1e-4, atol=1e-5)
    for i in range(b):
        for j in range(m):
            kept = usable[j] & ~((slot_ids[j] == own[i]) & (own[i] >= 0))
            if present[i, j] or not kept.any():
                assert readout[i, j].eq(0).all()
                assert indices[i, j].eq(-1).all()
                continue
            cut, share, where = functional.retrieve(
                query[i, j][None], keys[j, kept], values[j, kept], **options
            )
            assert_close(readout[i, j], cut[0], **NEAR[dtype])
            found = indices[i, j] >= 0
            assert_close(weights[i, j][found], share[0][where[0] >= 0], rtol=1e-4, atol=1e-5)
            numbers = kept.nonzero().flatten()[where[0][where[0] >= 0]]
            assert torch.equal(indices[i, j][found], numbers)


def stirred(module):
    """Off its initial values, so that no zero hides a path."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module.eval()


@DRAWN
@given(settings_of(), sizes(3), sizes(3), sizes(3))
def test_crta(drawn, length, num_context, num_blocks):
    b, m, present, dtype, generator, filler = drawn
    torch.manual_seed(0)
    crta = stirred(layers.CRTA(m, length, 8, 2, num_blocks, dtype=dtype))
    kind = {"generator": generator, "dtype": dtype}
    tokens, context = torch.randn(b, m, length, 8, **kind), torch.randn(num_context, 8, **kind)
    out = crta(tokens, context, present)
    dirty = under(present, tokens, filler)
    again = crta(dirty, context, present)
    for value, other in zip((*out[:3], *out.stages), (*again[:3], *again.stages), strict=True):
        assert torch.equal(value, other)
        assert finite(value)
    again.completed.square().sum().backward()
    assert finite(dirty.grad)
    assert dirty.grad[~present].eq(0).all()
    assert torch.equal(out.completed[present], tokens[present])
    for i in range(b):
        alone = crta(tokens[i : i + 1], context, present[i : i + 1])
        assert_close(alone.completed[0], out.completed[i], **NEAR[dtype])
        if present[i].any():  # the first block reads what a cascade without the absent ones reads
            kept = tokens[i : i + 1, present[i]]
            everything = torch.ones(kept.shape[:2], dtype=torch.bool)
            d_tokens, _ = smaller_block(crta.blocks[0], present[i])(kept, context[None], everything)
            first = (kept + d_tokens)[0]
            assert_close(out.stages[0][i, present[i]], first, **NEAR[dtype])


@DRAWN
@given(settings_of(), sizes(3), sizes(3), st.booleans())
def test_cmml(drawn, num_tokens, num_context, remembers):
    b, m, present, dtype, generator, filler = drawn
    torch.manual_seed(0)
    model = CMML(
        {f"m{j}": j + 2 for j in range(m)},
        num_classes=3,
        dim=8,
        num_tokens=num_tokens,
        num_heads=2,
        num_context=num_context,
        num_blocks=2,
        memory=layers.MemoryBank(m, 4, 8, 2, dtype=dtype),
        dtype=dtype,
    )
    kind = {"generator": generator, "dtype": dtype}
    if remembers:
        vectors = torch.randn(6, m, 8, **kind)
        model.memory.write(vectors, torch.ones(6, m, dtype=torch.bool), torch.arange(6))
    stirred(model)
    clean = {f"m{j}": torch.randn(b, j + 2, **kind) for j in range(m)}
    dirty = {name: under(present[:, j], x, filler) for j, (name, x) in enumerate(clean.items())}
    rest = {"labels": torch.arange(b) % 3, "sample_ids": torch.arange(b)}
    out, again = model(clean, present, **rest), model(dirty, present, **rest)
    for field in ("logits", "synthesised", "completed", "reference", "aligned", "loss"):
        assert torch.equal(getattr(out, field), getattr(again, field)), field
        assert finite(getattr(out, field)), field
    (again.loss + again.logits.square().sum()).backward()
    assert finite([p.grad for p in model.parameters()])
    for j, x in enumerate(dirty.values()):
        assert finite(x.grad)
        assert x.grad[~present[:, j]].eq(0).all()
    for i in range(b):
        row = {name: x[i : i + 1] for name, x in clean.items()}
        alone = model(row, present[i : i + 1], sample_ids=torch.tensor([i]))
        assert_close(alone.logits[0], out.logits[i], **NEAR[dtype])
