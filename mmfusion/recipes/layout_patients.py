"""New patients of data that a layout describes; labels are not looked at."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mmfusion.recipes.cells import TableCoding
from mmfusion.recipes.custom_files import read_modality
from mmfusion.recipes.custom_layout import CustomLayout
from mmfusion.recipes.men_layout import Layout
from mmfusion.recipes.men_table import Patient, box_of
from mmfusion.recipes.men_volumes import VolumeReader, value_of
from mmfusion.recipes.named_files import find_each
from mmfusion.recipes.patient_rows import (
    add_table,
    columns_of,
    naming,
    open_table,
    read_each,
)
from mmfusion.recipes.reading import Found, Patients, Reading


def custom_patients(table: str | Path, reading: Reading) -> Patients:
    """New cases in the layout that a run was trained with.

    Labels, groups and splits are not looked at. Files lie in the folder of the table as those of
    the training did in the folder of the layout.

    Args:
        table: CSV, Parquet or xlsx.
        reading: Of the run.

    Raises:
        ValueError: If the table cannot be read or lacks a column, or an id is blank or repeated.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.custom import Custom
        >>> from mmfusion.recipes.custom_synthetic import write_synthetic_custom
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     toml = write_synthetic_custom(folder, num_cases=40)
        ...     train = Custom(toml, "train", image_size=16, volume_size=(8, 8, 8))
        ...     patients = custom_patients(toml.parent / "table.csv", train.reading())
        ...     sorted(patients[0]["inputs"])
        ['clinic', 'photo', 'scan', 'signal']
    """
    layout = CustomLayout(**reading.coding["layout"])
    columns = [layout.id, *layout.cells, *columns_of(layout.files.values())]
    root, rows, sha256 = open_table(table, layout.table, columns)
    codings = {n: TableCoding.restored(kept) for n, kept in reading.coding["tables"].items()}

    files = {of: find_each(root, place, rows, layout.id) for of, place in layout.files.items()}

    def value(index: int, name: str) -> Tensor | None:
        file = _found(files[name][index])
        if file is None:
            return None
        make = partial(read_modality, root, file, name, layout, reading.shapes[name])
        found = naming(file, make)
        return found.float() / 255 if name in layout.photos else found

    def read(index: int) -> Found:
        row = rows[index]
        found = read_each({name: partial(value, index, name) for name in files})
        for name, coding in codings.items():
            add_table(found, name, coding, row)
        return found

    ids = [row[layout.id] for row in rows]
    return Patients(reading, ids, read, layout=layout, sha256=sha256, files=_paths(files.values()))


def men_patients(table: str | Path, reading: Reading, cache: Path | None = None) -> Patients:
    """New patients of a cohort, in the layout that a run was trained with; as ``custom_patients``.

    Where the layout names label maps or boxes, and a patient lacks one, the middle of the first
    volume is taken, and ``error`` says so.

    Args:
        table: CSV, Parquet or xlsx.
        reading: Of the run.
        cache: Folder for prepared volumes, as for ``Men``.

    Raises:
        ValueError: If the table cannot be read or lacks a column, or an id is blank or repeated.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.men import Men
        >>> from mmfusion.recipes.men_synthetic import write_synthetic_men
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_men(folder, num_patients=30, shape=(12, 12, 8))
        ...     reading = Men(root, "train", size=(16, 16, 8)).reading()
        ...     patients = men_patients(root / "table.csv", reading)
        ...     list(patients[0]["inputs"]), patients[0]["error"]
        (['ce_t1', 'ce_t2_flair', 'adc', 'table'], '')
    """
    coding = reading.coding
    layout = Layout(**coding["layout"])
    cells = [*layout.categorical, *layout.numeric]
    places = columns_of([*layout.volumes.values(), layout.tumour])
    columns = [layout.patient_id, *cells, *layout.box, *places]
    root, rows, sha256 = open_table(table, layout.table, columns)
    size = reading.shapes[next(iter(layout.volumes))][1:]
    load = VolumeReader(layout, size, coding["clip"], coding["margin"], cache)  # type: ignore[arg-type]
    of_table = TableCoding.restored(coding["table"])
    search = partial(find_each, root, rows=rows, id=layout.patient_id)
    named = {of: search(place) for of, place in layout.volumes.items()}
    maps = search(layout.tumour) if layout.tumour else [None] * len(rows)

    def read(index: int) -> Found:
        row = rows[index]
        files, problems = read_each({of: partial(_found, one[index]) for of, one in named.items()})
        tumours, lost = read_each({"tumour": partial(_found, maps[index])})
        tumour = tumours.get("tumour")
        here = {name: file for name, file in files.items() if file is not None}
        boxes, wrong = read_each({"box": partial(box_of, row, layout)})
        box = boxes.get("box")
        patient = Patient(row[layout.patient_id], "", {}, here, tumour, box)
        volumes, broken = load(patient)
        problems += [*lost, *wrong, *(f"{one.column}: {one.reason}" for one in broken)]
        uncut = box is None and (tumour is None or "tumour" in [one.column for one in broken])
        if here and uncut and (layout.tumour or layout.box):
            problems.append("tumour: no box, so that the middle of the first volume was taken")
        inputs, damaged = read_each({n: partial(value_of, kept) for n, kept in volumes.items()})
        problems += damaged
        if "table" in reading.names:
            add_table((inputs, problems), "table", of_table, row)
        return inputs, problems

    ids = [row[layout.patient_id] for row in rows]
    return Patients(
        reading, ids, read, layout=layout, sha256=sha256, files=_paths([*named.values(), maps])
    )


def _found(file: Path | str | None) -> Path | None:
    """The file, if ``find_each`` found nothing wrong."""
    if isinstance(file, str):
        raise ValueError(file)
    return file


def _paths(found: Iterable[Sequence[Path | str | None]]) -> list[Path]:
    return [one for column in found for one in column if isinstance(one, Path)]
