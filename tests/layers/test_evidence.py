import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmfusion import losses
from mmfusion.layers import ModalityEvidence

PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
ODDS = torch.tensor([(2 + 1) / (1 + 1), (1 + 1) / (3 + 1)]).log()
# What is counted, where -100 or NaN is missing, and the prior it makes.
COUNTED = {
    "multiclass": (torch.tensor([0, 0, 1, -100]), torch.tensor([(2 + 1) / 5, (1 + 1) / 5]).log()),
    "multilabel": (torch.tensor([[1, 0], [1, 0], [0, 1], [-100, 0]]), ODDS),
    "binary": (torch.tensor([1.0, 1.0, 0.0, torch.nan]), ODDS[:1]),
    "regression": (torch.tensor([[1.0, -2], [2, 0], [6, torch.nan]]), torch.tensor([3.0, -1.0])),
}
EVERY = pytest.mark.parametrize("target", COUNTED)


def made(target, **options):
    return ModalityEvidence(2, 3, COUNTED[target][1].numel(), target, **options).eval()


def counted(target):
    layer, (labels, _) = made(target), COUNTED[target]
    layer.count(labels, losses.is_known(labels))
    return layer


@EVERY
def test_the_prior_is_what_was_counted(target):
    layer, (_, prior) = counted(target), COUNTED[target]
    assert_close(layer.prior(), prior)
    out = layer(torch.full((1, 2, 4, 3), torch.nan), torch.tensor([[False, False]]))
    assert_close(out.logits[0], prior)
    assert out.evidence.eq(0).all()
    layer.reset_parameters()
    assert layer.tally.eq(0).all()


@EVERY
def test_nothing_counted_is_no_opinion(target):
    prior, classes = made(target).prior().exp(), COUNTED[target][1].numel()
    assert_close(prior, torch.full((classes,), 1 / classes if target == "multiclass" else 1.0))


def test_two_batches_count_as_one():
    layer, (labels, prior) = made("multilabel"), COUNTED["multilabel"]
    for part in labels.split(1):
        layer.count(part, losses.is_known(part))
    assert_close(layer.prior(), prior)


def test_forward_does_not_count():
    layer = counted("multiclass").train()
    before = layer.tally.clone()
    layer(torch.randn(4, 2, 1, 3), PRESENT)
    assert torch.equal(layer.tally, before)


def test_multiclass_is_bayes_rule():
    layer, prior = counted("multiclass"), COUNTED["multiclass"][1].exp()
    out = layer(torch.randn(4, 2, 4, 3), PRESENT)
    a, b = out.scores.softmax(-1).unbind(1)
    both = a[0] * b[0] / prior
    expected = torch.stack([both / both.sum(), a[1], b[2], prior])
    assert_close(out.logits.softmax(-1), expected)


@pytest.mark.parametrize("target", ["binary", "multilabel"])
def test_binary_and_multilabel_add_log_odds(target):
    layer, prior = counted(target), COUNTED[target][1]
    out = layer(torch.randn(4, 2, 4, 3), PRESENT)
    a, b = out.scores.unbind(1)
    assert_close(out.logits, torch.stack([a[0] + b[0] - prior, a[1], b[2], prior]))


def test_regression_is_the_mean_prediction():
    layer, prior = counted("regression"), COUNTED["regression"][1]
    out = layer(torch.randn(4, 2, 4, 3), PRESENT)
    a, b = out.scores.unbind(1)
    assert_close(out.logits, torch.stack([(a[0] + b[0]) / 2, a[1], b[2], prior]))


@EVERY
def test_evidence_and_prior_add_up_to_the_logits(target):
    layer = counted(target)
    out = layer(torch.randn(4, 2, 4, 3), PRESENT)
    assert_close(out.logits, layer.prior() + out.evidence.sum(1))
    assert out.evidence[~PRESENT].eq(0).all()


@EVERY
@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_absent_content_changes_no_bit_and_gets_no_gradient(target, content):
    layer, tokens = counted(target), torch.randn(4, 2, 4, 3)
    dirty = torch.where(PRESENT[:, :, None, None], tokens, content).requires_grad_()
    out = layer(dirty, PRESENT)
    for one, other in zip(out, layer(tokens, PRESENT), strict=True):
        assert torch.equal(one, other)
    out.logits.square().sum().backward()
    assert dirty.grad[~PRESENT].eq(0).all()
    assert dirty.grad[PRESENT].ne(0).any(-1).all()


def test_each_modality_has_a_classifier_of_its_own():
    layer = made("multiclass")
    layer(torch.randn(4, 2, 4, 3), PRESENT & torch.tensor([True, False])).logits[
        :, 0
    ].sum().backward()
    read, other = layer.heads
    assert read.classify.weight.grad.any()
    assert not other.classify.weight.grad.any()


def test_a_passed_head_is_copied():
    head = nn.Linear(3, 2)
    layer = ModalityEvidence(2, 3, 2, "multiclass", head=head)
    assert len({id(h.weight) for h in (head, *layer.heads)}) == 3
    assert all(torch.equal(h.weight, head.weight) for h in layer.heads)


def test_dropout_acts_in_training_alone():
    layer, tokens = made("multiclass", dropout=0.5), torch.randn(4, 2, 4, 3)
    assert torch.equal(layer(tokens, PRESENT).scores, layer(tokens, PRESENT).scores)
    layer.train()
    assert not torch.equal(layer(tokens, PRESENT).scores, layer(tokens, PRESENT).scores)


def test_half_precision_adds_in_single():
    layer = counted("multiclass").bfloat16()
    out = layer(torch.randn(4, 2, 4, 3).bfloat16(), PRESENT)
    a, b = out.scores.float().softmax(-1).unbind(1)
    both = a[0] * b[0] / layer.prior().exp()
    assert_close(out.logits[0].softmax(-1).float(), both / both.sum(), atol=0.01, rtol=0.01)
    assert {x.dtype for x in out} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_leaves_the_prior_alone(dtype):
    """Counts beyond 65504 became Inf in float16, and 257 became 256 in bfloat16."""
    layer = made("multiclass")
    layer.tally.copy_(torch.tensor([[70_000.0, 257.0], [70_257.0, 70_257.0]]))
    before, keys = layer.tally.clone(), list(layer.state_dict())
    for cast in (copy.deepcopy(layer).to(dtype), nn.Sequential(layer).to(dtype)[0]):
        assert torch.equal(cast.tally, before)
        assert cast.heads[0].classify.weight.dtype == dtype
        assert list(cast.state_dict()) == keys
        cast.count(torch.tensor([1]), torch.tensor([True]))
        assert cast.tally.tolist() == [[70_000, 258], [70_258, 70_258]]
        cast.tally.copy_(before)
    out = layer(torch.zeros(1, 2, 1, 3, dtype=dtype), torch.tensor([[False, False]]))
    assert_close(out.logits.float().softmax(1)[0, 0].item(), 70 / 70.257, atol=1e-3, rtol=1e-3)


def test_counts_still_move_between_devices():
    layer = counted("multiclass").to("meta", torch.bfloat16)
    assert (layer.tally.device.type, layer.tally.dtype) == ("meta", torch.float32)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.tally.eq(0).all()


def test_no_row_counts_nothing():
    for target, (labels, _) in COUNTED.items():
        layer, none = made(target), labels[:0]
        layer.count(none, losses.is_known(none))
        assert layer.tally.eq(0).all()
