"""ODIR-5K on disk: the two tables of its patients, what a cell may hold, and the photos beside.

What the reader (``odir``) and the writer of a synthetic release (``odir_synthetic``) share.
"""

import itertools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from mmfusion.recipes.tables import read_rows

XLSX, CSV = "ODIR-5K_Training_Annotations(Updated)_V2.xlsx", "full_df.csv"
# Label column -> class, and how many of the 3500 patients have it.
LABELS = {
    "N": "normal",
    "D": "diabetes",
    "G": "glaucoma",
    "C": "cataract",
    "A": "AMD",
    "H": "hypertension",
    "M": "myopia",
    "O": "other",
}
COUNTS = dict(zip(LABELS, (1140, 1128, 215, 212, 164, 103, 174, 979), strict=True))
NUM_PATIENTS, NUM_IDS = 3500, 4785
EYES = {"left": "Left-Fundus", "right": "Right-Fundus"}
KEYWORDS = {"left": "Left-Diagnostic Keywords", "right": "Right-Diagnostic Keywords"}
COLUMNS = ("ID", "Patient Age", "Patient Sex", *EYES.values(), *KEYWORDS.values(), *LABELS)
CSV_COLUMNS = (*COLUMNS, "filepath", "labels", "target", "filename")  # one row per photo
SEXES = ("Female", "Male")
CELLS = {
    "ID": (r"\d{1,9}", "a whole number"),
    "Patient Age": (r"\d?\d?|1[01]\d", "a whole number below 120, or nothing"),
    "Patient Sex": ("|".join((*SEXES, "")), "Female, Male, or nothing"),
    **dict.fromkeys(LABELS, ("[01]", "0 or 1")),
}


class Patient(NamedTuple):
    """What the tables say of one patient.

    Attributes:
        id: The patient's ID.
        row: 0-based position in the table, of the first of the patient's rows.
        age: In years; None where the cell is blank.
        sex: ``"Female"``, ``"Male"``, or blank.
        labels: The eight labels of the patient, 0 or 1, in the order of ``LABELS``.
        photos: The file of each eye, left and right; None where the table has none.
    """

    id: int
    row: int
    age: int | None
    sex: str
    labels: tuple[int, ...]
    photos: tuple[str | None, ...]


def find_table(root: str | Path) -> Path:
    """The table of a release: ``root`` itself, or one of the two known names inside it.

    Args:
        root: What the user calls the data root.

    Raises:
        ValueError: If there is none, or there are both.
    """
    root = Path(root).expanduser()
    found = [path for path in (root, root / CSV, root / XLSX) if path.is_file()]
    if len(found) != 1:
        held = "no table" if not found else "two tables"
        raise ValueError(
            f"root={str(root)!r} holds {held}: root is the folder of {CSV} or of {XLSX}, or that "
            "file itself. Pass the file. Request the data from odir2019.grand-challenge.org, or "
            "write a stand-in with write_synthetic_odir."
        )
    return found[0]


def read_patients(table: Path) -> list[Patient]:
    """Read either table, check every cell that counts, and return the patients by ID.

    Neither keywords nor the labels of single eyes are looked at, nor is the stale ``filepath``.

    Args:
        table: The xlsx, one row per patient, or the csv, one row per photo.

    Raises:
        ValueError: If the header, a cell, or what rows say of one patient or photo is not as in the
            release.
    """
    per_photo = table.suffix.lower() != ".xlsx"
    patients: dict[int, tuple[int, dict[str, str]]] = {}
    owners: dict[str, int] = {}  # photo -> its row
    for position, row in enumerate(read_rows(table, CSV_COLUMNS if per_photo else COLUMNS)):
        _check_cells(table, position, row)
        first, other = patients.setdefault(int(row["ID"]), (position, row))
        if first != position and not per_photo:
            _refuse(table, first, position, "are of one patient", "has one row")
        for column in (*CELLS, *EYES.values()):
            if row[column] != other[column]:
                values = f"hold {other[column]!r} and {row[column]!r} in column {column!r}"
                _refuse(table, first, position, values, "is the same in all rows of its ID")
        for photo in [row["filename"]] if per_photo else [row[name] for name in EYES.values()]:
            if photo and owners.setdefault(photo, position) != position:
                _refuse(table, owners[photo], position, f"name {photo!r}", "has its own photos")
    return [
        Patient(
            id=number,
            row=position,
            age=int(row["Patient Age"]) if row["Patient Age"] else None,
            sex=row["Patient Sex"],
            labels=tuple(int(row[column]) for column in LABELS),
            photos=tuple(row[name] if row[name] in owners else None for name in EYES.values()),
        )
        for number, (position, row) in sorted(patients.items())
    ]


def find_images(folder: Path, files: Collection[str], images: str | Path | None = None) -> Path:
    """The one folder, ``images`` or any below ``folder``, that holds photos of the table.

    Args:
        folder: Where to look.
        files: The photos.
        images: The only folder that may be taken.

    Raises:
        ValueError: If there is none, or there are several.
    """
    walk = os.walk(folder)
    if images is not None:
        walk = itertools.islice(os.walk(Path(images).expanduser()), 1)
    wanted = set(files)
    held = {Path(place): len(wanted.intersection(names)) for place, _, names in walk}
    found = sorted(place for place, number in held.items() if number)
    if len(found) != 1:
        places = ", ".join(f"{place} ({held[place]})" for place in found) or "no folder"
        raise ValueError(
            f"of {len(files)} photos in the table there are some in {places}, looking in "
            f"{images or folder}: one folder holds them. Pass images=, the path of that folder."
        )
    return found[0]


def _check_cells(table: Path, position: int, row: Mapping[str, str]) -> None:
    for column, (pattern, rule) in CELLS.items():
        if not re.fullmatch(pattern, row[column], re.ASCII):
            raise ValueError(
                f"{table} row {position} (ID {row['ID']}), column {column!r} holds "
                f"{row[column]!r}: it holds {rule}. Take the cell from the release."
            )
    photos = [row[column] for column in EYES.values()]
    if row.get("filename", photos[0]) not in photos:
        raise ValueError(
            f"{table} row {position} (ID {row['ID']}), column 'filename' holds "
            f"{row['filename']!r}: it repeats Left-Fundus or Right-Fundus, {photos}. Take the cell "
            "from the release."
        )


def _refuse(table: Path, first: int, second: int, value: str, rule: str) -> NoReturn:
    raise ValueError(
        f"{table} rows {first} and {second} {value}: a patient {rule}. Take {table.name} from the "
        "release, unchanged."
    )
