"""ZeroFill and TokenFill, and what all baselines take over from ``output.py``."""

import pytest
import torch
from torch import nn

from mmfusion.baselines import TokenFill, ZeroFill
from mmfusion.missingness import hide

SIZES = {"a": 3, "b": 2}
INPUTS = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def test_zeros_or_one_learned_token_stand_in():
    zeros = ZeroFill(SIZES, num_classes=2, dim=8)(INPUTS, PRESENT)
    assert zeros.completed[~PRESENT].eq(0).all()
    model = TokenFill(SIZES, num_classes=2, dim=8)
    out = model(INPUTS, PRESENT)
    assert torch.equal(out.completed[~PRESENT], model.absent.tokens[[1, 0, 0, 1]])
    for filled in (zeros, out):
        assert torch.equal(filled.completed[PRESENT], filled.tokens[PRESENT])


def test_visible_decides_what_is_filled_and_losses_need_labels():
    model = ZeroFill(SIZES, num_classes=2, dim=8)
    visible = hide(PRESENT, 1.0, torch.Generator().manual_seed(0))
    out = model(INPUTS, PRESENT, visible=visible)
    assert (PRESENT & ~visible).any()
    assert out.completed[~visible].eq(0).all()
    assert out.losses == {}
    assert out.loss is None
    out = model(INPUTS, PRESENT, labels=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(out.loss, out.losses["task"])


def test_a_visible_beyond_present_is_refused_by_name():
    model = ZeroFill(SIZES, num_classes=2, dim=8)
    with pytest.raises(ValueError, match=r"visible\[1, 'b'\] is True but present is False"):
        model(INPUTS, PRESENT, visible=torch.ones_like(PRESENT))


def test_a_passed_head_is_used_and_weights_of_losses_can_be_set():
    head = nn.Linear(8, 5)
    model = ZeroFill(SIZES, num_classes=5, dim=8, head=head)
    out = model(INPUTS, PRESENT)
    assert torch.equal(out.logits, head(out.fused))
    model.loss_weights["task"] = 3.0
    out = model(INPUTS, PRESENT, labels=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(out.loss, 3 * out.losses["task"])
