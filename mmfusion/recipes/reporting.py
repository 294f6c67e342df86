"""Score a model on every subset of modalities and three rates; a table, a plot, a JSON file.

Undefined scores are NaN here, null in the JSON file, and always come with their reason.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object, send_to_device
from sklearn.metrics import recall_score, roc_auc_score
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmfusion.missingness import PatternSet, all_patterns
from mmfusion.recipes.checkpoint import write_whole

RATES = (0.3, 0.5, 0.7)
Tasks = Mapping[str, Sequence[str]]


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Dataset[Any],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    present: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Logits of all samples, with only what ``present`` leaves of what each of them has.

    Over several ranks each does its part, and all get the same.

    Args:
        model: Takes ``inputs`` and ``present``; it is left in eval mode.
        data: Items as ``collate`` takes them.
        collate: Items to a batch of ``inputs`` and ``present``.
        present: Patterns to lay over what the samples have; None takes them as they are.
        batch_size: Samples at a time.

    Shape:
        - ``present``: ``(B, M)``; returned: ``(B, Y)`` float32, on the CPU

    Example:
        >>> import functools, mmfusion
        >>> model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=4, dim=8)
        >>> join = functools.partial(mmfusion.presence.collate, names=model.names)
        >>> predict(model, [{"inputs": {"a": torch.ones(2)}}] * 5, join).shape
        torch.Size([5, 4])
    """
    model.eval()
    state, device = PartialState(), next(model.parameters()).device
    rows = torch.arange(len(data)).tensor_split(state.num_processes)  # type: ignore[arg-type]
    parts = [part for part in rows[state.process_index].split(batch_size) if len(part)]
    loader = DataLoader(
        data,
        batch_sampler=[part.tolist() for part in parts],
        collate_fn=collate,
        generator=Generator(),  # else it would draw from the caller's
    )
    logits = []
    for part, batch in zip(parts, loader, strict=True):
        seen = batch["present"] if present is None else batch["present"] & present[part]
        inputs, seen = send_to_device((batch["inputs"], seen), device)
        logits.append(model(inputs, present=seen).logits.float().cpu())
    return torch.cat(gather_object(logits))


def score(logits: Tensor, labels: Tensor, tasks: Tasks) -> dict[str, Any]:
    """Macro one-vs-rest AUC and balanced accuracy of each task, and their means over tasks.

    The logits of the tasks lie side by side; within a task the highest one is the prediction.

    Args:
        logits: Of all samples.
        labels: Class of each sample in each task.
        tasks: Task -> its classes, in the order of the logits and of the columns of ``labels``.

    Shape:
        - ``logits``: ``(B, Y)``; ``labels``: ``(B,)`` or ``(B, tasks)``, int64

    Returns:
        ``auc``, ``balanced_accuracy``, ``undefined`` (reasons, empty where all is defined), and for
        several tasks ``tasks`` with the same for each.

    Example:
        >>> found = score(torch.eye(3)[:2], torch.tensor([0, 1]), {"diagnosis": ("A", "B", "C")})
        >>> found["auc"], found["undefined"]
        (nan, ['diagnosis: none of 2 cases is C'])
    """
    columns = labels.reshape(len(labels), len(tasks)).unbind(1)
    blocks = logits.split([len(classes) for classes in tasks.values()], dim=1)
    each = {
        task: _score_task(block.softmax(1).numpy(), column.numpy(), task, classes)
        for (task, classes), block, column in zip(tasks.items(), blocks, columns, strict=True)
    }
    if len(each) == 1:
        return next(iter(each.values()))
    found: dict[str, Any] = {
        key: float(np.mean([one[key] for one in each.values()]))
        for key in ("auc", "balanced_accuracy")
    }
    found["undefined"] = [reason for one in each.values() for reason in one["undefined"]]
    return found | {"tasks": each}


