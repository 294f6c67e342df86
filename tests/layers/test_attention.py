import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mmfusion.layers import PresenceAttention

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def made(**options):
    return PresenceAttention(8, num_heads=2, **options)


def plain(attention, queries, keys, attend):
    """Project, attend by hand, project; ``attend`` (B, Nq, N)."""
    q = attention.query(queries).unflatten(-1, (2, -1)).transpose(1, 2)
    k, v = attention.key_value(keys).chunk(2, -1)
    k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=attend.unsqueeze(1))
    return attention.out(out.transpose(1, 2).flatten(2))


def test_it_is_projections_around_masked_attention():
    attention = made()
    queries, keys = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    attend = torch.rand(3, 5) < 0.6
    attend[:, 0] = True
    out = attention(queries, keys, attend)
    close(out, plain(attention, queries, keys, attend.unsqueeze(1).expand(-1, 4, -1)))


def test_lengths_spread_present_over_tokens_after_the_context():
    attention = made()
    x = torch.randn(2, 6, 8)
    present = torch.tensor([[True, False], [False, True]])
    out = attention(x, x, present, lengths=(1, 3), num_context=2)
    spread = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
    close(out, attention(x, x, spread))
    # without lengths every key after the context has a column of its own
    close(out, attention(x, x, spread[:, 2:], num_context=2))


def test_every_query_may_have_keys_of_its_own():
    attention = made()
    queries, keys = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    attend = torch.rand(3, 1, 4, 5) < 0.5
    attend[..., 0] = True
    attend[:, :, 1] = False
    out = attention(queries, keys, attend)
    seen = attend.any(-1).squeeze(1)
    close(out[seen], plain(attention, queries, keys, attend.squeeze(1))[seen])
    assert torch.equal(out[:, 1], attention.out.bias.expand(3, -1))


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("content", [NAN, float("inf"), 1e30])
def test_hidden_content_changes_no_bit_and_no_gradient(pairwise, content):
    attention = made()
    queries, keys = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    attend = torch.tensor([[True, False, True, False], [False] * 4])
    hidden = ~attend
    attend = attend[:, None, None].expand(-1, 1, 3, -1) if pairwise else attend
    results = []
    for filling in (0.0, content):
        filled = keys.clone()
        filled[hidden] = filling
        filled.requires_grad_()
        out = attention(queries, filled, attend)
        grads = torch.autograd.grad(out.square().sum(), [filled, *attention.parameters()])
        assert (grads[0][hidden] == 0).all()
        results.append((out, *grads))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert torch.equal(results[0][0][1], attention.out.bias.expand(3, -1))


@pytest.mark.parametrize("pairwise", [False, True])
def test_dropout_works_in_training_follows_torch_and_rests_in_eval(pairwise):
    attention = made(dropout=0.5)
    x = torch.randn(2, 6, 8)
    attend = torch.ones(2, 6).bool()
    attend = attend[:, None, None].expand(-1, 1, 6, -1) if pairwise else attend
    torch.manual_seed(3)
    first, second = attention(x, x, attend), attention(x, x, attend)
    torch.manual_seed(3)
    assert torch.equal(attention(x, x, attend), first)
    assert not torch.equal(first, second)
    attention.eval()
    state = torch.get_rng_state()
    out = attention(x, x, attend)
    assert torch.equal(out, attention(x, x, attend))
    assert torch.equal(torch.get_rng_state(), state)
    attention.dropout = 0.0
    assert torch.equal(out, attention(x, x, attend))


def test_modality_weights_say_where_a_query_looks():
    attention = made()
    queries, keys = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    keys[1, 3:] = NAN
    present = torch.tensor([[True, True], [True, False], [False, False]])
    weights = attention.modality_weights(queries, keys, present, lengths=(3, 3))
    assert weights.shape == (3, 4, 2)
    close(weights.sum(-1), torch.tensor([1.0, 1.0, 0.0])[:, None].expand(-1, 4))
    assert (weights[1, :, 1] == 0).all()
    # with values that are the indicator of the second modality, attention returns its weight
    q = attention.query(queries[:1]).unflatten(-1, (2, -1)).transpose(1, 2)
    k = attention.key_value(keys[:1]).chunk(2, -1)[0].unflatten(-1, (2, -1)).transpose(1, 2)
    v = torch.tensor([0.0] * 3 + [1.0] * 3).reshape(1, 1, 6, 1).expand(1, 2, 6, 1)
    share = scaled_dot_product_attention(q, k, v).mean(1).squeeze(-1)
    close(weights[0, :, 1], share[0])


class Counting:
    """A compiler backend that counts the graphs it is given."""

    graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph


def test_one_graph_serves_every_number_of_keys():
    torch._dynamo.reset()
    attention, backend = made(), Counting()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for n in range(3, 14):
        x, attend = torch.randn(2, n, 8), torch.rand(2, n) < 0.5
        close(compiled(x, x, attend), attention(x, x, attend))
    assert backend.graphs == 1


def test_export_has_a_dynamic_number_of_keys():
    x, attend = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    keys = {1: torch.export.Dim("N", max=4096)}
    exported = torch.export.export(made(), (x, x, attend), dynamic_shapes=(keys,) * 3).module()
    x, attend = torch.randn(2, 700, 8), torch.rand(2, 700) < 0.5
    assert exported(x, x, attend).shape == (2, 700, 8)


def test_the_backend_is_handed_on():
    attention = made(backend="triton")
    x = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match=r"backend='triton'.*Use backend='auto'"):
        attention(x, x, torch.ones(1, 2).bool())


X = torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: PresenceAttention(8, 3), r"num_heads=3 with dim=8.*evenly.*divisor"),
        (lambda: PresenceAttention(8, 0), r"num_heads=0 with dim=8.*evenly.*divisor"),
        (lambda: made(dropout=1.0), r"dropout=1\.0.*share.*0 <= dropout < 1"),
        (lambda: made()(X, X, torch.ones(2, 3)), r"attend is \(2, 3\) torch\.float32.*Convert it"),
        (lambda: made()(X, X, torch.ones(2, 4).bool()), r"attend is \(2, 4\).*make up.*Correct"),
        (
            lambda: made()(X, X, torch.ones(2, 2, 3, 3).bool()),
            r"attend is \(2, 2, 3, 3\).*\(B, 1, Nq, N\) = \(2, 1, 3, 3\).*Convert",
        ),
        (
            lambda: made()(X, X, torch.ones(2, 1, 2, 3).bool()),
            r"attend is \(2, 1, 2, 3\).*\(2, 1, 3, 3\).*Convert",
        ),
        (
            lambda: made()(X, X, torch.ones(2, 2).bool(), lengths=(1, 1)),
            r"lengths=\(1, 1\).*3 keys.*make up all keys.*Correct",
        ),
        (
            lambda: made()(X, X, torch.ones(2, 1).bool(), lengths=(1, 2)),
            r"attend is \(2, 1\).*one column per modality.*Correct",
        ),
    ],
)
def test_refusals(call, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        call()
