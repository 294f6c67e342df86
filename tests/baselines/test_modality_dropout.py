import torch
from torch.testing import assert_close

from mmfusion.baselines import ModalityDropout


def model(modality_dropout):
    sizes = {"a": 3, "b": 2, "c": 2}
    return ModalityDropout(sizes, num_classes=2, dim=8, modality_dropout=modality_dropout)


def inputs(rows):
    return {"a": torch.randn(rows, 3), "b": torch.randn(rows, 2), "c": torch.randn(rows, 2)}


def test_one_observed_modality_is_always_kept_and_absent_ones_never():
    present = torch.rand(4000, 3) < 0.5
    kept = model(0.9)(inputs(4000), present).visible
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(1), present.any(1))


def test_the_rate_is_the_one_asked_for():
    """Of three, all would go with probability 0.3 ** 3; then one of them stays."""
    kept = model(0.3)(inputs(4000)).visible.float().mean().item()
    assert abs(kept - (0.7 + 0.3**3 / 3)) < 0.02


def test_what_is_kept_is_scaled_to_the_size_of_a_complete_sample():
    dropping = model(0.5).eval()
    seen = []
    dropping.fuse.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = dropping(inputs(2), torch.tensor([[True, False, True], [False, False, False]]))
    assert_close(seen[0][0], out.completed[0] * 1.5)
    assert seen[0][1].eq(0).all()
