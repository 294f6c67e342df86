import torch
from torch.testing import assert_close

from mmfusion.baselines import CascadeAutoencoder
from mmfusion.losses import reconstruction_loss


def model(**options):
    return CascadeAutoencoder({"a": 3, "b": 2}, num_classes=2, dim=8, num_tokens=2, **options)


INPUTS = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
LABELS = torch.tensor([0, 1, 0, 1])


def test_every_block_reads_the_input_plus_the_residuals_so_far():
    cascade = model(num_blocks=3).eval()
    visible = torch.tensor([[True, False]] * 4)
    out = cascade(INPUTS, visible=visible)
    x = torch.where(visible[:, :, None, None], out.tokens, 0).flatten(1)
    first = cascade.imagine[0](x)
    second = cascade.imagine[1](x + first)
    third = cascade.imagine[2](x + first + second)
    assert_close(out.synthesised.flatten(1), x + first + second + third)


def test_losses_live_on_what_is_hidden_and_on_what_is_visible():
    cascade = model()
    visible = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    out = cascade(INPUTS, visible=visible, labels=LABELS)
    expected = reconstruction_loss(out.synthesised, out.tokens, ~visible)
    assert_close(out.losses["reconstruction"], expected)
    weighted = out.losses["task"] + expected + 0.5 * out.losses["cycle"]
    assert_close(out.loss, weighted)
    complete = cascade(INPUTS, labels=LABELS)
    assert complete.losses["reconstruction"] == 0
    assert complete.losses["cycle"] > 0


def test_without_hiding_the_task_does_not_reach_the_cascade():
    cascade = model(cycle_weight=0.0)
    cascade(INPUTS, labels=LABELS).loss.backward()
    assert all(p.grad.eq(0).all() for p in cascade.imagine.parameters())
