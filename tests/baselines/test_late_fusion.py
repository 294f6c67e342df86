import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mmfusion.baselines import LateFusion

INPUTS = {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def model(target="multiclass", num_classes=3, **options):
    sizes = {"a": 3, "b": 2}
    return LateFusion(sizes, num_classes=num_classes, target=target, dim=8, dropout=0, **options)


def scores(late):
    """What each head says about each sample, by hand."""
    tokens = late.edge(INPUTS, None)[0].mean(2)
    parts = zip(late.evidence.hidden, late.evidence.heads, strict=True)
    return [head(F.gelu(hidden(tokens[:, m]))) for m, (hidden, head) in enumerate(parts)]


def test_log_probabilities_over_the_prior_add_up():
    late = model()
    late(INPUTS, labels=torch.tensor([0, 0, 2, -100]))
    prior = (torch.tensor([2.0, 0.0, 1.0]) + 1) / (3 + 3)
    a, b = (score.softmax(1) for score in scores(late.eval()))
    out = late(INPUTS, PRESENT).logits.softmax(1)
    both = a[0] * b[0] / prior
    assert_close(out[0], both / both.sum())
    assert_close(out[1], a[1])
    assert_close(out[2], b[2])
    assert_close(out[3], prior)


@pytest.mark.parametrize("target", ["binary", "multilabel"])
def test_log_odds_over_the_prior_add_up(target):
    late = model(target, 1)
    late(INPUTS, labels=torch.tensor([[1.0], [1.0], [0.0], [torch.nan]]))
    prior = torch.tensor([(2 + 1) / (1 + 1)]).log()
    a, b = scores(late.eval())
    out = late(INPUTS, PRESENT).logits
    assert_close(out, torch.stack([a[0] + b[0] - prior, a[1], b[2], prior]))


def test_regression_takes_the_mean_prediction():
    late = model("regression", 1)
    late(INPUTS, labels=torch.tensor([1.0, 2.0, 6.0, torch.nan]))
    a, b = scores(late.eval())
    out = late(INPUTS, PRESENT).logits
    assert_close(out, torch.stack([(a[0] + b[0]) / 2, a[1], b[2], torch.tensor([3.0])]))


def test_each_head_learns_on_its_own_from_what_is_visible():
    labels = torch.tensor([0, 1, 2, 0])
    late = model()
    late(INPUTS, PRESENT, labels=labels).loss.backward()
    task = nn.functional.cross_entropy
    expected = torch.autograd.grad(
        sum(
            task(score[PRESENT[:, m]], labels[PRESENT[:, m]], reduction="sum")
            for m, score in enumerate(scores(late))
        )
        / PRESENT.sum(),
        late.evidence.heads[0].classify.weight,
    )
    assert_close(late.evidence.heads[0].classify.weight.grad, expected[0])


def test_a_passed_head_is_copied_for_each_modality():
    head = nn.Linear(8, 3)
    late = model(head=head)
    assert len({id(h.weight) for h in (head, *late.evidence.heads)}) == 3
    assert all(torch.equal(h.weight, head.weight) for h in late.evidence.heads)


def test_the_prior_counts_in_training_only():
    late = model()
    late.eval()(INPUTS, labels=torch.tensor([0, 1, 2, 0]))
    assert late.evidence.tally.eq(0).all()
    late.train()(INPUTS, labels=torch.tensor([0, 1, 2, 0]))
    assert late.evidence.tally.tolist() == [[2, 1, 1], [4, 4, 4]]
