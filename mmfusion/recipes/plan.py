"""How to train: the numbers, and what they give at each step."""

import math
from dataclasses import dataclass
from typing import Literal

from mmfusion.missingness import curriculum


@dataclass(frozen=True)
class Plan:
    """How to train; every number that changes the result and is not the model or the data.

    Args:
        epochs: Passes over the training samples.
        batch_size: Samples per optimiser step, over all ranks together.
        accumulate: Parts in which a rank takes its share of a batch, to save memory.
        learning_rate: Of AdamW, reached after the warm-up; then a cosine down to zero.
        backbone_rate: Learning rate of pretrained encoders, as a multiple of the others'.
        weight_decay: Of the weights that multiply activations; not of biases, norms, embeddings.
        warmup: Share of all steps in which the learning rate rises linearly.
        clip_norm: Gradients are scaled down to this norm; a large one scales nothing.
        ema: Decay of a moving average of the weights, which is scored and kept; 0 for none.
        hide_rate: Probability of hiding an observed modality from the model.
        hide_ramp: Share of all steps in which it rises linearly from zero.
        patience: Stop after so many epochs without a better validation score.
        mixed_precision: "no", "bf16" or "fp16".
        num_workers: Processes that load samples, per rank.
        seed: Of data order, hiding, augmentation and dropout; initial weights are the caller's.

    Raises:
        ValueError: If a count is below 1, a share is not in 0..1, or ``clip_norm`` is not above 0.

    Example:
        >>> plan = Plan(learning_rate=1.0, warmup=0.5, hide_ramp=0.25)
        >>> [round(plan.pace(step, steps=8), 2) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
        >>> [plan.hiding(step, steps=8) for step in range(4)]
        [0.0, 0.25, 0.5, 0.5]
    """

    epochs: int = 30
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    weight_decay: float = 1e-2
    warmup: float = 0.1
    clip_norm: float = 1.0
    ema: float = 0.0
    hide_rate: float = 0.5
    hide_ramp: float = 0.0
    patience: int = 15
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: it is a count from 1 on. Raise {name}."
                )
        for name in ("warmup", "ema", "hide_rate", "hide_ramp", "backbone_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: it is a share from 0 to 1. Pass {name}=0.5 "
                    "for a half."
                )

        if not 0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm={self.clip_norm}: a gradient is scaled to a norm, a finite number "
                "above 0. Pass clip_norm=1, or clip_norm=1e9 to scale nothing."
            )

    def pace(self, step: int, steps: int) -> float:
        """Learning rate at one of ``steps``; it hangs on the step alone, so nothing is saved."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))

    def hiding(self, step: int, steps: int) -> float:
        """Hide rate at one of ``steps``."""
        ramp = round(self.hide_ramp * steps)
        return curriculum(step, ramp, end=self.hide_rate) if ramp else self.hide_rate
