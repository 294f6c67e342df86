import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from mmfusion.layers import PrototypeMemory

ALL = torch.zeros(2, 2, dtype=torch.bool)


def test_prototypes_are_all_mixed_in_order_and_learn():
    memory = PrototypeMemory(2, num_slots=4, dim=3, temperature=0.5)
    query = torch.randn(5, 2, 3, requires_grad=True)
    readout, weights, ids = memory.lookup(query)
    scores = torch.einsum("bmd,msd->bms", normalize(query, dim=-1), normalize(memory.slots, dim=-1))
    assert_close(weights, (scores / 0.5).softmax(-1).detach())
    assert_close(readout, torch.einsum("bms,msd->bmd", (scores / 0.5).softmax(-1), memory.slots))
    assert torch.equal(ids, torch.arange(4).expand(5, 2, -1))
    target = torch.randn(5, 2, 3)
    first = torch.autograd.grad((readout * target).sum(), [query, memory.slots])
    plain = torch.einsum("bms,msd->bmd", (scores / 0.5).softmax(-1), memory.slots)
    truth = torch.autograd.grad((plain * target).sum(), [query, memory.slots])
    for one, other in zip(first, truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert one.any()


def test_prototypes_serve_absent_modalities_alone():
    memory = PrototypeMemory(2, num_slots=4, dim=3)
    query, present = torch.randn(2, 2, 5, 3), torch.tensor([[True, False], [True, False]])
    readout = memory.read(query, present, sample_ids=torch.tensor([0, 1]))
    assert (readout[:, 0] == 0).all()
    assert torch.equal(memory.neighbours(query, present)[0][:, 0], torch.zeros(2, 5, 4))
    enriched = memory(query, present)
    assert torch.equal(enriched[:, 0], query[:, 0])
    enriched.sum().backward()
    assert not memory.slots.grad[0].any()
    assert memory.slots.grad[1].any()


def test_prototypes_reset():
    memory = PrototypeMemory(2, 4, 3)
    before = memory.slots.clone()
    memory.reset_parameters()
    assert not torch.equal(memory.slots, before)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: PrototypeMemory(2, 0, 3), "num_slots=0.*at least one.*1 or more"),
        (lambda: PrototypeMemory(2, 1, 3, temperature=-1), "temperature=-1.*divides.*above 0"),
        (
            lambda: PrototypeMemory(2, 1, 3).read(torch.ones(2, 3, 3)),
            r"query is .*M=2.*Reshape",
        ),
        (
            lambda: PrototypeMemory(2, 1, 3).read(torch.ones(2, 2, 3), ALL[:1]),
            r"present is \(1, 2\).*Convert",
        ),
    ],
)
def test_refusals(call, pattern):
    with pytest.raises(ValueError, match=pattern):
        call()
