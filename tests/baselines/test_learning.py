"""Every baseline learns from incomplete data; those that synthesise learn to."""

import pytest
import torch

from mmfusion import baselines
from mmfusion.missingness import hide, slot_rate


def draw(rows, seed):
    """Three views of a class and a nuisance that they share, a third of them absent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    nuisance = torch.randn(rows, 2, generator=generator)
    cause = torch.cat([torch.eye(3)[labels] * 2, nuisance], 1)
    mixing = torch.Generator().manual_seed(1)
    views = {name: cause @ torch.randn(5, 6, generator=mixing) for name in "abc"}
    return views, labels, slot_rate(rows, 3, 1 / 3, generator)


def trained(name, steps=80):
    torch.manual_seed(0)
    model = getattr(baselines, name)(
        dict.fromkeys("abc", 6), num_classes=3, dim=16, num_tokens=2, num_heads=2, dropout=0.0
    )
    views, labels, present = draw(128, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        visible = hide(present, 0.3, generator)
        loss = model(views, present, visible, labels, torch.arange(128)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("name", baselines.__all__)
def test_it_learns_from_incomplete_data(name):
    views, labels, present = draw(200, seed=1)
    logits = trained(name)(views, present).logits
    assert (logits.argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("name", ["CascadeAutoencoder", "RetrieveAndFill"])
def test_what_is_synthesised_resembles_the_hidden_truth_more_than_the_mean_does(name):
    views, _, present = draw(200, seed=1)
    everything = torch.ones_like(present)
    out = trained(name)(views, everything, visible=present)
    hidden = ~present
    truth, guess = out.tokens[hidden], out.synthesised[hidden]
    mean = out.tokens.mean(0).expand_as(out.tokens)[hidden]
    assert (guess - truth).square().mean() < 0.8 * (mean - truth).square().mean()
