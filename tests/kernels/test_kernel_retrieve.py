import pytest
import torch
from kernels.parity import check_retrieve

from mmfusion import functional

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("interpreter")]
FP32 = torch.float32


def kernel(*args, **options):
    return functional.retrieve(*args, **options, backend="triton")


@pytest.fixture(params=["stream", "pool"])
def way(request, monkeypatch):
    """Both ways to find the groups, whatever the size."""
    from mmfusion.kernels import retrieve

    monkeypatch.setattr(retrieve, "SMALL", 0 if request.param == "pool" else 1 << 30)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("banks", "queries", "slots", "width", "value_width", "k"),
    [(1, 1, 1, 1, 1, 1), (2, 5, 300, 40, 24, 5), (1, 3, 13, 3, 5, 20), (3, 2, 260, 96, 0, 17)],
)
def test_parity(banks, queries, slots, width, value_width, k):
    check_retrieve("cpu", FP32, banks, queries, slots, width, value_width, k)


@pytest.mark.usefixtures("way")
def test_parity_at_the_most_neighbours():
    check_retrieve("cpu", FP32, 1, 2, 700, 20, 16, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("way")
def test_parity_half(dtype):
    check_retrieve("cpu", dtype, 2, 4, 200, 40, 24, 8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("held", [(0, 1, 4), (5, 129, 150)])
def test_held(held):
    check_retrieve("cpu", FP32, 3, 3, 150, 16, 0, 5, held=held)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("exclude", ["slot", "ids"])
@pytest.mark.parametrize("wanted", [False, True])
def test_exclude_and_wanted(exclude, wanted):
    check_retrieve("cpu", FP32, 2, 5, 140, 16, 8, 4, exclude=exclude, wanted=wanted)


@pytest.mark.usefixtures("way")
def test_dot():
    check_retrieve("cpu", FP32, 1, 4, 140, 16, 8, 4, similarity="dot", temperature=3.0)


def test_wanted_rows_are_brought_together(monkeypatch):
    from mmfusion.kernels import retrieve

    monkeypatch.setattr(retrieve, "_SORT_FROM", 0)
    for small in (0, 2048):
        monkeypatch.setattr(retrieve, "SMALL", small)
        check_retrieve("cpu", FP32, 2, 20, 140, 16, 8, 4, exclude="ids", wanted=True)


@pytest.mark.parametrize(("workspace", "chunks"), [(2500, 2), (1, 1)], ids=["chunks", "streams"])
def test_little_workspace(monkeypatch, workspace, chunks):
    from mmfusion.kernels import retrieve
    from mmfusion.kernels.tiles import Tile

    pick = retrieve.pick
    tile = Tile({"BLOCK_Q": 16, "BLOCK_S": 128, "BLOCK_D": 16}, 4, 1)
    forced = lambda op, *args, **sizes: tile if "pool" in op else pick(op, *args, **sizes)  # noqa: E731
    monkeypatch.setattr(retrieve, "pick", forced)
    monkeypatch.setattr(retrieve, "SMALL", 0)
    monkeypatch.setattr(retrieve, "WORKSPACE", workspace)
    counted = []
    original = retrieve._Lookup.chunks
    monkeypatch.setattr(
        retrieve._Lookup, "chunks", lambda self: counted.append(original(self)) or counted[-1]
    )
    check_retrieve("cpu", FP32, 1, 20, 140, 8, 0, 3, wanted=True)
    assert len(counted[0]) == chunks


def test_a_bank_split_over_programs(monkeypatch):
    from mmfusion.kernels import retrieve

    for programs in (1, 3, 1000):
        monkeypatch.setattr(retrieve, "PROGRAMS", programs)
        check_retrieve("cpu", FP32, 1, 3, 700, 8, 0, 6, held=(601,))


@pytest.mark.parametrize(
    ("rows", "slots", "group"), [(128, 128, 8), (128, 64, 32), (32, 128, 16), (64, 64, 8)]
)
def test_every_pool_family(monkeypatch, rows, slots, group):
    from mmfusion.kernels import retrieve
    from mmfusion.kernels.tiles import Tile

    pick = retrieve.pick
    tile = Tile({"BLOCK_Q": rows, "BLOCK_S": slots, "BLOCK_D": 32}, 4, 1)
    forced = lambda op, *args, **sizes: tile if "pool" in op else pick(op, *args, **sizes)  # noqa: E731
    monkeypatch.setattr(retrieve, "pick", forced)
    monkeypatch.setattr(retrieve, "SMALL", 0)
    monkeypatch.setattr(retrieve._Lookup, "group_size", lambda self: group)
    check_retrieve("cpu", FP32, 1, 4, 333, 40, 0, 6, exclude="slot")


def test_every_stream_family(monkeypatch):
    from mmfusion.kernels import retrieve
    from mmfusion.kernels.tiles import Tile, table

    pick = retrieve.pick
    cuts = {str(row["constants"]): row for row in table() if row["op"] == "retrieve_stream"}
    for row in cuts.values():
        tile = Tile(row["constants"], 4, 1)
        monkeypatch.setattr(
            retrieve,
            "pick",
            lambda op, *args, tile=tile, **sizes: (
                tile if "stream" in op else pick(op, *args, **sizes)
            ),
        )
        check_retrieve("cpu", FP32, 1, 3, 150, 8, 0, min(row["size"], 20))


def test_triton_topk_agrees_with_its_fast_stand_in(monkeypatch):
    import triton.language as tl
    from triton.language.standard import topk

    from mmfusion.kernels import retrieve

    query, keys = torch.randn(1, 8), torch.randn(150, 8)
    fast = kernel(query, keys, k=5, temperature=0.1)
    monkeypatch.setattr(tl, "topk", topk)
    for small in (0, 2048):
        monkeypatch.setattr(retrieve, "SMALL", small)
        for one, other in zip(fast, kernel(query, keys, k=5, temperature=0.1), strict=True):
            torch.testing.assert_close(one, other)


def test_the_repeatable_sums_of_key_gradients():
    torch.use_deterministic_algorithms(True)
    try:
        check_retrieve("cpu", FP32, 2, 5, 40, 16, 8, 4, exclude="ids", wanted=True)
        check_retrieve("cpu", FP32, 2, 5, 40, 16, 0, 4)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_write_between_read_and_backward_does_not_matter():
    query = torch.randn(3, 8, requires_grad=True)
    bank = torch.randn(20, 8)
    (expected,) = torch.autograd.grad(
        functional.retrieve(query, bank, k=3, temperature=0.5, backend="torch")[0].sum(), query
    )
    readout = kernel(query, bank, k=3, temperature=0.5)[0]
    bank.fill_(torch.nan)
    (found,) = torch.autograd.grad(readout.sum(), query)
    torch.testing.assert_close(found, expected)


def test_nothing_is_kept_without_gradients():
    from mmfusion import ops

    saved = []
    original = ops._retrieve_forward
    ops._retrieve_forward = lambda *args: saved.append(args[-1]) or original(*args)
    try:
        with torch.no_grad():
            kernel(torch.randn(2, 4), torch.randn(5, 4), k=2, temperature=1.0)
    finally:
        ops._retrieve_forward = original
    assert saved == [False]


def test_equal_scores_give_different_slots_lowest_first():
    bank = torch.ones(50, 4)
    _, weights, indices = kernel(torch.ones(2, 4), bank, k=6, temperature=0.1)
    assert all(row.unique().numel() == 6 for row in indices)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_without_width_are_not_taken_for_keys(backend):
    query, keys = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8)
    options = {"k": 2, "temperature": 1.0, "backend": backend}
    readout, _, _ = functional.retrieve(query, keys, torch.empty(9, 0), **options)
    assert readout.shape == (3, 0)
    (dq,) = torch.autograd.grad(readout.sum(), query)
    assert bool((dq == 0).all())


def test_zero_vectors_score_zero_and_get_no_gradient():
    query = torch.zeros(2, 4, requires_grad=True)
    keys = torch.cat([torch.zeros(1, 4), torch.randn(5, 4)]).requires_grad_()
    readout, _, _ = kernel(query, keys, k=6, temperature=0.1)
    dq, dk = torch.autograd.grad(readout.square().sum(), (query, keys))
    assert bool((dq == 0).all())
    assert bool(dk.isfinite().all())


def test_scaling_keys_leaves_cosine_and_a_cold_softmax_is_argmax():
    query, keys = torch.randn(3, 8), torch.randn(40, 8)
    values = torch.randn(40, 8)
    one = kernel(query, keys, values, k=4, temperature=0.2)
    other = kernel(query, keys * torch.rand(40, 1).add(0.1), values, k=4, temperature=0.2)
    torch.testing.assert_close(one[0], other[0])
    assert torch.equal(one[2], other[2])
    cold = kernel(query, keys, values, k=4, temperature=1e-6)
    torch.testing.assert_close(cold[0], values[cold[2][:, 0]])


def test_exclusion_by_number_by_id_and_by_cutting_out_agree():
    query, keys = torch.randn(1, 8), torch.randn(30, 8)
    best = kernel(query, keys, k=1, temperature=1.0)[2][0, 0]
    by_number = kernel(query, keys, k=3, temperature=1.0, exclude=best.reshape(1))
    ids = (best.reshape(1), torch.arange(30))
    by_id = kernel(query, keys, k=3, temperature=1.0, exclude=ids)
    rest = torch.arange(30) != best
    cut = kernel(query, keys[rest], k=3, temperature=1.0)
    assert torch.equal(by_number[2], by_id[2])
    torch.testing.assert_close(by_number[0], by_id[0])
    torch.testing.assert_close(by_number[0], cut[0])


def test_wanted_rows_equal_the_full_run_and_the_others_are_zero():
    query, keys = torch.randn(6, 2, 8), torch.randn(2, 30, 8)
    wanted = torch.rand(6, 2) > 0.5
    full = kernel(query, keys, k=3, temperature=1.0)
    some = kernel(query, keys, k=3, temperature=1.0, wanted=wanted)
    for one, other, empty in zip(full, some, (0, 0, -1), strict=True):
        assert torch.equal(one[wanted], other[wanted])
        assert bool((other[~wanted] == empty).all())


def test_tokens_per_modality_and_strided_banks():
    query = torch.randn(2, 3, 4, 8)  # (B, M, Q, D)
    keys = torch.randn(30, 3, 16).transpose(0, 1)[..., :8]  # rows apart, never copied
    ours = kernel(query, keys, k=3, temperature=1.0)
    theirs = functional.retrieve(query, keys, k=3, temperature=1.0, backend="torch")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_what_is_not_wanted_may_hold_anything(junk):
    wanted = torch.tensor([True, False, True])
    query, keys = torch.randn(3, 8), torch.randn(30, 8, requires_grad=True)
    query[1] = junk
    query.requires_grad_()
    readout = kernel(query, keys, k=3, temperature=1.0, wanted=wanted)[0]
    grad = torch.where(wanted.unsqueeze(1), torch.randn(3, 8), junk)  # of what was not answered
    dq, dk = torch.autograd.grad(readout, (query, keys), grad)
    assert bool((dq[1] == 0).all())
    for x in (readout, dq, dk):
        assert bool(x.isfinite().all())


def test_a_long_query_in_a_half_precision_bank():
    query = torch.tensor([[1e5, 1.0], [torch.nan, 1.0]], requires_grad=True)
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.5]]).half()
    wanted = torch.tensor([True, False])
    results = []
    for backend in ("torch", "triton"):
        found = functional.retrieve(
            query, keys, k=2, temperature=0.5, wanted=wanted, backend=backend
        )
        results.append((*found, *torch.autograd.grad(found[0].sum(), query)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one.isfinite().all()


def test_kept_norms_of_keys_that_learn_are_not_used():
    query, keys = torch.tensor([[1.0, 0.2]]), torch.eye(2).requires_grad_()
    for backend in ("torch", "triton"):
        found = functional.retrieve(
            query, keys, k=1, temperature=1.0, key_scale=torch.tensor([1.0, 1e3]), backend=backend
        )
        assert found[2].item() == 0
