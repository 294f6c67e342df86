"""A tiny training run that can be told to die; a script for test_training.

python resumable.py FOLDER [STEPS]   STEPS: kill this process when so many steps have begun.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import mmfusion
from mmfusion.recipes.batches import EpochBatches
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.reporting import predict
from mmfusion.recipes.training import fit

torch.set_num_threads(1)  # with more, rounding hangs on how busy the machine is

NUM_SAMPLES, BATCH_SIZE = 48, 8
PLAN = Plan(epochs=4, batch_size=BATCH_SIZE, learning_rate=1e-2, seed=3)


def samples(num_samples: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, 2, 4, generator=generator)
    vectors = (noise + labels[:, None, None]).unbind(1)
    return [
        {"inputs": {"a": vectors[0][i], "b": vectors[1][i]}, "labels": int(labels[i])}
        | {"sample_ids": i}
        for i in range(num_samples)
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return mmfusion.presence.collate(rows, ("a", "b"))


def model(dropout: float = 0.1, **kind: Any) -> mmfusion.CMML:
    torch.manual_seed(0)
    return mmfusion.CMML(
        {"a": 4, "b": 4}, num_classes=2, dim=8, num_heads=2, num_blocks=1, dropout=dropout, **kind
    )


def loss_on_all(net: torch.nn.Module) -> float:
    """Stands in for a validation score: bit-sensitive to every weight and to the memory."""
    labels = torch.tensor([row["labels"] for row in samples()])
    present = torch.tensor([[True, False], [False, True]]).repeat(NUM_SAMPLES // 2, 1)
    logits = predict(net, samples(), collate, present)
    return -float(torch.nn.functional.cross_entropy(logits, labels))


def run(
    folder: Path,
    data: Any = None,
    *,
    plan: Plan = PLAN,
    net: torch.nn.Module | None = None,
    **kind: Any,
) -> dict[str, Any]:
    net = model() if net is None else net
    rows = samples() if data is None else data
    history = fit(net, rows, loss_on_all, plan, folder, collate=collate, progress=False, **kind)
    for row in history:
        del row["seconds"]
    return {"history": history, "final": loss_on_all(net)}


class Fatal(list[dict[str, Any]]):
    """Samples of which the n-th that is asked for is the last."""

    def __init__(self, rows: list[dict[str, Any]], lives: int) -> None:
        super().__init__(rows)
        self.lives = lives

    def __getitem__(self, index: Any) -> Any:
        self.lives -= 1
        if self.lives < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    assert len(EpochBatches(NUM_SAMPLES, batch_size=BATCH_SIZE, seed=0)) == 6
    if len(sys.argv) > 2:
        run(out, Fatal(samples(), int(sys.argv[2]) * BATCH_SIZE))
    found = run(out, net=model(0.0)) if "WORLD_SIZE" in os.environ else run(out, resume=True)
    if os.environ.get("RANK", "0") == "0":
        (out / "metrics.json").write_text(json.dumps(found))
