"""Rows of the contract's list: the baselines, each with one target, and one with all four."""

from typing import Any

import torch
from contract_case import CLASSES, DIM, HEADS, LENGTH, SLOTS, Case, cast
from contract_models import (
    absent_inputs,
    call_model,
    feature_inputs,
    model_batch,
    model_loss,
    widths,
)
from torch import Generator

from mmfusion import baselines


def baseline(name: str, target: str = "multiclass") -> Case:
    batch = model_batch(target, feature_inputs)

    def build(modalities: int, dropout: float = 0.0, **kind: Any) -> Any:
        own = {
            # none at dropout 0: two ranks do not draw what one process draws
            "ModalityDropout": {"modality_dropout": dropout},
            "RetrieveAndFill": {"num_slots": SLOTS},
        }
        return getattr(baselines, name)(
            widths(modalities),
            num_classes=1 if target == "binary" else CLASSES,
            target=target,
            dim=DIM,
            num_tokens=LENGTH,
            num_heads=HEADS,
            dropout=dropout,
            **(own.get(name, {}) | kind),
        )

    def fill(model: Any) -> None:
        """One step of training: what remembers, remembers samples 98, 99, ..."""
        dtype = next(model.parameters()).dtype
        drawn = batch(5, len(model.names), Generator().manual_seed(3))
        with torch.no_grad():
            model.train()(**cast(drawn, dtype))

    return Case(
        name if target == "multiclass" else f"{name}-{target}",
        getattr(baselines, name),
        build,
        batch,
        call_model,
        absent_inputs,
        fill,
        has_dropout=True,
        loss=model_loss,
    )


CASES = [
    *(baseline(name) for name in baselines.__all__),
    *(baseline("LateFusion", target) for target in ("multilabel", "binary", "regression")),
]
