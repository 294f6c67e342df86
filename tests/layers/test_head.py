import torch
from torch.nn.functional import layer_norm

from mmfusion.layers import FusionOutput, Head


def test_it_normalises_and_projects():
    head = Head(4, num_classes=3).eval()
    fused = torch.randn(2, 4)
    expected = layer_norm(fused, (4,)) @ head.classify.weight.T + head.classify.bias
    torch.testing.assert_close(head(fused), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head(3 * fused + 1), expected, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_alone():
    head = Head(64, num_classes=2, dropout=0.5)
    fused = torch.randn(1, 64)
    assert not torch.equal(head(fused), head(fused))
    head.eval()
    assert torch.equal(head(fused), head(fused))


def test_reset_draws_anew():
    head = Head(4, num_classes=3)
    torch.manual_seed(1)
    head.reset_parameters()
    first = head.classify.weight.clone()
    head.reset_parameters()
    assert not torch.equal(head.classify.weight, first)
    torch.manual_seed(1)
    head.reset_parameters()
    assert torch.equal(head.classify.weight, first)


def test_the_output_lists_what_is_documented():
    documented = "logits fused tokens synthesised completed context reference aligned present"
    assert set(documented.split()) | {"losses", "loss", "visible"} <= set(FusionOutput._fields)
    assert FusionOutput._fields[0] == "logits"
    for field in FusionOutput._fields:
        assert f"        {field}: " in FusionOutput.__doc__
