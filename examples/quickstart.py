"""CMML on real clinical data: is a breast mass malignant, and what if tables are missing?

Data: the Wisconsin diagnostic breast cancer set that ships with scikit-learn (569 patients, CC BY
4.0, https://doi.org/10.24432/C5DW2B). Ten measures of the cell nuclei come as their mean, their
standard error and their worst value; the three tables are our modalities.

    python examples/quickstart.py                 # half a minute on two cores
    python examples/quickstart.py --ablations     # CMML beside itself with each stage removed

It trains on complete rows while hiding modalities at random, then scores every subset of modalities
and three rates of missing ones, and writes to `runs/quickstart/`: report.html, report.png, and
metrics.json with one such file for each other method. Expected scores: docs/quickstart.md.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

import mmfusion
from mmfusion.evaluation import compare, diagnose, evaluate, merge
from mmfusion.missingness import hide

NAMES = ("mean", "error", "worst")
ABLATIONS = {
    "no cascade": {"crta": None},
    "no memory": {"memory": None},
    "no alignment": {"alignment": None},
    "no contrast": {"contrastive_weight": 0.0},
}


@dataclass
class Settings:
    """What to run."""

    out: Path = Path("runs/quickstart")
    """Folder for everything written."""
    seeds: int = 3
    """Splits, initial weights and test patterns are drawn anew for each."""
    epochs: int = 20
    """Passes over the training rows."""
    dim: int = 32
    """Width of a token."""
    hide_rate: float = 0.5
    """Share of modalities hidden from the model while training."""
    ablations: bool = False
    """Also train CMML with each stage removed."""


def load(seed: int) -> list[dict[str, Any]]:
    """Training and test rows: three standardised tables, labels (1 = malignant), and ids."""
    data = load_breast_cancer()
    labels = 1 - data.target
    parts = train_test_split(
        np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels
    )
    mean, deviation = data.data[parts[0]].mean(0), data.data[parts[0]].std(0)
    scaled = torch.tensor((data.data - mean) / deviation, dtype=torch.float32)
    return [
        {
            "inputs": dict(zip(NAMES, scaled[rows].split(10, dim=1), strict=True)),
            "labels": torch.tensor(labels[rows]),
            "sample_ids": torch.tensor(rows),
        }
        for rows in parts
    ]


def train_cmml(settings: Settings, seed: int, data: dict[str, Any], **stages) -> mmfusion.CMML:
    """A plain loop: hide, forward, backward, step."""
    torch.manual_seed(seed)
    model = mmfusion.CMML(
        dict.fromkeys(NAMES, 10),
        num_classes=1,
        target="binary",
        dim=settings.dim,
        num_tokens=2,
        num_blocks=2,
        dropout=0.3,
        **stages,
    )
    size = len(data["labels"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = settings.epochs * -(-size // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    for _ in range(settings.epochs):
        for rows in torch.randperm(size).split(64):
            present = torch.ones(len(rows), len(NAMES), dtype=torch.bool)
            out = model(
                {name: table[rows] for name, table in data["inputs"].items()},
                present=present,
                visible=hide(present, settings.hide_rate),
                labels=data["labels"][rows],
                sample_ids=data["sample_ids"][rows],
            )
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
            schedule.step()
    return model


def train_late_fusion(data: dict[str, Any]):
    """The honest floor: one logistic regression per modality, evidence summed over those present.

    Whatever takes ``inputs`` and ``present`` and returns logits can be evaluated.
    """
    prior = data["labels"].double().mean().logit()
    experts = [
        LogisticRegression(C=0.05, max_iter=1000).fit(table, data["labels"])
        for table in data["inputs"].values()
    ]

    def log_odds(inputs: dict[str, Tensor], present: Tensor) -> Tensor:
        said = zip(experts, inputs.values(), strict=True)
        odds = [torch.from_numpy(expert.decision_function(table)) for expert, table in said]
        return prior + ((torch.stack(odds, dim=1) - prior) * present).sum(1)

    return log_odds


def main(settings: Settings) -> None:
    """Train, evaluate, print and write."""
    settings.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    about = {"title": "Breast cancer (Wisconsin), tables missing", "settings": asdict(settings)}
    methods = {"CMML": {}, **(ABLATIONS if settings.ablations else {})}
    found = {name: [] for name in (*methods, "late fusion")}
    for seed in range(settings.seeds):
        train, test = load(seed)
        how = {"seeds": [seed], "target": "binary", "about": about}
        for name, stages in methods.items():
            model = train_cmml(settings, seed, train, **stages)
            report = evaluate(model, test, method=name, **how)
            report.diagnostics = diagnose(model, train, test)
            found[name].append(report)
            print(f"seed {seed}, {name}: {time.perf_counter() - started:.0f} s", flush=True)
        floor = train_late_fusion(train)
        found["late fusion"].append(evaluate(floor, test, method="late fusion", **how))
    reports = [merge(each) for each in found.values()]
    ours, *others = reports
    print(f"\n{ours.table()}\n\n{compare(reports).table()}\n")
    ours.to_json(settings.out / "metrics.json")
    for other in others:
        other.to_json(settings.out / f"metrics-{other.method.replace(' ', '-')}.json")
    ours.plot(settings.out / "report.png")
    ours.to_html(settings.out / "report.html", others)
    print(f"wrote {settings.out}/report.html, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
