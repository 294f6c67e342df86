import pytest
import torch
from torch.testing import assert_close

from mmfusion.baselines import ExpertBank
from mmfusion.baselines.expert_bank import _balance, _Experts


@pytest.mark.parametrize("num_active", [1, 2, 4])
def test_only_the_likeliest_experts_answer_and_their_shares_sum_to_one(num_active):
    experts = _Experts(8, 4, num_active)
    tokens = torch.randn(3, 5, 8)
    answer, probability, chosen = experts(tokens)
    assert chosen.sum(-1).eq(num_active).all()
    assert (probability * chosen).amin(-1).ge(0).all()
    kept = torch.where(chosen > 0, probability, torch.inf).amin(-1)
    left = torch.where(chosen > 0, -torch.inf, probability).amax(-1)
    assert (kept >= left).all()
    each = torch.stack([expert(experts.norm(tokens)) for expert in experts.experts], -1)
    share = torch.where(chosen > 0, experts.router(experts.norm(tokens)), -torch.inf).softmax(-1)
    assert_close(answer, torch.einsum("bnde,bne->bnd", each, share))


def test_balance_is_one_when_even_and_grows_to_the_number_of_experts():
    even = torch.full((2, 4, 4), 0.25)
    sent = torch.eye(4).expand(2, 4, 4)
    assert _balance(even, sent, gather=False).item() == 1
    first = torch.zeros(2, 4, 4)
    first[..., 0] = 1
    assert _balance(first, first, gather=False).item() == 4


def test_parameters_grow_with_modalities_not_with_patterns():
    def own(modalities):
        model = ExpertBank(dict.fromkeys("abcdef"[:modalities], 3), num_classes=2, dim=8)
        return sum(p.numel() for part in (model.bank, model.pattern) for p in part.parameters())

    assert own(6) - own(5) == own(3) - own(2) == 4 * 8 + 8


def test_the_bank_lends_by_pattern_and_never_replaces_what_is_visible():
    model = ExpertBank({"a": 3, "b": 2, "c": 2}, num_classes=2, dim=8).eval()
    inputs = {"a": torch.randn(3, 3), "b": torch.randn(3, 2), "c": torch.randn(3, 2)}
    visible = torch.tensor([[True, False, False], [True, False, False], [False, True, False]])
    out = model(inputs, visible=visible)
    assert torch.equal(out.completed[visible], out.tokens[visible])
    assert torch.equal(out.completed[0, 2], out.completed[1, 2])
    assert not torch.equal(out.completed[0, 2], out.completed[2, 2])
