"""Accuracy of every method with modalities missing in training and test alike.

python benchmarks/accuracy.py --data digits breast_cancer                  # shipped with sklearn
python benchmarks/accuracy.py --data data/handwritten.npz:1600 data/protein.npz data/protein.npz@250

A data set is ``digits``, ``breast_cancer``, or an .npz with ``y`` and one array per modality, rows
aligned. ``:1600`` takes the first 1600 rows for training, else 70 % at random, stratified;
``@250`` keeps 250 of the training rows. Each modality goes with probability ``rate``, one drawn at
random stays if all would go; splits and patterns depend on data and seed alone, so that all methods
see the same. Every method goes through ``mmfusion.recipes.estimator`` with the same preprocessing,
members, epochs, optimiser and hiding; ``late fusion`` and ``mean fill`` by logistic regression are
the floor, their strength chosen by the same folds. "+ shallow" mixes the estimator's linear models
and forests into a baseline, as they are mixed into CMML.

Results go to ``results.csv`` one by one, each with the commit that made it: run it again to go on.
``table.md`` sums them up, ``about.json`` says the settings.
"""

import csv
import json
import multiprocessing
import os
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from harness import commit
from rich.progress import Progress
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor

from mmfusion import baselines
from mmfusion.losses import task_loss
from mmfusion.missingness import per_modality
from mmfusion.presence import normalise
from mmfusion.recipes.checkpoint import write_whole
from mmfusion.recipes.crossfit import Features, Rows, folds
from mmfusion.recipes.estimator import CMMLClassifier
from mmfusion.recipes.evidence import SHALLOW, LinearEvidence
from mmfusion.recipes.features import FeatureScaler
from mmfusion.recipes.reporting import versions, write_json

FLOORS = ("late fusion (LR)", "mean fill (LR)")
ABLATIONS: dict[str, dict] = {
    "CMML, no forests": {"shallow": ("linear",)},
    "CMML, no linear models": {"shallow": ("forest",)},
    "CMML, networks alone": {"shallow": ()},
    "CMML, fused vector alone": {"shallow": (), "options": {"evidence": None}},
    "CMML, no cascade": {"options": {"crta": None}},
    "CMML, one block": {"options": {"num_blocks": 1}},
    "CMML, no memory": {"options": {"memory": None}},
    "CMML, no alignment": {"options": {"alignment": None}},
    "CMML, no contrast": {"options": {"contrastive_weight": 0.0}},
    "CMML, one context token": {"options": {"num_context": 1}},
    "CMML, no hiding": {"hide_rate": 0.0},
}
METHODS = ("CMML", *baselines.__all__, *FLOORS)


@dataclass
class Settings:
    """What to run."""

    data: tuple[str, ...] = ("digits", "breast_cancer")
    """Data sets; see above."""
    methods: tuple[str, ...] = METHODS
    """Any of the default, of the ablations ("CMML, no memory"), or "<baseline> + shallow"."""
    ablations: bool = False
    """Also every ablation of CMML."""
    rates: tuple[float, ...] = (0.3, 0.5, 0.7)
    """At which each modality is absent."""
    seeds: int = 3
    """Seeds 0, 1, ... of splits, patterns and weights."""
    epochs: int = 60
    """Passes over the training rows, for every method."""
    num_members: int = 5
    """Models in every ensemble."""
    jobs: int = 2
    """Processes, one thread each."""
    out: Path = Path("runs/accuracy")
    """Folder of the results."""


class Job(NamedTuple):
    """One training; the columns that identify a row of results.csv."""

    data: str
    rate: float
    seed: int
    method: str


COLUMNS = (*Job._fields, "auc", "accuracy", "log_loss", "seconds", "commit", "decisions")


