"""What only a GPU can show. Run with ``pytest -m gpu tests/kernels``."""

import pytest
import torch
from kernels.parity import attention_inputs, check_attention, check_contrastive, check_retrieve

from mmfusion import functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def attention(q, k, v, present, backend="triton", **options):
    return functional.presence_attention(q, k, v, present, backend=backend, **options)


def retrieve(*args, backend="triton", **options):
    return functional.retrieve(*args, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 24, 40, 64, 100, 128])
@pytest.mark.parametrize("tokens", [1, 7, 20, 37, 63, 64, 65, 111, 128, 200, 257, 512])
def test_attention_parity(dtype, width, tokens):
    if dtype == torch.float32 and width > 64:
        pytest.skip("served by PyTorch")
    first = tokens // 3
    check_attention(GPU, dtype, 5, 3, width, (first, tokens - first), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 4, 2), (3, 1, 5, 2), (49, 49, 20)])
@pytest.mark.parametrize("context", [0, 1, 8])
def test_attention_parity_over_lengths(dtype, lengths, context):
    check_attention(GPU, dtype, 7, 2, 64, lengths, context)
    check_attention(GPU, dtype, 7, 2, 64, lengths, context, queries=33)
    check_attention(GPU, dtype, 7, 2, 64, lengths, context, allow=True)
    check_attention(GPU, dtype, 7, 2, 64, lengths, context, allow=True, dropout=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("banks", "queries", "slots", "width", "value_width", "k"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 5, 300, 40, 24, 5),
        (2, 17, 1000, 64, 32, 16),
        (1, 7, 13, 3, 5, 20),
        (3, 33, 3001, 96, 96, 17),
        (1, 2, 4097, 257, 130, 64),
        (5, 300, 20000, 64, 0, 8),
        (1, 100, 50000, 1024, 64, 32),
    ],
)
def test_retrieve_parity(dtype, banks, queries, slots, width, value_width, k):
    # rounded keys tie more often than exact ones, so half precision compares without exclusions
    check_retrieve(GPU, dtype, banks, queries, slots, width, value_width, k)


@pytest.mark.parametrize("exclude", [None, "slot", "ids"])
@pytest.mark.parametrize("slots", [500, 5000])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_retrieve_options(exclude, slots, similarity):
    for held in (None, (0, 3, slots - 1)):
        for queries in (40, 1500):
            check_retrieve(
                GPU,
                torch.float32,
                3,
                queries,
                slots,
                64,
                32,
                7,
                held=held,
                exclude=exclude,
                wanted=True,
                similarity=similarity,
                temperature=0.3 if similarity == "cosine" else 8.0,
            )


@pytest.mark.parametrize("programs", [1, 3, 264])
def test_retrieve_by_streaming(monkeypatch, programs):
    from mmfusion.kernels import retrieve as launchers

    monkeypatch.setattr(launchers, "SMALL", 1 << 30)
    monkeypatch.setattr(launchers, "PROGRAMS", programs)
    for k in (3, 16, 40, 64):
        check_retrieve(GPU, torch.float32, 2, 50, 9000, 96, 32, k, exclude="ids", wanted=True)


@pytest.mark.parametrize(
    ("batch", "modalities", "width", "classes"), [(1, 1, 1, 1), (50, 3, 65, 4), (700, 3, 256, 7)]
)
def test_contrastive_parity(batch, modalities, width, classes):
    check_contrastive(GPU, batch, modalities, width, classes)


def test_contrastive_at_a_size_without_room_for_pairs():
    rows = 32768
    vectors = torch.nn.functional.normalize(torch.randn(rows, 128, device=GPU), dim=-1)
    labels = torch.randint(0, 10, (rows,), device=GPU)
    yes = torch.ones(rows, dtype=torch.bool, device=GPU)
    vectors.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, number = functional.class_contrastive(
        vectors, vectors, labels, labels, yes, yes, backend="triton"
    )
    loss.mean().backward()
    assert bool(loss.isfinite().all())
    assert bool((number > 0).all())
    assert torch.cuda.max_memory_allocated() - before < 200 << 20


def test_backward_gives_the_same_bits_every_time():
    q, k, v, present = attention_inputs(GPU, torch.bfloat16, 64, 8, 64, (49, 49, 20), 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, present, lengths=(49, 49, 20), num_context=8)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_deterministic_key_gradients_give_the_same_bits_every_time():
    query = torch.randn(512, 64, device=GPU)
    keys = torch.randn(100, 64, device=GPU, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [
            torch.autograd.grad(retrieve(query, keys, k=8, temperature=0.5)[0].sum(), keys)[0]
            for _ in range(20)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], other) for other in grads)


