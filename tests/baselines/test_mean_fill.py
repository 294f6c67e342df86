import torch
from torch.testing import assert_close

from mmfusion.baselines import MeanFill


def model():
    return MeanFill({"a": 3, "b": 2}, num_classes=2, dim=8, num_tokens=2)


def batch(rows=6):
    present = torch.rand(rows, 2) < 0.6
    present[0], present[1] = True, False
    return {"a": torch.randn(rows, 3), "b": torch.randn(rows, 2)}, present


def test_the_mean_is_that_of_the_steps_and_later_follows_them():
    filled, means = model(), []
    for _ in range(14):
        inputs, present = batch()
        tokens = filled(inputs, present).tokens
        rows = present[:, :, None, None]
        means.append((tokens.sum(0) / rows.sum(0)).detach())
    expected = torch.zeros_like(means[0])
    for step, mean in enumerate(means, 1):
        expected += max(1 / step, 0.1) * (mean - expected)
    assert_close(filled.mean, expected)
    assert_close(torch.stack(means[:10]).mean(0), follow(means[:10]))


def follow(means):
    """What a fresh buffer holds after these batch means."""
    filled = model()
    for mean in means:
        filled._follow(mean.unsqueeze(0), torch.ones(1, 2, dtype=torch.bool))
    return filled.mean


def test_hidden_modalities_count_and_unseen_ones_stay_zero():
    filled = model()
    inputs, present = batch()
    present[:, 1] = False
    tokens = filled(inputs, present, visible=torch.zeros_like(present)).tokens
    assert_close(filled.mean[0], tokens[present[:, 0], 0].mean(0))
    assert filled.mean[1].eq(0).all()
    assert filled.steps.tolist() == [1, 0]


def test_a_step_uses_the_mean_before_it_moves_and_eval_leaves_it():
    filled = model()
    inputs, present = batch()
    assert filled(inputs, present).completed[1].eq(0).all()
    before = filled.mean.clone()
    out = filled.eval()(inputs, present)
    assert torch.equal(out.completed[1], before)
    assert torch.equal(filled.mean, before)
