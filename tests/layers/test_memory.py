from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from mmfusion.layers import MemoryBank

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def filled(num_slots=6, rows=4, **options):
    """Two modalities of width 3; ids 10, 11, ...; everything observed."""
    bank = MemoryBank(2, num_slots, dim=3, num_neighbours=2, **options)
    vectors = torch.randn(rows, 2, 3)
    bank.write(vectors, torch.ones(rows, 2).bool(), torch.arange(10, 10 + rows))
    return bank, vectors


# the ring


class Ring:
    """What a bank holds, in plain Python."""

    def __init__(self, num_modalities, num_slots):
        self.rows = [deque(maxlen=num_slots) for _ in range(num_modalities)]
        self.written = [0] * num_modalities
        self.num_slots = num_slots

    def write(self, vectors, present, ids, labels):
        for b in range(len(vectors)):
            for m, rows in enumerate(self.rows):
                if present[b][m]:
                    rows.append((vectors[b][m], ids[b], labels[b]))
                    self.written[m] += 1

    def slots(self, m):
        """Slot number to row: the oldest is where the next is written, once the ring is full."""
        first = self.written[m] - len(self.rows[m])
        return {(first + i) % self.num_slots: row for i, row in enumerate(self.rows[m])}


batches = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9), max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_slots=st.integers(1, 5), batches=batches, with_ids=st.booleans(), width=st.integers(1, 2)
)
def test_a_bank_is_a_ring_per_modality(num_slots, batches, with_ids, width):
    bank = MemoryBank(2, num_slots, dim=1, num_neighbours=1, num_labels=width)
    ring, number = Ring(2, num_slots), 0
    for present in batches:
        size = len(present)
        ids = list(range(number, number + size))
        vectors = [[float(10 * i), float(10 * i + 1)] for i in ids]
        labels = [[float(i + j) for j in range(width)] for i in ids]
        number += size
        table = torch.tensor(present, dtype=torch.bool).reshape(size, 2)
        rows = torch.tensor(vectors).reshape(size, 2, 1)
        rows = torch.where(table.unsqueeze(-1), rows, NAN)
        bank.write(
            rows,
            table,
            torch.tensor(ids, dtype=torch.int64) if with_ids else None,
            torch.tensor(labels).reshape(size, width),
        )
        ring.write(vectors, present, ids if with_ids else [-1] * size, labels)
        for m in range(2):
            held = ring.slots(m)
            assert bank.held[m] == len(held)
            assert bank.cursor[m] == ring.written[m] % num_slots
            for slot in range(num_slots):
                vector, owner, label = held.get(slot, (0.0, -1, [NAN] * width))
                assert bank.slots[m, slot].tolist() == [vector]
                assert bank.ids[m, slot] == owner
                torch.testing.assert_close(
                    bank.labels[m, slot], torch.tensor(label), equal_nan=True, atol=0, rtol=0
                )


def test_a_large_batch_is_written_in_its_order():
    bank = MemoryBank(2, 100, dim=1, num_neighbours=1)
    present, ids = torch.rand(200, 2) < 0.3, torch.arange(200)
    bank.write(ids.float().reshape(-1, 1, 1).expand(-1, 2, -1), present, ids)
    for m in range(2):
        kept = ids[present[:, m]].tolist()
        assert bank.ids[m, : len(kept)].tolist() == kept
        assert bank.slots[m, : len(kept), 0].tolist() == kept


def test_labels_go_along_by_row():
    bank = MemoryBank(2, 4, dim=1, num_neighbours=1)
    present = torch.tensor([[True, False], [True, True]])
    bank.write(torch.ones(2, 2, 1), present, torch.tensor([5, 6]), torch.tensor([3, 900]))
    assert bank.labels[0, :2].flatten().tolist() == [3.0, 900.0]
    assert bank.labels[1, 0].tolist() == [900.0]
    assert bank.labels[1, 1:].isnan().all()
    bank.write(torch.ones(1, 2, 1), present[1:], torch.tensor([7]))
    assert bank.labels[0, 2].isnan().all()


def test_nothing_is_written_in_eval():
    bank, _ = filled()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    bank.eval()
    bank.write(torch.ones(2, 2, 3), torch.ones(2, 2).bool(), torch.tensor([1, 2]))
    for name, value in bank.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)


