"""What models answer on all cases of a data set, under given patterns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmfusion.presence import normalise
from mmfusion.ranks import world_size

__all__ = ["Cases", "Data", "Gather", "collect", "logits"]

ROWS = 256  # rows of a mapping that go through a model together
Data = Mapping[str, Any] | Iterable[Mapping[str, Any]]
Gather = Callable[[list[Any]], list[Any]]


class Cases(NamedTuple):
    """What is known of all cases without a model.

    Attributes:
        names: The modalities, in the order of the columns of ``present``.
        present: ``(B, M)`` bool, what there is.
        labels: ``(B,)`` or ``(B, Y)``, floating.
        ids: ``(B,)``, the ``sample_ids``, or row numbers.
        mine: Which of them this process holds.
    """

    names: tuple[str, ...]
    present: Tensor
    labels: np.ndarray
    ids: np.ndarray
    mine: slice


def collect(data: Data, names: Sequence[str] | None = None, gather: Gather | None = None) -> Cases:
    """Read the labels and what is present; ``names`` are by default the keys of the first inputs.

    Raises:
        ValueError: If the data can be iterated only once, hold nothing, have no labels or other
            ones than numbers, or parts have other numbers of rows.

    Example:
        >>> data = {"inputs": {"a": torch.ones(3, 2), "b": None}, "labels": torch.arange(3)}
        >>> collect(data).present.tolist()
        [[True, False], [True, False], [True, False]]
    """
    parts: list[Any] = []
    for batch in batches(data):
        order = parts[0][0] if parts else tuple(batch["inputs"] if names is None else names)
        _, present = normalise(batch["inputs"], order, batch.get("present"), accepts_nan=order)
        labels = _labels(batch)
        ids = np.asarray(batch["sample_ids"]) if _has(batch, "sample_ids") else None
        parts.append((order, present.cpu(), labels, ids))
    counts = [sum(len(labels) for _, _, labels, _ in parts)]
    if gather is not None:
        parts, counts = gather(parts), gather(counts)
    if not parts:
        raise ValueError(
            "data hold no case: there is nothing to score. Pass a mapping with inputs and labels, "
            "or batches of that form."
        )
    orders, tables, columns, given = zip(*parts, strict=True)
    rank = distributed.get_rank() if gather is not None and world_size() > 1 else 0
    start, total = sum(counts[:rank]), sum(counts)
    return Cases(
        names=orders[0],
        present=torch.cat(tables),
        labels=np.concatenate(columns),
        ids=np.arange(total) if given[0] is None else np.concatenate(given),
        mine=slice(start, start + counts[rank]),
    )


@torch.no_grad()
def logits(
    models: Sequence[Callable[..., Any]],
    data: Data,
    cases: Cases,
    wanted: Sequence[tuple[int, Tensor]],
    gather: Gather | None = None,
) -> list[np.ndarray]:
    """Let models answer, in one pass over the data.

    What is not seen is zeroed before a model gets it.

    Args:
        models: The models; modules run in eval mode.
        data: The data.
        cases: What ``collect`` read from them.
        wanted: Number of a model, and what it may see of each case, ``(B, M)``.
        gather: Joins lists over processes.

    Returns:
        For each of ``wanted`` the logits, ``(B, Y)``.

    Raises:
        ValueError: If the data come in another order than before, or a model returns something of
            another shape.

    Example:
        >>> data = {"inputs": {"a": torch.ones(3, 2)}, "labels": torch.arange(3)}
        >>> def model(inputs, present):
        ...     return inputs["a"]
        >>> cases = collect(data)
        >>> logits([model], data, cases, [(0, cases.present)])[0].shape
        (3, 2)
    """
    found: list[list[np.ndarray]] = [[] for _ in wanted]
    first = cases.mine.start
    with _evaluating(models):
        for batch in batches(data):
            labels = _labels(batch)
            rows = slice(first, first + len(labels))
            first = rows.stop
            if not np.array_equal(cases.labels[rows], labels, equal_nan=True):
                raise ValueError(
                    f"rows {rows.start} to {rows.stop} have other labels than before: every pass "
                    "over the data has the same order. Do not shuffle, draw or drop."
                )
            known: dict[tuple[int, bytes], np.ndarray] = {}
            for (index, seen), answers in zip(wanted, found, strict=True):
                key = index, seen[rows].numpy().tobytes()
                if key not in known:
                    known[key] = _answer(models[index], batch["inputs"], seen[rows], cases.names)
                answers.append(known[key])
    return [np.concatenate(gather(answers) if gather else answers) for answers in found]


def _answer(
    model: Callable[..., Any], inputs: Mapping[str, Any], seen: Tensor, names: Sequence[str]
) -> np.ndarray:
    held = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    given = (leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor))
    device = next(chain(held, given), seen).device  # the model's, else that of what is given
    inputs = _over_tensors(lambda leaf: leaf.to(device), inputs)
    inputs, seen = normalise(inputs, names, seen.to(device), check_values=False)
    out = model(inputs, present=seen)
    answer = getattr(out, "logits", out)
    if not isinstance(answer, Tensor) or answer.shape[:1] != (len(seen),) or answer.ndim > 2:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(
            f"the model returned {shape} for {len(seen)} cases: logits are a tensor (B, Y) or "
            "(B,), alone or as .logits of an output. Wrap the model in a function that returns it."
        )
    return answer.double().reshape(len(seen), -1).cpu().numpy()


def batches(data: Data, batch_size: int = ROWS) -> Iterator[Mapping[str, Any]]:
    """The batches of the data, a mapping cut into some.

    Example:
        >>> data = {"inputs": {"a": torch.ones(3, 2)}, "labels": torch.arange(3)}
        >>> [len(batch["labels"]) for batch in batches(data, batch_size=2)]
        [2, 1]
    """
    if not isinstance(data, Mapping):
        if iter(data) is data:
            raise ValueError(
                f"data is a {type(data).__name__}, which ends after one pass: there are two. Pass "
                "a list of batches or a DataLoader."
            )
        for batch in data:
            _check_rows(batch)
            yield batch
        return
    _check_rows(data)
    total = len(data["labels"]) if _has(data, "labels") else 1
    for first in range(0, total, batch_size):
        rows = slice(first, first + batch_size)
        inputs = _over_tensors(itemgetter(rows), data["inputs"])
        rest = {
            key: data[key][rows] for key in ("labels", "present", "sample_ids") if _has(data, key)
        }
        yield {"inputs": inputs, **rest}


def _has(data: Mapping[str, Any], key: str) -> bool:
    return data.get(key) is not None


def _check_rows(batch: Mapping[str, Any]) -> None:
    """Refuse parts with more or fewer rows than labels: they would be paired wrongly, or cut."""
    parts = {key: batch[key] for key in ("present", "sample_ids") if _has(batch, key)}
    for name, value in batch["inputs"].items():
        leaves = tree_leaves(dict(value) if isinstance(value, Mapping) else value)
        parts |= {f"inputs[{name!r}]": leaf for leaf in leaves if isinstance(leaf, Tensor)}
    for name, part in parts.items():
        if _has(batch, "labels") and len(part) != len(batch["labels"]):
            raise ValueError(
                f"{name} has {len(part)} rows and labels {len(batch['labels'])}: each case has "
                "one. Pass as many, a missing label as -100 or NaN."
            )


def _over_tensors(
    function: Callable[[Tensor], Tensor], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Apply to every tensor of the inputs, also to those in structures."""
    plain = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in inputs.items()
    }
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, plain)


def _labels(batch: Mapping[str, Any]) -> np.ndarray:
    """Labels as floating numbers; one column is no axis."""
    if not _has(batch, "labels"):
        raise ValueError(
            f"data hold {sorted(map(str, batch))}: there is no score without labels. Add them "
            "under 'labels', a missing one as -100 or NaN."
        )
    try:
        labels = torch.as_tensor(batch["labels"]).double().cpu().numpy()
    except (TypeError, ValueError):
        raise ValueError(
            f"labels begin with {batch['labels'][0]!r}: they are numbers, those of classes in "
            "their order. Encode them, and pass the names as classes=."
        ) from None
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


@contextmanager
def _evaluating(models: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Eval mode, and afterwards for each module the mode it had."""
    parts = [part for one in models if isinstance(one, nn.Module) for part in one.modules()]
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
