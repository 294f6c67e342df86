import pytest
import torch

from mmfusion import functional, reference
from mmfusion.functional import presence_attention, retrieve, why_not_triton

NAN = float("nan")
ATOL = {"retrieve": 1e-6, "attention": 1e-6}  # fp32 against fp32, unit-sized numbers


def says(call, *parts):
    """The call is refused with value, rule and cure, in that order."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the parts are matched below
        call()
    message = str(caught.value)
    places = [message.find(part) for part in parts]
    assert -1 not in places, (message, parts)
    assert places == sorted(places), (message, parts)


def close(op, actual, expected):
    torch.testing.assert_close(actual, expected, atol=ATOL[op], rtol=1e-5)


# retrieve: forms


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.parametrize("k", [2, None])
def test_grouped_is_a_loop_over_banks(queries, k):
    leading = (4, 5) if queries is None else (4, 5, queries)
    query, keys, values = torch.randn(*leading, 6), torch.randn(5, 7, 6), torch.randn(5, 7, 3)
    held = torch.tensor([7, 0, 3, 1, 2])
    wanted = torch.rand(4, 5) < 0.7
    asker, owner = torch.randint(-1, 4, (4,)), torch.randint(-1, 4, (5, 7))
    scale = keys.norm(dim=-1).reciprocal()
    got = retrieve(
        query,
        keys,
        values,
        k=k,
        temperature=0.3,
        held=held,
        exclude=(asker, owner),
        wanted=wanted,
        key_scale=scale,
    )
    width = 7 if k is None else k
    assert [x.shape for x in got] == [(*leading, 3), (*leading, width), (*leading, width)]
    for m in range(5):
        count = 1 if queries is None else queries
        flat = retrieve(
            query[:, m].reshape(-1, 6),
            keys[m],
            values[m],
            k=k,
            temperature=0.3,
            held=int(held[m]),
            exclude=(asker.repeat_interleave(count), owner[m]),
            wanted=wanted[:, m].repeat_interleave(count),
            key_scale=scale[m],
        )
        for whole, part in zip(got, flat, strict=True):
            close("retrieve", whole[:, m].reshape(part.shape), part)


@pytest.mark.parametrize("queries", [None, 3])
def test_tables_per_sample_per_modality_and_per_query_mean_the_same(queries):
    leading = (4, 2) if queries is None else (4, 2, queries)
    query, keys = torch.randn(*leading, 5), torch.randn(2, 6, 5)
    number = torch.tensor([3, -1, 0, 5])
    wanted = torch.tensor([True, False, True, True])
    results = []
    for axes in range(1, len(leading) + 1):
        some, which = (
            x.reshape(4, *[1] * (axes - 1)).expand(leading[:axes]) for x in (number, wanted)
        )
        results.append(retrieve(query, keys, k=6, temperature=0.4, exclude=some, wanted=which))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    indices = results[0][2]
    assert (indices[1] == -1).all()
    for b in (0, 2, 3):
        assert not (indices[b] == number[b]).any()
        assert ((indices[b] >= 0).sum(-1) == 5).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_excluding_by_id_is_excluding_by_number(grouped):
    query = torch.randn(3, 2, 4) if grouped else torch.randn(3, 4)
    keys = torch.randn(2, 5, 4) if grouped else torch.randn(5, 4)
    owner = torch.tensor([7, 8, 9, -1, 6])
    owner = owner.expand(2, -1) if grouped else owner
    by_id = (torch.tensor([8, -1, 6]), owner)
    by_number = torch.tensor([1, -1, 4])
    results = [retrieve(query, keys, k=5, temperature=0.2, exclude=e) for e in (by_id, by_number)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[0][2][1] >= 0).all()


def test_held_may_be_a_number_or_a_tensor():
    query, keys = torch.randn(3, 4), torch.randn(5, 4)
    keys[2:] = NAN
    results = [retrieve(query, keys, k=3, temperature=0.2, held=h) for h in (2, torch.tensor(2))]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][2][:, 2].eq(-1).all()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_kept_key_norms_change_nothing(grouped, learns):
    query = torch.randn(3, 2, 4) if grouped else torch.randn(3, 4)
    keys = torch.randn(2, 50, 4) if grouped else torch.randn(50, 4)
    keys = (keys * torch.rand(50, 1) * 9).requires_grad_(learns)
    scale = keys.detach().norm(dim=-1).reciprocal()
    plain = retrieve(query, keys, k=5, temperature=0.2)
    kept = retrieve(query, keys, k=5, temperature=0.2, key_scale=scale)
    for one, other in zip(plain, kept, strict=True):
        close("retrieve", one, other)
    wrong = retrieve(query, keys, k=5, temperature=0.2, key_scale=scale.flip(-1))
    assert torch.equal(wrong[2], plain[2]) == learns  # keys that learn outrun what was kept


@pytest.mark.parametrize("wanted", [None, torch.tensor([True, False])])
def test_a_long_query_finds_its_direction_in_a_half_precision_bank(wanted):
    query = torch.tensor([[1e5, 0.0], [NAN, 1.0]] if wanted is not None else [[1e5, 0.0], [0, 1e6]])
    query.requires_grad_()
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).half()
    readout, weights, indices = retrieve(query, keys, k=1, temperature=0.1, wanted=wanted)
    assert indices.flatten().tolist() == ([1, 0] if wanted is None else [1, -1])
    assert (readout.dtype, weights[0].item()) == (torch.float32, 1.0)
    readout.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("k", [2, 5, None])
def test_the_coldest_temperature_is_argmax(k):
    query, keys = -torch.ones(1, 2) * 1e4, torch.tensor([[3.0, 3.0], [2.0, 2.5], [5.0, 1.0]])
    query.requires_grad_()
    coldest = torch.finfo(torch.float32).tiny
    readout, weights, indices = retrieve(query, keys, k=k, temperature=coldest, held=2)
    best = indices[0, weights[0].argmax()].item()
    assert weights.max() == 1
    assert torch.equal(readout[0], keys[best])
    readout.sum().backward()
    assert query.grad.isfinite().all()


def test_results_have_the_documented_types_and_carry_gradient_only_where_documented():
    query = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 5, 4).requires_grad_()
    readout, weights, indices = retrieve(query, keys, k=2, temperature=0.2)
    assert readout.dtype == torch.float64
    assert weights.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert (readout.requires_grad, weights.requires_grad) == (True, False)
    readout.sum().backward()
    assert query.grad.dtype == torch.float64
    assert keys.grad.any()


# retrieve: refusals

FLAT = {"query": torch.ones(2, 3), "keys": torch.ones(4, 3), "k": 1, "temperature": 1.0}
GROUPED = {**FLAT, "query": torch.ones(2, 5, 3), "keys": torch.ones(5, 4, 3)}
WRONG_RETRIEVE = [
    (FLAT, {"query": torch.ones(3)}, "query is (3,) and keys (4, 3)", "(Q, D)", "Add or drop"),
    (FLAT, {"query": torch.ones(1, 2, 3)}, "query is (1, 2, 3)", "(Q, D)", "Add or drop an axis"),
    (FLAT, {"query": torch.ones(2, 4)}, "query is (2, 4)", "of one width", "Add or drop an axis"),
    (FLAT, {"keys": torch.ones(3)}, "keys (3,)", "(Q, D) with keys (S, D)", "Add or drop"),
    (FLAT, {"keys": torch.ones(1, 1, 1, 3)}, "keys (1, 1, 1, 3)", "(S, D)", "Add or drop"),
    (GROUPED, {"query": torch.ones(5, 3)}, "query is (5, 3)", "(B, M, D) or", "Add or drop"),
    (GROUPED, {"query": torch.ones(2, 4, 3)}, "query is (2, 4, 3)", "(B, M, D)", "Add or drop"),
    (FLAT, {"keys": torch.ones(0, 3)}, "keys is (0, 3)", "at least one slot", "held=0"),
    (FLAT, {"values": torch.ones(5, 2)}, "values is (5, 2)", "agree", "one value per key"),
    (GROUPED, {"values": torch.ones(4, 2)}, "values is (4, 2)", "agree", "one value per key"),
    (FLAT, {"k": 0}, "k=0", "at least one slot", "k=None"),
    (FLAT, {"k": -3}, "k=-3", "at least one slot", "k=None"),
    (FLAT, {"temperature": 0.0}, "temperature=0.0", "divides", "above 0"),
    (FLAT, {"temperature": float("inf")}, "temperature=inf", "divides", "above 0"),
    (FLAT, {"temperature": NAN}, "temperature=nan", "divides", "above 0"),
    (FLAT, {"similarity": "l2"}, "similarity='l2'", "'cosine' or 'dot'", "Use one"),
    (FLAT, {"held": torch.ones(4).bool()}, "held is (4,) torch.bool", "counts", "Pass the count"),
    (FLAT, {"held": True}, "held is () torch.bool", "counts", "Pass the count"),
    (FLAT, {"held": 1.5}, "held is () torch.float32", "integers of shape ()", "Pass the count"),
    (GROUPED, {"held": 3}, "held is ()", "integers of shape (5,)", "Pass the count"),
    (
        GROUPED,
        {"exclude": torch.ones(3, dtype=torch.int64)},
        "exclude is (3,)",
        "leading ones of query, (2, 5)",
        "Reshape",
    ),
    (FLAT, {"exclude": torch.ones(2)}, "exclude is (2,) torch.float32", "int64", "Cast"),
    (
        FLAT,
        {"exclude": (torch.ones(2, dtype=torch.int32), torch.ones(4, dtype=torch.int64))},
        "exclude[0] is (2,) torch.int32",
        "int64 numbers",
        "Cast",
    ),
    (
        FLAT,
        {"exclude": (torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64))},
        "exclude[1] is (3,)",
        "of shape (4,)",
        "reshape",
    ),
    (
        GROUPED,
        {"exclude": (torch.ones(2, dtype=torch.int64), torch.ones(4, dtype=torch.int64))},
        "exclude[1] is (4,)",
        "of shape (5, 4)",
        "reshape",
    ),
    (FLAT, {"wanted": torch.ones(2)}, "wanted is torch.float32", "it is bool", ".bool()"),
    (FLAT, {"wanted": torch.ones(3).bool()}, "wanted is (3,)", "(2,)", "Reshape it"),
    (FLAT, {"key_scale": torch.ones(3)}, "key_scale is (3,)", "(4,)", "Pass"),
    (FLAT, {"key_scale": torch.ones(1)}, "key_scale is (1,)", "(4,)", "Pass"),
    (GROUPED, {"key_scale": torch.ones(20)}, "key_scale is (20,)", "(5, 4)", "Pass"),
    (FLAT, {"backend": "cuda"}, "backend='cuda'", "'auto', 'torch', 'triton'", "Use 'auto'"),
]


@pytest.mark.parametrize("case", WRONG_RETRIEVE, ids=lambda case: case[2])
def test_retrieve_refuses(case):
    right, wrong, *parts = case
    retrieve(**right)
    says(lambda: retrieve(**{**right, **wrong}), *parts)


# presence_attention


def tokens(size, batch=2, dtype=torch.float32):
    return torch.randn(batch, size, 2, 4, dtype=dtype)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_attention_is_the_reference(backend):
    q, k, v = tokens(3), tokens(6), tokens(6)
    present = torch.tensor([[True, False], [False, True]])
    arguments = {"lengths": [1, 4], "num_context": 1, "dropout": 0.5, "seed": torch.tensor(3)}
    out = presence_attention(q, k, v, present, backend=backend, **arguments)
    assert torch.equal(out, reference.presence_attention(q, k, v, present, **arguments))
    assert out.shape == q.shape


@pytest.mark.parametrize("allowed", [False, True])
def test_without_lengths_every_key_has_a_column(allowed):
    x, present = tokens(6), torch.rand(2, 5) < 0.6
    allow = torch.rand(5, 5) < 0.6 if allowed else None
    options = {"num_context": 1, "allow": allow}
    out = presence_attention(x, x, x, present, **options)
    assert torch.equal(out, presence_attention(x, x, x, present, lengths=(1,) * 5, **options))


def test_the_seed_is_idle_without_dropout():
    x, present = tokens(2), torch.ones(2, 2).bool()
    out = presence_attention(x, x, x, present, lengths=(1, 1), seed=torch.tensor(1))
    assert torch.equal(out, presence_attention(x, x, x, present, lengths=(1, 1)))


ATTENTION = {
    "q": torch.ones(2, 3, 1, 4),
    "k": torch.ones(2, 3, 1, 4),
    "v": torch.ones(2, 3, 1, 4),
    "present": torch.ones(2, 2).bool(),
    "lengths": (1, 2),
}
WRONG_ATTENTION = [
    ({"q": torch.ones(2, 3, 4)}, "q is (2, 3, 4)", "q is (B, Nq, H, Dh)", "unflatten"),
    ({"k": torch.ones(2, 2, 1, 4)}, "k (2, 2, 1, 4)", "(B, N, H, Dh)", "unflatten"),
    ({"q": torch.ones(3, 3, 1, 4)}, "q is (3, 3, 1, 4)", "(B, Nq, H, Dh)", "unflatten"),
    ({"q": torch.ones(2, 3, 2, 4)}, "q is (2, 3, 2, 4)", "(B, Nq, H, Dh)", "unflatten"),
    ({"q": torch.ones(2, 3, 1, 5)}, "width 5 and k of 4", "widths agree", "Project both"),
    ({"present": torch.ones(2, 2)}, "present is (2, 2) torch.float32", "bool", "one length"),
    ({"present": torch.ones(2, 3).bool()}, "present is (2, 3)", "(2, 2)", "one length per"),
    ({"present": torch.ones(1, 2).bool()}, "present is (1, 2)", "(2, 2)", "one length per"),
    ({"lengths": None}, "present is (2, 2)", "(2, 3)", "one column per key"),
    ({"lengths": (2, 2)}, "lengths=(2, 2) with 3 keys", "make up all keys", "Correct"),
    ({"num_context": 1}, "num_context=1", "make up all keys", "Correct the lengths"),
    ({"allow": torch.ones(2, 2)}, "allow is (2, 2) torch.float32", "bool (M, M)", "Drop allow"),
    ({"allow": torch.ones(3, 3).bool()}, "allow is (3, 3)", "bool (M, M)", "Drop allow"),
    (
        {"allow": torch.ones(2, 2).bool(), "q": torch.ones(2, 1, 1, 4)},
        "with 1 queries and 3 keys",
        "the same tokens",
        "Drop allow in cross-attention",
    ),
    ({"dropout": 1.0, "seed": torch.tensor(1)}, "dropout=1.0", "share", "0 <= dropout < 1"),
    ({"dropout": -0.1, "seed": torch.tensor(1)}, "dropout=-0.1", "share", "0 <= dropout < 1"),
    ({"dropout": 0.1}, "dropout=0.1 with seed=None", "integer tensor", "torch.randint"),
    ({"dropout": 0.1, "seed": torch.tensor(1.0)}, "seed=1.0", "integer tensor", "torch.randint"),
    ({"dropout": 0.1, "seed": torch.ones(4).long()}, "seed=", "integer tensor", "torch.randint"),
    ({"backend": "fast"}, "backend='fast'", "'auto', 'torch', 'triton'", "Use 'auto'"),
]


@pytest.mark.parametrize("case", WRONG_ATTENTION, ids=lambda case: case[1])
def test_attention_refuses(case):
    wrong, *parts = case
    presence_attention(**ATTENTION)
    says(lambda: presence_attention(**{**ATTENTION, **wrong}), *parts)


# autocast


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("learns", [False, True])
def test_retrieve_ignores_autocast(k, learns):
    query, keys = torch.randn(3, 2, 16, requires_grad=learns), torch.randn(2, 9, 16)
    plain = retrieve(query, keys, k=k, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = retrieve(query, keys, k=k, temperature=0.1)
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_half_precision_query_is_answered_in_its_own_type():
    query, keys = torch.randn(3, 2, 16).bfloat16(), torch.randn(2, 9, 16)
    readout, weights, _ = retrieve(query, keys, k=2, temperature=0.1)
    assert readout.dtype == torch.bfloat16
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_casts_its_operands_under_autocast(dtype, dropout):
    q, k, v = tokens(3), tokens(3), tokens(3)
    present = torch.tensor([[True, False], [True, True]])
    arguments = {"lengths": (1, 2), "dropout": dropout, "seed": torch.tensor(1)}
    with torch.autocast("cpu", dtype):
        cast = presence_attention(q, k, v, present, **arguments)
    plain = presence_attention(*(x.to(dtype) for x in (q, k, v)), present, **arguments)
    assert cast.dtype == dtype
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_leaves_double_precision_alone(dropout):
    q, present = tokens(3, dtype=torch.float64), torch.tensor([[True, False], [True, True]])
    arguments = {"lengths": (1, 2), "dropout": dropout, "seed": torch.tensor(1)}
    with torch.autocast("cpu", torch.bfloat16):
        out = presence_attention(q, q, q, present, **arguments)
    assert torch.equal(out, presence_attention(q, q, q, present, **arguments))


# class_contrastive


def test_what_does_not_count_reaches_no_gradient():
    leaves = [torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)]
    used, real = torch.tensor([True, True, False]), torch.tensor([True, True, False, False])
    labels = torch.zeros(4, dtype=torch.int64)
    results = []
    for junk in (0.0, NAN):
        rows, columns = (
            torch.where(counts.unsqueeze(1), x, junk)
            for x, counts in zip(leaves, (used, real), strict=True)
        )
        loss, _ = functional.class_contrastive(rows, columns, labels[:3], labels, used, real)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


# backends


@pytest.mark.parametrize("op", ["retrieve", "presence_attention"])
def test_triton_says_why_it_cannot(op, monkeypatch):
    def call(backend):
        if op == "retrieve":
            return retrieve(
                torch.ones(1, 2), torch.ones(3, 2), k=1, temperature=1.0, backend=backend
            )
        return presence_attention(**ATTENTION, backend=backend)

    for triton, reason in (
        (False, "triton is not installed"),
        (True, "the tensors are on cpu"),
    ):
        monkeypatch.setattr(functional, "_HAS_TRITON", triton)
        assert reason in why_not_triton(op, torch.ones(1))
        says(lambda: call("triton"), "backend='triton' for " + op, reason, "backend='auto'")
        call("auto")
        call("torch")


def test_why_not_triton_names_the_first_reason(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    assert why_not_triton("retrieve", torch.ones(1)) == "the tensors are on cpu"
    assert why_not_triton("retrieve", torch.ones(1, device="meta")) == "the tensors are on meta"
    says(lambda: why_not_triton("softmax"), "op='softmax'", "fused ops are", "Name one")
