"""How a member of an ensemble is trained: alike for CMML and every baseline."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mmfusion.missingness import hide
from mmfusion.recipes.members import Rows


def batch_size(num_rows: int) -> int:
    """About five steps an epoch on few rows, at most 256 rows on many; our design."""
    return int(min(256, max(32, 2 ** round(math.log2(max(1, num_rows / 5))))))


def train(
    model: nn.Module,
    rows: Rows,
    numbers: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    hide_rate: float,
    input_dropout: float,
    generator: Generator,
    after_epoch: Callable[[], None],
) -> None:
    """AdamW under one cycle of the learning rate; modalities hidden and cells dropped at random.

    Args:
        model: CMML or a baseline; left in eval mode.
        rows: All training rows; those in ``numbers`` are used.
        numbers: Which rows; they are also the ids a memory stores.
        epochs: Passes over the rows.
        learning_rate: The highest one.
        hide_rate: See ``missingness.hide``.
        input_dropout: Of feature cells.
        generator: For the order of rows and for hiding.
        after_epoch: Called after every epoch, for a progress bar.
    """
    size = batch_size(len(numbers))
    steps = epochs * -(-len(numbers) // size)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=0.15
    )
    model.train()
    for _ in range(epochs):
        for part in numbers[torch.randperm(len(numbers), generator=generator)].split(size):
            batch = rows[part]
            device = next(model.parameters()).device
            loss = model(
                {n: F.dropout(x.to(device), input_dropout) for n, x in batch.inputs.scaled.items()},
                present=batch.present.to(device),
                visible=hide(batch.present, hide_rate, generator).to(device),
                labels=batch.labels.to(device),
                sample_ids=part.to(device),
            ).loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        after_epoch()
    model.eval()
