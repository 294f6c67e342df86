"""Hide each modality in turn, and keep what a model makes of it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Observed", "Probe", "observe", "probe"]


class Observed(NamedTuple):
    """A data set as a model encodes it, on the CPU.

    Attributes:
        names: The modalities, in the order of the columns.
        tokens: ``(B, M, L, D)``, zeros where absent.
        present: ``(B, M)`` bool.
        aligned: ``(B, M, L, D)``; None for a model without alignment.
        labels: ``(B,)`` or ``(B, Y)``.
    """

    names: tuple[str, ...]
    tokens: Tensor
    present: Tensor
    aligned: Tensor | None
    labels: Tensor


class Probe(NamedTuple):
    """What a model does for each modality where that one alone is hidden: column m is run m.

    Attributes:
        observed: The same data with nothing hidden: the truth.
        hidden: ``(B, M)`` bool, where a guess counts: the modality is present, and another too.
        synthesised: ``(B, M, L, D)``; None for a model that synthesises nothing.
        aligned: ``(B, M, L, D)``, the aligned guess; None for a model without alignment.
        neighbour_weights: ``(B, M, L, K)``; None without memory.
        neighbour_ids: ``(B, M, L, K)``, the samples read, -1 where none; None without memory.
    """

    observed: Observed
    hidden: Tensor
    synthesised: Tensor | None
    aligned: Tensor | None
    neighbour_weights: Tensor | None
    neighbour_ids: Tensor | None


@torch.no_grad()
def observe(model: Any, data: Mapping[str, Any], *, batch_size: int = 256) -> Observed:
    """Encode a data set with nothing hidden; arguments as for ``diagnose``."""
    model.eval()
    return _observed(model, data, [model(**batch) for batch in _batches(model, data, batch_size)])


@torch.no_grad()
def probe(model: Any, data: Mapping[str, Any], *, batch_size: int = 256) -> Probe:
    """Hide each modality in turn, and keep what the model makes of it; as for ``diagnose``."""
    model.eval()
    whole, parts = [], []
    for batch in _batches(model, data, batch_size):
        out = model(**batch)
        runs = []
        for column in range(out.present.shape[1]):
            visible = out.present.clone()
            visible[:, column] = False
            runs.append(model(**batch, visible=visible))
        whole.append(out)
        parts.append([_columns(runs, name) for name in Probe._fields[2:]])
    observed = _observed(model, data, whole)
    if observed.aligned is None:  # such a model returns what it completed
        parts = [[guess, None, *rest] for guess, _, *rest in parts]
    fields = [None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)]
    return Probe(observed, observed.present & (observed.present.sum(1) > 1)[:, None], *fields)


def _batches(model: Any, data: Mapping[str, Any], batch_size: int) -> Iterator[dict[str, Any]]:
    """Arguments of the model, on its device."""
    device = next(model.parameters()).device
    given = {key: data[key] for key in ("inputs", "present", "sample_ids") if key in data}
    for start in range(0, len(data["labels"]), batch_size):
        rows = slice(start, start + batch_size)
        yield tree_map_only(Tensor, partial(_taken, rows=rows, device=device), given)


def _taken(leaf: Tensor, rows: slice, device: torch.device) -> Tensor:
    return leaf[rows].to(device)


def _observed(model: Any, data: Mapping[str, Any], outputs: Sequence[Any]) -> Observed:
    aligned = None
    if outputs[0].reference is not None:
        aligned = torch.cat([out.aligned for out in outputs]).float().cpu()
    return Observed(
        names=tuple(model.names),
        tokens=torch.cat([out.tokens for out in outputs]).float().cpu(),
        present=torch.cat([out.present for out in outputs]).cpu(),
        aligned=aligned,
        labels=torch.as_tensor(data["labels"]).cpu(),
    )


def _columns(runs: Sequence[Any], name: str) -> Tensor | None:
    """Column m of run m, side by side."""
    values = [getattr(run, name) for run in runs]
    if values[0] is None:
        return None
    side = torch.stack([value[:, column] for column, value in enumerate(values)], 1).cpu()
    return side.float() if side.is_floating_point() else side
