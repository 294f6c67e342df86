import pytest
import torch
from torch.testing import assert_close

from mmfusion.baselines import LateFusion, MaskedTransformer


@pytest.mark.parametrize("baseline", [MaskedTransformer, LateFusion])
def test_absent_equals_a_model_that_never_had_the_modality(baseline):
    """The two baselines that let nothing stand in for what is absent."""
    whole = baseline({"a": 3, "b": 2}, num_classes=3, dim=8, num_heads=2).eval()
    alone = baseline({"a": 3}, num_classes=3, dim=8, num_heads=2).eval()
    assert alone.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    a = torch.randn(4, 3)
    assert_close(whole({"a": a, "b": None}).logits, alone({"a": a}).logits)


def test_with_nothing_observed_every_sample_gets_the_same_answer():
    model = MaskedTransformer({"a": 3, "b": 2}, num_classes=3, dim=8).eval()
    nothing = torch.zeros(5, 2, dtype=torch.bool)
    logits = model({"a": torch.randn(5, 3), "b": torch.randn(5, 2)}, nothing).logits
    assert torch.equal(logits, logits[:1].expand(5, -1))
