"""One training loop for every recipe: on a CPU, one GPU, or several ranks, through Accelerate.

What an epoch draws depends on the seed and the epoch alone, so that a run killed at any step and
resumed ends where the uninterrupted one does.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from rich.progress import Progress
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmfusion.missingness import hide
from mmfusion.recipes import checkpoint
from mmfusion.recipes.batches import EpochBatches, generator_for
from mmfusion.recipes.plan import Plan

History = list[dict[str, Any]]


def fit(
    model: nn.Module,
    train: Dataset[Any],
    score: Callable[[nn.Module], float],
    plan: Plan,
    folder: Path,
    *,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    classes: Tensor | None = None,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Train, keep the epoch that scores best on validation, and leave its weights in ``model``.

    Writes ``last.safetensors`` (weights, memory, optimiser, history) after every epoch and
    ``best.safetensors`` (weights and memory) after every better one, each whole or not at all.
    Selection and early stopping look at ``score`` only. The caller's random state is as before.

    Args:
        model: Takes ``inputs, present, visible, labels, sample_ids``; returns ``loss``, ``losses``
            and ``logits``.
        train: Items as ``collate`` takes them, with ``sample_ids`` and ``labels``.
        score: Validation score of a model in eval mode, the higher the better. Over several ranks
            each calls it, and all must get the same.
        plan: How to train.
        folder: For the checkpoints; made if need be.
        collate: Items to a batch of ``inputs``, ``present``, ``labels`` and ``sample_ids``.
        classes: Class of each training sample, to draw all classes equally often.
        resume: Go on from ``last.safetensors`` in ``folder``, if it is there.
        progress: Show a bar and a line per epoch on the main rank.

    Returns:
        A dict per epoch: ``epoch``, ``score``, the losses, ``seconds``.

    Raises:
        ValueError: If ``last.safetensors`` belongs to another plan or model, or a score is NaN.
        FloatingPointError: If a loss or gradient is NaN or infinite; it names the samples. The
            checkpoints of the epochs before stay.

    Example:
        >>> import functools, tempfile, mmfusion
        >>> rows = [{"inputs": {"a": torch.randn(2)}, "labels": i, "sample_ids": i} for i in (0, 1)]
        >>> model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=2, dim=8)
        >>> join = functools.partial(mmfusion.presence.collate, names=model.names)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     where = {"folder": Path(folder), "collate": join, "progress": False}
        ...     history = fit(model, rows, lambda model: 0.5, Plan(epochs=2), **where)
        >>> [row["epoch"] for row in history]
        [0, 1]
    """
    if plan.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            "mixed_precision='fp16' without a GPU: fp16 needs one. Pass 'bf16' or 'no'."
        )
    accelerator = Accelerator(
        mixed_precision=plan.mixed_precision,
        # Ranks agree on the memory bank by themselves; see mmfusion.layers.MemoryBank.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    num_samples = len(train)  # type: ignore[arg-type]  # a map-style dataset has a length
    run = _Run(accelerator, model, plan, folder, score, num_samples)
    batches = EpochBatches(
        num_samples,
        batch_size=plan.batch_size,
        seed=plan.seed,
        classes=classes,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    loader = DataLoader(
        train, batch_sampler=batches, collate_fn=collate, num_workers=plan.num_workers
    )
    if resume and run.last.exists():
        run.restore()
    elif accelerator.is_main_process:
        run.last.unlink(missing_ok=True)  # of another run, which is not to be resumed from here on
    shown = progress and accelerator.is_main_process
    with Progress(transient=True, disable=not shown) as bar:
        task = bar.add_task("training", total=plan.epochs * len(batches))
        while not run.finished():
            batches.epoch = len(run.history)
            bar.update(task, completed=batches.epoch * len(batches))
            run.epoch(loader, lambda: bar.advance(task))
            if shown:
                bar.console.print(run.summary(), highlight=False)
    run.take_best()
    return run.history


class _Run:
    """What changes while training: the model, the optimiser, and the history."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        plan: Plan,
        folder: Path,
        score: Callable[[nn.Module], float],
        num_samples: int,
    ) -> None:
        self.accelerator, self.plan, self.score = accelerator, plan, score
        self.num_samples = num_samples
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"
        self.bare = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self.model, self.optimiser = accelerator.prepare(model, optimiser)
        self.history: History = []

    def best_epoch(self) -> int:
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch]["score"])

    def finished(self) -> bool:
        done = len(self.history)
        return done > 0 and (
            done >= self.plan.epochs or done - 1 - self.best_epoch() >= self.plan.patience
        )

    def epoch(self, loader: DataLoader[Any], advance: Callable[[], None]) -> None:
        """Train one, validate, and write the checkpoints."""
        started, epoch, seed = time.perf_counter(), len(self.history), self.plan.seed
        rank, device = self.accelerator.process_index, self.accelerator.device
        hiding = generator_for(seed, epoch, "hide")
        totals: dict[str, Tensor] = {}
        self.model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(generator_for(seed, epoch, f"rank {rank}").initial_seed())
            for step, batch in enumerate(loader):
                losses = self._step(batch, hiding, epoch * len(loader) + step, len(loader))
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss / len(loader)
                advance()
        totals = self.accelerator.reduce(totals, reduction="mean")
        self.model.eval()
        with torch.inference_mode():
            score = self.score(self.bare)
        if math.isnan(score):
            raise ValueError(
                "the validation score is NaN: selection needs a number. See that each class has a "
                "case in the validation split."
            )
        means = {name: round(float(total), 6) for name, total in totals.items()}
        seconds = round(time.perf_counter() - started, 2)
        self.history.append({"epoch": epoch, "score": score, **means, "seconds": seconds})
        self._save()

    def _step(
        self, batch: dict[str, Any], hiding: Generator, step: int, steps: int
    ) -> dict[str, Tensor]:
        visible = self._hide(batch["present"], hiding)
        batch = send_to_device(batch | {"visible": visible}, self.accelerator.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.pace(step, steps * self.plan.epochs)
        out = self.model(**batch)
        self.optimiser.zero_grad()
        self._check(out.loss, out, batch["sample_ids"], "loss")
        self.accelerator.backward(out.loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        if self.accelerator.scaler is None:  # a scaler skips such a step by itself
            self._check(norm, out, batch["sample_ids"], "gradient norm")
        self.optimiser.step()
        return {"loss": out.loss.detach(), **{k: v.detach() for k, v in out.losses.items()}}

    def _hide(self, present: Tensor, generator: Generator) -> Tensor:
        """This rank's rows of what one process would draw for the joint batch."""
        rows, rank = len(present), self.accelerator.process_index
        joint = present.repeat(self.accelerator.num_processes, 1)
        return hide(joint, self.plan.hide_rate, generator)[rank * rows : (rank + 1) * rows]

    def _check(self, value: Tensor, out: Any, sample_ids: Tensor, what: str) -> None:
        """Stop every rank where one has a number that is none."""
        if bool(self.accelerator.gather(value.detach().reshape(1)).isfinite().all()):
            return
        ids, logits = self.accelerator.gather((sample_ids, out.logits.detach()))
        broken = ids[~logits.isfinite().all(1)]
        where = "their logits too" if len(broken) else "no single sample stands out: the batch"
        raise FloatingPointError(
            f"epoch {len(self.history)}: the {what} is not finite at sample_ids "
            f"{(broken if len(broken) else ids).tolist()} ({where}). Training needs finite "
            f"numbers; checkpoints in {self.last.parent} end with the epoch before. Look at those "
            "samples, lower learning_rate, or train without mixed_precision."
        )

    def _identity(self) -> dict[str, Any]:
        """What two runs share if one may go on from the other."""
        shapes = [[name, list(value.shape)] for name, value in self.bare.state_dict().items()]
        model = hashlib.sha256(repr(shapes).encode()).hexdigest()
        plan = {key: value for key, value in asdict(self.plan).items() if key != "num_workers"}
        return plan | {"model": model, "number of samples": self.num_samples}

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        about = {"identity": self._identity(), "history": self.history}
        if self.best_epoch() == len(self.history) - 1:
            checkpoint.save(self.best, self.bare.state_dict(), about)
        tensors, about["groups"] = checkpoint.pack(self.bare, self.optimiser)
        about["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        checkpoint.save(self.last, tensors, about)

    def restore(self) -> None:
        """Go on after the last finished epoch."""
        tensors, about = checkpoint.load(self.last)
        mine, theirs = self._identity(), about["identity"]
        if other := [name for name in mine if mine[name] != theirs.get(name)]:
            raise ValueError(
                f"{self.last} was trained with another {', '.join(other)} "
                f"({', '.join(str(theirs.get(n)) for n in other)}): resuming goes on with the same "
                "run. Pass the same settings, or start anew without resume."
            )
        checkpoint.unpack(tensors, about["groups"], self.bare, self.optimiser)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        self.history = about["history"]

    def take_best(self) -> None:
        self.accelerator.wait_for_everyone()
        self.bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.bare.load_state_dict(checkpoint.load(self.best)[0])
        self.bare.eval()

    def summary(self) -> str:
        now, best = self.history[-1], self.best_epoch()
        return (
            f"epoch {now['epoch'] + 1}/{self.plan.epochs}: loss {now['loss']:.3f}, validation "
            f"{now['score']:.4f}{' (best so far)' if now['epoch'] == best else ''}, "
            f"{now['seconds']:.1f} s"
        )
