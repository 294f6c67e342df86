import pytest
import torch

from mmfusion.layers import ConcatPool, PresencePool

TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


def test_untrained_it_is_the_mean_of_normalised_present_tokens():
    pool = PresencePool(6)
    tokens, present = (
        torch.randn(3, 2, 4, 6),
        torch.tensor([[True, True], [True, False], [False, True]]),
    )
    out = pool(tokens, present)
    for b in range(3):
        mean = torch.cat([pool.norm(tokens[b, m]) for m in range(2) if present[b, m]]).mean(0)
        torch.testing.assert_close(out[b], mean, **TOLERANCE)


def test_a_trained_query_prefers_some_tokens():
    pool = PresencePool(2)
    tokens = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
    pool.query.data = torch.tensor([100.0, -100.0])
    present = torch.tensor([[True]])
    torch.testing.assert_close(pool(tokens, present), pool.norm(tokens[:, 0, 0]), **TOLERANCE)
    pool.reset_parameters()
    assert not pool.query.any()


def test_nothing_present_gives_zeros_and_finite_gradients():
    pool = PresencePool(3)
    tokens = torch.full((2, 2, 1, 3), float("nan"), requires_grad=True)
    out = pool(tokens, torch.zeros(2, 2).bool())
    out.sum().backward()
    assert (out == 0).all()
    assert (tokens.grad == 0).all()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_absent_content_changes_no_bit(content):
    pool = PresencePool(3)
    torch.nn.init.normal_(pool.query)
    tokens, present = torch.randn(2, 2, 2, 3), torch.tensor([[True, False], [False, True]])
    dirty = tokens.clone()
    dirty[~present] = content
    assert torch.equal(pool(tokens, present), pool(dirty, present))
    cut = pool(tokens[:1, :1], torch.tensor([[True]]))
    torch.testing.assert_close(pool(dirty, present)[:1], cut, **TOLERANCE)


def test_the_query_learns():
    pool = PresencePool(3)
    pool(torch.randn(4, 2, 2, 3), torch.ones(4, 2).bool()).square().sum().backward()
    assert pool.query.grad.any()


def test_modalities_side_by_side_by_hand():
    pool = ConcatPool(2, 3)
    tokens, present = torch.randn(2, 2, 4, 3), torch.tensor([[True, True], [False, True]])
    a, b = tokens.mean(2).unbind(1)
    for row, parts in enumerate(([a[0], b[0]], [torch.zeros(3), b[1]])):
        expected = pool.project(torch.cat(parts))
        torch.testing.assert_close(pool(tokens, present)[row], expected, **TOLERANCE)


def test_a_short_guess_has_less_of_a_say():
    """Normalised, a guess near the mean counted as much as what is observed."""
    pool, tokens = ConcatPool(2, 3), torch.randn(1, 2, 4, 3)
    both = torch.tensor([[True, True]])
    alone = pool(tokens, torch.tensor([[True, False]]))
    tokens[:, 1] *= 0.5
    half = pool(tokens, both) - alone
    tokens[:, 1] *= 2
    torch.testing.assert_close(2 * half, pool(tokens, both) - alone, **TOLERANCE)


def test_it_tells_modalities_apart():
    pool, tokens = ConcatPool(2, 3), torch.randn(1, 2, 4, 3)
    both = torch.tensor([[True, True]])
    assert not torch.allclose(pool(tokens, both), pool(tokens.flip(1), both))


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_what_is_absent_counts_as_zeros_and_gets_no_gradient(content):
    pool, tokens = ConcatPool(2, 3), torch.randn(2, 2, 4, 3)
    present = torch.tensor([[True, False], [False, False]])
    dirty = torch.where(present[:, :, None, None], tokens, content).requires_grad_()
    out = pool(dirty, present)
    assert torch.equal(out, pool(tokens, present))
    torch.testing.assert_close(out[1], pool.project.bias)
    out.square().sum().backward()
    assert dirty.grad[~present].eq(0).all()
    assert dirty.grad[present].any()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


def test_dropout_of_the_concatenation_acts_in_training_alone():
    pool = ConcatPool(2, 32, dropout=0.5)
    batch = torch.randn(1, 2, 4, 32), torch.tensor([[True, True]])
    assert not torch.equal(pool(*batch), pool(*batch))
    pool.eval()
    assert torch.equal(pool(*batch), pool(*batch))
