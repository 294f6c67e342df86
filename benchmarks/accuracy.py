"""Accuracy of every method with modalities missing in training and test alike.

python benchmarks/accuracy.py --data digits breast_cancer                  # shipped with sklearn
python benchmarks/accuracy.py --data data/handwritten.npz:1600 data/protein.npz data/protein.npz@250

Data sets are named as in ``feature_sets.py``. Each modality goes with probability ``rate``, one
drawn at random stays if all would go; splits and patterns depend on data, rate and seed alone, so
that all methods see the same. Every method goes through ``mmfusion.recipes.estimator`` with the
same preprocessing, members, epochs, optimiser and hiding; ``late fusion`` and ``mean fill`` by
logistic regression are the floor, their strength chosen by the same folds. "+ shallow" mixes the
estimator's shallow models into a baseline, as they are mixed into CMML.

Every training leaves a report of ``mmfusion.evaluation`` in ``runs/``, whole or not at all: run it
again to go on. From all of them come ``results.csv`` (with the commit that made each), ``table.md``
and ``comparison.txt`` (tests between methods), and a page ``report-<data>.html``.
"""

import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from accuracy_tables import sum_up
from feature_sets import Job, load, name_of, present_rows
from harness import commit
from linear_floor import FLOORS, fit_floor
from rich.progress import Progress
from torch import Tensor

from mmfusion import baselines
from mmfusion.evaluation import MissingnessReport, evaluate
from mmfusion.layers import PresencePool
from mmfusion.recipes.estimator import CMMLClassifier
from mmfusion.recipes.evidence import SHALLOW
from mmfusion.recipes.reporting import versions, write_json

