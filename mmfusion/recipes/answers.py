"""What a trained model says of patients: chances, how they vary, and whom it remembers."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from mmfusion.evaluation.scores import Classes
from mmfusion.layers import MemoryBank, PresenceAttention
from mmfusion.presence import collate
from mmfusion.recipes.batches import generator_for, seeded
from mmfusion.recipes.reading import Reading

DROPS = (_DropoutNd, PresenceAttention, nn.MultiheadAttention)
Shares = dict[str, float]


class Answer(NamedTuple):
    """What a model says of one patient.

    Attributes:
        values: ``(Y,)``, probabilities, or predictions of a regression.
        draws: ``(samples, Y)``, the same with dropout on.
        used: The modalities observed.
        synthesised: The modalities guessed.
        lent: Remembered patients -> their share of what memory lent to the guesses.
        similar: Remembered patients -> their share among the nearest in what was observed.
    """

    values: Tensor
    draws: Tensor
    used: tuple[str, ...]
    synthesised: tuple[str, ...]
    lent: Shares
    similar: Shares


@torch.no_grad()
def answer(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    reading: Reading,
    *,
    samples: int,
    seed: int = 0,
) -> list[Answer]:
    """Ask a model about patients, once as it is and ``samples`` times with dropout on.

    Encoders run once, as they are; dropout acts in all that comes after them. What a patient's
    passes draw depends on the seed and the id alone, not on the batch. Nothing is written to the
    memory, and a patient of the training set does not find itself there.

    Args:
        model: CMML or a baseline; left in eval mode.
        inputs: Of every patient, modality -> tensor or None.
        ids: Of every patient.
        reading: Of the training set: shapes, classes, and who its patients are.
        samples: Passes with dropout on; 0 for none.
        seed: Of these passes.

    Raises:
        ValueError: On what the model refuses, or if it says something that is not finite.

    Example:
        >>> import mmfusion
        >>> model = mmfusion.CMML({"lab": 2, "mri": 3}, num_classes=2, dim=8)
        >>> reading = Reading(model.names, {"lab": (2,), "mri": (3,)}, ("no", "yes"))
        >>> [one] = answer(model, [{"lab": torch.ones(2)}], ["Bea"], reading, samples=3)
        >>> one.used, one.synthesised, tuple(one.draws.shape)
        (('lab',), ('mri',), (3, 2))
    """
    model.eval()
    device = next(model.parameters()).device
    batch = collate([{"inputs": one} for one in inputs], model.names, reading.shapes)
    own = torch.tensor([reading.numbers.get(id, -1) for id in ids], device=device)
    moved = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch["inputs"])
    out = model(moved, present=batch["present"].to(device), sample_ids=own)
    values = chances(out.logits, model.target, reading.classes).cpu()
    for id, numbers in zip(ids, values, strict=True):
        if not numbers.isfinite().all():
            raise ValueError(
                f"patient {id!r} gets {numbers.tolist()}: chances and predictions are finite. "
                "Correct values so large that the model overflows, or train a model that does not."
            )
    draws = [out.logits[:0]] * len(ids)
    if samples:
        for row, id in enumerate(ids):
            with _dropping(model, out.tokens[row], out.present[row], samples, f"{seed}/{id}"):
                draws[row] = model({}, sample_ids=own[row].expand(samples)).logits
    lent, similar = _remembered(model, out, own, reading.train_ids)
    present = out.present.tolist()
    guessed = getattr(out, "synthesised", None) is not None
    return [
        Answer(
            values[row],
            chances(draws[row], model.target, reading.classes).cpu(),
            tuple(name for name, here in zip(model.names, seen, strict=True) if here),
            tuple(n for n, here in zip(model.names, seen, strict=True) if guessed and not here),
            lent[row],
            similar[row],
        )
        for row, seen in enumerate(present)
    ]


def chances(logits: Tensor, target: str, classes: Classes) -> Tensor:
    """Probabilities, or predictions as they are, in float64.

    Args:
        logits: Of a model.
        target: As for ``CMML``.
        classes: A mapping of task -> classes has a softmax for each.

    Shape:
        - ``logits``, result: ``(B, Y)``

    Example:
        >>> chances(torch.zeros(1, 4), "multilabel", {"sex": ("f", "m"), "hand": ("l", "r")})
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    logits = logits.double()
    if isinstance(classes, Mapping):
        blocks = logits.split([len(of) for of in classes.values()], dim=1)
        return torch.cat([block.softmax(1) for block in blocks], dim=1)
    if target == "multiclass":
        return logits.softmax(1)
    return logits if target == "regression" else logits.sigmoid()


def varies(model: nn.Module) -> bool:
    """Whether dropout changes what a model says.

    Example:
        >>> varies(nn.Dropout(0.1)), varies(nn.Dropout(0.0))
        (True, False)
    """
    edge = {id(part) for part in getattr(model, "edge", nn.Module()).modules()}
    parts = [part for part in model.modules() if isinstance(part, DROPS) and id(part) not in edge]
    return any(float(getattr(part, "p", getattr(part, "dropout", 0))) > 0 for part in parts)


class _Encoded(nn.Module):
    """Stands in for the encoders: the tokens of one patient, several times."""

    def __init__(self, edge: Any, tokens: Tensor, present: Tensor, times: int) -> None:
        super().__init__()
        self.names, self.check_values = edge.names, False
        self.tokens = tokens.expand(times, *tokens.shape)
        self.present = present.expand(times, *present.shape)

    def forward(self, inputs: Any, present: Any = None) -> tuple[Tensor, Tensor]:
        return self.tokens, self.present


@contextlib.contextmanager
def _dropping(
    model: Any, tokens: Tensor, present: Tensor, times: int, purpose: str
) -> Iterator[None]:
    """Dropout on, all else as in evaluation, and draws that hang on ``purpose`` alone."""
    edge = model.edge
    try:
        model.edge = _Encoded(edge, tokens, present, times)
        for part in model.modules():
            if isinstance(part, DROPS):
                part.training = True
        with seeded(generator_for(0, 0, purpose).initial_seed(), tokens.device):
            yield
    finally:
        model.edge = edge
        model.eval()


def _remembered(
    model: Any, out: Any, own: Tensor, train_ids: Mapping[str, str]
) -> tuple[list[Shares], list[Shares]]:
    """Shares of remembered patients: those lent to what is absent, those near what is observed."""
    memory = getattr(model, "memory", None)
    nobody: list[Shares] = [{} for _ in own]
    if not isinstance(memory, MemoryBank):
        return nobody, nobody
    lent = _shares(out.neighbour_ids, out.neighbour_weights, train_ids)
    of_tokens = (len(model.names), out.tokens.shape[-1])
    if memory.slots.shape[::2] != of_tokens:  # (M, S, D): it remembers patients as a whole
        return lent, nobody
    weights, ids = memory.neighbours(out.tokens.mean(2), ~out.present, own)
    return lent, _shares(ids, weights, train_ids)


def _shares(ids: Tensor, weights: Tensor, train_ids: Mapping[str, str]) -> list[Shares]:
    """The share of each remembered sample in what a patient was lent, the largest first."""
    found = []
    for numbers, lent in zip(ids.flatten(1).tolist(), weights.flatten(1).tolist(), strict=True):
        total: Counter[str] = Counter()
        for number, weight in zip(numbers, lent, strict=True):
            if number >= 0:
                total[train_ids.get(str(number), f"#{number}")] += weight
        whole = sum(total.values())
        found.append({id: weight / whole for id, weight in total.most_common()} if whole else {})
    return found
