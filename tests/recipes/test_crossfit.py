import pytest
import torch
from torch import nn

from mmfusion.baselines import ZeroFill
from mmfusion.recipes.crossfit import (
    as_an_ensemble,
    folds,
    least_loss,
    mixture_loss,
    mixture_weights,
)
from mmfusion.recipes.evidence import SHALLOW, shallow_kinds
from mmfusion.recipes.member_training import batch_size
from mmfusion.recipes.members import Features, Member, Rows


def test_weights_find_the_opinion_that_is_right():
    labels = torch.randint(3, (400,))
    right = 2 * torch.nn.functional.one_hot(labels, 3) + torch.randn(400, 3)
    scores = torch.stack([right, torch.randn(400, 3)], dim=2).log_softmax(1)
    weights = mixture_weights(scores, labels, "multiclass")
    assert weights[0] > 5 * weights[1] >= 0
    least = mixture_loss(scores, labels, "multiclass", weights)
    for other in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0]):
        assert least < mixture_loss(scores, labels, "multiclass", torch.tensor(other).double())


def test_who_is_too_sure_is_judged_by_what_a_mixture_makes_of_it():
    labels = torch.randint(3, (400,))
    better, worse = (
        a * torch.nn.functional.one_hot(labels, 3) + torch.randn(400, 3) for a in (2, 1)
    )
    sure, modest = ((a * x).log_softmax(1).unsqueeze(2) for a, x in ((20, better), (1, worse)))
    one = torch.ones(1).double()
    assert mixture_loss(sure, labels, "multiclass", one) > mixture_loss(
        modest, labels, "multiclass", one
    )
    assert least_loss(sure, labels, "multiclass") < least_loss(modest, labels, "multiclass")


def test_two_opinions_that_err_apart_are_both_heard():
    truth = torch.randn(300, 1)
    scores = torch.stack([truth + torch.randn(300, 1) for _ in range(2)], dim=2)
    weights = mixture_weights(scores, truth, "regression")
    assert weights.min() > 0.2


@pytest.mark.parametrize("target", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_is_left_out_once(target, grouped):
    labels = {
        "multiclass": torch.tensor([0] * 20 + [1] * 18 + [2, 3]),  # two classes with one row
        "multilabel": torch.randint(2, (40, 2)).float(),
        "regression": torch.randn(40, 1),
    }[target]
    groups = torch.arange(40).div(2, rounding_mode="floor").numpy() if grouped else None
    parts = folds(
        Rows(Features({}, {}), torch.ones(40, 1).bool(), labels, groups), 4, target, seed=1
    )
    assert sorted(torch.cat([held for _, held in parts]).tolist()) == list(range(40))
    for kept, held in parts:
        assert sorted([*kept.tolist(), *held.tolist()]) == list(range(40))
        if target == "multiclass" and not grouped:
            assert 4 <= (labels[held] == 0).sum() <= 6


def test_batches_grow_with_the_rows():
    assert [batch_size(rows) for rows in (1, 200, 1000, 10**6)] == [32, 32, 256, 256]


@pytest.mark.parametrize("target", ["multiclass", "multilabel", "regression"])
def test_as_an_ensemble_averages_the_network_and_leaves_shallow_evidence_and_modes_alone(target):
    model = ZeroFill({"a": 4}, num_classes=3, target=target, dim=8, dropout=0.5)
    shallow = {kind: SHALLOW[kind]({"a": 4}, 3, target) for kind in shallow_kinds(target)}
    member = Member(model, shallow).eval()
    nn.init.normal_(model.head.classify.weight, std=3)
    features, present = {"a": torch.randn(6, 4)}, torch.ones(6, 1, dtype=torch.bool)
    inputs = Features(features, features)
    plain = member.scores(inputs, present)
    found = as_an_ensemble(member, inputs, present, input_dropout=0.2)
    torch.testing.assert_close(found[..., 1:], plain[..., 1:])
    assert not torch.allclose(found[..., 0], plain[..., 0])
    assert not any(module.training for module in member.modules())
    if target == "multiclass":  # an average of probabilities is one, and less sure of itself
        torch.testing.assert_close(found[..., 0].exp().sum(1), torch.ones(6).double())
        assert found[..., 0].exp().amax(1).mean() < plain[..., 0].exp().amax(1).mean()
