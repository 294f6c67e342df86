"""New patients in the tables of public releases; labels are not looked at."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmfusion.recipes.cells import Row, TableCoding
from mmfusion.recipes.derm7pt import PHOTOS
from mmfusion.recipes.images import read_photo
from mmfusion.recipes.odir import cells_of
from mmfusion.recipes.odir_format import CELLS, CSV, EYES, Patient, find_images
from mmfusion.recipes.patient_rows import add_table, naming, open_table, read_each
from mmfusion.recipes.reading import Found, Patients, Reading

AGE_SEX = ("Patient Age", "Patient Sex")


def odir_patients(
    table: str | Path, reading: Reading, images: str | Path | None = None
) -> Patients:
    """New patients in one of the tables of ODIR-5K, of which the labels and keywords may lack.

    Args:
        table: With the columns ID, Patient Age, Patient Sex, Left-Fundus and Right-Fundus: a row
            per patient, or, with a column filename, one per photo. CSV, Parquet or xlsx.
        reading: Of the run.
        images: The folder of the photos; None looks for it below the folder of the table.

    Raises:
        ValueError: If the table cannot be read or lacks a column, an id is blank or repeated, or
            there is no folder with photos of the table, or several.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.odir import Odir
        >>> from mmfusion.recipes.odir_synthetic import write_synthetic_odir
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_odir(folder, num_patients=30, image_size=32)
        ...     train = Odir(root, image_size=32)
        ...     patients = odir_patients(root / "full_df.csv", train.reading())
        ...     len(patients) == len(train), list(patients[0]["inputs"])
        (True, ['left', 'right', 'table'])
    """
    columns = [*AGE_SEX, *EYES.values()]
    root, rows, sha256 = open_table(table, CSV, ["ID", *columns])
    photos: dict[str, set[str]] = {}
    for row in rows:
        named = [row["filename"]] if "filename" in row else [row[eye] for eye in EYES.values()]
        photos.setdefault(row["ID"], set()).update(filter(None, named))
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        first.setdefault(row["ID"], row)
    odd = {r["ID"] for r in rows if any(r[name] != first[r["ID"]][name] for name in columns)}
    if "filename" in rows[0]:  # a row per photo
        rows = [*first.values()]
    files = [file for named in photos.values() for file in sorted(named)]
    folder = Path(images).expanduser() if images else find_images(root, files) if files else root
    size = reading.shapes["left"][1:]

    def value(row: Row, eye: str) -> Tensor | None:
        file = row[EYES[eye]]
        return _photo(folder, file, size) if file in photos[row["ID"]] else None

    def read(index: int) -> Found:
        row = rows[index]
        inputs, problems = read_each({eye: partial(value, row, eye) for eye in EYES})
        if row["ID"] in odd:
            problems.append("rows of this patient contradict each other: the first one counts")
        cells = dict(row)
        for column in AGE_SEX:
            pattern, rule = CELLS[column]
            if not re.fullmatch(pattern, row[column], re.ASCII):
                cells[column] = ""
                problems.append(f"table: {column}={row[column]!r} is not {rule}")
        age = int(cells[AGE_SEX[0]]) if cells[AGE_SEX[0]] else None
        patient = Patient(0, 0, age, cells[AGE_SEX[1]], (), ())
        inputs["table"] = torch.tensor(cells_of(patient, reading.coding["placeholder_age"]))
        return inputs, problems

    ids, paths = [row["ID"] for row in rows], [folder / file for file in files]
    return Patients(reading, ids, read, sha256=sha256, files=paths)


def derm7pt_patients(table: str | Path, reading: Reading) -> Patients:
    """New cases in a table like ``meta/meta.csv``, photos in ``images`` beside the table's folder.

    Args:
        table: With case_num, clinic, derm and the input columns of the run. CSV, Parquet or xlsx.
        reading: Of the run.

    Raises:
        ValueError: If the table cannot be read or lacks a column, an id is blank or repeated, or
            there is no folder ``images``.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.derm7pt import Derm7pt
        >>> from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_release(folder, num_cases=30)
        ...     reading = Derm7pt(root, "train", image_size=32).reading()
        ...     patients = derm7pt_patients(root / "meta" / "meta.csv", reading)
        ...     len(patients), list(patients[0]["inputs"])
        (30, ['clinic', 'derm', 'meta'])
    """
    values: dict[str, list[str]] = {}
    for feature in reading.feature_names:
        column, _, word = feature.partition("=")
        values.setdefault(column, []).append(word)
    coding = TableCoding.restored({"values": values, "scales": {}})
    root, rows, sha256 = open_table(table, "meta/meta.csv", ["case_num", *PHOTOS, *values])
    size = reading.shapes["derm"][1:]
    if not (root / "images").is_dir():
        raise ValueError(
            f"{root / 'images'} is not there: photos lie in images/, beside the folder of "
            "the table. Move them there."
        )

    def value(row: Row, name: str) -> Tensor | None:
        repeated = name == "clinic" and row["clinic"] == row["derm"]
        return _photo(root / "images", row[name], size) if row[name] and not repeated else None

    def read(index: int) -> Found:
        row = rows[index]
        found = read_each({name: partial(value, row, name) for name in PHOTOS})
        return add_table(found, "meta", coding, row)

    ids = [row["case_num"] for row in rows]
    files = [root / "images" / row[name] for row in rows for name in PHOTOS if row[name]]
    return Patients(reading, ids, read, sha256=sha256, files=files)


def _photo(images: Path, file: str, size: Sequence[int]) -> Tensor:
    make = partial(read_photo, images, file, (size[0], size[1]))
    return naming(file, make).float() / 255