def test_reset_forgets_but_keeps_the_gate_and_reset_parameters_draws_it_anew():
    bank, _ = filled()
    gate = bank.gate.openness.weight.clone()
    bank.reset()
    assert torch.equal(bank.gate.openness.weight, gate)
    for name, value in MemoryBank(2, 6, 3, 2).named_buffers():
        found = dict(bank.named_buffers())[name]
        torch.testing.assert_close(found, value, equal_nan=True, atol=0, rtol=0)
    bank, _ = filled()
    bank.reset_parameters()
    assert not bank.held.any()
    assert not torch.equal(bank.gate.openness.weight, gate)
    assert (bank.gate.openness.bias == -2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_written_takes_the_type_of_the_slots(dtype):
    bank = MemoryBank(1, 4, dim=3, num_neighbours=1, dtype=dtype)
    vector = torch.randn(1, 1, 3)
    bank.write(vector, torch.ones(1, 1).bool())
    assert bank.slots.dtype == dtype
    assert torch.equal(bank.slots[0, 0], vector[0, 0].to(dtype))
    readout = bank.read(vector)
    assert readout.dtype == torch.float32
    assert torch.equal(readout[0, 0], vector[0, 0].to(dtype).float())


def test_autocast_changes_nothing():
    vectors, present = (
        torch.randn(3, 2, 3),
        torch.tensor([[True, False], [True, True], [False, True]]),
    )
    banks = MemoryBank(2, 4, 3, 2), MemoryBank(2, 4, 3, 2)
    banks[0].write(vectors, present, torch.arange(3))
    plain = banks[0].lookup(vectors, ~present)
    with torch.autocast("cpu", torch.bfloat16):
        banks[1].write(vectors, present, torch.arange(3))
        cast = banks[1].lookup(vectors, ~present)
        assert banks[1](vectors, present).isfinite().all()
    assert torch.equal(banks[0].slots, banks[1].slots)
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)


def test_half_precision_vectors_of_autocast_are_taken():
    bank = MemoryBank(2, 4, 3, 2)
    bank.write(torch.ones(2, 2, 3).bfloat16(), torch.ones(2, 2).bool(), torch.arange(2))
    assert bank.slots.dtype == torch.float32
    assert bank.read(torch.ones(1, 2, 3).bfloat16()).dtype == torch.bfloat16


def test_no_gradient_is_kept():
    bank = MemoryBank(1, 4, 3, 1)
    bank.write(torch.randn(2, 1, 3, requires_grad=True), torch.ones(2, 1).bool())
    assert not bank.slots.requires_grad
    assert bank.slots.grad_fn is None


def test_backward_works_after_a_later_write():
    """A training step reads, writes, and only then runs backward."""
    bank, _ = filled()
    query = torch.randn(3, 2, 2, 3, requires_grad=True)
    present = torch.tensor([[True, False], [False, False], [False, True]])
    enriched = bank(query, present, torch.tensor([1, 2, 3]))
    expected = torch.autograd.grad(enriched.square().sum(), query, retain_graph=True)[0]
    bank.write(torch.randn(6, 2, 3), torch.ones(6, 2).bool(), torch.arange(6))
    (late,) = torch.autograd.grad(enriched.square().sum(), query)
    assert torch.equal(late, expected)
    assert late[1].any()


# reading


def test_a_read_mixes_the_nearest_by_cosine():
    bank, vectors = filled(temperature=0.2)
    query = torch.randn(5, 2, 3)
    readout, weights, ids = bank.lookup(query)
    for b in range(5):
        for m in range(2):
            scores = cosine_similarity(query[b, m].unsqueeze(0), vectors[:, m])
            top, slots = scores.topk(2)
            close(weights[b, m], (top / 0.2).softmax(0))
            assert ids[b, m].tolist() == (slots + 10).tolist()
            close(readout[b, m], weights[b, m] @ vectors[slots, m])
    assert torch.equal(bank.read(query), readout)
    for one, other in zip(bank.neighbours(query), (weights, ids), strict=True):
        assert torch.equal(one, other)


def test_tokens_are_looked_up_one_by_one():
    bank, _ = filled()
    query = torch.randn(3, 2, 4, 3)
    present = torch.tensor([[True, False], [False, False], [False, True]])
    ids = torch.tensor([10, 99, 12])
    whole = bank.lookup(query, present, ids)
    assert [tuple(x.shape) for x in whole] == [(3, 2, 4, 3), (3, 2, 4, 2), (3, 2, 4, 2)]
    for token in range(4):
        part = bank.lookup(query[:, :, token], present, ids)
        for one, other in zip(whole, part, strict=True):
            close(one[:, :, token], other)
    close(bank(query, present, ids)[:, :, 1], bank(query[:, :, 1], present, ids))


