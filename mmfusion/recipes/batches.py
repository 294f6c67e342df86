"""Which samples an epoch takes, and in what order: a function of the seed and the epoch."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, Sampler

Draw = tuple[int, int]


class EpochBatches(Sampler[list[Draw]]):
    """Whole batches of one epoch, of which a rank loads its part; the order hangs on the epoch.

    Samples come in random order, each once before any comes again, and the last batch is filled
    from the next round. With ``classes``, every class comes equally often instead, and within a
    class each sample once before any comes again. Each draw is an index and a seed for its
    augmentation; ``Seeded`` takes both. Set ``epoch``, and ``start`` to go on within it, before
    iterating.

    Args:
        num_samples: Samples in the set; as many are drawn, rounded up to whole batches.
        batch_size: Samples per batch, over all ranks together.
        seed: One seed, one order.
        classes: Class of each sample, to balance them; None takes samples as they are.
        rank: Which part of each batch to give: in rank order they make up the batch.
        ranks: Number of parts.

    Shape:
        - ``classes``: ``(num_samples,)``, int64

    Raises:
        ValueError: If there is no sample, or a batch does not divide evenly over the ranks.

    Example:
        >>> batches = EpochBatches(4, batch_size=2, seed=0, classes=torch.tensor([0, 0, 0, 1]))
        >>> sum(index == 3 for draws in batches for index, seed in draws), len(batches)
        (2, 2)
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        classes: Tensor | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if num_samples < 1 or batch_size % ranks:
            raise ValueError(
                f"num_samples={num_samples}, batch_size={batch_size} on {ranks} ranks: there is a "
                "sample, and a batch divides evenly over the ranks. Pass another batch_size."
            )
        whole = torch.arange(num_samples)
        groups = [whole] if classes is None else [whole[classes == c] for c in classes.unique()]
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.steps = math.ceil(num_samples / batch_size)
        share = batch_size // ranks
        self.part = slice(rank * share, (rank + 1) * share)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = generator_for(self.seed, self.epoch, "order")
        wanted = self.steps * self.batch_size
        drawn = []
        for group in self.groups:
            rounds = math.ceil(wanted / len(self.groups) / len(group))
            order = [group[torch.randperm(len(group), generator=generator)] for _ in range(rounds)]
            drawn.append(torch.cat(order)[: math.ceil(wanted / len(self.groups))])
        order_of_all = torch.cat(drawn)
        if len(self.groups) > 1:
            order_of_all = order_of_all[torch.randperm(len(order_of_all), generator=generator)]
        seeds = torch.randint(2**62, (wanted,), generator=generator)
        draws = torch.stack([order_of_all[:wanted], seeds], dim=1)
        for batch in draws.split(self.batch_size)[self.start :]:
            yield [(index, seed) for index, seed in batch[self.part].tolist()]


class Seeded(Dataset[Any]):
    """A data set that is asked with a draw, and augments by the seed in it.

    So augmentation is the same whichever worker or rank loads a sample, and after a resume. It
    seeds torch's generator on the CPU, and leaves its state as it was.

    Args:
        data: The data set; what it draws, it draws from torch's generator.

    Example:
        >>> class Noise(Dataset):
        ...     def __getitem__(self, index):
        ...         return torch.rand(()).item()
        >>> noise = Seeded(Noise())
        >>> noise[0, 7] == noise[0, 7] != noise[0, 8]
        True
    """

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitem__(self, draw: Draw) -> Any:
        index, seed = draw
        with seeded(seed):
            return self.data[index]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw under a seed on the CPU and on one device; afterwards all draws go on as before.

    Example:
        >>> with seeded(7):
        ...     first = torch.rand(2)
        >>> with seeded(7):
        ...     torch.equal(first, torch.rand(2))
        True
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def generator_for(seed: int, epoch: int, purpose: str) -> Generator:
    """A generator of its own for each use in each epoch.

    Example:
        >>> draws = [generator_for(0, epoch, "order").initial_seed() for epoch in (1, 1, 2)]
        >>> draws[0] == draws[1] != draws[2]
        True
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))
