import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mmfusion import functional, reference

NAN = float("nan")
SHAPES = [  # (Q, S, D, Dv, k), each axis once not a power of two
    (1, 1, 1, 1, 1),
    (5, 300, 40, 24, 5),
    (17, 1000, 64, 32, 16),
    (7, 13, 3, 5, 20),
    (33, 3001, 96, 96, 17),
    (2, 4097, 257, 130, 64),
]
# max |error| / max |truth|, the truth being fp64 of the rounded inputs
TOLERANCE = {
    "retrieve": {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2.5e-3,
        torch.bfloat16: 2e-2,
    },
    "attention": {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2.5e-3,
        torch.bfloat16: 2e-2,
    },
}
TIE = 1e-5  # scores that lie closer may be ordered either way


def close(op, actual, expected, dtype=None):
    dtype = dtype or actual.dtype
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    scale = expected.abs().max().clamp(min=1e-3)
    assert (actual - expected).abs().max() <= TOLERANCE[op][dtype] * scale


def bank(groups, queries, slots, width, value_width, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return (
        normal(groups, queries, width),
        normal(groups, slots, width),
        normal(groups, slots, value_width),
    )


def loop_scores(query, keys, similarity):
    """One query against every key, fp64."""
    scores = keys @ query
    if similarity == "cosine":
        lengths = keys.norm(dim=-1) * query.norm()
        short = (keys.norm(dim=-1) <= 1e-12) | (query.norm() <= 1e-12)
        scores = torch.where(short, 0.0, scores / lengths)
    return scores.tolist()


def loop_retrieve(
    query,
    keys,
    values,
    *,
    k,
    temperature,
    held=None,
    exclude=None,
    wanted=None,
    similarity="cosine",
):
    """The contract, one query at a time, in Python numbers. ``exclude``: sets of slots."""
    query, keys = query.double(), keys.double()
    values = keys if values is None else values.double()
    groups, queries = query.shape[:2]
    width = keys.shape[1] if k is None else k
    readout = torch.zeros(groups, queries, values.shape[2], dtype=torch.float64)
    weights = torch.zeros(groups, queries, width, dtype=torch.float64)
    indices = torch.full((groups, queries, width), -1)
    best = torch.full((groups, queries, width), -math.inf, dtype=torch.float64)
    for m in range(groups):
        limit = keys.shape[1] if held is None else int(held[m])
        for q in range(queries):
            if wanted is not None and not wanted[m, q]:
                continue
            scores = loop_scores(query[m, q], keys[m, :limit], similarity)
            slots = [s for s in range(limit) if not (exclude and s in exclude[m][q])]
            places = list(slots)
            if k is not None:
                slots = sorted(slots, key=lambda s: -scores[s])[:k]
                places = range(len(slots))
            if not slots:
                continue
            top = max(scores[s] for s in slots)
            parts = [math.exp((scores[s] - top) / temperature) for s in slots]
            for place, s, part in zip(places, slots, parts, strict=True):
                weights[m, q, place] = part / sum(parts)
                indices[m, q, place], best[m, q, place] = s, scores[s]
                readout[m, q] += part / sum(parts) * values[m, s]
    return readout, weights, indices, best


def agrees(actual, expected, dtype):
    """Readout and weights, and the indices wherever the scores decide them."""
    readout, weights, indices = actual
    truth, true_weights, true_indices, best = expected
    close("retrieve", readout, truth, dtype)
    assert weights.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(weights.double(), true_weights, atol=2e-5, rtol=0)
    assert torch.equal(indices < 0, true_indices < 0)
    gap = best.diff(dim=-1).abs() > TIE
    sure = torch.ones_like(indices, dtype=torch.bool)
    sure[..., 1:] &= gap
    sure[..., :-1] &= gap
    sure[..., -1] = False  # may tie with the first one left out
    assert torch.equal(indices[sure], true_indices[sure])
    chosen = [set(row[row >= 0].tolist()) for row in indices.flatten(0, -2)]
    counts = (indices >= 0).sum(-1).flatten().tolist()
    assert [len(s) for s in chosen] == counts, "a slot was taken twice"


def mixed_held(groups, slots, k):
    numbers = [slots, 0, 1, k - 1, k, slots - 1]
    return torch.tensor([min(max(numbers[m % 6], 0), slots) for m in range(groups)])


# retrieve: values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_retrieve_is_the_loop(shape, similarity, dtype):
    *sizes, k = shape
    query, keys, values = bank(1, *sizes, dtype=dtype)
    arguments = {"k": k, "temperature": 0.7, "similarity": similarity}
    actual = reference.retrieve(query, keys, values, **arguments)
    agrees(actual, loop_retrieve(query, keys, values, **arguments), dtype)


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_retrieve_reads_each_groups_held_slots(groups, similarity):
    query, keys, values = bank(groups, 4, 13, 6, 3, dtype=torch.float32)
    held = mixed_held(groups, 13, 5)
    for m, n in enumerate(held.tolist()):
        keys[m, n:] = NAN
        values[m, n:] = NAN
    arguments = {"k": 5, "temperature": 0.2, "held": held, "similarity": similarity}
    actual = reference.retrieve(query, keys, values, **arguments)
    agrees(actual, loop_retrieve(query, keys, values, **arguments), torch.float32)
    read = (actual[2] >= 0).sum(-1)
    assert torch.equal(read, held.clamp(max=5).unsqueeze(1).expand_as(read))


@pytest.mark.parametrize("held", [0, 1, 4, 5, 12, 13, 20])
def test_retrieve_held_at_its_limits(held):
    query, keys, values = bank(1, 4, 13, 6, 3, dtype=torch.float32)
    counted = torch.tensor([held])
    actual = reference.retrieve(query, keys, values, k=5, temperature=0.2, held=counted)
    counted = counted.clamp(max=13)
    truth = loop_retrieve(query, keys, values, k=5, temperature=0.2, held=counted)
    agrees(actual, truth, torch.float32)


def test_retrieve_dense_is_a_softmax_over_all_held_slots_in_order():
    query, keys, values = bank(3, 4, 7, 5, 2)
    held = torch.tensor([7, 0, 3])
    arguments = {"k": None, "temperature": 0.3, "held": held}
    exclude = torch.tensor([[0, -1, 6, 2]] * 3)
    sets = [[{n} for n in row] for row in exclude.tolist()]
    actual = reference.retrieve(query, keys, values, exclude=exclude, **arguments)
    truth = loop_retrieve(query, keys, values, exclude=sets, **arguments)
    close("retrieve", actual[0], truth[0])
    assert torch.equal(actual[2], truth[2])
    torch.testing.assert_close(actual[1].double(), truth[1], atol=1e-6, rtol=0)
    everything = reference.retrieve(query, keys, values, k=7, temperature=0.3)[0]
    close(
        "retrieve", reference.retrieve(query, keys, values, k=None, temperature=0.3)[0], everything
    )


def test_retrieve_without_values_reads_the_keys():
    query, keys, _ = bank(2, 3, 9, 4, 1)
    for k in (2, None):
        given = reference.retrieve(query, keys, keys, k=k, temperature=0.5)
        for one, other in zip(
            reference.retrieve(query, keys, None, k=k, temperature=0.5), given, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [4, None])
def test_retrieve_of_a_half_precision_bank_scores_in_single(dtype, k):
    query, keys, values = bank(2, 5, 40, 16, 8, dtype=dtype)
    arguments = {"k": k, "temperature": 0.1}
    truth = loop_retrieve(query, keys, values, **arguments)
    actual = reference.retrieve(query, keys, values, **arguments)
    assert actual[0].dtype == dtype
    close("retrieve", actual[0], truth[0])
    # A query in single precision is rounded to the bank's type first; the readout keeps its own.
    wide = query.float() + 1e-6
    wider = reference.retrieve(wide, keys, values, **arguments)
    assert wider[0].dtype == torch.float32
    close("retrieve", wider[0], truth[0], torch.float32)
    assert torch.equal(wider[2], actual[2])


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("learns", [False, True])
def test_retrieve_answers_wanted_queries_alone(k, learns):
    query, keys, values = bank(2, 6, 9, 4, 3, dtype=torch.float32)
    query.requires_grad_(learns)
    wanted = torch.tensor([[True, False, True, False, False, True], [False] * 6])
    full = reference.retrieve(query, keys, values, k=k, temperature=0.2)
    some = reference.retrieve(query, keys, values, k=k, temperature=0.2, wanted=wanted)
    for part, whole, blank in zip(some, full, (0, 0, -1), strict=True):
        assert torch.equal(part[wanted], whole[wanted])
        assert (part[~wanted] == blank).all()


@pytest.mark.parametrize("k", [3, None])
def test_excluding_by_number_by_id_and_by_cutting_out_agree(k):
    query, keys, values = bank(1, 4, 9, 5, 2)
    number = torch.tensor([[2, -1, 0, 8]])
    owner = torch.tensor([[11, 22, 7, 5, 5, -1, 0, 3, 4]])
    asker = torch.tensor([[7, -1, 11, 4]])
    arguments = {"k": k, "temperature": 0.4}
    by_number = reference.retrieve(query, keys, values, exclude=number, **arguments)
    by_id = reference.retrieve(query, keys, values, exclude=(asker, owner), **arguments)
    for one, other in zip(by_number, by_id, strict=True):
        assert torch.equal(one, other)
    for q, slot in enumerate(number[0].tolist()):
        rest = [s for s in range(9) if s != slot]
        cut = reference.retrieve(query[:, q : q + 1], keys[:, rest], values[:, rest], **arguments)
        close("retrieve", by_number[0][:, q : q + 1], cut[0])
        if k is not None:
            assert by_number[2][0, q].tolist() == [rest[s] for s in cut[2][0, 0].tolist()]


def test_an_id_excludes_every_slot_that_carries_it_and_negative_ids_none():
    query, keys, values = bank(2, 3, 8, 4, 2, dtype=torch.float32)
    asker = torch.tensor([[5, -1, 9], [-7, 2, 2]])
    owner = torch.tensor([[5, 5, -1, 5, 1, 5, -1, 5], [2, -7, 2, 2, 2, 2, 2, 2]])
    sets = [
        [{s for s in range(8) if a >= 0 and owner[m, s] == a} for a in asker[m].tolist()]
        for m in (0, 1)
    ]
    arguments = {"k": 4, "temperature": 0.3}
    actual = reference.retrieve(query, keys, values, exclude=(asker, owner), **arguments)
    agrees(actual, loop_retrieve(query, keys, values, exclude=sets, **arguments), torch.float32)
    assert (actual[2][0, 0] >= 0).sum() == 3
    assert (actual[2][1, 1] >= 0).sum() == 1


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("learns", [False, True])
def test_nothing_to_read_gives_exact_zeros_and_zero_gradients(k, learns):
    query, keys, values = bank(2, 2, 3, 4, 5, dtype=torch.float32)
    keys[:], values[:] = NAN, NAN
    keys[1, :1] = 1.0
    values[1, :1] = 1.0
    for tensor in (query, keys, values):
        tensor.requires_grad_(learns)
    held = torch.tensor([0, 1])
    exclude = torch.zeros(2, 2, dtype=torch.int64)
    out = reference.retrieve(query, keys, values, k=k, temperature=0.1, held=held, exclude=exclude)
    assert (out[0] == 0).all()
    assert (out[1] == 0).all()
    assert (out[2] == -1).all()
    if learns:
        out[0].sum().backward()
        for tensor in (query, keys, values):
            assert (tensor.grad == 0).all()


@pytest.mark.parametrize("k", [2, None])
def test_unheld_nan_gets_zero_gradient_and_spoils_none(k):
    query, keys, values = bank(1, 3, 6, 4, 2, dtype=torch.float32)
    clean_keys, clean_values = keys[:, :3].clone(), values[:, :3].clone()
    keys[:, 3:], values[:, 3:] = NAN, math.inf
    grads = []
    for bank_keys, bank_values, held in (
        (keys, values, torch.tensor([3])),
        (clean_keys, clean_values, None),
    ):
        inputs = [x.clone().requires_grad_() for x in (query, bank_keys, bank_values)]
        out = reference.retrieve(*inputs, k=k, temperature=0.2, held=held)[0]
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for dirty, clean in zip(*grads, strict=True):
        close("retrieve", dirty[:, :3], clean)
        assert (dirty[:, 3:] == 0).all()
    assert grads[0][0].any()


@pytest.mark.parametrize("k", [4, None])
def test_a_zero_vector_has_no_direction_and_gets_no_gradient(k):
    query, keys, values = bank(1, 2, 4, 3, 2)
    query[0, 0] = 0
    keys[0, 1] = 1e-13
    inputs = [x.requires_grad_() for x in (query, keys, values)]
    out = reference.retrieve(*inputs, k=k, temperature=0.5)
    truth = loop_retrieve(*(x.detach() for x in inputs), k=k, temperature=0.5)
    close("retrieve", out[0], truth[0])
    torch.testing.assert_close(out[1][0, 0], torch.full_like(out[1][0, 0], 1 / out[1].shape[-1]))
    grads = torch.autograd.grad(out[0].square().sum(), inputs)
    assert (grads[0][0, 0] == 0).all()
    assert (grads[1][0, 1] == 0).all()
    assert grads[0][0, 1].any()
    assert grads[1][0, 0].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_scaling_keys_leaves_cosine_and_changes_dot():
    query, keys, values = bank(1, 5, 12, 6, 3)
    factor = torch.rand(1, 12, 1, dtype=torch.float64) + 0.5
    for similarity, same in (("cosine", True), ("dot", False)):
        arguments = {"k": 4, "temperature": 0.5, "similarity": similarity}
        plain = reference.retrieve(query, keys, values, **arguments)[0]
        scaled = reference.retrieve(query, keys * factor, values, **arguments)[0]
        assert torch.allclose(plain, scaled) is same


def test_a_low_temperature_reads_the_best_alone():
    query, keys, values = bank(2, 5, 12, 6, 3, dtype=torch.float32)
    readout, weights, indices = reference.retrieve(query, keys, values, k=4, temperature=1e-6)
    assert torch.equal(weights[..., 0], torch.ones(2, 5))
    for m in range(2):
        assert torch.equal(readout[m], values[m, indices[m, :, 0]])


def test_ties_pick_different_slots_and_repeat():
    keys = torch.ones(1, 9, 2)
    query = torch.ones(1, 1, 2)
    first = reference.retrieve(query, keys, None, k=5, temperature=1.0)
    again = reference.retrieve(query, keys, None, k=5, temperature=1.0)
    assert len(set(first[2].flatten().tolist())) == 5
    assert torch.equal(first[2], again[2])
    torch.testing.assert_close(first[1], torch.full((1, 1, 5), 0.2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunking_changes_nothing(monkeypatch, shape, chunk):
    queries, slots, width, value_width, k = shape
    slots = min(slots, 150)
    query, keys, values = bank(2, queries, slots, width, value_width, dtype=torch.float32)
    owner = torch.arange(slots).expand(2, -1) // 2
    asker = torch.arange(queries).expand(2, -1) * 3
    for held in (None, torch.tensor([slots, slots // 2])):
        for exclude in (None, asker, (asker, owner)):
            scale = keys.norm(dim=-1).reciprocal()
            arguments = {"k": k, "temperature": 0.3, "held": held, "exclude": exclude}
            monkeypatch.setattr(reference, "CHUNK", 2**14)
            whole = reference.retrieve(query, keys, values, key_scale=scale, **arguments)
            monkeypatch.setattr(reference, "CHUNK", chunk)
            parts = reference.retrieve(query, keys, values, key_scale=scale, **arguments)
            close("retrieve", parts[0], whole[0])
            torch.testing.assert_close(parts[1], whole[1], atol=2e-6, rtol=0)
            assert torch.equal(parts[2] < 0, whole[2] < 0)
            scores = [
                torch.where(
                    out[2] < 0,
                    0.0,
                    (F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT).gather(
                        -1, out[2].clamp(min=0)
                    ),
                )
                for out in (parts, whole)
            ]
            torch.testing.assert_close(*scores, atol=1e-6, rtol=0)


def test_the_default_chunk_is_crossed_by_a_large_bank():
    query, keys, _ = bank(1, 3, reference.CHUNK + 5, 4, 1, dtype=torch.float32)
    keys[0, -1] = query[0, 0]
    readout, _, indices = reference.retrieve(query, keys, None, k=1, temperature=0.1)
    truth = (F.normalize(query[0], dim=-1) @ F.normalize(keys[0], dim=-1).T).argmax(-1)
    assert indices[0, :, 0].tolist() == truth.tolist()
    assert indices[0, 0, 0] == reference.CHUNK + 4
    assert torch.equal(readout[0], keys[0, truth])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("with_values", [False, True])
def test_with_and_without_gradient_the_result_is_the_same(similarity, with_values):
    query, keys, values = bank(3, 6, 50, 8, 4, dtype=torch.float32)
    values = values if with_values else None
    held = torch.tensor([50, 0, 3])
    arguments = {"k": 5, "temperature": 0.2, "held": held, "similarity": similarity}
    frozen = reference.retrieve(query, keys, values, **arguments)
    learning = reference.retrieve(query.clone().requires_grad_(), keys, values, **arguments)
    assert learning[0].requires_grad
    assert not learning[1].requires_grad
    with torch.no_grad():
        silent = reference.retrieve(query.clone().requires_grad_(), keys, values, **arguments)
    assert not silent[0].requires_grad
    for one, other, third in zip(frozen, learning, silent, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
        assert torch.equal(one, third)


def test_expanded_and_strided_inputs_equal_their_copies():
    query, keys, values = bank(1, 4, 20, 6, 3, dtype=torch.float32)
    keys, values = keys.expand(3, -1, -1), values.expand(3, -1, -1)
    query = query.expand(3, -1, -1)
    strided = torch.stack([keys, keys], dim=-1).flatten(-2)[..., ::2]
    assert not strided.is_contiguous()
    for k in (5, None):
        plain = reference.retrieve(
            query.contiguous(), keys.contiguous(), values.contiguous(), k=k, temperature=0.2
        )
        for some_keys in (keys, strided):
            viewed = reference.retrieve(query, some_keys, values, k=k, temperature=0.2)
            for one, other in zip(plain, viewed, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# retrieve: gradients

GRADIENTS = ["query", "keys", "values", "query keys", "query keys values"]


@pytest.mark.parametrize("wanted_grads", GRADIENTS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("k", [3, 9, None])
def test_retrieve_gradcheck(wanted_grads, similarity, k):
    query, keys, values = bank(2, 3, 6, 3, 2, seed=3)
    names = dict(zip(("query", "keys", "values"), (query, keys, values), strict=True))
    inputs = [names[name].requires_grad_() for name in wanted_grads.split()]
    held, exclude = torch.tensor([6, 4]), torch.tensor([[0, -1, 2], [1, 1, -1]])

    def call(*_):
        return reference.retrieve(
            query,
            keys,
            values,
            k=k,
            temperature=0.4,
            held=held,
            exclude=exclude,
            wanted=torch.tensor([[True, True, True], [True, False, True]]),
            similarity=similarity,
        )[0]

    assert gradcheck(call, inputs)
    if k != 9 and wanted_grads in ("query", "query keys values"):
        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("k", [3, None])
def test_retrieve_gradcheck_of_keys_that_are_the_values(k):
    query, keys, _ = bank(1, 2, 5, 3, 1, seed=4)
    inputs = (query.requires_grad_(), keys.requires_grad_())

    def call(query, keys):
        return reference.retrieve(query, keys, None, k=k, temperature=0.4)[0]

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_gradients_equal_autograd_through_topk():
    query, keys, values = bank(1, 5, 30, 6, 4)
    inputs = [x.requires_grad_() for x in (query, keys, values)]
    scores = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT
    top, slots = scores.topk(4)
    plain = ((top / 0.3).softmax(-1).unsqueeze(-1) * values[0][slots]).sum(-2)
    ours = reference.retrieve(*inputs, k=4, temperature=0.3)[0]
    weight = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad((plain * weight).sum(), inputs),
        torch.autograd.grad((ours * weight).sum(), inputs),
        strict=True,
    ):
        close("retrieve", other, one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients(dtype):
    halves = bank(1, 5, 30, 16, 8, dtype=dtype)
    grads = []
    for inputs in (halves, [x.double() for x in halves]):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = reference.retrieve(*inputs, k=4, temperature=0.3)[0]
        grads.append(torch.autograd.grad(out.sum(), inputs))
    for one, other in zip(*grads, strict=True):
        close("retrieve", one, other)


@pytest.mark.parametrize("k", [2, None])
def test_vmap_of_grad_is_the_loop(k):
    queries = torch.randn(4, 2, 3, 5)
    keys = torch.randn(4, 2, 7, 5)
    held = torch.tensor([7, 3])

    def total(query, keys):
        return (
            reference.retrieve(query, keys, None, k=k, temperature=0.3, held=held)[0].square().sum()
        )

    grad = torch.func.grad(total, argnums=(0, 1))
    both = torch.func.vmap(grad)(queries, keys)
    shared = torch.func.vmap(grad, in_dims=(0, None))(queries, keys[0])
    for i in range(4):
        for fast, slow in zip(both, grad(queries[i], keys[i]), strict=True):
            close("retrieve", fast[i], slow)
        for fast, slow in zip(shared, grad(queries[i], keys[0]), strict=True):
            close("retrieve", fast[i], slow)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("learns", [False, True])
def test_jvp_equals_finite_differences(k, learns):
    query, keys, values = bank(1, 3, 8, 4, 2)
    query.requires_grad_(learns)
    tangents = bank(1, 3, 8, 4, 2, seed=9)

    def call(*inputs):
        return reference.retrieve(*inputs, k=k, temperature=0.5, held=torch.tensor([7]))[0]

    inputs = (query, keys, values)
    _, tangent = torch.func.jvp(call, inputs, tangents)
    step = 1e-6
    ahead, behind = (
        call(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), atol=1e-7, rtol=1e-6)


# attention


def heads(batch, tokens, num_heads, width, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, num_heads, width)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def loop_attention(q, k, v, present, lengths, num_context=0, allow=None):
    q, k, v = q.double(), k.double(), v.double()
    owner = [None] * num_context + [m for m, n in enumerate(lengths) for _ in range(n)]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = [j for j, m in enumerate(owner) if m is None or present[b, m]]
                if allow is not None and owner[i] is not None:
                    seen = [j for j in seen if owner[j] is None or allow[owner[i], owner[j]]]
                scores = [float(q[b, i, h] @ k[b, j, h]) * q.shape[-1] ** -0.5 for j in seen]
                parts = [math.exp(s - max(scores)) for s in scores]
                for j, part in zip(seen, parts, strict=True):
                    out[b, i, h] += part / sum(parts) * v[b, j, h]
    return out


LAYOUTS = [((1, 4, 2), 0), ((3, 1, 5, 2), 1), ((2, 2), 8), ((1,), 0), ((2, 0, 1), 3)]


def patterns(batch, modalities):
    present = torch.rand(batch, modalities) < 0.5
    present[0], present[-1] = False, True
    return present


@pytest.mark.parametrize(("lengths", "num_context"), LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("num_queries", [None, 1, 3])
def test_attention_is_the_loop(lengths, num_context, dtype, num_queries):
    size = num_context + sum(lengths)
    q = heads(4, num_queries or size, 2, 5, dtype)
    k, v = heads(4, size, 2, 5, dtype, seed=1), heads(4, size, 2, 5, dtype, seed=2)
    present = patterns(4, len(lengths))
    out = reference.presence_attention(q, k, v, present, lengths=lengths, num_context=num_context)
    assert out.dtype == dtype
    close("attention", out, loop_attention(q, k, v, present, lengths, num_context))
    if not num_context:
        assert (out[0] == 0).all()


@pytest.mark.parametrize(("lengths", "num_context"), LAYOUTS)
def test_attention_with_allow_is_the_loop(lengths, num_context):
    x = heads(4, num_context + sum(lengths), 2, 3)
    present = patterns(4, len(lengths))
    allow = torch.rand(len(lengths), len(lengths)) < 0.5
    out = reference.presence_attention(
        x, x, x, present, lengths=lengths, num_context=num_context, allow=allow
    )
    close("attention", out, loop_attention(x, x, x, present, lengths, num_context, allow))


def test_a_query_that_may_see_nothing_gives_zeros_and_gets_none():
    x = heads(2, 3, 1, 4, torch.float32).requires_grad_()
    present = torch.tensor([[True, True], [False, False]])
    allow = torch.tensor([[False, True], [False, False]])
    out = reference.presence_attention(x, x, x, present, lengths=(1, 2), allow=allow)
    assert (out[0, 1:] == 0).all()
    assert (out[1] == 0).all()
    assert out[0, 0].any()
    out.sum().backward()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("content", [NAN, math.inf, 1e30])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_allow", [False, True])
def test_absent_content_changes_no_bit_and_gets_zero_gradient(content, dropout, with_allow):
    q, k, v = (heads(3, 5, 2, 4, torch.float32, seed=s) for s in range(3))
    present = torch.tensor([[True, False], [False, True], [False, False]])
    absent = ~present[:, [0, 0, 1, 1, 1]]
    allow = torch.tensor([[True, True], [False, True]]) if with_allow else None
    results = []
    for filling in (0.0, content):
        k, v = k.clone(), v.clone()
        k[absent], v[absent] = filling, filling
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = reference.presence_attention(
            *inputs, present, lengths=(2, 3), allow=allow, dropout=dropout, seed=torch.tensor(5)
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    for grad in results[1][2:]:
        assert (grad[absent] == 0).all()
        assert grad.any()


def test_absent_tokens_might_as_well_be_cut_out():
    q, k, v = (heads(2, 6, 2, 4, seed=s) for s in range(3))
    present = torch.tensor([[True, False, True]]).expand(2, -1)
    out = reference.presence_attention(q, k, v, present, lengths=(2, 3, 1))
    kept = [0, 1, 5]
    cut = reference.presence_attention(
        q, k[:, kept], v[:, kept], present[:, [0, 2]], lengths=(2, 1)
    )
    close("attention", out, cut)


@pytest.mark.parametrize("num_context", [0, 3])
def test_everything_present_is_scaled_dot_product_attention(num_context):
    q, k, v = (heads(2, 6 + num_context, 3, 8, torch.float32, seed=s) for s in range(3))
    out = reference.presence_attention(
        q, k, v, torch.ones(2, 2).bool(), lengths=(2, 4), num_context=num_context
    )
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    close("attention", out, plain.transpose(1, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("with_allow", [False, True])
def test_attention_gradcheck(dropout, with_allow):
    inputs = [heads(2, 4, 1, 3, seed=s).requires_grad_() for s in range(3)]
    present = torch.tensor([[True, False], [True, True]])
    allow = torch.tensor([[True, False], [True, True]]) if with_allow else None

    def call(q, k, v):
        return reference.presence_attention(
            q,
            k,
            v,
            present,
            lengths=(2, 1),
            num_context=1,
            allow=allow,
            dropout=dropout,
            seed=torch.tensor(3),
        )

    assert gradcheck(call, inputs)
    for alone in range(3):
        others = [x.detach() for x in inputs]
        others[alone] = inputs[alone]
        assert gradcheck(call, others)


def test_attention_with_dropout_has_second_derivatives():
    inputs = [heads(1, 3, 1, 2, seed=s).requires_grad_() for s in range(3)]
    present = torch.tensor([[True, True]])

    def call(*inputs):
        return reference.presence_attention(
            *inputs, present, lengths=(2, 1), dropout=0.3, seed=torch.tensor(8)
        )

    assert gradgradcheck(call, inputs)


def weights_under_dropout(dropout, seed, batch=64, size=16, dtype=torch.float32):
    """(B, H, Nq, N): with one-hot values the output is the weights themselves."""
    q = torch.zeros(batch, size, 2, size, dtype=dtype)
    v = torch.eye(size, dtype=dtype)[None, :, None, :].expand(batch, -1, 2, -1)
    present = torch.ones(batch, 1, dtype=torch.bool)
    out = reference.presence_attention(
        q, q, v, present, lengths=(size,), dropout=dropout, seed=torch.tensor(seed)
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_scales_the_rest_and_keeps_the_mean(dropout):
    weights = weights_under_dropout(dropout, seed=1)
    kept = weights > 0
    assert kept.double().mean() == pytest.approx(1 - dropout, abs=0.01)
    expected = torch.full((), 1 / (16 * (1 - dropout)))
    torch.testing.assert_close(weights[kept], expected.expand(int(kept.sum())))
    assert weights.double().mean() == pytest.approx(1 / 16, rel=0.03)
    for axis in range(4):  # no axis is favoured, nor does it repeat along one
        others = [a for a in range(4) if a != axis]
        shares = kept.double().mean(others)
        spread = (
            dropout * (1 - dropout) / kept[0].numel() * kept.shape[axis] / kept.shape[0]
        ) ** 0.5
        assert (shares - (1 - dropout)).abs().max() < 5 * spread + 1e-9
        halves = kept.narrow(axis, 0, 1), kept.narrow(axis, 1, 1)
        assert not torch.equal(*halves)


def test_dropout_follows_from_the_seed_alone():
    first, again = weights_under_dropout(0.5, 7), weights_under_dropout(0.5, 7)
    assert torch.equal(first, again)
    for seed in (8, 7 + 2**32, -7, 2**62):
        other = weights_under_dropout(0.5, seed)
        assert ((first > 0) == (other > 0)).double().mean() == pytest.approx(0.5, abs=0.02)


def test_dropout_mean_over_seeds_is_attention_without():
    q, k, v = (heads(1, 4, 1, 3, seed=s) for s in range(3))
    present = torch.tensor([[True, False]])
    arguments = {"lengths": (3, 1)}
    plain = reference.presence_attention(q, k, v, present, **arguments)
    draws = [
        reference.presence_attention(
            q, k, v, present, dropout=0.3, seed=torch.tensor(seed), **arguments
        )
        for seed in range(1000)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, atol=0.07, rtol=0)


def test_attention_takes_views():
    x = torch.randn(2, 3, 6, 4)  # (B, H, N, Dh)
    q, k, v = (
        x.transpose(1, 2),
        x.flip(0).transpose(1, 2),
        x[:1].expand(2, -1, -1, -1).transpose(1, 2),
    )
    present = torch.tensor([[True, False], [True, True]])
    out = reference.presence_attention(q, k, v, present, lengths=(4, 2))
    copies = (t.contiguous() for t in (q, k, v))
    close("attention", out, reference.presence_attention(*copies, present, lengths=(4, 2)))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_vmaps():
    x = torch.randn(3, 2, 4, 1, 5)
    present = torch.tensor([[True, False], [True, True]])

    def total(x):
        return reference.presence_attention(x, x, x, present, lengths=(2, 2)).square().sum()

    fast = torch.func.vmap(torch.func.grad(total))(x)
    for i in range(3):
        close("attention", fast[i], torch.func.grad(total)(x[i]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention_under_autocast_keeps_softmax_and_sums_in_single_precision(dropout):
    q, k, v = (heads(2, 40, 2, 8, torch.float32, seed=s) for s in range(3))
    present = torch.tensor([[True, False], [True, True]])
    arguments = {"lengths": (30, 10), "dropout": dropout, "seed": torch.tensor(3)}
    halves = [x.bfloat16() for x in (q, k, v)]
    truth = reference.presence_attention(*(x.double() for x in halves), present, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.presence_attention(q, k, v, present, **arguments)
    assert out.dtype == torch.bfloat16
    if dropout:  # one rounding of the result, to 8 bits, is all that is lost
        assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()
    close("attention", out, truth)


# masked_softmax


def test_masked_softmax():
    scores = torch.tensor([[1.0, 2.0, -math.inf], [5.0, 5.0, 5.0]], requires_grad=True)
    allowed = torch.tensor([[True, True, False], [False, False, False]])
    weights = reference.masked_softmax(scores, allowed)
    torch.testing.assert_close(weights[0, :2], torch.tensor([1.0, 2.0]).softmax(0))
    assert weights[0, 2] == 0
    assert (weights[1] == 0).all()
    weights.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[1] == 0).all()
    full = torch.randn(2, 3)
    assert torch.equal(reference.masked_softmax(full, None), full.softmax(-1))
