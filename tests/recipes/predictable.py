"""A small model and patients, the same in every process; run as a script it dies while predicting.

``python predictable.py out.csv 5`` kills itself when it is asked for the patient of row 5.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfusion
from mmfusion.recipes.encoders import TableEncoder
from mmfusion.recipes.predict import Member, predict
from mmfusion.recipes.reading import Patients, Reading

SHAPES = {"photo": (3,), "scan": (4,), "lab": (3,)}
NAMES = tuple(SHAPES)
CELLS = ("age", "sex", "sex")
IDS = tuple(f"new{row}" for row in range(10))
HOW: dict[str, Any] = {"samples": 4, "batch_size": 4, "progress": False}


def model(target: str = "multiclass", outputs: int = 3, seed: int = 0, **kind: Any) -> Any:
    """A model that remembers twelve samples, numbered from 100."""
    torch.manual_seed(seed)
    made = mmfusion.CMML(
        {"photo": 3, "scan": 4, "lab": (TableEncoder(CELLS, 8), 8)},
        num_classes=outputs,
        target=target,
        **{"dim": 8, "num_heads": 2, "dropout": 0.3} | kind,
    )
    inputs = {name: torch.randn(12, *shape) for name, shape in SHAPES.items()}
    made.train()(inputs, sample_ids=torch.arange(100, 112))
    return made.eval()


def inputs_of(row: int) -> dict[str, Tensor | None]:
    """Row 0 has everything, row 7 nothing; a pattern for each."""
    generator = torch.Generator().manual_seed(row)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: None if row >> m & 1 else drawn[name] for m, name in enumerate(NAMES)}


def reading(classes: Any = ("a", "b", "c")) -> Reading:
    train = {str(100 + i): f"old{i}" for i in range(12)}
    return Reading(NAMES, SHAPES, classes, train_ids=train)


def patients(classes: Any = ("a", "b", "c"), read: Any = None, ids: Any = IDS) -> Patients:
    return Patients(reading(classes), ids, read or (lambda row: (inputs_of(row), [])))


def deadly(last: int) -> Any:
    """Reads patients, until one is asked for that ends the process."""

    def read(row: int) -> Any:
        if row == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs_of(row), []

    return read


if __name__ == "__main__":
    torch.set_num_threads(1)
    predict([Member(model(), patients(read=deadly(int(sys.argv[2]))))], Path(sys.argv[1]), **HOW)
