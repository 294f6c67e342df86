"""A tiny training run that can be told to die; a script for test_training.

python resumable.py FOLDER [STEPS SIGNAL]   send this process SIGNAL when STEPS steps have begun
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import get_worker_info

import mmfusion
from mmfusion.recipes.batches import EpochBatches
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.training import fit

torch.set_num_threads(1)  # with more, rounding hangs on how busy the machine is

NUM_SAMPLES, BATCH_SIZE = 48, 8
# Everything that has a state of its own is on.
PLAN = Plan(
    epochs=4,
    batch_size=BATCH_SIZE,
    accumulate=2,
    learning_rate=1e-2,
    ema=0.8,
    hide_ramp=0.5,
    seed=3,
)


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
    batch = collate(samples())
    with torch.no_grad():
        logits = net.eval()(batch["inputs"], present=batch["present"] & present).logits
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
    rows = Noisy(samples()) if data is None else data
    history = fit(net, rows, loss_on_all, plan, folder, collate=collate, progress=False, **kind)
    for row in history:
        for name in ("seconds", "samples_per_second", "peak_memory_mb"):
            del row[name]
    return {"history": history, "final": loss_on_all(net)}


class Noisy(list[dict[str, Any]]):
    """Samples with augmentation."""

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        noisy = {name: v + 0.1 * torch.randn(4) for name, v in row["inputs"].items()}
        return row | {"inputs": noisy}


class Fatal(Noisy):
    """Samples of which the n-th that is asked for sends this process a signal."""

    def __init__(self, rows: list[dict[str, Any]], lives: int, number: int) -> None:
        super().__init__(rows)
        self.lives, self.number = lives, number

    def __getitem__(self, index: Any) -> Any:
        self.lives -= 1
        if self.lives == -1:
            if get_worker_info() is None:
                os.kill(os.getpid(), self.number)
            else:  # as schedulers do: every process of the job gets it
                os.killpg(os.getpgrp(), self.number)
        return super().__getitem__(index)


def shard_on_cpus() -> None:
    """Let Accelerate do with FSDP2 between CPUs what it does between GPUs only."""
    join_processes()
    state = Accelerator().state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


if __name__ == "__main__":
    out = Path(sys.argv[1])
    assert len(EpochBatches(NUM_SAMPLES, batch_size=BATCH_SIZE, seed=0)) == 6
    alone = "WORLD_SIZE" not in os.environ
    net, plan = (model(), PLAN) if alone else (model(0.0), replace(PLAN, accumulate=1))
    if "SHARDED" in os.environ:
        shard_on_cpus()
        plan = replace(plan, ema=0.0)
    plan = replace(plan, num_workers=int(os.environ.get("WORKERS", "0")))
    data = None
    if len(sys.argv) > 2:
        steps, number = map(int, sys.argv[2:])
        lives = steps * BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1"))
        data = Fatal(samples(), lives, number)
    found = run(out, data, plan=plan, net=net, resume=True)
    if os.environ.get("RANK", "0") == "0":
        (out / "metrics.json").write_text(json.dumps(found))
    join_processes().destroy_process_group()