def _score_task(
    probabilities: np.ndarray, labels: np.ndarray, task: str, classes: Sequence[str]
) -> dict[str, Any]:
    counts = np.bincount(labels, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if absent or not len(labels):
        reason = f"{task}: none of {len(labels)} cases is {', '.join(absent)}"
        return {"auc": math.nan, "balanced_accuracy": math.nan, "undefined": [reason]}
    one_hot = np.eye(len(classes))[labels]
    taken = slice(None) if len(classes) > 2 else slice(1, 2)  # both of two say the same
    auc = roc_auc_score(one_hot[:, taken], probabilities[:, taken], average="macro")
    accuracy = recall_score(labels, probabilities.argmax(1), average="macro")
    return {"auc": float(auc), "balanced_accuracy": float(accuracy), "undefined": []}


def evaluate(
    model: nn.Module,
    data: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    folder: Path,
    *,
    seed: int,
    split: str = "test",
    batch_size: int = 64,
) -> dict[str, Any]:
    """Score every subset of modalities, and fixed patterns at three rates, which are saved.

    A subset is scored on the cases that have all of it; a rate on the cases of which it leaves
    something. At a rate each modality goes with that probability, one always stays.

    Args:
        model: The model.
        data: A data set with ``names``, ``labels``, ``present`` and ``tasks``, such as ``Derm7pt``.
        collate: As for ``predict``.
        folder: Gets ``patterns-<split>-<rate>.json``.
        seed: Of the patterns at a rate.
        split: Of the patterns too.
        batch_size: Samples at a time.

    Returns:
        ``subsets`` and ``rates``, each a list of dicts with ``name``, ``cases`` and what ``score``
        gives; a rate also has its realised rates and the hash of its patterns.

    Example:
        >>> import functools, mmfusion, tempfile
        >>> from mmfusion.recipes.derm7pt import Derm7pt
        >>> from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_release(Path(folder, "release"), num_cases=30)
        ...     data = Derm7pt(root, "test", image_size=16)
        ...     photo = torch.nn.Flatten(), 3 * 16 * 16
        ...     model = mmfusion.CMML(
        ...         {"clinic": photo, "derm": photo, "meta": 14}, num_classes=5, dim=8
        ...     )
        ...     join = functools.partial(mmfusion.presence.collate, names=data.names)
        ...     report = evaluate(model, data, join, Path(folder), seed=0)
        >>> [row["name"] for row in report["subsets"]][-2:]
        ['clinic + derm', 'clinic + derm + meta']
    """

    def scored(name: str, present: Tensor, taken: Tensor) -> dict[str, Any]:
        logits = predict(model, data, collate, present, batch_size)
        found = score(logits[taken], data.labels[taken], data.tasks)
        return {"name": name, "cases": int(taken.sum()), **found}

    subsets, rates = [], []
    for pattern in sorted(all_patterns(len(data.names)).tolist(), key=lambda row: (sum(row), row)):
        present = torch.tensor(pattern).expand(len(data), -1)
        name = " + ".join(n for n, seen in zip(data.names, pattern, strict=True) if seen)
        subsets.append(scored(name, present, (data.present | ~present).all(1)))
    for rate in RATES:
        patterns = PatternSet.draw(
            "per_modality", len(data), data.names, [rate] * len(data.names), seed=seed, split=split
        )
        if PartialState().is_main_process:
            patterns.save(folder / f"patterns-{split}-{rate}.json")
        left = (data.present & patterns.present).any(1)
        about = {"rate": rate, "realised": patterns.realised(), "sha256": patterns.hash}
        rates.append(scored(f"rate {rate}", patterns.present, left) | about)
    return {"subsets": subsets, "rates": rates}


def table(reports: Mapping[str, dict[str, Any]]) -> str:
    """The reports side by side, as plain text.

    Example:
        >>> row = {"cases": 9, "auc": 0.75, "balanced_accuracy": float("nan"), "undefined": ["why"]}
        >>> print(table({"CMML": {"subsets": [{"name": "derm", **row}], "rates": []}}))
        what is present         cases    CMML: AUC  bal. acc.
        derm                        9        0.750        nan
        nan: why
    """
    wide = {name: max(13, len(name) + 8) for name in reports}
    first = next(iter(reports.values()))

    def line(name: str, cases: Any, rows: Sequence[dict[str, Any]]) -> str:
        cells = (
            f"{row['auc']:>{width}.3f}{row['balanced_accuracy']:>11.3f}"
            for row, width in zip(rows, wide.values(), strict=True)
        )
        return f"{name:22}{cases:>7}" + "".join(cells)

    heads = "".join(f"{f'{name}: AUC':>{width}}  bal. acc." for name, width in wide.items())
    lines, reasons = [f"{'what is present':22}{'cases':>7}{heads}"], []
    for kind in ("subsets", "rates"):
        for place, row in enumerate(first[kind]):
            rows = [report[kind][place] for report in reports.values()]
            lines.append(line(row["name"], row["cases"], rows))
            reasons += [f"nan: {reason}" for one in rows for reason in one["undefined"]]
    for task in first["subsets"][-1].get("tasks", ()):
        whole = [report["subsets"][-1]["tasks"][task] for report in reports.values()]
        lines.append(line(task, "all", whole))
    for row in first["rates"]:
        realised = ", ".join(f"{kind} {value:.3f}" for kind, value in row["realised"].items())
        nominal = f"{row['name']} (each modality, nominal)"
        lines.append(f"{nominal}: realised {realised}; sha256 {row['sha256'][:12]}")
    return "\n".join([*lines, *dict.fromkeys(reasons)])


def plot(reports: Mapping[str, dict[str, Any]], path: Path, title: str) -> None:
    """AUC of every subset on the left; on the right over the rates, complete samples at 0.

    Args:
        reports: Name of a model -> what ``evaluate`` gave.
        path: A PNG file.
        title: Above both; say there if the data are synthetic.

    Example:
        >>> import tempfile
        >>> subset, rate = {"name": "derm", "auc": 0.9}, {"rate": 0.5, "auc": 0.8}
        >>> report = {"subsets": [subset], "rates": [rate]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot({"CMML": report}, Path(folder, "auc.png"), "SYNTHETIC")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [row["name"] for row in next(iter(reports.values()))["subsets"]]
    for number, (label, report) in enumerate(reports.items()):
        places = np.arange(len(names)) + 0.16 * (number - (len(reports) - 1) / 2)
        left.plot([row["auc"] for row in report["subsets"]], places, "o", label=label)
        auc = [report["subsets"][-1]["auc"], *(row["auc"] for row in report["rates"])]
        right.plot([0, *(row["rate"] for row in report["rates"])], auc, "o-", label=label)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="AUC", title="What is present")
    left.invert_yaxis()
    right.set(
        xlabel="nominal rate at which each modality is absent",
        ylabel="AUC",
        title="Random absence",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, dpi=150))


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
