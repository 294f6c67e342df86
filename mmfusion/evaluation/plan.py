"""Which conditions an evaluation scores, with the patterns of each."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfusion.evaluation.report import Condition
from mmfusion.missingness import PatternSet, all_patterns

__all__ = ["FIXED", "KINDS", "cannot", "plan", "subset_note"]

RATED = {"per_modality": "rate", "sample_rate": "sample rate", "slot_rate": "slot rate"}
FIXED = ("subset", "always_missing")  # no chance in them
KINDS = (*FIXED, *RATED, "not_at_random")
MOST_SUBSETS = 128


def plan(
    kinds: Sequence[str],
    rates: Sequence[float],
    seed: int,
    names: Sequence[str],
    cause: Tensor,
    train_rate: float | None = None,
) -> Iterator[tuple[Condition, PatternSet]]:
    """Yield every condition with its patterns.

    Args:
        kinds: Of ``KINDS``.
        rates: Nominal rates; see ``cannot``.
        seed: Of the patterns.
        names: The modalities.
        cause: What absence depends on for ``"not_at_random"``: whole numbers, of which the even
            and the odd differ, or floating ones, of which the lower and the upper half do.
        train_rate: Put into the conditions.

    Shape:
        - ``cause``: ``(B,)``

    Raises:
        ValueError: If a kind is unknown, or a rate is no share or there twice.

    Example:
        >>> found = plan(("subset", "slot_rate"), (0.5,), 0, ("a", "b"), torch.zeros(9))
        >>> [condition.name for condition, _ in found]
        ['a', 'b', 'a + b', 'slot rate 0.5']
    """
    if isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
        raise ValueError(
            f"kinds={kinds!r}: a kind is one of {', '.join(KINDS)}. Pass names of these, in a list."
        )
    if wrong := [rate for rate in rates if not 0 <= rate <= 1]:
        raise ValueError(
            f"rates hold {wrong[0]}: a rate is a share from 0 to 1. Pass 0.3 for 30 per cent."
        )
    if twice := [rate for rate in rates if list(rates).count(rate) > 1]:
        raise ValueError(
            f"rates hold {twice[0]} twice: a condition has one entry a seed. Pass it once, with "
            "more seeds."
        )
    size, rates = len(cause), [float(rate) for rate in rates]  # 0 is 0.0

    def fixed(kind: str, name: str, row: Sequence[bool]) -> tuple[Condition, PatternSet]:
        present = torch.tensor(row).expand(size, -1)
        condition = Condition(kind, name, pattern=tuple(row), train_rate=train_rate)
        return condition, PatternSet(present, names, kind, 0.0, seed, "test")

    def drawn(kind: str, rate: Any, **cause: Tensor) -> PatternSet:
        return PatternSet.draw(kind, size, names, rate, seed=seed, split="test", **cause)

    for kind in kinds:
        if kind == "subset":
            for row in _subsets(len(names)):
                kept = [name for name, left in zip(names, row, strict=True) if left]
                yield fixed(kind, " + ".join(kept), row)
        elif kind == "always_missing" and len(names) > 1:
            for gone in names:
                yield fixed(kind, f"without {gone}", [name != gone for name in names])
        for rate in rates if kind not in FIXED else ():
            if cannot(kind, rate, len(names)) or (kind not in RATED and not rate):
                continue
            if kind in RATED:
                name = f"{RATED[kind]} {rate}"
                condition = Condition(kind, name, rate=rate, train_rate=train_rate)
                given = [rate] * len(names) if kind == "per_modality" else rate
                yield condition, drawn(kind, given)
            else:
                rows = [[rate * (i % 2 == half) for i in range(len(names))] for half in (0, 1)]
                which = cause if cause.is_floating_point() else cause % 2
                for name, table in (("tied to label", rows), ("reversed", rows[::-1])):
                    condition = Condition(kind, f"{name}, rate {rate}", train_rate=train_rate)
                    yield condition, drawn(kind, table, cause=which)


def cannot(kind: str, rate: float, num_modalities: int) -> str | None:
    """Say why a kind has no patterns of a rate; None if it has.

    Example:
        >>> cannot("slot_rate", 0.7, 2)
        'slot_rate 0.7: each case keeps one of its 2 modalities'
    """
    if kind in FIXED or not rate:
        return None
    most = (num_modalities - 1) / num_modalities if kind == "slot_rate" else num_modalities > 1
    if rate > most or (kind == "per_modality" and rate == 1):
        return f"{kind} {float(rate)}: each case keeps one of its {num_modalities} modalities"
    return None


def subset_note(kinds: Sequence[str], num_modalities: int) -> list[str]:
    """Say so where not all subsets are scored.

    Example:
        >>> subset_note(["subset"], 8)
        ['of 255 subsets 17 were scored: single modalities, all but one, and all']
    """
    found, total = len(_subsets(num_modalities)), 2**num_modalities - 1
    if "subset" not in kinds or found == total:
        return []
    return [f"of {total} subsets {found} were scored: single modalities, all but one, and all"]


def _subsets(num_modalities: int) -> list[tuple[bool, ...]]:
    """All patterns, small ones first; of very many single modalities, all but one, and all."""
    if 2**num_modalities - 1 <= MOST_SUBSETS:
        table = all_patterns(num_modalities)
    else:
        single = torch.eye(num_modalities, dtype=torch.bool)
        table = torch.cat([single, ~single, single.any(0, keepdim=True)])
    rows = [tuple(row) for row in table.tolist()]
    return sorted(rows, key=lambda row: (sum(row), [not left for left in row]))
