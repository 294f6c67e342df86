"""How close guesses come to the hidden truth: CMML and the baselines that synthesise.

python benchmarks/synthesis.py --data digits breast_cancer handwritten.npz:1600@250

Data sets, splits, patterns and training are those of ``accuracy.py``, at one rate. Then each
modality of the test rows is hidden in turn, and the guess for its tokens compared with the tokens
that the model makes of the truth: cosine, and R2 against the mean of the training rows, as
``mmfusion.evaluation.diagnose`` defines them, mean over modalities, members and seeds. Two
references in the same space: the nearest training row, and the mean of training rows of the true
class, which nobody who predicts can know. Tokens are each method's own, so that numbers of two
methods compare how well each fills its own gaps. Writes ``results.csv``, ``table.md`` and
``about.json``.
"""

import csv
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from feature_sets import Job, load, name_of, present_rows
from harness import commit
from rich.progress import track

from mmfusion.evaluation import diagnose
from mmfusion.recipes.checkpoint import write_whole
from mmfusion.recipes.estimator import CMMLClassifier
from mmfusion.recipes.reporting import versions, write_json

METHODS = {
    "CMML": {},
    "CMML, no memory": {"memory": None},
    "CascadeAutoencoder": {},
    "SharedSpecific": {},
    "RetrieveAndFill": {},
}
GUESSES = ("model", "nearest_neighbour", "class_mean")
COLUMNS = (*Job._fields, "guess", "cosine", "r2")


@dataclass
class Settings:
    """What to run."""

    data: tuple[str, ...] = ("digits", "breast_cancer")
    """Data sets; see ``feature_sets.py``."""
    rate: float = 0.5
    """At which each modality is absent in training and test rows."""
    seeds: int = 3
    """Seeds 0, 1, ... of splits, patterns and weights."""
    epochs: int = 60
    """Passes over the training rows."""
    jobs: int = 2
    """Processes, one thread each."""
    out: Path = Path("runs/synthesis")
    """Folder of the results."""


def run(job: Job, epochs: int) -> list[dict]:
    """Train two members of one method, and look at what they guess."""
    torch.set_num_threads(1)
    views, labels, train, test = load(job.data, job.seed)
    present = present_rows(job, len(labels), len(views))
    model = CMMLClassifier(
        job.method.partition(",")[0],
        epochs=epochs,
        num_members=2,
        shallow=(),
        options=METHODS[job.method],
        random_state=job.seed,
        device="cpu",
        progress=False,
    ).fit({name: x[train] for name, x in views.items()}, labels[train], present[train])

    def data(rows: np.ndarray) -> dict:
        tensors = {name: torch.from_numpy(x[rows]) for name, x in views.items()}
        return {
            "inputs": model.scaler_(tensors),
            "present": torch.from_numpy(present[rows]),
            "labels": torch.from_numpy(np.searchsorted(model.classes_, labels[rows])),
            "sample_ids": torch.from_numpy(rows),
        }

    # No id of a test row is that of a training row, which are numbered from 0 in ``fit``.
    before = data(train) | {"sample_ids": torch.arange(len(train))}
    after = data(test) | {"sample_ids": torch.arange(len(train), len(train) + len(test))}
    found = [
        part
        for member in model.members_
        for part in diagnose(member.model, before, after)["synthesis"].values()
    ]
    return [
        job._asdict()
        | {"guess": guess}
        | {
            what: round(float(np.nanmean([value(part, guess, what) for part in found])), 5)
            for what in ("cosine", "r2")
        }
        for guess in GUESSES
    ]


def value(part: dict, guess: str, what: str) -> float:
    """NaN where nothing could be hidden, or nothing varies."""
    found = (part.get(guess) or {}).get(what)
    return np.nan if found is None else found


def table(rows: list[dict]) -> str:
    """R2 and cosine of each method, beside its references."""
    lines = [
        "| data | method | R2 | nearest row | true class's mean | cosine | nearest row | true "
        "class's mean |",
        "|---" * 8 + "|",
    ]
    found: dict[tuple, dict] = {}
    for row in rows:
        cells = found.setdefault((name_of(row["data"]), row["method"]), {})
        for what in ("r2", "cosine"):
            cells.setdefault((what, row["guess"]), []).append(row[what])
    for (data, method), cells in found.items():
        values = [np.mean(cells[what, guess]) for what in ("r2", "cosine") for guess in GUESSES]
        lines.append(f"| {data} | {method} | {' | '.join(f'{x:.3f}' for x in values)} |")
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Run everything, and sum up."""
    settings.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    jobs = [
        Job(data, settings.rate, seed, method)
        for data in settings.data
        for method in METHODS
        for seed in range(settings.seeds)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        each = pool.map(run, jobs, [settings.epochs] * len(jobs))
        rows = [row for found in track(each, "training", total=len(jobs)) for row in found]

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(settings.out / "results.csv", write)
    text = table(rows)
    write_whole(settings.out / "table.md", lambda part: part.write_text(text + "\n"))
    plain = asdict(settings) | {
        "data": [name_of(data) for data in settings.data],
        "out": settings.out.name,
    }
    about = {"settings": plain, "commit": commit(), "versions": versions()}
    write_json(settings.out / "about.json", about)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
