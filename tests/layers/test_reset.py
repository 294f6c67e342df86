import torch
from torch import nn

from mmfusion.layers.reset import reset_children


class Counted(nn.Module):
    def __init__(self, calls, name):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.calls, self.name = calls, name

    def reset_parameters(self):
        self.calls.append(self.name)


def test_children_reset_in_order_and_once():
    calls = []
    nested = nn.Sequential(Counted(calls, "b"), nn.Sequential(nn.ReLU(), Counted(calls, "c")))
    reset_children(nn.ModuleList([Counted(calls, "a"), nested, Counted(calls, "d")]))
    assert calls == ["a", "b", "c", "d"]


def test_a_child_that_resets_itself_is_not_looked_into():
    child = Counted([], "a")
    before = child.inner.weight.clone()
    reset_children(nn.Sequential(child))
    assert torch.equal(child.inner.weight, before)


def test_the_module_itself_is_left_alone():
    linear = nn.Linear(2, 2)
    before = linear.weight.clone()
    reset_children(linear)
    assert torch.equal(linear.weight, before)


def test_reset_on_meta_gives_the_values_of_a_normal_build():
    def build(device):
        return nn.Sequential(
            nn.Linear(3, 4, device=device),
            nn.Sequential(nn.LayerNorm(4, device=device)),
            nn.Linear(4, 2, device=device),
        )

    torch.manual_seed(5)
    normal = build("cpu")
    late = build("meta").to_empty(device="cpu")
    torch.manual_seed(5)
    reset_children(late)
    for one, other in zip(normal.parameters(), late.parameters(), strict=True):
        assert torch.equal(one, other)


def test_torch_attention_is_drawn_whole():
    torch.manual_seed(0)
    built = nn.Sequential(nn.MultiheadAttention(4, 2))
    late = nn.Sequential(nn.MultiheadAttention(4, 2, device="meta")).to_empty(device="cpu")
    torch.manual_seed(0)
    reset_children(late)
    for name, value in built.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name
