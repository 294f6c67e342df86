import pytest
import torch
from kernels.parity import attention_inputs, check_attention

from mmfusion import functional

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("interpreter")]
FP32 = torch.float32


def kernel(q, k, v, present, **options):
    return functional.presence_attention(q, k, v, present, **options, backend="triton")


@pytest.mark.parametrize(
    ("width", "lengths", "context", "queries"),
    [
        (16, (1,), 0, None),
        (24, (1, 4, 2), 1, None),
        (40, (3, 1, 5, 2), 8, 5),
        (64, (20, 0, 17), 0, None),
        (64, (30, 33), 1, 3),
        (100, (49, 20), 0, 70),
        (16, (49, 49, 20), 8, None),
    ],
)
def test_parity_half(width, lengths, context, queries):
    check_attention("cpu", torch.float16, 2, 2, width, lengths, context, queries)


@pytest.mark.parametrize(
    ("width", "lengths", "context", "queries"),
    [
        (1, (1,), 0, 1),
        (24, (1, 4, 2), 1, None),
        (64, (3, 1, 5, 2), 0, 40),
        (40, (31, 34), 0, None),
        (16, (100, 100), 0, 7),
    ],
)
def test_parity_single(width, lengths, context, queries):
    check_attention("cpu", FP32, 2, 1, width, lengths, context, queries)


def test_parity_bfloat16():
    check_attention("cpu", torch.bfloat16, 3, 2, 24, (3, 1, 5, 2), 1)


@pytest.mark.parametrize("lengths", [(3, 1, 5, 2), (30, 20, 25)])
def test_allow_and_dropout(lengths):
    check_attention("cpu", FP32, 2, 2, 16, lengths, 2, allow=True)
    check_attention("cpu", FP32, 2, 2, 16, lengths, 2, allow=True, dropout=0.3)


def test_as_many_modalities_as_there_are_bits():
    check_attention("cpu", FP32, 2, 1, 16, (1,) * 62, 1, allow=True)


@pytest.mark.parametrize(
    ("m", "n"), [(16, 16), (16, 32), (32, 32), (32, 64), (64, 64)], ids=lambda x: str(x)
)
def test_every_tile_family(monkeypatch, m, n):
    from mmfusion.kernels import presence_attention
    from mmfusion.kernels.tiles import Tile

    tile = Tile({"BLOCK_M": m, "BLOCK_N": n}, 4, 1)
    monkeypatch.setattr(presence_attention, "pick", lambda *_, **__: tile)
    check_attention("cpu", FP32, 2, 1, 24, (20, 0, 17), 3)
    check_attention("cpu", FP32, 2, 1, 24, (20, 17), 0, queries=9, dropout=0.2)


def test_nothing_present_gives_zeros_and_zero_gradients():
    q, k, v, present = attention_inputs("cpu", FP32, 2, 2, 16, (40, 30), 0, 5)
    leaves = [x.requires_grad_() for x in (q, torch.full_like(k, torch.inf), v * torch.nan)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = kernel(*leaves, torch.zeros_like(present), lengths=(40, 30))
    assert bool((out == 0).all())
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert bool((grad == 0).all())


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_content_under_absent_changes_no_bit(junk):
    lengths, context = (3, 4, 2), 1
    q, k, v, present = attention_inputs("cpu", FP32, 3, 2, 16, lengths, context)
    hidden = ~functional.reference.visibility(present, lengths, context)[:, :, None, None]
    options = {"lengths": lengths, "num_context": context}
    clean = kernel(q, k, v, present, **options)
    dirty = kernel(q, k.masked_fill(hidden, junk), v.masked_fill(hidden, junk), present, **options)
    assert torch.equal(clean, dirty)


def test_absent_equals_cut_out():
    q, k, v, _ = attention_inputs("cpu", FP32, 2, 2, 16, (3, 4, 2), 0, 5)
    present = torch.tensor([[True, False, True]]).expand(2, -1)
    rest = [0, 1, 2, 7, 8]
    whole = kernel(q, k, v, present, lengths=(3, 4, 2))
    cut = kernel(q, k[:, rest], v[:, rest], present[:, [0, 2]], lengths=(3, 2))
    torch.testing.assert_close(whole, cut)


def test_batch_mates_do_not_matter():
    q, k, v, present = attention_inputs("cpu", FP32, 3, 2, 16, (3, 4), 1)
    together = kernel(q, k, v, present, lengths=(3, 4), num_context=1)
    for i in range(3):
        one = slice(i, i + 1)
        alone = kernel(q[one], k[one], v[one], present[one], lengths=(3, 4), num_context=1)
        assert torch.equal(together[one], alone)


def test_a_strided_view_equals_its_copy():
    packed = torch.randn(2, 7, 3, 2, 16)
    q, k, v = packed.unbind(2)  # what chunking a projection gives
    present = torch.tensor([[True, False], [True, True]])
    view = kernel(q, k, v, present, lengths=(4, 3))
    copy = kernel(q.contiguous(), k.contiguous(), v.contiguous(), present, lengths=(4, 3))
    assert torch.equal(view, copy)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(view, kernel(*heads_first, present, lengths=(4, 3)))
    last_strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(view, kernel(*last_strided, present, lengths=(4, 3)))


def test_an_expanded_gradient_equals_a_dense_one():
    q, k, v, present = attention_inputs("cpu", FP32, 2, 2, 16, (3, 4), 1)
    q = q.requires_grad_()
    out = kernel(q, k, v, present, lengths=(3, 4), num_context=1)
    (dense,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    (expanded,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(dense, expanded)


def test_dropout_drops_the_same_weights_as_the_reference():
    q, k, v, present = attention_inputs("cpu", FP32, 2, 2, 16, (20, 30), 2)
    options = {"lengths": (20, 30), "num_context": 2, "dropout": 0.5, "seed": torch.tensor(3)}
    ours = kernel(q, k, v, present, **options)
    theirs = functional.presence_attention(q, k, v, present, **options, backend="torch")
    torch.testing.assert_close(ours, theirs)
    options["seed"] = torch.tensor(4)
    assert not torch.allclose(ours, kernel(q, k, v, present, **options))


def test_an_empty_batch():
    q, k, v, present = attention_inputs("cpu", FP32, 0, 2, 16, (3, 4), 0)
    q.requires_grad_()
    out = kernel(q, k, v, present, lengths=(3, 4))
    assert out.shape == (0, 7, 2, 16)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
