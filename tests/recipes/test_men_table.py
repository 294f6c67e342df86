"""Layout, table and splits of a cohort: what is meant is found, what is wrong is named."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mmfusion.recipes.men_layout import BRATS_LAYOUT, MEN_LAYOUT, Layout
from mmfusion.recipes.men_table import check_split, read_patients, read_split

TOML = """
table = "clinic.xlsx"
patient_id = "ID"
label = "WHO"
categorical = ["sex"]
numeric = ["age"]
tumour_labels = [1, 3]
box = ["x0", "y0", "z0", "x1", "y1", "z1"]
[volumes]
t1 = "scans/{site}-{ID}/*t1*.nii.gz"
adc = "path of adc"
[classes]
1 = "grade1"
2 = "grade2"
"""
BOX = {"x0": "-1", "y0": "-2", "z0": "-3", "x1": "1", "y1": "2.5", "z1": "3"}
ROWS = [
    {"ID": "007", "site": "A[1]", "sex": "f", "age": "40", "WHO": "1", "path of adc": "x/7.nii"},
    {"ID": "8", "site": "B", "sex": " m ", "age": "", "WHO": "2", "path of adc": ""},
]


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "cohort.toml").write_text(TOML, encoding="utf-8")
    return dataclasses.replace(Layout.from_toml(tmp_path / "cohort.toml"), table="clinic.csv")


def put(root: Path, *changes: dict[str, str], table: str = "clinic.csv") -> None:
    rows = [row | BOX | change for row, change in zip(ROWS, (*changes, {}, {}), strict=False)]
    frame = pd.DataFrame(rows)
    if table.endswith(".xlsx"):
        frame.to_excel(root / table, index=False)
    else:
        frame.to_csv(root / table, index=False)
    folder = root / "scans" / "A[1]-007"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ax_t1_gd.nii.gz").touch()


def test_a_volume_of_two_patients_is_refused(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path, {"ID": "1"}, {"ID": "12"})
    (tmp_path / "12_t1.nii").touch()
    close = dataclasses.replace(layout, volumes={"t1": "{ID}*_t1.nii"})
    with raises("12_t1.nii fits '{ID}*_t1.nii' for '1' and for '12'", "one of them", "Narrow"):
        read_patients(tmp_path, close)


def test_rows_that_end_in_a_comma_do_not_move_the_cells(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path)
    path = tmp_path / layout.table
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row + "," for row in rows)]))
    with raises("a cell more than the 12 columns", "each cell has a column", "Remove the comma"):
        read_patients(tmp_path, layout)


@pytest.mark.parametrize("table", ["clinic.csv", "clinic.xlsx"])
def test_a_mapping_in_toml(tmp_path: Path, layout: Layout, table: str) -> None:
    put(tmp_path, table=table)
    first, second = read_patients(tmp_path, dataclasses.replace(layout, table=table))
    assert layout.names == ("t1", "adc", "table")
    assert (first.patient_id, first.label, first.cells) == (
        "007",
        "grade1",
        {"sex": "f", "age": "40"},
    )
    t1 = tmp_path / "scans/A[1]-007/ax_t1_gd.nii.gz"
    assert first.files == {"t1": t1, "adc": tmp_path / "x/7.nii"}
    assert (second.label, second.cells, second.files) == ("grade2", {"sex": "m", "age": ""}, {})
    assert first.tumour is None
    assert first.box is not None
    assert first.box.tolist() == [[-1, -2, -3], [1, 2.5, 3]]


def test_ids_that_look_alike_stay_apart(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path, {}, {"ID": "7"})
    assert [patient.patient_id for patient in read_patients(tmp_path, layout)] == ["007", "7"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (({}, {"ID": "007"}), ("clinic.csv row 1: ID='007' is that of row 0 too", "one row per")),
        (({"ID": " "},), ("clinic.csv row 0: ID='' is blank", "Name the patient")),
        (({}, {"WHO": "III"}), ("row 1 (8): WHO='III': labels are '1', '2'.", "Correct the cell")),
        (({}, {"WHO": ""}), ("row 1 (8): WHO=''", "Correct the cell")),
        (({"x0": "2"},), ("007: x0, y0, z0, x1, y1, z1 = 2, -2", "lowest x, y, z", "Correct")),
        (({"x0": ""},), ("007: x0, y0, z0, x1, y1, z1 = , -2", "or six blank cells")),
        (({"site": "B"},), ("no patient has 't1' by 'scans/{site}", "or leave the volume out")),
    ],
)
def test_wrong_rows(tmp_path: Path, layout: Layout, changes: Any, parts: Any) -> None:
    put(tmp_path, *changes)
    with raises(*parts):
        read_patients(tmp_path, layout)


def test_six_blank_cells_are_no_box(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path, dict.fromkeys(BOX, ""))
    assert read_patients(tmp_path, layout)[0].box is None


def test_a_table_that_lacks_columns_or_is_none(tmp_path: Path, layout: Layout) -> None:
    with raises("clinic.csv cannot be read (", "it is a table", "Correct the table, or the layout"):
        read_patients(tmp_path, layout)
    (tmp_path / "clinic.csv").write_text("ID,WHO,sex\n1,1,f\n")
    with raises("has the columns ID, WHO, sex", "must have age, x0", "path of adc too"):
        read_patients(tmp_path, layout)
    (tmp_path / "clinic.xlsx").write_text("no workbook")
    with raises("clinic.xlsx cannot be read ("):
        read_patients(tmp_path, dataclasses.replace(layout, table="clinic.xlsx"))


def test_parquet_has_types_and_needs_a_package(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    layout = dataclasses.replace(layout, table="clinic.parquet")
    frame = pd.DataFrame([row | BOX for row in ROWS])
    typed = frame.assign(WHO=[1, 2], age=[40.0, float("nan")], **{"path of adc": ["x/7.nii", None]})
    monkeypatch.setattr(pd, "read_parquet", lambda path: typed)
    first, second = read_patients(tmp_path, layout)
    assert (first.label, first.cells["age"], second.cells["age"]) == ("grade1", "40.0", "")
    assert second.files == {}

    def lacking(path: Path) -> None:
        raise ImportError("no engine for parquet")

    monkeypatch.setattr(pd, "read_parquet", lacking)
    with raises("clinic.parquet: no engine", "pip install pyarrow", "save the table as CSV"):
        read_patients(tmp_path, layout)


def test_two_files_that_fit_and_braces_that_do_not(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path)
    (tmp_path / "scans/A[1]-007/.hidden_t1.nii.gz").touch()
    assert "t1" in read_patients(tmp_path, layout)[0].files
    (tmp_path / "scans/A[1]-007/t1_again.nii.gz").touch()
    with raises("ax_t1_gd.nii.gz, ", "t1_again.nii.gz in", "all fit 'scans/", "Remove the others"):
        read_patients(tmp_path, layout)
    with raises("pattern '{hospital}/a.nii' of the layout", "a column of the table (ID, site"):
        read_patients(tmp_path, dataclasses.replace(layout, volumes={"t1": "{hospital}/a.nii"}))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("table = ", ("cohort.toml: ", "TOML file in UTF-8", "Correct it")),
        ('tabel = "a"\n' + TOML, ("tabel = 'a'", "a layout has volumes, classes, table")),
        (TOML.replace('["age"]', '"age"'), ("numeric = 'age'", "Correct the file")),
        (TOML.replace("[1, 3]", '["1"]'), ("tumour_labels = ['1']", "list of integers")),
        (TOML.partition("[volumes]")[0], ("no volumes, no classes", "needed")),
        (TOML.replace('["sex"]', '["age"]'), ("used twice: ['age']", "Correct the layout")),
        (TOML.replace('"x0", ', ""), ("box=['y0'", "a box has six columns")),
        (TOML.replace("adc =", "table ="), ("used twice: ['table']", "'table' for the table")),
    ],
)
def test_wrong_layouts(tmp_path: Path, text: str, parts: Any) -> None:
    (tmp_path / "cohort.toml").write_text(text, encoding="utf-8")
    with raises(*parts):
        Layout.from_toml(tmp_path / "cohort.toml")


def test_a_layout_that_is_not_there(tmp_path: Path) -> None:
    with raises("cohort.toml", "a layout is a TOML file"):
        Layout.from_toml(tmp_path / "cohort.toml")


def test_the_layout_of_brats(tmp_path: Path) -> None:
    for number, lacking in ((4, ""), (5, "t2f")):
        name = f"BraTS-MEN-0000{number}-000"
        (tmp_path / name).mkdir()
        for kind in {"t1n", "t1c", "t2w", "t2f", "seg"} - {lacking}:
            (tmp_path / name / f"{name}-{kind}.nii.gz").touch()
    (tmp_path / "table.csv").write_text(
        "patient_id,grade\nBraTS-MEN-00004-000,1\nBraTS-MEN-00005-000,3\n"
    )
    first, second = read_patients(tmp_path, BRATS_LAYOUT)
    assert BRATS_LAYOUT.names == ("t1n", "t1c", "t2w", "t2f")
    assert [first.label, second.label] == ["grade1", "grade3"]
    assert list(first.files) == ["t1n", "t1c", "t2w", "t2f"]
    assert list(second.files) == ["t1n", "t1c", "t2w"]
    assert first.files["t1c"].name == "BraTS-MEN-00004-000-t1c.nii.gz"
    assert first.tumour == tmp_path / "BraTS-MEN-00004-000/BraTS-MEN-00004-000-seg.nii.gz"


def test_the_default_layout_is_that_of_the_page() -> None:
    assert MEN_LAYOUT.names == ("ce_t1", "ce_t2_flair", "adc", "table")
    assert list(MEN_LAYOUT.classes.values()) == ["grade1", "grade2_invasive", "grade2_noninvasive"]


# Splits ------------------------------------------------------------------------------------------

LABELS = {str(i): "ab"[i % 2] for i in range(6)}
GOOD = {"train": ["0", "1"], "valid": ["2", "3"], "test": ["4", "5"]}


def test_a_split_file(tmp_path: Path) -> None:
    rows = [(i, split) for split, ids in GOOD.items() for i in ids]
    frame = pd.DataFrame(rows, columns=["patient_id", "split"])
    frame.to_csv(tmp_path / "0.csv", index=False)
    assert read_split(tmp_path / "0.csv") == GOOD
    check_split(GOOD, LABELS, "ab")
    frame.replace("valid", "val").to_csv(tmp_path / "1.csv", index=False)
    with raises("1.csv row 2 (2): split='val'", "one of train, valid, test", "split_patients"):
        read_split(tmp_path / "1.csv")
    with raises("2.csv cannot be read", "pass splits="):
        read_split(tmp_path / "2.csv")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"test": ["4", "5", "9"]}, "patients that the table lacks: 9 (1 in all)"),
        ({"test": ["4"]}, "patients in no split: 5"),
        ({"test": ["4", "5", "0"]}, "patients named twice: 0"),
        ({"valid": [], "test": ["2", "3", "4", "5"]}, "splits without a patient: valid"),
        ({"val": []}, "splits of another name: val"),
        ({"valid": ["2"], "test": ["3", "4", "5"]}, "valid has no patient of b"),
        ({"train": ["1"], "test": ["0", "4", "5"]}, "train has no patient of a"),
    ],
)
def test_wrong_splits(change: dict[str, list[str]], what: str) -> None:
    with raises(f"splits: {what}", "Split anew with"):
        check_split(GOOD | change, LABELS, "ab")


def test_a_class_that_nobody_has() -> None:
    with raises("splits: train has no patient of c", "merge classes in the layout"):
        check_split(GOOD, LABELS, "abc")