def test_present_modalities_are_not_looked_up_nor_changed():
    bank, _ = filled()
    query, present = torch.randn(2, 2, 3), torch.tensor([[True, False], [False, True]])
    readout, weights, ids = bank.lookup(query, present)
    assert (readout[present] == 0).all()
    assert (weights[present] == 0).all()
    assert (ids[present] == -1).all()
    assert readout[~present].any()
    enriched = bank(query, present)
    assert torch.equal(enriched[present], query[present])
    assert not torch.equal(enriched[~present], query[~present])


def test_a_sample_never_reads_itself():
    bank, vectors = filled(num_slots=8)
    bank.write(vectors[:2], torch.ones(2, 2).bool(), torch.tensor([10, 11]))  # a second epoch
    own = torch.arange(10, 14)
    _, found = bank.neighbours(vectors, sample_ids=own)
    assert (found != own[:, None, None]).all()
    assert (found >= 0).all()
    _, found = bank.neighbours(vectors, sample_ids=own + 100)
    assert (found[..., 0] == own[:, None]).all()
    _, found = bank.neighbours(vectors)
    assert (found[..., 0] == own[:, None]).all()


def test_alone_in_the_bank_a_sample_reads_nothing():
    bank, vectors = filled(rows=1)
    out = bank.lookup(vectors, sample_ids=torch.tensor([10]))
    assert (out.readout == 0).all()
    assert (out.weights == 0).all()
    assert (out.ids == -1).all()


def test_rows_without_an_id_are_open_to_all():
    bank = MemoryBank(1, 4, dim=3, num_neighbours=2)
    bank.write(torch.randn(1, 1, 3), torch.ones(1, 1).bool())
    _, weights, ids = bank.lookup(torch.randn(1, 1, 3), sample_ids=torch.tensor([-1]))
    assert weights.tolist() == [[[1.0, 0.0]]]
    assert ids.tolist() == [[[-1, -1]]]


def test_an_empty_bank_reads_as_zero_with_zero_gradient():
    bank = MemoryBank(2, 4, dim=3, num_neighbours=2)
    query = torch.randn(2, 2, 3, requires_grad=True)
    out = bank.lookup(query)
    out.readout.sum().backward()
    assert (out.readout == 0).all()
    assert (out.ids == -1).all()
    assert (query.grad == 0).all()
    absent = torch.zeros(2, 2).bool()
    assert torch.equal(bank(query, absent), query)


def test_fewer_than_k_held_are_mixed_alone():
    bank, vectors = filled(rows=1)
    out = bank.lookup(torch.randn(2, 2, 3))
    assert out.weights.tolist() == [[[1.0, 0.0]] * 2] * 2
    assert out.ids.tolist() == [[[10, -1]] * 2] * 2
    close(out.readout, vectors.expand(2, -1, -1))


def test_gradient_of_a_read_reaches_query_and_gate():
    bank, _ = filled()
    query = torch.randn(2, 2, 3, requires_grad=True)
    present = torch.tensor([[True, False], [False, False]])
    (bank.read(query, present) ** 2).sum().backward()
    assert (query.grad[present] == 0).all()
    assert query.grad[~present].any(-1).all()
    bank(query, present).square().sum().backward()
    assert all(p.grad.any() for p in bank.gate.parameters())
    assert dict(bank.named_parameters()).keys() == {"gate.openness.weight", "gate.openness.bias"}


def test_state_holds_everything():
    bank, vectors = filled()
    other = MemoryBank(2, 6, dim=3, num_neighbours=2)
    other.load_state_dict(bank.state_dict())
    query = torch.randn(2, 2, 3)
    for one, two in zip(bank.lookup(query), other.lookup(query), strict=True):
        assert torch.equal(one, two)
    bank.write(vectors, torch.ones(4, 2).bool())
    other.write(vectors, torch.ones(4, 2).bool())
    assert torch.equal(bank.slots, other.slots)


# refusals

