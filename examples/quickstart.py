"""CMML on real clinical data: is a breast mass malignant, and what if tables are missing?

Data: the Wisconsin diagnostic breast cancer set that ships with scikit-learn (569 patients, CC BY
4.0, https://doi.org/10.24432/C5DW2B). Ten measures of the cell nuclei come as their mean, their
standard error and their worst value; the three tables are our modalities.

    python examples/quickstart.py                 # a quarter of a minute on two cores
    python examples/quickstart.py --ablations     # CMML beside itself with each stage removed

It trains on complete rows while hiding modalities at random, then scores every subset of modalities
and three rates of missing ones, and writes `metrics.json`, `table.txt` and `auc.png` to
`runs/quickstart/`. The expected scores, with their spread, are in `docs/quickstart.md`.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import torch
import tyro
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import mmfusion
from mmfusion.missingness import PatternSet, all_patterns, hide

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = ("mean", "error", "worst")
RATES = (0.3, 0.5, 0.7)
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
    """Folder for metrics.json, table.txt and auc.png."""
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


def load(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray, np.ndarray]:
    """Three standardised tables, labels (1 = malignant), and the rows of training and test."""
    data = load_breast_cancer()
    labels = 1 - data.target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels
    )
    scaled = (data.data - data.data[train].mean(0)) / data.data[train].std(0)
    tables = torch.tensor(scaled, dtype=torch.float32).split(10, dim=1)
    return dict(zip(NAMES, tables, strict=True)), torch.tensor(labels), train, test


def train_cmml(settings: Settings, seed: int, inputs, labels, train, **stages) -> mmfusion.CMML:
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
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = settings.epochs * -(-len(train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    for _ in range(settings.epochs):
        for rows in torch.tensor(train)[torch.randperm(len(train))].split(64):
            present = torch.ones(len(rows), len(NAMES), dtype=torch.bool)
            out = model(
                {name: table[rows] for name, table in inputs.items()},
                present=present,
                visible=hide(present, settings.hide_rate),
                labels=labels[rows],
                sample_ids=rows,
            )
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def train_late_fusion(inputs, labels, train):
    """The honest floor: one logistic regression per modality, log-odds summed."""
    odds = []
    share = labels[train].double().mean()
    prior = (share / (1 - share)).log().item()
    for table in inputs.values():
        fitted = LogisticRegression(C=0.05, max_iter=1000).fit(table[train], labels[train])
        odds.append(fitted.decision_function(table) - prior)
    evidence = torch.tensor(np.stack(odds, axis=1), dtype=torch.float32)
    return lambda rows, present: (evidence[rows] * present).sum(1)


def cmml_scores(model: mmfusion.CMML, inputs):
    """The same interface: scores of these rows under these patterns."""

    @torch.inference_mode()
    def score(rows, present):
        return model({n: table[rows] for n, table in inputs.items()}, present=present).logits[:, 0]

    return score


def evaluate(score, labels, test, seed: int) -> dict[str, float]:
    """AUC of every subset, and of every rate under test patterns all methods share."""
    auc = {}
    for pattern in all_patterns(len(NAMES)):
        key = " + ".join(name for name, seen in zip(NAMES, pattern, strict=True) if seen)
        present = pattern.expand(len(test), -1)
        auc[key] = float(roc_auc_score(labels[test], score(test, present)))
    for rate in RATES:
        patterns = test_patterns(len(test), rate, seed)
        auc[f"rate {rate}"] = float(roc_auc_score(labels[test], score(test, patterns.present)))
    return auc


def test_patterns(num_samples: int, rate: float, seed: int) -> PatternSet:
    """Each modality gone independently with this rate, one always kept."""
    rates = [rate] * len(NAMES)
    return PatternSet.draw("per_modality", num_samples, NAMES, rates, seed=seed, split="test")


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Methods in columns, mean and standard deviation over seeds."""
    width = max(14, *(len(method) + 2 for method in results))
    lines = [f"{'AUC, mean (sd)':24}" + "".join(f"{method:>{width}}" for method in results)]
    for key in next(iter(results.values()))[0]:
        cells = ""
        for runs in results.values():
            values = np.array([run[key] for run in runs])
            cells += f"{f'{values.mean():.3f} ({values.std():.3f})':>{width}}"
        lines.append(f"{key:24}{cells}")
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Left: every subset. Right: the rates, with the complete sample at rate 0."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    subsets = [key for key in next(iter(results.values()))[0] if not key.startswith("rate")]
    complete = " + ".join(NAMES)
    subsets.sort(key=lambda key: (key.count("+"), key))
    for offset, (method, runs) in enumerate(results.items()):
        place = np.arange(len(subsets)) + 0.12 * (offset - (len(results) - 1) / 2)
        values = np.array([[run[key] for key in subsets] for run in runs])
        left.errorbar(values.mean(0), place, xerr=values.std(0), fmt="o", capsize=2, label=method)
        keys = [complete, *(f"rate {rate}" for rate in RATES)]
        values = np.array([[run[key] for key in keys] for run in runs])
        right.errorbar(
            [0, *RATES], values.mean(0), values.std(0), fmt="o-", capsize=2, label=method
        )
    left.set(yticks=range(len(subsets)), yticklabels=subsets, xlabel="AUC", title="What is present")
    left.invert_yaxis()
    right.set(xlabel="rate at which each modality is absent", ylabel="AUC", title="Random absence")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(path: Path, save) -> None:
    """Whole or not at all: under another name first."""
    part = path.with_name(f"part-{path.name}")
    save(part)
    os.replace(part, path)


def main(settings: Settings) -> None:
    """Train, evaluate, print and write."""
    settings.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    methods = {"CMML": {}, **(ABLATIONS if settings.ablations else {})}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (*methods, "late fusion")}
    realised = {}
    for seed in range(settings.seeds):
        inputs, labels, train, test = load(seed)
        for name, stages in methods.items():
            model = train_cmml(settings, seed, inputs, labels, train, **stages)
            results[name].append(evaluate(cmml_scores(model, inputs), labels, test, seed))
            print(
                f"seed {seed}, {name}: trained, {time.perf_counter() - started:.0f} s", flush=True
            )
        floor = train_late_fusion(inputs, labels, train)
        results["late fusion"].append(evaluate(floor, labels, test, seed))
        for rate in RATES:
            patterns = test_patterns(len(test), rate, seed)
            realised[f"rate {rate}, seed {seed}"] = {**patterns.realised(), "sha256": patterns.hash}
    lines = [table(results), ""]
    for rate in RATES:
        drawn = [realised[f"rate {rate}, seed {seed}"] for seed in range(settings.seeds)]
        slot, sample = (np.mean([d[kind] for d in drawn]) for kind in ("slot_rate", "sample_rate"))
        lines.append(f"rate {rate}: realised slot rate {slot:.3f}, sample rate {sample:.3f}")
    text = "\n".join(lines)
    print(f"\n{text}\n")
    metrics = {
        "data": "Wisconsin diagnostic breast cancer (scikit-learn)",
        "settings": {**asdict(settings), "out": str(settings.out)},
        "auc": results,
        "patterns": realised,
        "versions": {
            "mmfusion": mmfusion.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    write(settings.out / "metrics.json", lambda p: p.write_text(json.dumps(metrics, indent=1)))
    write(settings.out / "table.txt", lambda path: path.write_text(text + "\n"))
    write(settings.out / "auc.png", lambda path: plot(results, path))
    print(f"wrote metrics.json, table.txt and auc.png to {settings.out}, {metrics['seconds']} s")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