def load(data: str, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Modalities, labels, and the numbers of training and test rows."""
    source, _, keep = data.partition("@")
    source, _, first = source.partition(":")
    if source == "digits":
        found = load_digits()
        quarters = found.images.reshape(-1, 2, 4, 2, 4).transpose(1, 3, 0, 2, 4).reshape(4, -1, 16)
        views = dict(
            zip(("upper left", "upper right", "lower left", "lower right"), quarters, strict=True)
        )
        labels = found.target
    elif source == "breast_cancer":
        found = load_breast_cancer()
        views = dict(zip(("mean", "error", "worst"), np.split(found.data, 3, axis=1), strict=True))
        labels = found.target
    else:
        with np.load(source) as file:
            views = {name: file[name] for name in file.files if name != "y"}
            labels = file["y"]
    rows = np.arange(len(labels))
    if first:
        train, test = np.split(rows, [int(first)])
    else:
        train, test = train_test_split(rows, test_size=0.3, random_state=seed, stratify=labels)
    if keep:
        train, _ = train_test_split(
            train, train_size=int(keep), random_state=seed, stratify=labels[train]
        )
    return views, labels, train, test


def taken(job: Job, views: dict, num_rows: int, *parts: np.ndarray) -> list[tuple]:
    """Modalities and what is present of them, for each of the parts."""
    number = zlib.crc32(f"{Path(job.data).name} {job.rate} {job.seed}".encode())
    present = per_modality(
        num_rows, [job.rate] * len(views), Generator().manual_seed(number)
    ).numpy()
    return [
        ({name: x[rows].astype(np.float32) for name, x in views.items()}, present[rows])
        for rows in parts
    ]


def run(job: Job, settings: Settings) -> dict:
    """Train one method and score it on the test rows."""
    torch.set_num_threads(1)
    views, labels, train, test = load(job.data, job.seed)
    (inputs, present), (test_inputs, test_present) = taken(job, views, len(labels), train, test)
    started = time.perf_counter()
    if job.method in FLOORS:
        probabilities, decisions = floor(
            job, inputs, present, labels[train], test_inputs, test_present, settings
        )
    else:
        method, _, mixed = job.method.partition(" + ")
        about = ABLATIONS.get(method, {"shallow": tuple(SHALLOW)} if mixed else {})
        model = CMMLClassifier(
            "CMML" if method in ABLATIONS else method,
            epochs=settings.epochs,
            num_members=settings.num_members,
            random_state=job.seed,
            device="cpu",
            progress=False,
            **about,
        ).fit(inputs, labels[train], present)
        probabilities = model.predict_proba(test_inputs, test_present)
        decisions = model.decisions_
    return (
        job._asdict()
        | scores(probabilities, labels[test], np.unique(labels[train]))
        | {
            "seconds": round(time.perf_counter() - started, 2),
            "commit": commit(),
            "decisions": json.dumps(decisions),
        }
    )


def floor(job, inputs, present, labels, test_inputs, test_present, settings):
    """Logistic regression: per modality and summed, or on everything with means filled in."""
    names = tuple(inputs)
    tensors, seen = normalise(
        {name: torch.from_numpy(x) for name, x in inputs.items()}, names, torch.from_numpy(present)
    )
    test, test_seen = normalise(
        {name: torch.from_numpy(x) for name, x in test_inputs.items()},
        names,
        torch.from_numpy(test_present),
    )
    scaler = FeatureScaler({name: x.shape[1] for name, x in tensors.items()}, 64).fit(tensors, seen)
    classes, numbers = np.unique(labels, return_inverse=True)
    numbers = torch.from_numpy(numbers)

    def prepared(tensors: dict[str, Tensor], seen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scaled = scaler(tensors)
        if job.method == FLOORS[0]:
            return scaled, seen
        filled = [torch.where(seen[:, m, None], x, 0) for m, x in enumerate(scaled.values())]
        return {"all": torch.cat(filled, dim=1)}, torch.ones(len(seen), 1, dtype=torch.bool)

    scaled, seen = prepared(tensors, seen)
    rows = Rows(Features(scaled, scaled), seen, numbers)
    made = LinearEvidence({n: x.shape[1] for n, x in scaled.items()}, len(classes), "multiclass")
    losses = dict.fromkeys(made.SETTINGS, 0.0)
    for kept, held in folds(rows, settings.num_members, "multiclass", job.seed):
        for strength in made.SETTINGS:
            part, left = rows[kept], rows[held]
            found = made.fit(part.inputs.scaled, part.present, part.labels, strength)
            loss = task_loss(found(left.inputs.scaled, left.present), left.labels, "multiclass")
            losses[strength] += float(loss) * len(held)
    best = min(losses, key=losses.__getitem__)
    made.fit(scaled, rows.present, rows.labels, best)
    probabilities = made(*prepared(test, test_seen)).softmax(1)
    return probabilities.double().numpy(), {"linear_strength": best}


def scores(probabilities: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> dict:
    """Macro one-vs-rest AUC over the classes of the test rows, accuracy and log-loss."""
    auc = [
        roc_auc_score(labels == known, probabilities[:, column])
        for column, known in enumerate(classes)
        if (labels == known).any()
    ]
    whole = probabilities / probabilities.sum(1, keepdims=True)  # to the last bit
    return {
        "auc": round(float(np.mean(auc)), 5),
        "accuracy": round(float((classes[probabilities.argmax(1)] == labels).mean()), 5),
        "log_loss": round(float(log_loss(labels, whole, labels=classes)), 5),
    }


def jobs(settings: Settings) -> list[Job]:
    """All of them, a whole seed and rate at a time."""
    methods = (*settings.methods, *(ABLATIONS if settings.ablations else ()))
    return [
        Job(data, rate, seed, method)
        for seed in range(settings.seeds)
        for rate in settings.rates
        for data in settings.data
        for method in methods
    ]


def done(path: Path) -> list[dict]:
    """Rows of an earlier run; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if _whole(row)]