def test_more_heads_than_a_grid_axis_holds():
    q, k, v, present = attention_inputs(GPU, torch.float16, 16400, 4, 16, (4, 4), 0)
    ours = attention(q, k, v, present, lengths=(4, 4))
    last = slice(-3, None)
    theirs = attention(q[last], k[last], v[last], present[last], lengths=(4, 4), backend="torch")
    torch.testing.assert_close(ours[last], theirs, atol=3e-3, rtol=3e-3)


def test_offsets_beyond_31_bits_in_attention():
    batch, tokens = 70000, 64  # 70000 * 64 * 8 * 64 elements = 2.3e9
    needs = 4 * batch * tokens * 8 * 64 * 2
    if torch.cuda.mem_get_info()[0] < 2 * needs:
        pytest.skip("not enough memory")
    x = torch.randn(batch, tokens, 8, 64, device=GPU, dtype=torch.float16)
    present = torch.rand(batch, 2, device=GPU) > 0.5
    out = attention(x, x, x, present, lengths=(30, 34))
    last = slice(-3, None)
    part = x[last].clone()
    theirs = attention(part, part, part, present[last], lengths=(30, 34), backend="torch")
    torch.testing.assert_close(out[last], theirs, atol=3e-3, rtol=3e-3)


def test_offsets_beyond_31_bits_in_retrieve():
    slots, width = (1 << 31) // 128 + 5000, 128
    if torch.cuda.mem_get_info()[0] < 3 * slots * width * 2:
        pytest.skip("not enough memory")
    keys = torch.empty(slots, width, device=GPU, dtype=torch.float16)
    for part in keys.split(1 << 20):
        part.copy_(torch.randn(len(part), width, device=GPU))
    place = torch.tensor([0, slots - 1, slots - 4000], device=GPU)
    _, _, indices = retrieve(keys[place], keys, k=1, temperature=0.1)
    assert torch.equal(indices[:, 0], place)


def test_another_stream_and_another_device():
    q, k, v, present = attention_inputs(GPU, torch.float16, 8, 2, 64, (20, 17), 0)
    expected = attention(q, k, v, present, lengths=(20, 17))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention(q, k, v, present, lengths=(20, 17))
    stream.synchronize()
    assert torch.equal(found, expected)
    if torch.cuda.device_count() > 1:  # the current device stays the first
        moved = [x.to("cuda:1") for x in (q, k, v, present)]
        assert torch.equal(attention(*moved, lengths=(20, 17)).to(GPU), expected)


def test_capture_into_a_cuda_graph():
    q, k, v, present = attention_inputs(GPU, torch.float16, 8, 2, 64, (20, 17), 0)
    query, keys = torch.randn(64, 2, 64, device=GPU), torch.randn(2, 5000, 64, device=GPU)
    held = torch.tensor([5000, 17], device=GPU)
    wanted = torch.rand(64, 2, device=GPU) > 0.5

    def run():
        out = attention(q, k, v, present, lengths=(20, 17))
        readout = retrieve(query, keys, k=8, temperature=0.1, held=held, wanted=wanted)[0]
        one_bank = retrieve(query[:, 0], keys[0], k=8, temperature=0.1, held=4000)[0]
        return out, readout, one_bank

    with torch.no_grad():
        expected = run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for x in found:
            x.zero_()
        graph.replay()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_auto_takes_the_kernel_on_a_gpu():
    q, k, v, present = attention_inputs(GPU, torch.float16, 2, 2, 64, (3, 4), 0)
    out = attention(q.requires_grad_(), k, v, present, lengths=(3, 4), backend="auto")
    assert out.grad_fn.name() == "PresenceAttentionBackward"
    assert functional.why_not_triton("retrieve", q.double()) == "float64"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_inductor_on_a_gpu():
    q, k, v, present = attention_inputs(GPU, torch.bfloat16, 4, 2, 64, (20, 17), 0)
    call = lambda *x: attention(*x, lengths=(20, 17)) * 2  # noqa: E731
    q.requires_grad_()
    one, other = torch.compile(call, fullgraph=True)(q, k, v, present), call(q, k, v, present)
    torch.testing.assert_close(one, other)
    for a, b in zip(*(torch.autograd.grad(x.sum(), q) for x in (one, other)), strict=True):
        torch.testing.assert_close(a, b)
