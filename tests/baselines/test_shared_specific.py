import torch
from torch.testing import assert_close

from mmfusion.baselines import SharedSpecific

INPUTS = {"a": torch.randn(4, 3), "b": torch.randn(4, 2), "c": torch.randn(4, 2)}
LABELS = torch.tensor([0, 1, 0, 1])
VISIBLE = torch.tensor([[True, True, False], [True, False, False], [False] * 3, [True] * 3])


def model():
    return SharedSpecific({"a": 3, "b": 2, "c": 2}, num_classes=2, dim=8, num_tokens=2)


def test_the_visible_modalities_mean_shared_part_stands_in():
    split = model().eval()
    out = split(INPUTS, visible=VISIBLE)
    shared = split.shared(split.edge(INPUTS, None)[0])
    assert_close(out.completed[0, 2], shared[0, :2].mean(0))
    assert_close(out.completed[1, 1], shared[1, 0])
    assert out.completed[2].eq(0).all()
    assert torch.equal(out.completed[VISIBLE], out.tokens[VISIBLE])


def test_one_visible_modality_has_nothing_to_align_to():
    split = model()
    one = torch.tensor([[True, False, False]] * 4)
    assert split(INPUTS, visible=one, labels=LABELS).losses["alignment"] == 0
    assert split(INPUTS, labels=LABELS).losses["alignment"] > 0


def test_specific_parts_learn_to_tell_the_modality():
    split = model()
    optimiser = torch.optim.Adam(split.parameters(), lr=0.01)
    for _ in range(60):
        loss = split(INPUTS, visible=VISIBLE, labels=LABELS).losses["domain"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
