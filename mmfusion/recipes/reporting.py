"""What the examples share around ``mmfusion.evaluation``: batches in order, and what is written."""

import importlib.metadata
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Subset

from mmfusion.evaluation import MissingnessReport, score
from mmfusion.missingness import PatternSet
from mmfusion.recipes.checkpoint import write_whole
from mmfusion.recipes.launch import join_processes

Collate = Callable[[Sequence[Any]], dict[str, Any]]


def in_order(
    data: Dataset[Any], collate: Collate, batch_size: int = 64, *, all_ranks: bool = False
) -> DataLoader[Any]:
    """Batches for ``evaluate``; over several ranks, of the consecutive part that is this one's.

    Args:
        data: Items as ``collate`` takes them.
        collate: Items to a batch of ``inputs``, ``present`` and ``labels``.
        batch_size: Samples at a time.
        all_ranks: Take the parts of all ranks, for what one rank does alone.

    Example:
        >>> [len(batch) for batch in in_order(range(5), list, batch_size=2)]
        [2, 2, 1]
    """
    state, rows = join_processes(), torch.arange(len(data))  # type: ignore[arg-type]
    mine = rows if all_ranks else rows.tensor_split(state.num_processes)[state.process_index]
    return DataLoader(
        Subset(data, mine.tolist()),
        batch_size=batch_size,
        collate_fn=collate,
        generator=Generator(),  # else it would draw from the caller's
    )


def pooled(report: MissingnessReport) -> float:
    """The main metric over all conditions in one ranking, as if they were one data set.

    So scores have to compare across patterns, as they do where patients lack different things.

    Args:
        report: With its predictions.

    Example:
        >>> from mmfusion.evaluation import evaluate
        >>> def model(inputs, present):  # each subset by itself is in order
        ...     return inputs["a"] + inputs["b"] + 9 * present[:, :1]
        >>> table = torch.tensor([[0.0], [1.0]])
        >>> data = {"inputs": {"a": table, "b": table}, "labels": torch.tensor([0, 1])}
        >>> report = evaluate(model, data, kinds=["subset"], target="binary", num_bootstrap=0)
        >>> [one.values["auc_macro"] for one in report.scores], round(pooled(report), 3)
        ([1.0, 1.0, 1.0], 0.778)
    """
    kept: Any = [(one.probabilities, one.labels) for one in report.scores]
    chances, labels = map(np.concatenate, zip(*kept, strict=True))
    classes = report.about.get("tasks", report.classes)
    values, _ = score(chances, labels, report.metrics[:1], report.target, classes)
    return values[report.metrics[0]]


def by_task(report: MissingnessReport) -> dict[str, dict[str, float]]:
    """The metrics of each of several tasks, where all modalities are present; {} for a sole one.

    Args:
        report: With its predictions.

    Example:
        >>> from mmfusion.evaluation import evaluate
        >>> def model(inputs, present):
        ...     return inputs["a"]
        >>> data = {"inputs": {"a": torch.eye(4)[[0, 3]]}, "labels": torch.tensor([[0, 1], [1, 1]])}
        >>> tasks = {"colour": ("red", "blue"), "size": ("small", "large")}
        >>> how = {"target": "multiclass", "metrics": ["accuracy"], "classes": tasks}
        >>> by_task(evaluate(model, data, **how))
        {'colour': {'accuracy': 0.5}, 'size': {'accuracy': 0.5}}
    """
    tasks: Mapping[str, Sequence[str]] = report.about.get("tasks", {})
    if not tasks:
        return {}
    complete = (True,) * len(report.names)
    whole: Any = next(one for one in report.scores if one.condition.pattern == complete)
    ends = np.cumsum([len(classes) for classes in tasks.values()])[:-1]
    blocks = np.split(whole.probabilities, ends, axis=1)
    return {
        task: score(block, column, report.metrics, report.target, classes)[0]
        for (task, classes), block, column in zip(
            tasks.items(), blocks, whole.labels.T, strict=True
        )
    }


def write_reports(reports: Sequence[MissingnessReport], folder: Path) -> None:
    """Write ``report.html`` and ``report.png`` of a method beside others, and every number.

    Args:
        reports: The first is ``metrics.json`` and what the page and the image are about; another
            is ``metrics-<method>.json``, and a second one of that name ``...--2.json``.
        folder: Where to.

    Example:
        >>> import tempfile
        >>> from mmfusion.evaluation import evaluate
        >>> def model(inputs, present):
        ...     return inputs["a"]
        >>> data = {"inputs": {"a": torch.eye(3)}, "labels": torch.arange(3)}
        >>> reports = [evaluate(model, data, target="multiclass", method=m) for m in ("A", "B C")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_reports(reports, Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['metrics-B-C.json', 'metrics.json', 'report.html', 'report.png']
    """
    first, *others = reports
    first.to_json(folder / "metrics.json")
    taken: Counter[str] = Counter()
    for other in others:
        name = re.sub(r"\W+", "-", other.method)
        taken[name] += 1
        number = f"--{taken[name]}" if taken[name] > 1 else ""  # no name has two dashes
        other.to_json(folder / f"metrics-{name}{number}.json")
    first.plot(folder / "report.png")
    first.to_html(folder / "report.html", others)


def write_patterns(report: MissingnessReport, num_samples: int, folder: Path) -> None:
    """Write the patterns of each rate per modality, drawn again: ``patterns-<rate>-<seed>.json``.

    Args:
        report: Of ``evaluate``.
        num_samples: Samples of the data it was given.
        folder: Where to.

    Example:
        >>> import tempfile
        >>> from mmfusion.evaluation import evaluate
        >>> def model(inputs, present):
        ...     return inputs["a"]
        >>> data = {"inputs": {"a": torch.eye(3), "b": torch.eye(3)}, "labels": torch.arange(3)}
        >>> report = evaluate(model, data, target="multiclass", rates=(0.5,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_patterns(report, 3, Path(folder))
        ...     patterns = PatternSet.load(Path(folder, "patterns-0.5-0.json"))
        >>> patterns.hash == report.scores[-1].sha256
        True
    """
    for one in report.scores:
        rate = one.condition.rate
        if one.condition.kind == "per_modality" and rate:
            rates = [rate] * len(report.names)
            how: dict[str, Any] = {"seed": one.seed, "split": "test"}
            patterns = PatternSet.draw("per_modality", num_samples, report.names, rates, **how)
            patterns.save(folder / f"patterns-{rate}-{one.seed}.json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain JSON, whole or not at all; NaN becomes null, a path its name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "metrics.json"), {"auc": float("nan")})
        ...     json.loads(Path(folder, "metrics.json").read_text())
        {'auc': None}
    """
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def versions() -> dict[str, str]:
    """What the numbers were made with.

    Example:
        >>> versions()["mmfusion"] == __import__("mmfusion").__version__
        True
    """
    packages = "mmfusion torch accelerate transformers monai scikit-learn numpy pillow".split()
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
