"""What an epoch draws: every sample or class alike, the same whichever rank or worker loads it."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmfusion.recipes.batches import EpochBatches, Seeded


def test_an_epoch_takes_every_sample_once_and_fills_the_last_batch() -> None:
    batches = EpochBatches(10, batch_size=4, seed=0)
    first = list(batches)
    assert [len(draws) for draws in first] == [4, 4, 4]
    assert {index for draws in first for index, _ in draws} == set(range(10))
    assert first == list(batches)
    batches.epoch = 1
    assert first != list(batches)


def test_balanced_batches_draw_every_class_alike() -> None:
    classes = torch.tensor([0] * 20 + [1] * 3 + [2] * 7)
    batches = EpochBatches(30, batch_size=5, seed=0, classes=classes)
    drawn = torch.tensor([index for draws in batches for index, _ in draws])
    assert classes[drawn].bincount().tolist() == [10, 10, 10]
    assert drawn.bincount(minlength=30)[:20].max() == 1
    assert drawn.bincount(minlength=30)[20:23].min() == 3


def test_the_parts_of_the_ranks_make_up_the_batch() -> None:
    kind: dict[str, Any] = {"batch_size": 6, "seed": 0}
    parts = [list(EpochBatches(12, rank=rank, ranks=3, **kind)) for rank in range(3)]
    joint = [[*itertools.chain(*rows)] for rows in zip(*parts, strict=True)]
    assert joint == list(EpochBatches(12, **kind))


def test_a_batch_that_does_not_divide_over_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"batch_size=5 on 2 ranks.*evenly.*another batch_size"):
        EpochBatches(10, batch_size=5, seed=0, ranks=2)


def test_an_epoch_can_begin_in_its_midst() -> None:
    batches = EpochBatches(10, batch_size=4, seed=0)
    whole = list(batches)
    batches.start = 1
    assert list(batches) == whole[1:]


def test_a_sample_drawn_twice_is_augmented_twice() -> None:
    classes = torch.tensor([0] * 9 + [1])
    draws = [*itertools.chain(*EpochBatches(10, batch_size=5, seed=0, classes=classes))]
    seeds = [seed for index, seed in draws if index == 9]
    assert len(seeds) == len(set(seeds)) == 5


class Noisy(list[int]):
    def __getitem__(self, index: Any) -> Any:
        return torch.cat([torch.tensor([index]), torch.rand(2)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_does_not_hang_on_rank_or_worker(num_workers: int) -> None:
    def load(rank: int, ranks: int, num_workers: int) -> list[torch.Tensor]:
        batches = EpochBatches(8, batch_size=4, seed=0, rank=rank, ranks=ranks)
        data = Seeded(Noisy(range(8)))
        return list(DataLoader(data, batch_sampler=batches, num_workers=num_workers))

    parts = zip(load(0, 2, num_workers), load(1, 2, num_workers), strict=True)
    for joint, (first, second) in zip(load(0, 1, 0), parts, strict=True):
        assert torch.equal(joint, torch.cat([first, second]))
    assert not torch.equal(joint[:, 1], joint[:, 2])


def test_asking_for_a_sample_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    Seeded(Noisy(range(8)))[3, 5]
    assert torch.equal(torch.get_rng_state(), before)
