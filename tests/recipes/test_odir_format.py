"""The checks of both tables and of the photos beside: one test for each way they can be wrong."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pandas as pd
import pytest

from mmfusion.recipes.odir_format import (
    COLUMNS,
    COUNTS,
    CSV,
    CSV_COLUMNS,
    LABELS,
    XLSX,
    find_images,
    find_table,
    read_patients,
)
from mmfusion.recipes.odir_synthetic import write_synthetic_odir

NUM_PATIENTS = 40
Change = Callable[[list[list[str]]], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("format")
    return {
        layout: write_synthetic_odir(
            folder / layout, num_patients=NUM_PATIENTS, image_size=16, layout=layout
        )
        for layout in ("kaggle", "xlsx")
    }


@pytest.fixture
def table(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(written["kaggle"] / CSV, tmp_path))


@pytest.fixture
def workbook(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(written["xlsx"] / XLSX, tmp_path))


def edit(path: Path, change: Change) -> None:
    if path.suffix == ".xlsx":
        sheet = [list(row) for row in openpyxl.load_workbook(path).active.values]
        change(sheet)
        book = openpyxl.Workbook()
        for row in sheet:
            book.active.append(row)
        book.save(path)
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def put(position: int, column: str, value: object) -> Change:
    return lambda rows: rows[position + 1].__setitem__(CSV_COLUMNS.index(column), value)


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def pair(table: Path) -> tuple[int, int]:
    """Positions of the two rows of one patient."""
    ids = pd.read_csv(table)["ID"]
    number = ids[ids.duplicated()].iloc[0]
    first, second = ids.index[ids == number]
    return int(first), int(second)


def test_columns_are_those_of_the_releases() -> None:
    assert (len(COLUMNS), len(CSV_COLUMNS)) == (15, 19)
    assert "".join(LABELS) == "NDGCAHMO" == "".join(COUNTS)
    assert sum(COUNTS.values()) == 4115


def test_both_tables_say_the_same_of_the_patients_they_share(written: dict[str, Path]) -> None:
    original = {p.id: p for p in read_patients(written["xlsx"] / XLSX)}
    kaggle = {p.id: p for p in read_patients(written["kaggle"] / CSV)}
    assert len(original) == NUM_PATIENTS > len(kaggle) > 0.9 * NUM_PATIENTS
    for number, patient in kaggle.items():
        other = original[number]
        assert (patient.age, patient.sex, patient.labels) == (other.age, other.sex, other.labels)
        assert set(patient.photos) <= {*other.photos, None}
    assert all(None not in patient.photos for patient in original.values())


def test_patients_come_by_number_whatever_the_order_of_the_rows(table: Path) -> None:
    before = read_patients(table)
    edit(table, lambda rows: rows.__setitem__(slice(1, None), rows[:0:-1]))
    after = read_patients(table)
    assert [p.id for p in after] == sorted(p.id for p in after)
    assert [p._replace(row=0) for p in after] == [p._replace(row=0) for p in before]


def test_the_csv_has_one_row_per_photo_and_the_other_eye_is_none(table: Path) -> None:
    rows = pd.read_csv(table)
    files = [file for patient in read_patients(table) for file in patient.photos if file]
    assert sorted(files) == sorted(rows["filename"])
    single = next(p for p in read_patients(table) if None in p.photos)
    (row,) = rows[rows["ID"] == single.id].to_dict("records")
    assert [file for file in single.photos if file] == [row["filename"]]


def test_keywords_the_stale_path_and_labels_of_single_eyes_are_not_read(table: Path) -> None:
    before = read_patients(table)
    for column in ("filepath", "labels", "target"):
        edit(table, put(0, column, "whatever"))
    words = [CSV_COLUMNS.index(c) for c in CSV_COLUMNS if "Keywords" in c]
    edit(table, lambda rows: [row.__setitem__(i, "cataract") for row in rows[1:] for i in words])
    assert read_patients(table) == before


def test_labels_are_of_the_patient_where_those_of_the_eye_contradict_them(table: Path) -> None:
    rows = pd.read_csv(table)
    labels = {p.id: p.labels for p in read_patients(table)}
    differ = 0
    for row in rows.to_dict("records"):
        assert labels[row["ID"]] == tuple(row[column] for column in LABELS)
        differ += str(list(labels[row["ID"]])) != row["target"]
    assert differ > 0


def test_a_workbook_whose_numbers_are_text_or_floats(workbook: Path) -> None:
    before = read_patients(workbook)
    frame = pd.read_excel(workbook)
    frame.astype({"ID": str, "Patient Age": float, "N": str, "D": float}).to_excel(
        workbook, index=False
    )
    assert read_patients(workbook) == before


def test_blank_age_sex_and_photo_are_missing(workbook: Path) -> None:
    for column in ("Patient Age", "Patient Sex", "Left-Fundus"):
        edit(workbook, put(3, column, None))
    patient = read_patients(workbook)[3]
    assert (patient.age, patient.sex, patient.photos[0]) == (None, "", None)
    assert patient.photos[1] is not None


@pytest.mark.parametrize("kind", ["table", "workbook"])
@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.__setitem__(slice(7, 15), [f"{name} " for name in LABELS.values()]),
        lambda row: row.__delitem__(4),
        lambda row: row.reverse(),
    ],
    ids=["label words", "one eye", "order"],
)
def test_variants_with_another_header(
    kind: str, change: Callable[[list[str]], object], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    edit(path, lambda rows: change(rows[0]))
    expected = ",".join(COLUMNS if kind == "workbook" else CSV_COLUMNS)
    with raises(f"{path}: the header is", f"it must be '{expected}'", f"Take {path.name} from"):
        read_patients(path)


@pytest.mark.parametrize("name", [CSV, XLSX])
def test_a_table_that_is_no_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe nothing")
    kind = "a csv in UTF-8" if name == CSV else "an xlsx"
    with raises(str(tmp_path / name), f"the file is {kind}", f"Take {name} from the release"):
        read_patients(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("ID", "p12", "it holds a whole number"),
        ("ID", "", "it holds a whole number"),
        ("Patient Age", "61.5", "it holds a whole number below 120, or nothing"),
        ("Patient Age", "161", "it holds a whole number below 120, or nothing"),
        ("Patient Sex", "female", "it holds Female, Male, or nothing"),
        ("G", "2", "it holds 0 or 1"),
        ("G", "", "it holds 0 or 1"),
        ("filename", "nobody.jpg", "it repeats Left-Fundus or Right-Fundus"),
    ],
)
def test_a_cell_that_the_release_could_not_hold(
    table: Path, column: str, value: str, rule: str
) -> None:
    edit(table, put(5, column, value))
    with raises(f"{table} row 5 (ID ", f"column {column!r} holds {value!r}", rule, "Take the cell"):
        read_patients(table)


@pytest.mark.parametrize("column", ["ID", "Patient Age", "Patient Sex", "D", "Right-Fundus"])
def test_rows_of_one_patient_that_contradict_each_other(table: Path, column: str) -> None:
    first, second = pair(table)
    row = pd.read_csv(table, dtype=str).iloc[first]
    other = {"Patient Age": "7", "Patient Sex": {"Male": "Female"}.get(row["Patient Sex"], "Male")}
    other |= {"ID": f"0{row['ID']}", "D": str(1 - int(row["D"])), "Right-Fundus": "other.jpg"}
    edit(table, put(second, column, other[column]))
    with raises(
        f"rows {first} and {second} hold {row[column]!r} and {other[column]!r} in column",
        "a patient is the same in all rows",
        f"Take {CSV} from the release",
    ):
        read_patients(table)


def test_a_photo_with_two_rows(table: Path) -> None:
    edit(table, lambda rows: rows.insert(4, rows[2]))
    with raises("rows 1 and 3 name '", "a patient has its own photos", f"Take {CSV} from"):
        read_patients(table)


def test_a_photo_of_two_patients(workbook: Path) -> None:
    file = pd.read_excel(workbook)["Left-Fundus"][2]
    edit(workbook, put(7, "Right-Fundus", file))
    with raises(f"rows 2 and 7 name {file!r}", "a patient has its own photos", "Take ODIR-5K_"):
        read_patients(workbook)


def test_a_patient_with_two_rows_in_the_workbook(workbook: Path) -> None:
    number = pd.read_excel(workbook)["ID"][2]
    edit(workbook, put(7, "ID", number))
    with raises("rows 2 and 7 are of one patient", "a patient has one row", "Take ODIR-5K_"):
        read_patients(workbook)


def test_root_is_a_folder_or_the_table_itself(written: dict[str, Path]) -> None:
    for layout, name in (("kaggle", CSV), ("xlsx", XLSX)):
        assert find_table(written[layout]) == find_table(written[layout] / name)


def test_a_root_without_a_table_says_where_to_get_one(tmp_path: Path) -> None:
    with raises(f"root='{tmp_path}' holds no table", "root is the folder of", "Request the data"):
        find_table(tmp_path)


def test_a_root_with_both_tables(table: Path, workbook: Path) -> None:
    with raises(f"root='{table.parent}' holds two tables", "that file itself", "Pass the file"):
        find_table(table.parent)


def test_images_are_found_below_the_table_and_no_other_file_disturbs(tmp_path: Path) -> None:
    images = tmp_path / "ODIR-5K" / "Training Images"
    images.mkdir(parents=True)
    (images / "0_left.jpg").touch()
    (tmp_path / "ODIR-5K" / "Testing Images").mkdir()
    (tmp_path / "ODIR-5K" / "Testing Images" / "1000_left.jpg").touch()
    assert find_images(tmp_path, ["0_left.jpg", "0_right.jpg"]) == images
    assert find_images(tmp_path / "elsewhere", ["0_left.jpg"], images) == images


@pytest.mark.parametrize("places", [[], ["a", "b"]])
def test_no_or_two_folders_of_images(tmp_path: Path, places: list[str]) -> None:
    for place in places:
        (tmp_path / place).mkdir()
        (tmp_path / place / "0_left.jpg").touch()
    listed = ", ".join(f"{tmp_path / place} (1)" for place in places) or "no folder"
    with raises(f"of 2 photos in the table there are some in {listed}", "one folder", "images="):
        find_images(tmp_path, ["0_left.jpg", "0_right.jpg"])


def test_a_given_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "0_left.jpg").touch()
    with raises("some in no folder, looking in", "elsewhere", "Pass images="):
        find_images(tmp_path, ["0_left.jpg"], tmp_path / "elsewhere")