def _whole(row: dict) -> bool:
    try:
        return bool(json.loads(row["decisions"]))
    except (TypeError, ValueError):  # the column is lacking, or cut
        return False


def name_of(data: str) -> str:
    """Without folder, suffix and split rule: ``protein@250``."""
    source, _, keep = data.partition("@")
    return Path(source.partition(":")[0]).stem + (f"@{keep}" if keep else "")


def table(rows: list[dict]) -> str:
    """AUC in points, mean over seeds and rates of each data set and over data sets, best first."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(name_of(row["data"]), []).append(
            100 * float(row["auc"])
        )
    sets = list(dict.fromkeys(name_of(row["data"]) for row in rows))
    whole = max(len(values) for each in found.values() for values in each.values())
    complete = {m: e for m, e in found.items() if all(len(e.get(s, ())) == whole for s in sets)}
    mean = {m: [float(np.mean(e[s])) for s in sets] for m, e in complete.items()}
    lines = [f"| method | {' | '.join(sets)} | mean |", "|---" * (len(sets) + 2) + "|"]
    for method in sorted(mean, key=lambda m: -np.mean(mean[m])):
        cells = " | ".join(f"{value:.2f}" for value in (*mean[method], np.mean(mean[method])))
        lines.append(f"| {method} | {cells} |")
    others = [values for method, values in mean.items() if not method.startswith("CMML")]
    if "CMML" in mean and others:
        against = {
            "best other of each set": np.max(others, axis=0),
            "best other on average": max(others, key=np.mean),
        }
        for what, values in against.items():
            gain = np.subtract(mean["CMML"], values)
            cells = " | ".join(f"{value:+.2f}" for value in (*gain, gain.mean()))
            lines.append(f"| CMML minus {what} | {cells} |")
    lines.append(f"\nMacro one-vs-rest AUC x 100; runs (seeds x rates) per data set: {whole}.")
    return "\n".join(lines)


def results(settings: Settings, left: list[Job]) -> Iterator[dict]:
    """Each as it comes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(run, job, settings) for job in left]):
            yield future.result()


def main(settings: Settings) -> None:
    """Run what is not done yet; then sum up."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path, about = settings.out / "results.csv", settings.out / "about.json"
    plain = asdict(settings) | {"out": settings.out.name}
    plain["data"] = [name_of(data) for data in settings.data]
    if about.exists():
        before = json.loads(about.read_text())["settings"]
        for name in ("epochs", "num_members"):
            if before[name] != plain[name]:
                raise ValueError(
                    f"{name}={plain[name]}, and {about} was made with {before[name]}: one table is "
                    "of one training. Pass another folder, or the value of before."
                )
    rows = done(path)
    known = {Job(r["data"], float(r["rate"]), int(r["seed"]), r["method"]) for r in rows}
    wanted = jobs(settings)
    left = [job for job in wanted if job not in known]

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)
    write_json(about, {"settings": plain, "versions": versions()})
    with path.open("a", newline="") as file, Progress() as bar:
        task = bar.add_task("trainings", total=len(wanted), completed=len(wanted) - len(left))
        for row in results(settings, left):
            rows.append(row)
            csv.DictWriter(file, COLUMNS).writerow(row)
            file.flush()
            bar.advance(task)
    text = table(rows)
    write_whole(settings.out / "table.md", lambda part: part.write_text(text + "\n"))
    print(text)


if __name__ == "__main__":
    warnings.filterwarnings("error", category=RuntimeWarning)
    main(tyro.cli(Settings, description=__doc__))
