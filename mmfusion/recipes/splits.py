"""Splits by patient: seeded, the same on every machine, saved with a hash, checked when loaded."""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from mmfusion.recipes.checkpoint import write_whole

Ids = Sequence[int] | Sequence[str]
FRACTIONS: Mapping[str, float] = {"train": 0.7, "valid": 0.1, "test": 0.2}


def split_patients(
    ids: Ids,
    fractions: Mapping[str, float] = FRACTIONS,
    *,
    seed: int = 0,
    labels: Sequence[Hashable] | None = None,
) -> dict[str, list[Any]]:
    """Deal patients out to splits, each patient to one.

    The same patients and seed give the same splits, in whatever order ``ids`` comes. Cases of one
    patient go where the patient goes: deal out patients, then look the cases up.

    Args:
        ids: Of the patients, each once.
        fractions: Split -> its share of the patients; together 1.
        seed: Of the draw.
        labels: One class per patient; every split then has its share of every class.

    Raises:
        ValueError: If an id is repeated, the shares are not shares, a split would be empty, or a
            class has too few patients to be in every split.

    Example:
        >>> split = split_patients(range(10), seed=1)
        >>> [len(ids) for ids in split.values()], split == split_patients(range(9, -1, -1), seed=1)
        ([7, 1, 2], True)
    """
    patients, classes = _patients(ids, labels)
    bounds = [0, *(round(share * len(patients)) for share in accumulate(fractions.values()))]
    sizes = [stop - start for start, stop in pairwise(bounds)]
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(sizes) < 1:
        raise ValueError(
            f"fractions={dict(fractions)} of {len(patients)} patients: shares add up to 1, and "
            "every split gets a patient or more. Pass shares such as FRACTIONS, or more ids."
        )
    split: dict[str, list[Any]] = {}
    rest = patients
    for name, size in zip(list(fractions)[:-1], sizes, strict=False):
        strata = [classes[patient] for patient in rest] if classes else None
        try:
            split[name], rest = train_test_split(
                rest, train_size=size, random_state=seed, stratify=strata
            )
        except ValueError as error:
            raise ValueError(
                f"labels, while {size} of {len(rest)} patients went to {name!r}: {error} Every "
                "class has a patient for every split. Merge rare classes, or pass labels=None."
            ) from None
    split[list(fractions)[-1]] = rest
    return {name: sorted(split[name]) for name in fractions}


def folds(
    ids: Ids,
    num_folds: int,
    seed: int = 0,
    *,
    valid: float = 0.125,
    labels: Sequence[Hashable] | None = None,
) -> list[dict[str, list[Any]]]:
    """Splits for cross-validation: every patient is tested once, and none selects its own model.

    Args:
        ids: Of the patients, each once.
        num_folds: How many splits, 2 or more.
        seed: Of the draw.
        valid: Share of the patients not tested that select the model.
        labels: One class per patient; every part then has its share of every class.

    Returns:
        ``num_folds`` times ``{"train": ..., "valid": ..., "test": ...}``.

    Raises:
        ValueError: As ``split_patients``, or if there are fewer patients than folds, in all or of
            a class.

    Example:
        >>> [fold["test"] for fold in folds(range(9), 3)]
        [[1, 2, 7], [4, 6, 8], [0, 3, 5]]
    """
    patients, classes = _patients(ids, labels)
    kind, strata = KFold, None
    if classes:
        kind, strata = StratifiedKFold, [classes[patient] for patient in patients]
    scarce = min(map(strata.count, set(strata))) if strata else len(patients)
    if not 2 <= num_folds <= scarce:
        raise ValueError(
            f"num_folds={num_folds} with {len(patients)} patients (of the rarest class: {scarce}): "
            "there are 2 folds or more, and a patient of each class in each. Pass fewer folds, or "
            "merge rare classes."
        )
    found = []
    folding = kind(num_folds, shuffle=True, random_state=seed)
    for rest, test in folding.split(patients, strata):
        fold = split_patients(
            [patients[i] for i in rest],
            {"train": 1 - valid, "valid": valid},
            seed=seed,
            labels=[strata[i] for i in rest] if strata else None,
        )
        found.append(fold | {"test": [patients[i] for i in test]})
    return found


def hash_split(split: Mapping[str, Ids]) -> str:
    """The sha256 of who is where; the order of patients and of splits does not matter.

    Example:
        >>> hash_split({"train": [1, 2], "test": [3]})[:8]
        'f6a5c559'
    """
    plain = {name: sorted(part) for name, part in split.items()}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save_split(path: str | Path, split: Mapping[str, Ids]) -> str:
    """Write a split as JSON, whole or not at all.

    Args:
        path: The file; its folder exists.
        split: Split -> its patients.

    Returns:
        Its hash, which the file holds too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "split.json")
        ...     _ = save_split(path, {"train": ["b", "a"], "test": ["c"]})
        ...     load_split(path, ["a", "b", "c"])
        {'train': ['a', 'b'], 'test': ['c']}
    """
    content = {
        "sha256": hash_split(split),
        "split": {name: sorted(part) for name, part in split.items()},
    }
    text = json.dumps(content, indent=1) + "\n"
    write_whole(Path(path), lambda file: file.write_text(text, encoding="utf-8"))
    return hash_split(split)


def load_split(path: str | Path, ids: Ids) -> dict[str, list[Any]]:
    """Read what ``save_split`` wrote, for exactly these patients.

    Args:
        path: The file.
        ids: All patients, as ``split_patients`` got them.

    Raises:
        ValueError: If the file is damaged or was changed, or a patient is unknown, in no split or
            in two.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        split: dict[str, list[Any]] = content["split"]
        same = content["sha256"] == hash_split(split)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}): a split is a JSON file written by save_split. "
            "Save it again."
        ) from None
    dealt = [patient for part in split.values() for patient in part]
    twice = [patient for patient, times in Counter(dealt).items() if times > 1]
    for wrong, who in (
        ("have patients that ids lacks", set(dealt) - set(_plain(ids))),
        ("lack patients of ids", set(_plain(ids)) - set(dealt)),
        ("share patients", twice),
    ):
        if who:
            raise ValueError(
                f"{path}: the splits {wrong}: {sorted(who, key=str)[:5]} ({len(who)} in all). A "
                "split file deals each patient of one data set out once. Pass the ids it was made "
                "for, or make a new split."
            )
    if not same:
        raise ValueError(
            f"{path}: its sha256 is not that of its patients: a split is never edited by hand, "
            "since results refer to its hash. Restore the file, or make a new split."
        )
    return split


def _plain(values: Any) -> list[Any]:
    """Plain Python values, of an array or a column of a table too."""
    return values.tolist() if hasattr(values, "tolist") else [*values]


def _patients(
    ids: Ids, labels: Sequence[Hashable] | None
) -> tuple[list[Any], dict[Any, Hashable] | None]:
    """The patients, sorted, and the class of each."""
    patients = sorted(_plain(ids))
    twice = [patient for patient, times in Counter(patients).items() if times > 1]
    if twice or (labels is not None and len(labels) != len(patients)):
        raise ValueError(
            f"ids has {len(patients)} entries (repeated: {twice[:5]}), labels "
            f"{None if labels is None else len(labels)}: each patient stands there once, with one "
            "class or none. Pass sorted(set(ids)), and a label for each."
        )
    if labels is None:
        return patients, None
    return patients, dict(zip(_plain(ids), _plain(labels), strict=True))
