"""Without a group, and over two gloo processes that hold 3 and 1 rows."""

import datetime
import traceback

import pytest
import torch
from torch import distributed, multiprocessing

from mmfusion.layers import ModalityEvidence
from mmfusion.losses import class_contrastive_loss
from mmfusion.ranks import first_row, gather_rows, joint_mean, joint_sum, world_size

ROWS = (3, 1)


def test_alone_everything_is_the_identity():
    rows, ids = torch.randn(3, 2, requires_grad=True), torch.arange(3)
    (same, same_ids), real = gather_rows(rows, ids)
    assert same is rows
    assert same_ids is ids
    assert real.tolist() == [True] * 3
    assert world_size() == 1
    assert first_row(8) == 0
    assert torch.equal(joint_sum(rows), rows)
    assert not joint_sum(rows).requires_grad


@pytest.mark.parametrize("gather", [False, True])
def test_joint_mean_alone(gather):
    values = torch.tensor([[1.0, float("nan")], [4.0, 7.0]], requires_grad=True)
    where = torch.tensor([[True, False], [True, True]])
    mean = joint_mean(values, where, gather)
    mean.backward()
    assert mean.item() == 4.0
    torch.testing.assert_close(values.grad, where.float() / 3)


def test_joint_mean_over_nothing_is_zero():
    values = torch.full((2,), float("inf"), requires_grad=True)
    mean = joint_mean(values, torch.tensor([False, False]))
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad.tolist() == [0.0, 0.0]
    assert joint_mean(torch.ones(0), torch.ones(0, dtype=torch.bool)).item() == 0.0


def joint_batch():
    """The rows of both ranks, in rank order, and where each rank's start."""
    draw = torch.Generator().manual_seed(4)
    return torch.randn(sum(ROWS), 2, 3, generator=draw), torch.tensor([0, 1, 0, 1])


def mine(rank, table):
    return table.split(ROWS)[rank]


def gathers(rank):
    rows, labels = joint_batch()
    own = mine(rank, rows).clone().requires_grad_()
    flags = mine(rank, labels) == 1
    (everything, all_labels, all_flags), real = gather_rows(own, mine(rank, labels), flags)
    assert everything.shape == (6, 2, 3)
    assert real.tolist() == [True, True, True, True, False, False]
    assert first_row(6) == 3 * rank
    assert torch.equal(everything[real], rows.detach())
    assert all_labels.dtype == torch.int64
    assert all_labels[real].tolist() == labels.tolist()
    assert all_flags.dtype == torch.bool
    assert all_flags[real].tolist() == (labels == 1).tolist()
    assert not everything[~real].any()
    # each rank weighs the rows by its own number: a row's gradient is the sum over ranks
    weight = (rank + 1) * torch.arange(6.0)[:, None, None]
    (everything * weight).sum().backward()
    place = torch.arange(6.0)[3 * rank : 3 * rank + ROWS[rank], None, None]
    assert torch.equal(own.grad, (3 * place).expand_as(own))


def gathers_an_expanded_gradient(rank):
    own = torch.ones(2, 3, requires_grad=True)
    (everything,), _ = gather_rows(own)
    everything.sum().backward()
    assert torch.equal(own.grad, torch.full((2, 3), 2.0))


def gathers_from_an_empty_rank(rank):
    own = torch.ones(2 * rank, 3, requires_grad=True)
    (everything,), real = gather_rows(own)
    assert real.tolist() == [False, False, True, True]
    everything[real].sum().backward()
    assert own.grad.shape == own.shape


def means_over_the_joint_batch(rank):
    rows, labels = joint_batch()
    where = labels == 0  # two of three rows here, none there
    own = mine(rank, rows[:, 0, 0]).clone().requires_grad_()
    share = joint_mean(own, mine(rank, where))
    share.backward()
    truth = rows[:, 0, 0][where].mean()
    total = share.detach().clone()
    distributed.all_reduce(total)
    torch.testing.assert_close(total / 2, truth)  # what DDP's averaging makes of it
    torch.testing.assert_close(own.grad / 2, mine(rank, where).float() / 2)
    alone = joint_mean(own, mine(rank, where), gather=False)
    expected = own[mine(rank, where)].mean() if rank == 0 else torch.zeros(())
    torch.testing.assert_close(alone, expected)


def sums_over_ranks(rank):
    own = torch.tensor([[1.0, 2.0], [4.0, 8.0]]) * (1 + 9 * rank)
    assert joint_sum(own).tolist() == [[11, 22], [44, 88]]
    assert joint_sum(torch.tensor(rank + 1)).item() == 3


def counts_the_labels_of_all_ranks(rank):
    _, labels = joint_batch()
    own = mine(rank, labels)
    evidence = ModalityEvidence(2, 3, 2, "multiclass")
    evidence.count(own, known=own >= 0)
    assert evidence.tally.tolist() == [[2, 2], [4, 4]]


def contrasts_over_the_joint_batch(rank):
    rows, labels = joint_batch()
    whole = rows.clone().requires_grad_()
    truth = class_contrastive_loss(whole, labels, gather=False)
    truth.backward()
    own = mine(rank, rows).clone().requires_grad_()
    share = class_contrastive_loss(own, mine(rank, labels))
    share.backward()
    total = share.detach().clone()
    distributed.all_reduce(total)
    torch.testing.assert_close(total / 2, truth.detach())
    torch.testing.assert_close(own.grad / 2, mine(rank, whole.grad))


CHECKS = (
    gathers,
    gathers_an_expanded_gradient,
    gathers_from_an_empty_rank,
    means_over_the_joint_batch,
    sums_over_ranks,
    counts_the_labels_of_all_ranks,
    contrasts_over_the_joint_batch,
)


def work(rank, folder):
    """Run every check; leave a trace of those that failed, by name."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    for check in CHECKS:
        try:
            assert world_size() == 2
            check(rank)
            verdict = "passed"
        except Exception:
            verdict = traceback.format_exc()
        (folder / f"{check.__name__}.{rank}").write_text(verdict)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawned = multiprocessing.spawn(work, args=(folder,), nprocs=2, join=False)
    try:
        for _ in range(2):
            if spawned.join(timeout=60):
                break
    finally:
        for process in spawned.processes:
            if process.is_alive():
                process.kill()
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(verdicts, check, rank):
    assert verdicts[f"{check.__name__}.{rank}"] == "passed"
