"""One step of the optimiser on a batch: hide, forward, backward, clip, update, average."""

import contextlib
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.operations import slice_tensors
from torch import Generator, Tensor, nn

from mmfusion.losses import IGNORE
from mmfusion.missingness import hide
from mmfusion.recipes.batches import generator_for
from mmfusion.recipes.ema import moving_average
from mmfusion.recipes.parameters import parameter_groups
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.sharding import whole


class OptimiserStep:
    """A model with its optimiser and average; called with a batch, it takes one step.

    What a step draws depends on the seed, the epoch and the step alone. With ``accumulate`` parts,
    gradients are those of the whole batch for the task, reconstruction and alignment losses, each a
    mean that is weighed by what it is taken over. The contrastive loss compares samples within a
    part only, and the memory is written after each part.

    Args:
        accelerator: Knows the ranks, the device and the arithmetic.
        model: As ``fit`` takes it.
        plan: How to train.

    Attributes:
        bare: The model itself; ``model`` is what Accelerate made of it.
        average: Its moving average, or None.

    Raises:
        ValueError: If a batch does not divide evenly into parts, or there is an average with FSDP.
        FloatingPointError: If a loss or gradient is NaN or infinite, on every rank.

    Example:
        >>> import mmfusion
        >>> model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=2, dim=8)
        >>> step = OptimiserStep(Accelerator(cpu=True), model, Plan(batch_size=2))
        >>> batch = {"inputs": {"a": torch.ones(2, 2), "b": None}, "labels": torch.tensor([0, 1])}
        >>> batch |= {"present": torch.tensor([[True, False]] * 2), "sample_ids": torch.arange(2)}
        >>> sorted(step(batch, epoch=0, step=0, steps=10))
        ['alignment', 'contrastive', 'loss', 'reconstruction', 'task']
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, plan: Plan) -> None:
        if plan.batch_size % (accelerator.num_processes * plan.accumulate):
            raise ValueError(
                f"batch_size={plan.batch_size} on {accelerator.num_processes} ranks with "
                f"accumulate={plan.accumulate}: a batch divides evenly over the ranks, and a "
                "rank's share into parts. Pass another batch_size."
            )
        self.accelerator, self.plan, self.bare = accelerator, plan, model
        if plan.ema and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"ema={plan.ema} with FSDP: an average of weights that are split over ranks is not "
                "kept. Pass ema=0, or train without FSDP."
            )
        self.average = None
        if plan.ema:  # a copy, so it comes before Accelerate wraps what there is to copy
            self.average = moving_average(model, plan.ema).to(accelerator.device)
        optimiser = torch.optim.AdamW(parameter_groups(model, plan), lr=plan.learning_rate)
        with warnings.catch_warnings():  # DDP has a new name for it, unknown to torch 2.8
            warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
            self.model, self.optimiser = accelerator.prepare(model, optimiser)

    def __call__(
        self, batch: dict[str, Any], epoch: int, step: int, steps: int
    ) -> dict[str, Tensor]:
        """Step number ``step`` of ``epoch``, each of which has ``steps``; the losses, detached."""
        plan, rank = self.plan, self.accelerator.process_index
        now = epoch * steps + step, plan.epochs * steps
        hiding = generator_for(plan.seed, epoch, f"hide {step}")
        visible = self._hide(batch["present"], plan.hiding(*now), hiding)
        batch = send_to_device(batch | {"visible": visible}, self.accelerator.device)
        torch.manual_seed(generator_for(plan.seed, epoch, f"step {step} {rank}").initial_seed())
        for group in self.optimiser.param_groups:
            group["lr"] = plan.pace(*now) * group["pace"]
        self.optimiser.zero_grad()
        where = f"epoch {epoch}, step {step}"
        totals: dict[str, Tensor] = {}
        logits: list[Tensor] = []
        parts = self._parts(batch)
        for part, shares in zip(parts, self._shares(parts), strict=True):
            last = part is parts[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                out = self.model(**part)
                logits.append(out.logits.detach())
                losses = self._weigh(out, shares)
                self._check(losses["loss"], part["sample_ids"], logits[-1], f"{where}: the loss")
                self.accelerator.backward(losses["loss"])
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), plan.clip_norm))
        if self.accelerator.scaler is None:  # a scaler skips such a step by itself
            what = f"{where}: the gradient norm"
            self._check(norm, batch["sample_ids"], torch.cat(logits), what)
        self.optimiser.step()
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update_parameters(self.bare)
        return totals

    def _hide(self, present: Tensor, rate: float, generator: Generator) -> Tensor:
        """This rank's rows of what one process would draw for the joint batch."""
        rows, rank = len(present), self.accelerator.process_index
        joint = present.repeat(self.accelerator.num_processes, 1)
        return hide(joint, rate, generator)[rank * rows : (rank + 1) * rows]

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        rows = len(batch["present"]) // self.plan.accumulate
        starts = range(0, rows * self.plan.accumulate, rows)
        return [slice_tensors(batch, slice(start, start + rows)) for start in starts]

    def _shares(self, parts: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """By how much the losses of each part count, so that their sum is that of the batch."""
        if len(parts) == 1:
            return [{}]
        counts = torch.stack([_counts(part) for part in parts])  # (parts, 2)
        counts = self.accelerator.reduce(counts, reduction="sum")
        return [
            {"task": task, "reconstruction": hidden, "others": task.new_tensor(1 / len(parts))}
            for task, hidden in counts / counts.sum(0).clamp(min=1)
        ]

    def _weigh(self, out: Any, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        if not shares:
            return {"loss": out.loss, **out.losses}
        parts = {k: loss * shares.get(k, shares["others"]) for k, loss in out.losses.items()}
        weights: Any = self.bare.loss_weights
        return {"loss": torch.stack([weights[k] * v for k, v in parts.items()]).sum(), **parts}

    def _check(self, value: Tensor, sample_ids: Tensor, logits: Tensor, what: str) -> None:
        """Stop every rank where one has a number that is none."""
        if bool(self.accelerator.gather(value.detach().reshape(1)).isfinite().all()):
            return
        ids, logits = self.accelerator.gather((sample_ids, logits))
        broken = ids[~logits.isfinite().all(1)]
        where = "their logits too" if len(broken) else "no single sample stands out: the batch"
        raise FloatingPointError(
            f"{what} is not finite at sample_ids {(broken if len(broken) else ids).tolist()} "
            f"({where}). Training needs finite numbers; the last checkpoint is kept. Look at those "
            "samples, lower learning_rate, or train without mixed_precision."
        )


def _counts(part: dict[str, Any]) -> Tensor:
    """Over how many known labels and hidden modalities the losses of a part are means."""
    labels = part["labels"]
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
    hidden = part["present"] & ~part["visible"]
    return torch.stack([known.sum(), hidden.sum()]).float()
