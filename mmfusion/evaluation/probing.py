"""Hide each modality in turn, and keep what a model makes of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmfusion.evaluation.forward import Data, batches

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
def observe(model: Any, data: Data, *, batch_size: int = 256) -> Observed:
    """Encode a data set with nothing hidden; arguments as for ``diagnose``."""
    model.eval()
    found = [(model(**given), labels) for given, labels in _batches(model, data, batch_size)]
    return _observed(model, *zip(*found, strict=True))


@torch.no_grad()
def probe(model: Any, data: Data, *, batch_size: int = 256) -> Probe:
    """Hide each modality in turn, and keep what the model makes of it; as for ``diagnose``."""
    model.eval()
    whole, parts = [], []
    for given, labels in _batches(model, data, batch_size):
        out = model(**given)
        runs = []
        for column in range(out.present.shape[1]):
            visible = out.present.clone()
            visible[:, column] = False
            runs.append(model(**given, visible=visible))
        whole.append((out, labels))
        parts.append([_columns(runs, name) for name in Probe._fields[2:]])
    observed = _observed(model, *zip(*whole, strict=True))
    if observed.aligned is None:  # such a model returns what it completed
        parts = [[guess, None, *rest] for guess, _, *rest in parts]
    fields = [None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)]
    return Probe(observed, observed.present & (observed.present.sum(1) > 1)[:, None], *fields)


def _batches(model: Any, data: Data, batch_size: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Arguments of the model, on its device; and labels."""
    device = next(model.parameters()).device
    for batch in batches(data, batch_size):
        given = {key: batch[key] for key in ("inputs", "present", "sample_ids") if key in batch}
        moved = tree_map_only(Tensor, lambda leaf: leaf.to(device), given)
        yield moved, torch.as_tensor(batch["labels"]).cpu()


def _observed(model: Any, outputs: Sequence[Any], labels: Sequence[Tensor]) -> Observed:
    aligned = None
    if outputs[0].reference is not None:
        aligned = torch.cat([out.aligned for out in outputs]).float().cpu()
    return Observed(
        names=tuple(model.names),
        tokens=torch.cat([out.tokens for out in outputs]).float().cpu(),
        present=torch.cat([out.present for out in outputs]).cpu(),
        aligned=aligned,
        labels=torch.cat(list(labels)),
    )


def _columns(runs: Sequence[Any], name: str) -> Tensor | None:
    """Column m of run m, side by side."""
    values = [getattr(run, name) for run in runs]
    if values[0] is None:
        return None
    side = torch.stack([value[:, column] for column, value in enumerate(values)], 1).cpu()
    return side.float() if side.is_floating_point() else side
