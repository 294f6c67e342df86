"""Read the table of a cohort, find the files of its patients, and check its splits."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmfusion.recipes.men_layout import MEN_LAYOUT, Layout
from mmfusion.recipes.named_files import claimed_twice, find_file

SPLITS = ("train", "valid", "test")


class Patient(NamedTuple):
    """One row of the table, and the files that belong to it.

    Attributes:
        patient_id: As the table spells it.
        label: The class.
        cells: Input columns -> cell, blank where the table is.
        files: Volume -> file; without those that the patient lacks.
        tumour: The label map, or None.
        box: ``(2, 3)``, mm, from columns of the table, or None.
    """

    patient_id: str
    label: str
    cells: dict[str, str]
    files: dict[str, Path]
    tumour: Path | None
    box: NDArray[np.float64] | None


def read_patients(root: str | Path, layout: Layout = MEN_LAYOUT) -> list[Patient]:
    """Read the table and find the files of every patient; no volume is opened.

    Args:
        root: The folder of the cohort.
        layout: Where it keeps what.

    Returns:
        The patients, in the order of the table.

    Raises:
        ValueError: If the table is not there or lacks a column, an id is blank or repeated, a label
            is unknown, a box is none, a pattern fits two files or gives one file to two rows, or no
            patient has some volume.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.men_synthetic import write_synthetic_men
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_men(folder, num_patients=30, shape=(12, 12, 8))
        ...     patient = read_patients(root)[0]
        >>> patient.patient_id, sorted(patient.cells)[:3]
        ('0001', ['adc_value', 'age', 'location'])
    """
    root = Path(root).expanduser()
    path = root / layout.table
    rows = _read_table(path, layout)
    seen: dict[str, int] = {}
    for position, row in enumerate(rows):
        patient, cell = row[layout.patient_id], row[layout.label]
        if not patient or patient in seen:
            raise ValueError(
                f"{path} row {position}: {layout.patient_id}={patient!r} is "
                f"{f'that of row {seen[patient]} too' if patient else 'blank'}: the table has one "
                "row per patient. Name the patient, or join the rows."
            )
        seen[patient] = position
        if cell not in layout.classes:
            raise ValueError(
                f"{path} row {position} ({patient}): {layout.label}={cell!r}: labels are "
                f"{', '.join(map(repr, layout.classes))}. Correct the cell, or the classes of the "
                "layout."
            )
    patients = [_patient(root, row, layout) for row in rows]
    for name, place in {**layout.volumes, "": layout.tumour}.items():
        files = [patient.files.get(name) if name else patient.tumour for patient in patients]
        for told in claimed_twice(place, rows, files, layout.patient_id).values():
            raise ValueError(told)
    for name in layout.volumes:
        if not any(name in patient.files for patient in patients):
            raise ValueError(
                f"root={str(root)!r}: no patient has {name!r} by {layout.volumes[name]!r}: a "
                "layout names volumes that some patient has. Correct the pattern or column, or "
                "leave the volume out of the layout."
            )
    return patients


def read_split(path: Path) -> dict[str, list[str]]:
    """Read ``splits/<n>.csv``: two columns, ``patient_id`` and ``split`` (train, valid or test).

    Args:
        path: The file.

    Raises:
        ValueError: If it is not there, lacks a column, or a split has another name.
    """
    cure = "Correct it, or pass splits=mmfusion.recipes.splits.split_patients(...) instead."
    rows = read_table(path, ("patient_id", "split"), cure)
    for position, row in enumerate(rows):
        if row["split"] not in SPLITS:
            raise ValueError(
                f"{path} row {position} ({row['patient_id']}): split={row['split']!r}: a split is "
                f"one of {', '.join(SPLITS)}. {cure}"
            )
    return {s: [row["patient_id"] for row in rows if row["split"] == s] for s in SPLITS}


def check_split(
    splits: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
    classes: Sequence[str],
    cure: str = "Split anew with mmfusion.recipes.splits.split_patients(ids, labels=labels)",
) -> None:
    """Refuse splits that share, lose or invent a patient, or cannot train and select a model.

    Args:
        splits: Split -> ids of its patients.
        labels: Id of every patient of the table -> class.
        classes: All classes.
        cure: The end of a message.

    Raises:
        ValueError: If so, by name.

    Example:
        >>> labels = {"1": "a", "2": "a", "3": "a"}
        >>> check_split({"train": ["1"], "valid": ["2"], "test": ["3"]}, labels, ["a"])
    """
    dealt = [patient for split in SPLITS for patient in splits.get(split, ())]
    wrong = {
        "patients that the table lacks": set(dealt) - set(labels),
        "patients in no split": set(labels) - set(dealt),
        "patients named twice": {patient for patient in dealt if dealt.count(patient) > 1},
        "splits of another name": set(splits) - set(SPLITS),
        "splits without a patient": {split for split in SPLITS if not splits.get(split)},
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(
                f"splits: {what}: {', '.join(sorted(names)[:5])} ({len(names)} in all): train, "
                f"valid and test together hold every patient of the table once. {cure}."
            )
    for split in ("train", "valid"):
        if lacking := set(classes) - {labels[patient] for patient in splits[split]}:
            raise ValueError(
                f"splits: {split} has no patient of {', '.join(sorted(lacking))}: a class is "
                f"trained on, and selects the model. {cure}, or merge classes in the layout."
            )


def _read_table(path: Path, layout: Layout) -> list[dict[str, str]]:
    places = (*layout.volumes.values(), *([layout.tumour] if layout.tumour else []))
    columns = (
        layout.patient_id,
        layout.label,
        *layout.categorical,
        *layout.numeric,
        *layout.box,
        *(place for place in places if "{" not in place),
    )
    return read_table(path, columns, "Correct the table, or the layout.")


def read_table(path: Path, columns: Iterable[str], cure: str) -> list[dict[str, str]]:
    """All cells as stripped text, so that ids keep their zeros; blank cells are ""."""
    plain: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".xlsx":
            table = pd.read_excel(path, **plain)
        else:
            table = pd.read_csv(path, **plain, encoding="utf-8-sig")
    except ImportError as error:
        raise ValueError(
            f"{path}: {error}: reading it needs another package. Install it (pip install pyarrow "
            'for Parquet, "mmfusion[examples]" for xlsx), or save the table as CSV.'
        ) from None
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} cannot be read ({error}): it is a table. {cure}") from None
    if not isinstance(table.index, pd.RangeIndex) and path.suffix != ".parquet":
        raise ValueError(
            f"{path}: rows have a cell more than the {table.shape[1]} columns of the header, which "
            f"would move all cells: each cell has a column. Remove the comma that ends rows. {cure}"
        )
    if lacking := [column for column in columns if column not in table.columns]:
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table.columns))}: it must have "
            f"{', '.join(lacking)} too. {cure}"
        )
    table = table.astype(object).where(table.notna(), "")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in table.to_dict("records")]


def _patient(root: Path, row: dict[str, str], layout: Layout) -> Patient:
    files = {name: find_file(root, place, row) for name, place in layout.volumes.items()}
    return Patient(
        row[layout.patient_id],
        layout.classes[row[layout.label]],
        {column: row[column] for column in (*layout.categorical, *layout.numeric)},
        {name: file for name, file in files.items() if file is not None},
        find_file(root, layout.tumour, row) if layout.tumour else None,
        box_of(row, layout),
    )


def box_of(row: dict[str, str], layout: Layout) -> NDArray[np.float64] | None:
    """The tumour box in the columns of a row, ``(2, 3)`` in mm; None where they are blank.

    Raises:
        ValueError: If they hold something else.
    """
    cells = [row[column] for column in layout.box]
    if not any(cells):
        return None
    try:
        box = np.array([float(cell) for cell in cells]).reshape(2, 3)
    except ValueError:
        box = np.full((2, 3), np.nan)
    if not (box[0] < box[1]).all() or not np.isfinite(box).all():
        raise ValueError(
            f"{row[layout.patient_id]}: {', '.join(layout.box)} = {', '.join(cells)}: a box is "
            "lowest x, y, z and highest x, y, z in mm, or six blank cells. Correct the cells."
        )
    return box
