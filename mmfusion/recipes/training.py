"""One training loop for every recipe: on a CPU, one GPU, or several ranks, through Accelerate.

What a step draws depends on the seed, the epoch and the step alone, so that a run killed at any
moment and resumed ends where the uninterrupted one does.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmfusion.recipes import checkpoint
from mmfusion.recipes.batches import EpochBatches, Seeded
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.sharding import gathered
from mmfusion.recipes.signals import StopRequest, holding_sigterm, ignore_sigterm
from mmfusion.recipes.state import History, TrainingState
from mmfusion.recipes.stepping import OptimiserStep
from mmfusion.recipes.tracking import Tracker, peak_memory


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
    track: bool = False,
) -> History:
    """Train, keep the epoch that scores best on validation, and leave its weights in ``model``.

    Writes ``last.safetensors`` (weights, memory, optimiser, history) after every epoch and
    ``best.safetensors`` (weights and memory) after every better one, each whole or not at all.
    Selection and early stopping look at ``score`` only. On SIGTERM it finishes the step, writes
    ``last.safetensors`` and exits with code 143. The caller's random state is as before.

    Args:
        model: Takes ``inputs, present, visible, labels, sample_ids``; returns ``loss``, ``losses``
            and ``logits``; has ``loss_weights``.
        train: Items as ``collate`` takes them, with ``sample_ids`` and ``labels``. What it draws
            to augment them, it draws from torch's generator. Where it is a list or has
            ``sample_ids``, a run is resumed with the same samples only.
        score: Validation score of a model in eval mode, the higher the better. Over several ranks
            each calls it, and all must get the same.
        plan: How to train.
        folder: For the checkpoints; made if need be.
        collate: Items to a batch of ``inputs``, ``present``, ``labels`` and ``sample_ids``.
        classes: Class of each training sample, to draw all classes equally often.
        resume: Go on from ``last.safetensors`` in ``folder``, if it is there.
        progress: Show a bar and a line per epoch on the main rank.
        track: Write TensorBoard files to ``folder / "tensorboard"``.

    Returns:
        A dict per epoch: ``epoch``, ``score``, the losses, ``seconds``, and of the main rank
        ``samples_per_second`` while training and ``peak_memory_mb``.

    Raises:
        ValueError: If nothing can be written to ``folder``, ``last.safetensors`` belongs to another
            plan, model or training set, or a score is NaN.
        FloatingPointError: If a loss or gradient is NaN or infinite; it names the samples. The
            checkpoints of the epochs before stay.
        OSError: If a checkpoint cannot be written; the one before stays.

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
    join_processes()
    accelerator = Accelerator(
        mixed_precision=plan.mixed_precision,
        # Ranks agree on the memory bank by themselves; see mmfusion.layers.MemoryBank.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    main = accelerator.is_main_process
    if main:
        checkpoint.check_folder(folder)
    num_samples = len(train)  # type: ignore[arg-type]  # a map-style dataset has a length
    state = TrainingState(OptimiserStep(accelerator, model, plan), folder, train)
    batches = EpochBatches(
        num_samples,
        batch_size=plan.batch_size,
        seed=plan.seed,
        classes=classes,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    loader = DataLoader(
        Seeded(train),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=plan.num_workers,
        worker_init_fn=ignore_sigterm,
    )
    if resume and state.last.exists():
        state.restore()
    elif main:
        for of_another_run in (state.last, state.best):
            of_another_run.unlink(missing_ok=True)
    steps, shown = len(batches), progress and main
    with (
        Progress(console=Console(quiet=not shown, highlight=False), transient=True) as bar,
        StopRequest() as request,
        Tracker(
            folder / "tensorboard" if track and main else None,
            step=len(state.history) * steps + state.step,
        ) as tracker,
    ):
        task = bar.add_task("training", total=plan.epochs * steps)
        while not state.finished():
            batches.epoch, batches.start = len(state.history), state.step
            bar.update(task, completed=batches.epoch * steps + state.step)
            try:
                _epoch(state, loader, score, request, tracker, lambda: bar.advance(task))
            except SystemExit:
                bar.console.print(
                    f"SIGTERM: {len(state.history)} epochs and {state.step} steps are saved"
                )
                raise
            bar.console.print(_summary(state.history, state.best_epoch(), plan.epochs))
        _stop_if(request, state)  # asked while the last epoch was validated
    state.take_best()
    return state.history


def _epoch(
    state: TrainingState,
    loader: DataLoader[Any],
    score: Callable[[nn.Module], float],
    request: StopRequest,
    tracker: Tracker,
    advance: Callable[[], None],
) -> None:
    """Train one from where it stands, validate, and write the checkpoints."""
    started, first = time.perf_counter(), state.step
    epoch, steps, take, plan = len(state.history), len(loader), state.take, state.take.plan
    device = take.accelerator.device
    take.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with holding_sigterm():
            batches = iter(loader)
        for batch in batches:
            losses = take(batch, epoch, state.step, steps)
            now = epoch * steps + state.step
            tracker.tell(losses, now)
            tracker.tell({"learning_rate": plan.pace(now, steps * plan.epochs)}, now)
            state.add({name: loss / steps for name, loss in losses.items()})
            advance()
            _stop_if(request, state)
    seen = (state.step - first) * plan.batch_size
    speed = {"samples_per_second": round(seen / (time.perf_counter() - started), 1)}
    state.scored.eval()
    with gathered(state.scored), torch.inference_mode():
        value = score(state.scored)
    if math.isnan(value):
        raise ValueError(
            "the validation score is NaN: selection needs a number. See that each class has a "
            "case in the validation split."
        )
    seconds = {"seconds": round(time.perf_counter() - started, 2)}
    memory = {"peak_memory_mb": round(peak_memory(device), 1)}
    state.end_epoch(value, seconds | speed | memory)
    tracker.tell({"score": value} | seconds | speed | memory, (epoch + 1) * steps - 1)


def _stop_if(request: StopRequest, state: TrainingState) -> None:
    """Where one rank was asked to stop, all do."""
    accelerator = state.take.accelerator
    noted = torch.tensor([request.noted], device=accelerator.device)
    if bool(accelerator.gather(noted).any()):
        state.save()
        join_processes().destroy_process_group()
        raise SystemExit(StopRequest.exit_code)


def _summary(history: History, best: int, epochs: int) -> str:
    now = history[-1]
    return (
        f"epoch {now['epoch'] + 1}/{epochs}: loss {now['loss']:.3f}, validation "
        f"{now['score']:.4f}{' (best)' if now['epoch'] == best else ''}, "
        f"{now['seconds']:.1f} s, {now['samples_per_second']:.0f} samples/s, "
        f"{now['peak_memory_mb']:.0f} MB"
    )
