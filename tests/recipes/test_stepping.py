"""One optimiser step: parts of a batch add up, weights decay where they should, EMA follows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import mmfusion
from mmfusion.recipes.ema import moving_average
from mmfusion.recipes.encoders import TableEncoder
from mmfusion.recipes.parameters import parameter_groups
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.stepping import OptimiserStep

PLAN = Plan(batch_size=8, hide_rate=0.4)


def stepped(plan: Plan, labels: torch.Tensor, **kind: Any) -> tuple[OptimiserStep, dict[str, Any]]:
    torch.manual_seed(0)
    model = mmfusion.CMML(
        {"a": 3, "b": 4}, num_classes=3, dim=8, num_blocks=1, dropout=0.0, memory=None, **kind
    )
    take = OptimiserStep(Accelerator(cpu=True), model, plan)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(8, size, generator=generator) for name, size in [("a", 3), ("b", 4)]
    }
    present = torch.ones(8, 2, dtype=torch.bool)
    present[5:, 1] = False
    batch = {"inputs": inputs, "present": present, "labels": labels}
    return take, take(batch | {"sample_ids": torch.arange(8)}, epoch=0, step=1, steps=5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_have_the_losses_and_gradients_of_the_whole(accumulate: int) -> None:
    """Also where parts know different numbers of labels and hide different numbers of entries."""
    labels = torch.tensor([0, 1, 2, -100, -100, -100, 1, 0])
    kind = {"contrastive_weight": 0.0}
    whole, losses = stepped(PLAN, labels, **kind)
    parts, of_parts = stepped(replace(PLAN, accumulate=accumulate), labels, **kind)
    for name in ("task", "reconstruction", "alignment", "loss"):
        assert float(of_parts[name]) == pytest.approx(float(losses[name]), rel=1e-5)
    assert float(losses["reconstruction"]) > 0
    for ours, theirs in zip(parts.bare.parameters(), whole.bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_contrastive_loss_compares_within_parts() -> None:
    labels = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0])
    whole, parts = (stepped(replace(PLAN, accumulate=n), labels)[1] for n in (1, 4))
    assert float(whole["contrastive"]) != pytest.approx(float(parts["contrastive"]), rel=1e-3)


def test_a_batch_that_does_not_divide_into_parts() -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 on 1 ranks with accumulate=3.*another"):
        stepped(replace(PLAN, accumulate=3), torch.zeros(8, dtype=torch.int64))


def test_what_multiplies_decays_and_nothing_else() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Embedding(5, 4))
    table = TableEncoder(("age", "sex"), 4)
    model = mmfusion.CMML({"photo": (encoder, 4), "meta": (table, 4)}, num_classes=2, dim=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = sorted(parameter_groups(model, Plan()), key=lambda group: -group["weight_decay"])
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decayed | rest == set(names.values())
    assert {"edge.encoders.photo.0.weight", "edge.encoders.meta.weight"} < decayed
    assert {"head.classify.weight", "crta.blocks.0.residual_weight"} < decayed
    assert {f"edge.encoders.photo.{n}" for n in ("0.bias", "1.weight", "2.weight")} < rest
    assert "edge.encoders.meta.missing" in rest
    assert [name for name in rest if name.startswith("context.")]


def test_a_backbone_learns_at_its_own_rate() -> None:
    encoder = nn.Linear(2, 4)
    encoder.pretrained = True
    model = mmfusion.CMML({"a": (encoder, 4), "b": 3}, num_classes=2, dim=8, memory=None)
    take = OptimiserStep(Accelerator(cpu=True), model, Plan(backbone_rate=0.0, batch_size=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = {"a": torch.randn(2, 2), "b": torch.randn(2, 3)}
    batch = {"inputs": inputs, "present": torch.ones(2, 2, dtype=torch.bool)}
    batch |= {"labels": torch.tensor([0, 1]), "sample_ids": torch.arange(2)}
    take(batch, epoch=0, step=0, steps=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not [name for name in moved if name.startswith("edge.encoders")]
    assert "head.classify.weight" in moved


def test_a_rate_for_a_backbone_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"backbone_rate=0.1: no encoder.*pretrained = True"):
        parameter_groups(nn.Linear(1, 1), Plan(backbone_rate=0.1))


def test_the_average_copies_the_memory_and_averages_weights() -> None:
    torch.manual_seed(0)
    model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=2, dim=8)
    plan = Plan(ema=0.5, batch_size=2, warmup=0.0, learning_rate=0.1)
    take = OptimiserStep(Accelerator(cpu=True), model, plan)
    seen = []
    for step in range(2):
        inputs = {"a": torch.randn(2, 2), "b": torch.randn(2, 3)}
        batch = {"inputs": inputs, "present": torch.ones(2, 2, dtype=torch.bool)}
        batch |= {"labels": torch.tensor([0, 1]), "sample_ids": torch.arange(2)}
        take(batch, epoch=0, step=step, steps=9)
        seen.append(model.head.classify.weight.detach().clone())
    assert take.average is not None
    average: Any = take.average.module
    kept = min(0.5, 2 / 11)  # at the second update
    torch.testing.assert_close(average.head.classify.weight, kept * seen[0] + (1 - kept) * seen[1])
    assert average.memory.held.tolist() == [4, 4]
    assert torch.equal(average.memory.slots, model.memory.slots)


def test_a_long_average_tends_to_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = moving_average(model, 0.9)
    model.weight.data.fill_(0.0)
    average.update_parameters(model)
    model.weight.data.fill_(1.0)
    for _ in range(500):
        average.update_parameters(model)
    assert math.isclose(average.module.weight.item(), 1.0, abs_tol=1e-3)
    model.weight.data.fill_(0.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(0.9, abs=1e-3)
