import pytest
import torch
from torch.testing import assert_close

from mmfusion.layers import ReadoutGate


def test_the_gate_starts_nearly_closed_and_interpolates_where_absent():
    gate = ReadoutGate(3)
    query, readout = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    present = torch.tensor([[True, False], [False, True]])
    out = gate(query, readout, present)
    assert torch.equal(out[present], query[present])
    opening = gate.openness(torch.cat([query, readout], -1)).sigmoid()
    assert_close(out[~present], (query + opening * (readout - query))[~present])
    torch.nn.init.zeros_(gate.openness.weight)
    out = gate(query, readout, present)
    assert_close(out[~present], (query + 0.1192029 * (readout - query))[~present])


def test_a_readout_that_says_the_same_changes_nothing():
    """Added, it made every guess longer."""
    query = torch.randn(2, 2, 3)
    assert_close(ReadoutGate(3)(query, query, torch.zeros(2, 2, dtype=torch.bool)), query)


def test_where_nothing_was_read_the_query_stays():
    query, readout = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    readout[0] = 0
    readout[1, 1, 2] = 0
    out = ReadoutGate(3)(query, readout, torch.zeros(2, 2, dtype=torch.bool))
    read = readout.any(-1)
    assert torch.equal(out[~read], query[~read])
    assert (out[read] != query[read]).all()


@pytest.mark.parametrize("content", [float("nan"), float("inf")])
def test_present_content_spoils_no_gradient_of_the_gate(content):
    """The gate never computes with what it does not enrich."""
    gate = ReadoutGate(3)
    query, present = torch.randn(2, 2, 3), torch.tensor([[True, False], [False, True]])
    readout = torch.where(present.unsqueeze(-1), 0.0, torch.randn(2, 2, 3))
    query[present] = content
    gate(query, readout, present)[~present].sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())
