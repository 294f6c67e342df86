"""What a script does once it has data and a model: train, evaluate, write; or predict."""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from mmfusion.evaluation import diagnose, evaluate
from mmfusion.presence import collate
from mmfusion.recipes import reporting
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.predict import Member, predict
from mmfusion.recipes.reading import Patients
from mmfusion.recipes.restoring import take_best
from mmfusion.recipes.training import fit


def run(
    model: nn.Module,
    data: Mapping[str, Any],
    plan: Plan,
    folder: Path,
    about: Mapping[str, Any],
    *,
    metrics: Sequence[str] | None = None,
    classes: Tensor | None = None,
    resume: bool = False,
) -> None:
    """Train with the epoch selected on ``valid``, look at ``test`` once, and write all there is.

    The epoch is selected by the first metric on validation cases, every subset of modalities in one
    ranking. Over several ranks each calls it; the main one writes ``report.html``, ``report.png``,
    ``metrics.json`` and ``history.json``, and the process group ends here.

    Args:
        model: As ``training.fit`` takes it.
        data: ``train``, ``valid`` and ``test``: data sets with ``names``, ``shapes`` and
            ``class_names``.
        plan: How to train.
        folder: For what is written, checkpoints in a folder of their own.
        about: Of the report: ``title``, ``synthetic`` and what else it is to say.
        metrics: See ``evaluate``; None takes those of the target.
        classes: Class of each training sample, to draw all classes equally often.
        resume: Go on with a run that was stopped.

    Example:
        >>> import contextlib, io, mmfusion, tempfile, torch
        >>> class Cases(list):
        ...     names, shapes, class_names = ("lab",), {"lab": (2,)}, ("no", "yes")
        >>> rows = [{"inputs": {"lab": torch.randn(2)}, "labels": i % 2} for i in range(12)]
        >>> cases = Cases(row | {"sample_ids": i} for i, row in enumerate(rows))
        >>> model = mmfusion.CMML({"lab": 2}, num_classes=2, dim=8)
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ...     splits = dict.fromkeys(("train", "valid", "test"), cases)
        ...     run(model, splits, Plan(epochs=1), Path(folder), {"title": "CMML"})
        ...     written = Path(folder, "report.html").exists()
        >>> written
        True
    """
    started, state = time.perf_counter(), join_processes()
    train, valid, test = (data[name] for name in ("train", "valid", "test"))
    join = functools.partial(collate, names=train.names, shapes=train.shapes)
    score_on = functools.partial(evaluate, metrics=metrics, gather=gather_object)

    def validation_score(model: nn.Module) -> float:
        found = score_on(model, reporting.in_order(valid, join), kinds=["subset"], num_bootstrap=0)
        return reporting.pooled(found)

    history = fit(
        model,
        train,
        validation_score,
        plan,
        folder / "checkpoints",
        collate=join,
        classes=classes,
        resume=resume,
        track=True,
    )
    report = score_on(
        model,
        reporting.in_order(test, join),
        seeds=[plan.seed],
        classes=test.class_names,
        about=about,
    )
    state.destroy_process_group()
    if not state.is_main_process:
        return
    both = [reporting.in_order(cases, join, all_ranks=True) for cases in (train, test)]
    report.diagnostics = diagnose(model, *both)
    reporting.write_reports([report], folder)
    seconds = round(time.perf_counter() - started, 1)
    reporting.write_json(folder / "history.json", {"epochs": history, "seconds": seconds})
    print(f"\n{about['title']}\n{report.table()}\n")
    print(f"wrote {folder}/report.html and metrics.json after {seconds} s of training and scoring")


def predict_new(model: nn.Module, patients: Patients, out: Path, checkpoints: str = "") -> None:
    """Predict new patients with what a run selected, into ``predictions.csv`` beside its report.

    Args:
        model: Built as the run's.
        patients: As the run read its own.
        out: The folder of the run.
        checkpoints: Folder below ``out/checkpoints``.
    """
    path = out / "predictions.csv"
    found = predict([Member(take_best(model, out / "checkpoints" / checkpoints), patients)], path)
    if patients.reading.is_synthetic:
        print("SYNTHETIC: the model was trained on drawn data, its predictions mean nothing")
    print(
        f"wrote {path}: {found.patients} patients, {found.new} of them now, "
        f"{found.errors} of these with an error, which their row tells"
    )
