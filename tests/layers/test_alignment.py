import pytest
import torch
from torch import nn

from mmfusion.layers import ReferenceAlignment
from mmfusion.losses import alignment_loss

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def made(**options):
    return ReferenceAlignment(8, num_heads=2, **options)


def test_context_reads_modalities_and_modalities_read_the_reference():
    align = made().eval()
    completed, context = torch.randn(2, 3, 2, 8), torch.randn(5, 8)
    aligned, reference = align(completed, context)
    x = completed.flatten(1, 2)
    tokens = align.norm_tokens(x)
    everything = torch.ones(2, 6).bool()
    given = context.expand(2, -1, -1)
    truth = given + align.gather(align.norm_context(given), tokens, everything)
    torch.testing.assert_close(reference, truth, **TOLERANCE)
    keys = align.norm_reference(reference)
    x = x + align.guide(tokens, keys, torch.ones(2, 5).bool())
    x = x + align.contract(nn.functional.gelu(align.expand(align.norm_hidden(x))))
    torch.testing.assert_close(aligned.flatten(1, 2), x, **TOLERANCE)


def test_context_may_come_once_or_per_sample():
    align = made().eval()
    completed, context = torch.randn(2, 3, 1, 8), torch.randn(5, 8)
    for one, other in zip(
        align(completed, context), align(completed, context.expand(2, -1, -1)), strict=True
    ):
        assert torch.equal(one, other)


def test_modalities_meet_in_the_reference_alone():
    """What modality 0 holds reaches modality 1 through the reference, or not at all."""
    align = made().eval()
    completed = torch.randn(1, 2, 1, 8, requires_grad=True)
    aligned, _ = align(completed, torch.randn(3, 8))
    (grad,) = torch.autograd.grad(aligned[0, 1].sum(), completed)
    assert grad[0, 0].any()
    nn.init.zeros_(align.gather.out.weight)
    aligned, _ = align(completed, torch.randn(3, 8))
    (grad,) = torch.autograd.grad(aligned[0, 1].square().sum(), completed)
    assert not grad[0, 0].any()
    assert grad[0, 1].any()


@pytest.mark.parametrize("content", [NAN, float("inf"), 1e30])
def test_a_modality_left_out_is_not_read_and_comes_out_as_zeros(content):
    align = made().eval()
    completed, context = torch.randn(2, 3, 2, 8), torch.randn(4, 8)
    present = torch.tensor([[True, False, True], [False, False, False]])
    dirty = completed.clone()
    dirty[~present] = content
    dirty.requires_grad_()
    aligned, reference = align(dirty, context, present)
    for one, other in zip(align(completed, context, present), (aligned, reference), strict=True):
        assert torch.equal(one, other)
    assert (aligned[~present] == 0).all()
    aligned.square().sum().backward()
    assert (dirty.grad[~present] == 0).all()
    cut = align(completed[:1, [0, 2]], context)
    torch.testing.assert_close(aligned[:1, [0, 2]], cut[0], **TOLERANCE)
    torch.testing.assert_close(reference[:1], cut[1], **TOLERANCE)


def test_modality_weights_are_shares():
    align = made().eval()
    completed, context = torch.randn(3, 2, 2, 8), torch.randn(4, 8)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    weights = align.modality_weights(completed, context, present)
    assert weights.shape == (3, 4, 2)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4), **TOLERANCE)
    assert weights[1].tolist() == [[pytest.approx(1.0), 0.0]] * 4
    assert not weights[2].any()
    torch.testing.assert_close(
        align.modality_weights(completed, context)[0], weights[0], **TOLERANCE
    )


def test_dropout_acts_in_training_alone():
    align = made(dropout=0.5)
    completed, context = torch.randn(2, 2, 1, 8), torch.randn(4, 8)
    assert not torch.equal(align(completed, context)[0], align(completed, context)[0])
    align.eval()
    assert torch.equal(align(completed, context)[0], align(completed, context)[0])


def test_training_lowers_the_angle_to_the_reference():
    align, context = made(), torch.randn(4, 8)
    completed = torch.randn(16, 2, 2, 8)
    optimiser = torch.optim.Adam(align.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = alignment_loss(*align(completed, context))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"num_heads=3 with dim=8.*evenly.*divisor"):
        ReferenceAlignment(8, num_heads=3)