ABLATIONS: dict[str, dict] = {
    "CMML, no discriminants": {"shallow": ("linear", "forest")},
    "CMML, no forests": {"shallow": ("linear", "discriminant")},
    "CMML, no linear models": {"shallow": ("forest", "discriminant")},
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
TRIALS: dict[str, dict] = {  # what the defaults were chosen against
    "CMML, pooled by attention": {"options": {"pool": PresencePool(64)}},
    "CMML, two tokens": {"options": {"num_tokens": 2}},
    "CMML, four blocks": {"options": {"num_blocks": 4}},
    "CMML, width 32": {"dim": 32},
    "CMML, width 128": {"dim": 128},
    "CMML, dropout 0.1": {"dropout": 0.1},
    "CMML, dropout 0.5": {"dropout": 0.5},
    "CMML, no input dropout": {"input_dropout": 0.0},
    "CMML, hiding 0.3": {"hide_rate": 0.3},
    "CMML, learning rate 1e-3": {"learning_rate": 1e-3},
    "CMML, reconstruction x 4": {"options": {"reconstruction_weight": 4.0}},
}
METHODS = ("CMML", *baselines.__all__, *FLOORS)
METRICS = ("auc_macro", "accuracy", "balanced_accuracy", "brier", "ece")


@dataclass
class Settings:
    """What to run."""

    data: tuple[str, ...] = ("digits", "breast_cancer")
    """Data sets; see ``feature_sets.py``."""
    methods: tuple[str, ...] = METHODS
    """Any of the default, a variant of CMML ("CMML, no memory"), or "<baseline> + shallow"."""
    ablations: bool = False
    """Also CMML without each of its parts."""
    trials: bool = False
    """Also CMML with other settings than its defaults."""
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


def fitted(
    job: Job, settings: Settings, inputs: dict, numbers: np.ndarray, present: np.ndarray
) -> tuple[Callable, dict]:
    """The method, trained: from tensors and what is present to log-probabilities; its decisions."""
    if job.method in FLOORS:
        return fit_floor(job, inputs, present, torch.from_numpy(numbers), settings.num_members)
    method, _, mixed = job.method.partition(" + ")
    variants = ABLATIONS | TRIALS
    about = variants.get(method, {"shallow": tuple(SHALLOW)} if mixed else {})
    model = CMMLClassifier(
        "CMML" if method in variants else method,
        epochs=settings.epochs,
        num_members=settings.num_members,
        random_state=job.seed,
        device="cpu",
        progress=False,
        **about,
    ).fit(inputs, numbers, present)

    def answer(inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        return torch.from_numpy(model.predict_proba(inputs, present)).clamp(min=1e-30).log()

    return answer, model.decisions_


def run(job: Job, settings: Settings) -> MissingnessReport:
    """Train one method and score it on the test rows."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=RuntimeWarning)
    views, labels, train, test = load(job.data, job.seed)
    present = present_rows(job, len(labels), len(views))[train]
    inputs = {name: x[train] for name, x in views.items()}
    classes, numbers = np.unique(labels[train], return_inverse=True)
    started = time.perf_counter()
    answer, decisions = fitted(job, settings, inputs, numbers, present)
    report = evaluate(
        answer,
        {
            "inputs": {name: torch.from_numpy(x[test]) for name, x in views.items()},
            "labels": torch.from_numpy(np.searchsorted(classes, labels[test])),
            "sample_ids": torch.from_numpy(test),
        },
        kinds=("per_modality",),
        rates=(job.rate,),
        seeds=(job.seed,),
        metrics=METRICS,
        target="multiclass",
        classes=[str(one) for one in classes],
        method=job.method,
        num_bootstrap=0,
    )
    report.about |= {
        "title": f"{name_of(job.data)}: modalities missing in training and test alike",
        "data": Path(job.data).name,
        "settings": {"epochs": settings.epochs, "num_members": settings.num_members},
        "seconds": round(time.perf_counter() - started, 2),
        "commit": commit(),
        "decisions": decisions,
    }
    return report


def jobs(settings: Settings) -> list[Job]:
    """All of them, a whole seed and rate at a time."""
    variants = (ABLATIONS if settings.ablations else {}) | (TRIALS if settings.trials else {})
    methods = (*settings.methods, *variants)
    return [
        Job(data, rate, seed, method)
        for seed in range(settings.seeds)
        for rate in settings.rates
        for data in settings.data
        for method in methods
    ]


def path_of(job: Job, out: Path) -> Path:
    """Where the report of a training is."""
    method = re.sub(r"\W+", "-", job.method).strip("-")
    return out / "runs" / f"{name_of(job.data)} {method} {job.rate} {job.seed}.json"


def check_alike(job: Job, settings: Settings) -> None:
    """Refuse the report of another training under the same name."""
    path = path_of(job, settings.out)
    before = MissingnessReport.from_json(path).about
    wanted = {"data": Path(job.data).name}
    wanted |= {name: getattr(settings, name) for name in before["settings"]}
    for name, value in (before["settings"] | {"data": before["data"]}).items():
        if value != wanted[name]:
            raise ValueError(
                f"{name}={wanted[name]!r}, and {path} was made with {value!r}: one table is of one "
                "training. Pass another folder, or the value of before."
            )


def results(settings: Settings, left: list[Job]) -> Iterator[tuple[Job, MissingnessReport]]:
    """Each as it comes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        of = {pool.submit(run, job, settings): job for job in left}
        for future in as_completed(of):
            yield of[future], future.result()


def main(settings: Settings) -> None:
    """Run what is not done yet; then sum up."""
    (settings.out / "runs").mkdir(parents=True, exist_ok=True)
    wanted = jobs(settings)
    left = [job for job in wanted if not path_of(job, settings.out).exists()]
    for job in wanted:
        if job not in left:
            check_alike(job, settings)
    with Progress() as bar:
        task = bar.add_task("trainings", total=len(wanted), completed=len(wanted) - len(left))
        for job, report in results(settings, left):
            report.to_json(path_of(job, settings.out))
            bar.advance(task)
    plain = asdict(settings) | {"out": settings.out.name, "data": [*map(name_of, settings.data)]}
    write_json(settings.out / "about.json", {"settings": plain, "versions": versions()})
    print(sum_up(settings.out))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
