"""Why a model scores as it does: what it synthesises, remembers and aligns."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfusion.evaluation.forward import Data
from mmfusion.evaluation.probing import Observed, Probe, observe, probe

__all__ = ["alignment_gap", "diagnose", "memory_use", "projection", "synthesis"]

Json = dict[str, Any]


def diagnose(model: Any, train: Data, test: Data, *, batch_size: int = 256) -> Json:
    """Everything below that a model has, as plain data for ``MissingnessReport.diagnostics``.

    Each modality of the test data is hidden in turn, so it costs ``M + 1`` passes over them. The
    model is left in eval mode.

    Args:
        model: CMML or a baseline.
        train: ``inputs`` and ``labels``, and ``present`` and ``sample_ids`` where there are any; or
            batches of that form, such as a ``DataLoader``.
        test: The same of other samples, with other ids than those of training.
        batch_size: Samples at a time, of what is no batches yet.

    Returns:
        ``synthesis``, ``projection``, ``alignment`` and ``memory``, of which a model lacks some.

    Example:
        >>> import mmfusion
        >>> model = mmfusion.CMML({"a": 2, "b": 3}, num_classes=2, dim=8, memory=None)
        >>> inputs = {"a": torch.randn(6, 2), "b": torch.randn(6, 3)}
        >>> data = {"inputs": inputs, "labels": torch.arange(6) % 2}
        >>> sorted(diagnose(model, data, data))
        ['alignment', 'projection', 'synthesis']
    """
    found = probe(model, test, batch_size=batch_size)
    parts: Json = {}
    if found.synthesised is not None:
        parts["synthesis"] = synthesis(found, observe(model, train, batch_size=batch_size))
        parts["projection"] = projection(found)
        if found.aligned is not None:
            parts["alignment"] = alignment_gap(found)
    if found.neighbour_ids is not None and hasattr(model.memory, "held"):
        parts["memory"] = memory_use(model.memory, found)
    return parts


def synthesis(found: Probe, train: Observed) -> Json:
    """Quality of the guesses against hidden truth, beside two references from training data.

    The references are the mean of training samples of the same class (same labels; for a class that
    training lacks, the mean of all), and the training sample that is nearest by the cosine of the
    other modalities. Tokens of a modality are flattened. R2 is 1 minus the squared error over that
    of the training mean.

    Args:
        found: Of the test data.
        train: Of the training data.

    Returns:
        Modality to ``cases``, and ``model``, ``class_mean`` (None for a regression) and
        ``nearest_neighbour`` with ``cosine`` and ``r2`` each; None where nothing could be hidden.

    Raises:
        ValueError: If the model synthesises nothing.
    """
    guesses, parts = _guesses(found), {}
    groups = _groups(train.labels, found.observed.labels)
    for column, name in enumerate(train.names):
        rows, kept = found.hidden[:, column], train.present[:, column]
        truth = found.observed.tokens[rows, column].flatten(1).double()
        pool = train.tokens[kept, column].flatten(1).double()
        part: Json = {"cases": int(rows.sum())}
        if part["cases"] and len(pool):
            centre = pool.mean(0)
            nearest = _nearest(train, found.observed, rows, column)
            candidates = {
                "model": guesses[rows, column].flatten(1).double(),
                "class_mean": None
                if groups is None
                else _means(pool, groups[0][kept], groups[1][rows]),
                "nearest_neighbour": pool[nearest],
            }
            part |= {key: _closeness(one, truth, centre) for key, one in candidates.items()}
        parts[name] = part
    return parts


def projection(found: Probe, *, num_points: int = 200) -> Json:
    """Observed vectors and the guesses for them on the two main axes of what was observed.

    Args:
        found: Of the test data.
        num_points: Samples kept per modality, evenly spaced in the data.

    Returns:
        Modality to ``observed`` and ``synthesised``, lists of points that belong together, and
        ``explained``, the shares of variance of the axes. Empty lists for less than three samples.

    Raises:
        ValueError: If the model synthesises nothing.
    """
    from sklearn.decomposition import PCA

    guesses, parts = _guesses(found), {}
    for column, name in enumerate(found.observed.names):
        rows = found.hidden[:, column].nonzero()[:, 0]
        pair = [
            part[rows, column].mean(1).double().numpy() for part in (found.observed.tokens, guesses)
        ]
        points: list[Any] = [[], []]
        explained: list[float] = []
        if len(rows) > 2 and pair[0].shape[1] > 1 and pair[0].std(0).any():
            axes = PCA(2, svd_solver="full").fit(pair[0])
            taken = np.linspace(0, len(rows) - 1, min(num_points, len(rows))).astype(int)
            points = [axes.transform(one[taken]).round(4).tolist() for one in pair]
            explained = axes.explained_variance_ratio_.round(4).tolist()
        parts[name] = dict(
            zip(("observed", "synthesised", "explained"), (*points, explained), strict=True)
        )
    return parts


def memory_use(memory: Any, found: Probe) -> Json:
    """How much of a memory serves, where each modality of the test data was hidden.

    Args:
        memory: A ``MemoryBank`` that was written with ids, with a ring for each modality, or one
            for whole samples.
        found: Of the test data, by the model that owns the memory.

    Returns:
        Modality to ``held`` vectors, ``used`` (share of them whose sample was read), ``hit_rate``
        (share of hidden entries that read anything), ``sources`` (different samples read) and
        ``same_label`` (share of neighbours with the label of the sample; None without classes).

    Raises:
        ValueError: If the model has no memory.
    """
    if found.neighbour_ids is None or found.neighbour_weights is None:
        raise ValueError(
            "neighbour_ids is None: the use of a memory shows in what was read. Pass the probe of "
            "a model with memory."
        )
    labels, parts = found.observed.labels, {}
    for column, name in enumerate(found.observed.names):
        rows = found.hidden[:, column]
        ids = found.neighbour_ids[rows, column].flatten(1)
        read = found.neighbour_weights[rows, column].flatten(1) > 0
        ring = column if len(memory.held) > 1 else 0  # of one that remembers whole samples
        held = int(memory.held[ring])
        stored, stored_labels = memory.ids[ring, :held].cpu(), memory.labels[ring, :held].cpu()
        part = {
            "held": held,
            "used": _number(torch.isin(stored, ids[read]).double().mean()),
            "hit_rate": _number(read.any(1).double().mean()),
            "sources": len(ids[read].unique()),
            "same_label": None,
        }
        if not labels.is_floating_point() and len(stored) and read.any():
            order = stored.argsort()
            place = torch.searchsorted(stored[order], ids[read]).clamp(max=held - 1)
            lent = stored_labels[order[place]]
            own = labels[rows].reshape(len(ids), 1, -1).expand(-1, ids.shape[1], -1)[read]
            known = ((own >= 0) & lent.isfinite() & (lent >= 0)).all(1)
            part["same_label"] = _number((own == lent).all(1)[known].double().mean())
        parts[name] = part
    return parts


def alignment_gap(found: Probe) -> Json:
    """Distance between the centres of observed and of synthesised vectors, before and after.

    Args:
        found: Of the test data.

    Returns:
        Modality to ``before`` and ``after`` the alignment, in units of the spread of the observed
        vectors around their centre; None where nothing could be hidden.

    Raises:
        ValueError: If the model has no alignment.
    """
    if found.aligned is None or found.observed.aligned is None:
        raise ValueError(
            "aligned is None: the gap is measured after an alignment. Pass the probe of a model "
            "with one."
        )
    pairs = {
        "before": (found.observed.tokens, _guesses(found)),
        "after": (found.observed.aligned, found.aligned),
    }
    return {
        name: {
            key: _gap(*(part[found.hidden[:, column], column].mean(1) for part in pair))
            for key, pair in pairs.items()
        }
        for column, name in enumerate(found.observed.names)
    }


def _guesses(found: Probe) -> Tensor:
    if found.synthesised is None:
        raise ValueError(
            "synthesised is None: this model guesses nothing that could be compared with the "
            "truth. Pass the probe of a model that synthesises."
        )
    return found.synthesised


def _groups(*labels: Tensor) -> tuple[Tensor, ...] | None:
    """The class of each sample of each set, -1 where unknown; None where there are no classes."""
    rows = torch.cat([one.reshape(len(one), -1) for one in labels])
    if rows.is_floating_point():
        return None
    classes = rows.unique(dim=0, return_inverse=True)[1]
    return classes.masked_fill((rows < 0).any(1), -1).split([len(one) for one in labels])


def _means(pool: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
    """The mean of the same class for each wanted sample; of all, for a class without samples."""
    same = ((wanted[:, None] == known) & (known >= 0)).to(pool.dtype)
    count = same.sum(1, keepdim=True)
    return torch.where(count > 0, same @ pool / count.clamp(min=1), pool.mean(0))


def _nearest(train: Observed, test: Observed, rows: Tensor, column: int) -> Tensor:
    """The training sample, among those with a modality, nearest by what both have of the others."""
    others = torch.arange(train.present.shape[1]) != column
    kept = train.present[:, column]
    keys, keys_have = train.tokens[kept][:, others].flatten(2), train.present[kept][:, others]
    found = []
    for part in rows.nonzero()[:, 0].split(1024):
        queries, queries_have = (
            test.tokens[part][:, others].flatten(2),
            test.present[part][:, others],
        )
        product = queries.flatten(1) @ keys.flatten(1).T  # absent ones are zeros
        norms = (queries.square().sum(2) @ keys_have.float().T) * (
            queries_have.float() @ keys.square().sum(2).T
        )
        found.append((product / norms.sqrt()).nan_to_num(nan=-2.0).argmax(1))
    return torch.cat(found)


def _closeness(
    guess: Tensor | None, truth: Tensor, centre: Tensor
) -> dict[str, float | None] | None:
    if guess is None:
        return None
    spread = (truth - centre).square().sum()
    return {
        "cosine": _number(torch.cosine_similarity(guess, truth).mean()),
        "r2": _number(1 - (truth - guess).square().sum() / spread),
    }


def _gap(observed: Tensor, synthesised: Tensor) -> float | None:
    centre = observed.mean(0)
    spread = (observed - centre).square().sum(1).mean().sqrt()
    return _number((synthesised.mean(0) - centre).norm() / spread)


def _number(value: Tensor) -> float | None:
    """A number of JSON: None for what is undefined."""
    return float(value) if value.isfinite() else None