ONES, ALL = torch.ones(2, 2, 3), torch.ones(2, 2).bool()
DIRTY = torch.tensor([[[1.0] * 3, [1.0] * 3], [[1.0] * 3, [1.0, NAN, 1.0]]])


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda b: MemoryBank(2, 4, 3, 9), "num_neighbours=9 with num_slots=4.*between 1.*Lower"),
        (lambda b: MemoryBank(2, 4, 3, 0), "num_neighbours=0 with num_slots=4.*between 1.*Lower"),
        (lambda b: MemoryBank(2, 9, 3, temperature=0), "temperature=0.*divides.*above 0"),
        (lambda b: MemoryBank(2, 9, 3, sync="all"), "sync='all'.*'gather'.*Choose"),
        (lambda b: b.write(torch.ones(2, 2, 4), ALL), r"vectors is \(2, 2, 4\).*D=3.*Reshape"),
        (lambda b: b.write(torch.ones(2, 3, 3), ALL), r"vectors is \(2, 3, 3\).*M=2.*Reshape"),
        (lambda b: b.write(torch.ones(2, 2, 5, 3), ALL), r"vectors is \(2, 2, 5, 3\).*Pool"),
        (lambda b: b.write(ONES, ALL[:1]), r"present \(1, 2\).*one bool \(B, M\).*Pool"),
        (lambda b: b.write(ONES, ALL.float()), r"torch\.float32.*one bool \(B, M\).*Pool"),
        (
            lambda b: b.write(ONES, ALL, torch.tensor([1.0, 2.0])),
            r"sample_ids is \(2,\) torch\.float32.*int64 \(B,\) = \(2,\).*Number",
        ),
        (
            lambda b: b.write(ONES, ALL, torch.tensor([1])),
            r"sample_ids is \(1,\).*int64 \(B,\) = \(2,\).*Number",
        ),
        (
            lambda b: b.write(ONES, ALL, None, torch.ones(2, 4)),
            r"labels is \(2, 4\) for 2 rows.*num_labels=1.*Build it with",
        ),
        (
            lambda b: MemoryBank(2, 4, 3, 1, num_labels=3).write(ONES, ALL, None, torch.ones(3, 2)),
            r"labels is \(3, 2\) for 2 rows.*num_labels=3.*Build it with",
        ),
        (
            lambda b: MemoryBank(2, 4, 3, 1, num_labels=3).write(ONES, ALL, None, torch.ones(6)),
            r"labels is \(6,\) for 2 rows.*num_labels=3.*Build it with",
        ),
        (lambda b: b.write(DIRTY, ALL), r"vectors\[1, 1\] is observed.*finite.*Mark it absent"),
        (lambda b: b.read(torch.ones(2, 3)), r"query is \(2, 3\).*\(B, M, D\).*Reshape"),
        (lambda b: b.read(torch.ones(2, 3, 3)), r"query is \(2, 3, 3\).*M=2.*Reshape"),
        (lambda b: b.read(torch.ones(2, 2, 4)), r"query is \(2, 2, 4\).*D=3.*Reshape"),
        (lambda b: b.read(ONES, ALL.int()), r"present is \(2, 2\) torch\.int32.*bool.*\.bool\(\)"),
        (lambda b: b.read(ONES, ALL[:, 0]), r"present is \(2,\).*\(B, M\) = \(2, 2\).*Convert"),
        (
            lambda b: b.read(ONES, None, torch.tensor([1, 2], dtype=torch.int32)),
            r"sample_ids is \(2,\) torch\.int32.*int64 \(B,\).*Number",
        ),
        (lambda b: b.read(ONES, None, torch.arange(3)), r"sample_ids is \(3,\).*\(2,\).*Number"),
    ],
)
def test_refusals(call, pattern):
    bank = MemoryBank(2, 4, 3, 1)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        call(bank)
    assert not bank.held.any(), "a refused write leaves no trace"


def test_nan_passes_where_values_are_not_checked_and_under_absent():
    absent = torch.tensor([[True, True], [True, False]])
    bank = MemoryBank(2, 4, 3, 1)
    bank.write(DIRTY, absent)
    assert bank.slots.isfinite().all()
    bank = MemoryBank(2, 4, 3, 1, check_values=False)
    bank.write(DIRTY, ALL)
    assert bank.slots.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_leaves_labels_alone(dtype):
    """Class 301 became 300 in bfloat16."""
    bank = MemoryBank(1, 4, dim=3, num_neighbours=2)
    row = torch.ones(1, 1, 3), torch.ones(1, 1).bool(), torch.tensor([5])
    bank.write(*row, torch.tensor([301]))
    bank.to(dtype)
    bank.write(row[0].to(dtype), *row[1:], torch.tensor([303]))
    assert bank.labels[0, :2].flatten().tolist() == [301, 303]
    assert (bank.slots.dtype, bank.labels.dtype) == (dtype, torch.float32)
    assert bank.to("meta").labels.is_meta
