"""Where a training run stands, and the two files that keep it."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.recipes import checkpoint
from mmfusion.recipes.sharding import whole
from mmfusion.recipes.stepping import OptimiserStep

History = list[dict[str, Any]]


class TrainingState:
    """What changes while training: model, optimiser, history, and the step of the epoch under way.

    Args:
        take: The model and its optimiser.
        folder: Gets ``last.safetensors`` and ``best.safetensors``.
        train: The training set; a run goes on with the same one, as far as ``facts_of`` can tell.

    Attributes:
        scored: The model to validate: the moving average where there is one.
        history: A dict per finished epoch.
        step: Steps done of the epoch under way.

    Example:
        >>> import mmfusion
        >>> from accelerate import Accelerator
        >>> from mmfusion.recipes.plan import Plan
        >>> model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=2, dim=8)
        >>> take = OptimiserStep(Accelerator(cpu=True), model, Plan())
        >>> TrainingState(take, Path("unused"), range(9)).finished()
        False
    """

    def __init__(self, take: OptimiserStep, folder: Path, train: Any) -> None:
        self.take, self.samples = take, facts_of(train)
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"
        self.modules: dict[str, nn.Module] = {"model": take.bare}
        self.scored = take.bare
        if take.average is not None:
            self.modules["average"] = take.average
            self.scored = take.average.module
        self.history: History = []
        self.step = 0
        self._totals: dict[str, Tensor] = {}

    def best_epoch(self) -> int:
        """The epoch with the highest score so far."""
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch]["score"])

    def finished(self) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        done, plan = len(self.history), self.take.plan
        return done > 0 and (done >= plan.epochs or done - 1 - self.best_epoch() >= plan.patience)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count a step, and its share of the epoch's losses."""
        self.step += 1
        for name, loss in losses.items():
            self._totals[name] = self._totals.get(name, 0) + loss

    def end_epoch(self, score: float, about: dict[str, float]) -> None:
        """Add a line to the history, and write the checkpoints."""
        means = {name: round(value, 6) for name, value in self._means().items()}
        self.history.append({"epoch": len(self.history), "score": score, **means, **about})
        self.step, self._totals = 0, {}
        if self.best_epoch() == len(self.history) - 1:
            weights = {name: whole(x) for name, x in self.scored.state_dict().items()}
            if self.take.accelerator.is_main_process:
                checkpoint.save(self.best, weights, self._about())
        self.save()

    def save(self) -> None:
        """Write ``last.safetensors``, within an epoch too."""
        about = self._about() | {"step": self.step, "totals": self._means()}
        scaler = self.take.accelerator.scaler
        tensors, groups = checkpoint.pack(self.modules, self.take.optimiser)
        about |= {"groups": groups, "scaler": scaler and scaler.state_dict()}
        if self.take.accelerator.is_main_process:
            checkpoint.save(self.last, tensors, about)
        self.take.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Go on after the last step that was saved."""
        tensors, about = checkpoint.load(self.last)
        mine, theirs = self._about()["identity"], about["identity"]
        if other := [name for name in mine | theirs if mine.get(name) != theirs.get(name)]:
            raise ValueError(
                f"{self.last} was trained with another {', '.join(other)} "
                f"({', '.join(str(theirs.get(n)) for n in other)}): resuming goes on with the same "
                "run. Pass the same settings, or start anew without resume."
            )
        checkpoint.unpack(tensors, about["groups"], self.modules, self.take.optimiser)
        if self.take.accelerator.scaler is not None:
            self.take.accelerator.scaler.load_state_dict(about["scaler"])
        self.history, self.step = about["history"], about["step"]
        device = self.take.accelerator.device
        self._totals = {k: torch.tensor(v, device=device) for k, v in about["totals"].items()}

    def take_best(self) -> None:
        """Load the best epoch's weights into the caller's model."""
        self.take.accelerator.wait_for_everyone()
        model = self.take.accelerator.unwrap_model(self.take.model, keep_fp32_wrapper=False)
        checkpoint.load_weights(model, checkpoint.load(self.best)[0])
        model.eval()

    def _means(self) -> dict[str, float]:
        """The epoch's losses, over ranks."""
        means = self.take.accelerator.reduce(self._totals, reduction="mean")
        return {name: float(value) for name, value in means.items()}

    def _about(self) -> dict[str, Any]:
        """The history, and what two runs share if one may go on from the other."""
        shapes = [[name, list(x.shape)] for name, x in self.take.bare.state_dict().items()]
        trained = [name for name, x in self.take.bare.named_parameters() if x.requires_grad]
        plan = {key: value for key, value in asdict(self.take.plan).items() if key != "num_workers"}
        parts = {"model": _sha256(shapes), "choice of frozen parameters": _sha256(trained)}
        return {"identity": plan | parts | self.samples, "history": self.history}


def facts_of(train: Any) -> dict[str, Any]:
    """What two training sets share if a run may go on from one with the other: number and ids.

    Ids are the attribute ``sample_ids``, or those in the items of a list. Of another data set only
    the number is known, since reading all of it for its ids could take as long as an epoch.

    Args:
        train: As ``fit`` takes it.

    Example:
        >>> here, there = facts_of([{"sample_ids": 1}]), facts_of([{"sample_ids": 2}])
        >>> [name for name in here if here[name] != there[name]]
        ['set of samples']
    """
    ids = getattr(train, "sample_ids", None)
    if ids is None and isinstance(train, list):
        ids = [row["sample_ids"] for row in train]
    known = {} if ids is None else {"set of samples": _sha256([int(one) for one in ids])}
    return {"number of samples": len(train), **known}


def _sha256(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
