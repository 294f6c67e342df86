"""Score models under missing modalities, and join what was scored apart."""

import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfusion.evaluation.forward import Cases, Data, Gather, collect, logits
from mmfusion.evaluation.metrics import METRICS, known_labels, table
from mmfusion.evaluation.plan import FIXED, cannot, plan, subset_note
from mmfusion.evaluation.report import Condition, MissingnessReport, Scores
from mmfusion.evaluation.scores import Classes, calibrate, check_metrics, flat, score, youden
from mmfusion.evaluation.statistics import bootstrap
from mmfusion.losses import IGNORE
from mmfusion.missingness import PatternSet

__all__ = ["evaluate", "merge"]

DEFAULTS = {
    "multiclass": ("auc_macro", "balanced_accuracy", "f1_macro", "ece"),
    "multilabel": ("auc_macro", "auprc_macro", "f1_macro", "ece"),
    "binary": ("auc_macro", "sensitivity", "specificity", "ece"),
    "regression": ("r2", "mae", "rmse", "spearman"),
}


def evaluate(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    data: Data,
    *,
    kinds: Sequence[str] = ("subset", "per_modality"),
    rates: Sequence[float] = (0.0, 0.3, 0.5, 0.7),
    metrics: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    target: str | None = None,
    classes: Classes | None = None,
    validation: Data | None = None,
    train_rate: float | None = None,
    method: str | None = None,
    num_bootstrap: int = 200,
    gather: Gather | None = None,
    about: Mapping[str, Any] | None = None,
) -> MissingnessReport:
    """Score a model under missing modalities: every subset, rates, or what else ``kinds`` lists.

    What a pattern hides is zeroed, so that no model can peek. A subset is scored on the cases that
    have all of it, everything else on the cases of which something is left; cases without a label
    are left out. A seed gives every model the same patterns. The data are read twice.

    - ``"subset"``: all ``2^M - 1`` patterns; above 128 only single modalities, all but one, and all
    - ``"per_modality"``, ``"sample_rate"``, ``"slot_rate"``: the draws of ``missingness`` at every
      one of ``rates``; at 0 a case keeps what it has
    - ``"always_missing"``: one modality removed from every case
    - ``"not_at_random"``: every other modality goes at the rate, which ones depends on the label
      (its parity, or its half of a regression's range); and the reverse

    Args:
        model: Called as ``model(inputs, present=present)``, it returns logits or an output with
            ``logits``; or a sequence of them, one per seed. Modules run in eval mode, and get their
            mode back. The modalities are ``model.names``, else the keys of the inputs.
        data: ``{"inputs": {name: tensor or None}, "labels": ...}``, with ``present`` and
            ``sample_ids`` if there are any; or batches of that form, in the same order whenever
            iterated, such as a ``DataLoader`` that does not shuffle. The model gets no ids, so pass
            cases that it was not trained on.
        kinds: What to score.
        rates: Nominal rates. One that a kind cannot have is left out, and the report says so.
        metrics: Names of metrics, the main one first; by default four that suit the target.
        seeds: Seeds of the patterns; by default 0, 1, ... for as many models. With several seeds
            for one model its patterns are drawn anew, and those without chance scored once.
        target: As for ``CMML``; None takes ``model.target``.
        classes: Names of classes, labels or outputs; of no and yes for ``"binary"``. A mapping of
            task to classes scores several multiclass tasks side by side and averages over them.
        validation: Data to choose the threshold of a ``"binary"`` target on; without, it is 0.5.
        train_rate: The rate the model was trained at; ``merge`` joins reports of several.
        method: Name of the model in the report; None takes that of its class.
        num_bootstrap: Resamples behind each interval.
        gather: For several processes that each hold a consecutive part of the data: joins lists
            over processes, as ``accelerate.utils.gather_object`` does. All of them get the report.
        about: Plain data for the report, such as ``title`` and ``synthetic``.

    Raises:
        ValueError: If an argument is unknown or does not fit, the target cannot be told, the data
            hold no labels, or their order changes.

    Example:
        >>> import mmfusion
        >>> model = mmfusion.CMML({"clinic": 4, "derm": 3}, num_classes=2, dim=8)
        >>> inputs = {"clinic": torch.randn(20, 4), "derm": torch.randn(20, 3)}
        >>> report = evaluate(model, {"inputs": inputs, "labels": torch.arange(20) % 2})
        >>> [condition.name for condition in report.conditions()]
        ['clinic', 'derm', 'clinic + derm', 'rate 0.0', 'rate 0.3', 'rate 0.5', 'rate 0.7']
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    seeds = list(range(len(models)) if seeds is None else seeds)
    target, metrics = _check(models, seeds, target, metrics, validation)
    if num_bootstrap < 0:
        raise ValueError(
            f"num_bootstrap={num_bootstrap}: it is a number of resamples. Pass 0 for no interval."
        )
    cases = collect(data, getattr(models[0], "names", None), gather)
    cause = _cause(cases.labels, target)
    planned = [
        (index if len(models) > 1 else 0, seed, condition, patterns)
        for index, seed in enumerate(seeds)
        for condition, patterns in plan(kinds, rates, seed, cases.names, cause, train_rate)
        if index < len(models) or condition.kind not in FIXED
    ]
    if not planned:
        raise ValueError(
            f"kinds={kinds!r} with rates={rates!r} and the modalities {cases.names}: they have no "
            "pattern. Add 'subset' to kinds, or other rates."
        )
    wanted = [(which, cases.present & patterns.present) for which, _, _, patterns in planned]
    answers = logits(models, data, cases, wanted, gather)
    named = _named(classes, target, answers[0].shape[1])
    scorer = _Scorer(cases, metrics, target, named, num_bootstrap)
    thresholds = [0.5] * len(models)
    if validation is not None:
        held = collect(validation, cases.names, gather)
        everything = [(which, held.present) for which in range(len(models))]
        answered = logits(models, validation, held, everything, gather)
        thresholds = [youden(scorer.probabilities(one), held.labels) for one in answered]
    scores = [
        scorer(condition, seed, patterns, answer, thresholds[which], seeds[which])
        for (which, seed, condition, patterns), answer in zip(planned, answers, strict=True)
    ]
    left_out = [cannot(kind, rate, len(cases.names)) for kind in kinds for rate in rates]
    told: dict[str, Any] = {
        "versions": {
            "mmfusion": sys.modules["mmfusion"].__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "num_bootstrap": num_bootstrap,
        "notes": [*filter(None, left_out), *subset_note(kinds, len(cases.names))],
    }
    if isinstance(named, Mapping):
        told["tasks"] = {task: list(of) for task, of in named.items()}
    return MissingnessReport(
        method=method or str(getattr(models[0], "__name__", type(models[0]).__name__)),
        names=cases.names,
        classes=flat(named),
        target=target,
        metrics=metrics,
        scores=scores,
        about=told | dict(about or {}),
    )


def merge(reports: Sequence[MissingnessReport]) -> MissingnessReport:
    """Join reports of one method: of other seeds, or of models trained at other rates.

    Raises:
        ValueError: If they differ in method, modalities, classes, target or metrics, or share a
            condition and seed.

    Example:
        >>> def model(inputs, present):
        ...     return inputs["a"]
        >>> data = {"inputs": {"a": torch.eye(3)}, "labels": torch.arange(3)}
        >>> reports = [
        ...     evaluate(model, data, target="multiclass", rates=(0.0,), train_rate=rate)
        ...     for rate in (0.0, 0.5)
        ... ]
        >>> [condition.train_rate for condition in merge(reports).conditions("per_modality")]
        [0.0, 0.5]
    """
    if not reports:
        raise ValueError("reports=[]: there is nothing to join. Pass one report or more.")
    first = reports[0]
    for place, report in enumerate(reports):
        for name in ("method", "names", "classes", "target", "metrics"):
            if getattr(report, name) != getattr(first, name):
                raise ValueError(
                    f"reports[{place}].{name} is {getattr(report, name)!r}, reports[0] has "
                    f"{getattr(first, name)!r}: reports of one method are joined. Use compare for "
                    "several methods, or evaluate with the same arguments."
                )
    scores = [one for report in reports for one in report.scores]
    counts = Counter((one.condition, one.seed) for one in scores)
    if twice := [f"{where.name}, seed {seed}" for (where, seed), n in counts.items() if n > 1]:
        raise ValueError(
            f"{twice[0]} is in several reports: a condition has one entry a seed. Evaluate with "
            "seeds or train_rate of their own."
        )
    about = {key: value for report in reversed(reports) for key, value in report.about.items()}
    diagnostics = {k: v for report in reversed(reports) for k, v in report.diagnostics.items()}
    return replace(first, scores=scores, about=about, diagnostics=diagnostics)


@dataclass(frozen=True)
class _Scorer:
    """Turns logits of all cases into the scores of one condition."""

    cases: Cases
    metrics: tuple[str, ...]
    target: str
    classes: Classes
    num_bootstrap: int

    def __call__(
        self,
        condition: Condition,
        seed: int,
        patterns: PatternSet,
        answer: np.ndarray,
        threshold: float,
        model: int,
    ) -> Scores:
        cases, drawn = self.cases, patterns.present
        seen = cases.present & drawn
        taken = (seen == drawn).all(1) if condition.kind == "subset" else seen.any(1)
        known = known_labels(cases.labels, self.target)
        rows = taken.numpy() & table(known).any(1)
        labels, absent = cases.labels[rows], ~seen.numpy()[rows]
        chances = self.probabilities(answer[rows])
        asked = (self.metrics, self.target, self.classes)
        values, undefined = score(chances, labels, *asked, threshold)
        intervals, dropped = bootstrap(
            chances,
            labels,
            *asked,
            threshold=threshold,
            ids=cases.ids[rows],
            num_resamples=self.num_bootstrap,
        )
        kept = labels.astype(np.float64)
        if self.target != "regression":
            kept = np.where(known[rows], labels, IGNORE).astype(np.int64)
        return Scores(
            condition=condition,
            seed=seed,
            cases=len(labels),
            values=values,
            intervals=intervals,
            undefined=undefined,
            realised={
                "sample_rate": float(absent.any(1).mean()) if len(absent) else math.nan,
                "slot_rate": float(absent.mean()) if len(absent) else math.nan,
            },
            sha256=patterns.hash,
            calibration=calibrate(chances, labels, self.target, self.classes),
            probabilities=chances,
            labels=kept,
            case_ids=cases.ids[rows],
            dropped=dropped,
            threshold=threshold,
            model=model,
        )

    def probabilities(self, answer: np.ndarray) -> np.ndarray:
        """What the logits mean, float32, a softmax for each task; predictions as they are."""
        found = torch.from_numpy(answer)
        if self.target == "regression":
            return answer
        if self.target in ("binary", "multilabel"):
            found = found.sigmoid()
        elif self.target == "multiclass":
            sizes = [len(self.classes)]
            if isinstance(self.classes, Mapping):
                sizes = [len(of) for of in self.classes.values()]
            found = torch.cat([block.softmax(1) for block in found.split(sizes, 1)], 1)
        return found.float().numpy()


def _check(
    models: Sequence[Any],
    seeds: Sequence[int],
    target: str | None,
    metrics: Sequence[str] | None,
    validation: Data | None,
) -> tuple[str, tuple[str, ...]]:
    """The target and the metrics; refuses what does not fit."""
    if not seeds or len(models) not in (1, len(seeds)) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{len(models)} models with seeds={seeds}: each model has a seed of its own, and a "
            "sole model one or more. Pass as many different seeds as models."
        )
    target = target or getattr(models[0], "target", None)
    if target is None:
        raise ValueError(
            "target=None with a model that has no attribute target: it says what logits mean. Pass "
            f"target as one of {', '.join(METRICS)}."
        )
    metrics = tuple(DEFAULTS.get(target, ("",)) if metrics is None else metrics)
    check_metrics(metrics, target)
    if validation is not None and target != "binary":
        raise ValueError(
            f"validation with target={target!r}: a threshold is chosen for binary targets alone. "
            "Leave it out."
        )
    return target, metrics


def _named(classes: Classes | None, target: str, width: int) -> Classes:
    """The classes as tuples, numbered if they have no names."""
    if classes is None:
        classes = ("no", "yes") if target == "binary" else tuple(map(str, range(width)))
    named: Classes = tuple(classes)
    if isinstance(classes, Mapping):
        named = {task: tuple(of) for task, of in classes.items()}
        if len(named) == 1:
            [named] = named.values()
    count = len(flat(named))
    fits = (count, width) == (2, 1) if target == "binary" else count == width
    if not fits or (isinstance(named, Mapping) and target != "multiclass"):
        raise ValueError(
            f"classes={classes!r} with target={target!r} and {width} logits: each logit has a name "
            "(of a class, label or output), the one of a binary target two, and only multiclass "
            "tasks are a mapping. Pass as many, or another target."
        )
    return named


def _cause(labels: np.ndarray, target: str) -> Tensor:
    """What absence depends on if it does: the class, the first label that holds, or the value."""
    cells = table(np.where(known_labels(labels, target), labels, 0))
    if target == "regression":
        return torch.from_numpy(cells.mean(1))
    return torch.from_numpy(cells.argmax(1) if target == "multilabel" else cells[:, 0]).long()
