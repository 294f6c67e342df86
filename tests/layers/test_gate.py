import pytest
import torch
from torch.testing import assert_close

from mmfusion.layers import ReadoutGate


def test_the_gate_starts_nearly_closed_and_adds_where_absent():
    gate = ReadoutGate(3)
    query, readout = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    present = torch.tensor([[True, False], [False, True]])
    out = gate(query, readout, present)
    assert torch.equal(out[present], query[present])
    opening = gate.openness(torch.cat([query, readout], -1)).sigmoid()
    assert_close(out[~present], (query + opening * readout)[~present])
    torch.nn.init.zeros_(gate.openness.weight)
    out = gate(query, readout, present)
    assert_close(out[~present], (query + 0.1192029 * readout)[~present])


@pytest.mark.parametrize("content", [float("nan"), float("inf")])
def test_present_content_spoils_no_gradient_of_the_gate(content):
    """The gate never computes with what it does not enrich."""
    gate = ReadoutGate(3)
    query, present = torch.randn(2, 2, 3), torch.tensor([[True, False], [False, True]])
    readout = torch.where(present.unsqueeze(-1), 0.0, torch.randn(2, 2, 3))
    query[present] = content
    gate(query, readout, present)[~present].sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())
