"""What a run keeps, so that new patients are read as those it was trained on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from mmfusion.evaluation.scores import Classes, flat
from mmfusion.recipes.reporting import write_json

FILE = "reading.json"
Found = tuple[dict[str, Tensor | None], list[str]]  # inputs, and what could not be read


@dataclass(frozen=True)
class Reading:
    """How the patients of a run were read: plain data, ``reading.json`` in its folder.

    Args:
        names: The modalities, in the order of the columns of ``present``.
        shapes: Shape of each modality, as ``presence.collate`` takes it.
        classes: Names of the logits, or task -> its classes, as ``evaluate`` takes them.
        feature_names: The columns of the table, or table -> its columns.
        train_ids: ``sample_ids`` of the training set, as text -> id of the patient.
        coding: What else the reader learned from training rows or was told: layout, scales.
        is_synthetic: Whether the training data were drawn, so that predictions mean nothing.

    Example:
        >>> import tempfile
        >>> reading = Reading(("lab",), {"lab": (2,)}, ("no", "yes"), train_ids={"7": "Anna"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reading.save(Path(folder))
        ...     Reading.load(Path(folder)) == reading
        True
    """

    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    classes: Classes
    feature_names: Any = ()
    train_ids: Mapping[str, str] = field(default_factory=dict)
    coding: Mapping[str, Any] = field(default_factory=dict)
    is_synthetic: bool = False

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Patients of the training set -> their ``sample_ids``."""
        return {patient: int(number) for number, patient in self.train_ids.items()}

    def save(self, folder: Path) -> None:
        """Write ``reading.json``, whole or not at all."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Reading":
        """What ``save`` wrote.

        Raises:
            ValueError: If the folder holds no such file.
        """
        try:
            kept = _tuples(json.loads((folder / FILE).read_text(encoding="utf-8")))
            return cls(**kept)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / FILE} cannot be read ({error}): the folder of a run says how its "
                "patients were read. Pass the folder that a training wrote, or train again."
            ) from None


class Patients(Dataset[dict[str, Any]]):
    """New patients, with or without labels, each read when it is asked for, as the run's own were.

    An item is ``{"inputs": {modality: tensor or None}, "error": str}``. What cannot be read is
    absent, and ``error`` says why; what is absent because the table says so is no error.

    Args:
        reading: Of the run whose model will predict.
        ids: Of the patients, each once.
        read: Number of a patient -> inputs, and what could not be read.
        layout: Of the format, where it has one.
        sha256: Of the table, so that the rows of two are never mixed.
        files: What the table names; predictions made from a former state of them are not kept.

    Attributes:
        names: As those of ``reading``; so ``shapes`` and ``feature_names``.
        class_names: All classes, in the order of the logits.
        num_classes: How many they are.
        state: The sha256 of place, size and time of the files.

    Raises:
        ValueError: If an id is blank or repeated, or there is none.

    Example:
        >>> import torch
        >>> reading = Reading(("lab",), {"lab": (2,)}, ("no", "yes"))
        >>> patients = Patients(reading, ["Bea"], lambda row: ({"lab": torch.ones(2)}, []))
        >>> patients[0]["inputs"]["lab"].tolist(), patients[0]["error"]
        ([1.0, 1.0], '')
    """

    def __init__(
        self,
        reading: Reading,
        ids: Sequence[str],
        read: Callable[[int], Found],
        *,
        layout: Any = None,
        sha256: str = "",
        files: Iterable[Path] = (),
    ) -> None:
        wrong: list[str] = [id for id in ids if not id] or sorted(_twice(ids))
        if wrong or not ids:
            raise ValueError(
                f"ids of {len(ids)} patients, blank or repeated: {wrong[:5]}: each patient has a "
                "row and an id of its own. Name the patients, or join the rows."
            )
        self.reading, self.ids, self.read = reading, tuple(ids), read
        self.layout, self.sha256, self.state = layout, sha256, _state_of(files)
        self.names, self.shapes = reading.names, reading.shapes
        self.feature_names = reading.feature_names
        self.class_names = flat(reading.classes)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, problems = self.read(index)
        return {
            "inputs": {name: inputs.get(name) for name in self.names},
            "error": "; ".join(problems),
        }


def _state_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            now = file.stat()
            facts = str(file), now.st_size, now.st_mtime_ns
        except (OSError, ValueError):  # not there, or no name that a file could have
            facts = str(file), 0, 0
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def _twice(ids: Sequence[str]) -> set[str]:
    return {id for id, count in Counter(ids).items() if count > 1}


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
