"""The checks of the release on disk: one test for each way it can be wrong."""

import csv
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfusion.recipes.derm7pt_format import (
    COLUMNS,
    CRITERIA,
    GROUPS,
    VALUES,
    find_release,
    read_splits,
    read_table,
)
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release

NUM_CASES = 30


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("format") / "release_v0"
    return write_synthetic_release(root, num_cases=NUM_CASES, image_size=(16, 24))


@pytest.fixture
def meta(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "meta", tmp_path / "meta"))


def edit(path: Path, change: Callable[[list[list[str]]], object]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def put(position: int, column: str, value: str) -> Callable[[list[list[str]]], object]:
    return lambda rows: rows[position + 1].__setitem__(COLUMNS.index(column), value)


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_groups_are_numbered_as_upstream_numbers_them() -> None:
    classes = {column: list(dict.fromkeys(groups.values())) for column, groups in GROUPS.items()}
    assert classes == {
        "diagnosis": ["BCC", "NEV", "MEL", "MISC", "SK"],
        "pigment_network": ["absent", "typical", "atypical"],
        "streaks": ["absent", "regular", "irregular"],
        "pigmentation": ["absent", "regular", "irregular"],
        "regression_structures": ["absent", "present"],
        "dots_and_globules": ["absent", "regular", "irregular"],
        "blue_whitish_veil": ["absent", "present"],
        "vascular_structures": ["absent", "regular", "irregular"],
    }


def test_groups_of_the_cells_are_those_of_the_release() -> None:
    assert {
        kind: sum(n for v, n in VALUES["diagnosis"].items() if GROUPS["diagnosis"][v] == kind)
        for kind in ("BCC", "NEV", "MEL", "MISC", "SK")
    } == {"BCC": 42, "NEV": 575, "MEL": 252, "MISC": 97, "SK": 45}
    vessels = GROUPS["vascular_structures"]
    assert [v for v in vessels if vessels[v] == "irregular"] == ["dotted", "linear irregular"]
    assert [v for v in vessels if vessels[v] == "absent"] == ["absent"]
    shades = GROUPS["pigmentation"]
    assert [v for v in shades if shades[v] == "regular"] == ["localized regular", "diffuse regular"]


def test_every_column_counts_the_1011_cases_of_the_release() -> None:
    assert (len(COLUMNS), len(CRITERIA)) == (19, 7)
    assert {sum(counts.values()) for counts in VALUES.values()} == {1011}


def test_root_is_the_release_or_its_parent(written: Path) -> None:
    assert find_release(written) == written
    assert find_release(written.parent) == written


def test_a_root_without_a_release_says_where_to_get_one(tmp_path: Path) -> None:
    with raises(str(tmp_path), "root is the unpacked release_v0", "Request the data from"):
        find_release(tmp_path)


def test_table_keeps_every_row_in_order(meta: Path) -> None:
    table = read_table(meta / "meta.csv")
    assert [row["case_num"] for row in table] == [str(i + 1) for i in range(NUM_CASES)]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(meta: Path) -> None:
    path = meta / "meta.csv"
    table = read_table(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_table(path) == table


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0].reverse(),
        lambda rows: rows[0].__setitem__(1, "Diagnosis"),
        lambda rows: [row.pop() for row in rows],
        lambda rows: rows.clear(),
    ],
    ids=["order", "spelling", "too few", "empty file"],
)
def test_wrong_header(meta: Path, change: Callable[[list[list[str]]], object]) -> None:
    edit(meta / "meta.csv", change)
    with raises("meta.csv: the header is", "it must be 'case_num,diagnosis", "Take meta.csv from"):
        read_table(meta / "meta.csv")


def test_a_row_with_a_cell_too_many(meta: Path) -> None:
    edit(meta / "meta.csv", lambda rows: rows[4].append("x"))
    with raises("meta.csv row 3 has 20 cells", "each row has 19", "Take meta.csv from the release"):
        read_table(meta / "meta.csv")


def test_a_table_that_is_not_utf8(meta: Path) -> None:
    (meta / "meta.csv").write_bytes(b"caf\xe9\n")
    with raises("can't decode", "the file is a csv in UTF-8", "Take meta.csv from the release"):
        read_table(meta / "meta.csv")


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        ("diagnosis", "Melanoma", "'clark nevus'"),
        ("diagnosis", "", "'clark nevus'"),
        ("streaks", "", "'absent', 'regular', 'irregular'"),
        ("sex", "F", "'female', 'male'"),
        ("elevation", "flat ", "'flat', 'palpable', 'nodular'"),
        ("seven_point_score", "11", "'0', '1'"),
    ],
)
def test_an_unknown_cell_lists_the_allowed_ones(
    meta: Path, column: str, value: str, allowed: str
) -> None:
    edit(meta / "meta.csv", put(6, column, value))
    cell = f"row 6 (case_num 7), column {column!r} holds {value!r}"
    with raises(cell, "allowed are", allowed, "Take the cell from the release"):
        read_table(meta / "meta.csv")


@pytest.mark.parametrize("column", ["elevation", "location", "sex", "management"])
def test_a_blank_input_cell_passes(meta: Path, column: str) -> None:
    edit(meta / "meta.csv", put(6, column, ""))
    assert read_table(meta / "meta.csv")[6][column] == ""


def test_a_table_with_a_row_dropped(meta: Path) -> None:
    edit(meta / "meta.csv", lambda rows: rows.pop(5))
    with raises("case_num of its 29 rows is not 1..29", "count the rows", "Take meta.csv whole"):
        read_table(meta / "meta.csv")


def test_splits_are_disjoint_and_cover_the_rows(meta: Path) -> None:
    splits = read_splits(meta, NUM_CASES)
    assert list(splits) == ["train", "valid", "test"]
    assert sorted(itertools.chain(*splits.values())) == list(range(NUM_CASES))


@pytest.mark.parametrize("cell", ["30", "-1", "3.0", ""])
def test_an_index_that_is_no_row_position(meta: Path, cell: str) -> None:
    (meta / "valid_indexes.csv").write_text(f'indexes\n"{cell}"\n', encoding="utf-8")
    with raises(f"indexes={cell!r}", "0..29, not a case_num", "Take the index files"):
        read_splits(meta, NUM_CASES)


def test_indexes_that_start_at_one_are_taken_for_case_numbers(meta: Path) -> None:
    for path in meta.glob("*_indexes.csv"):
        edit(path, lambda rows: [row.__setitem__(0, str(int(row[0]) + 1)) for row in rows[1:]])
    with raises("indexes='30'", "0-based row position", "not a case_num", "Take the index files"):
        read_splits(meta, NUM_CASES)


def test_a_case_in_two_splits(meta: Path) -> None:
    index = read_splits(meta, NUM_CASES)["train"][0]
    edit(meta / "test_indexes.csv", lambda rows: rows.insert(1, [str(index)]))
    with raises(
        f"test_indexes.csv row 0: indexes={index} is already in train_indexes.csv",
        "a case belongs to one split",
        "Take the index files",
    ):
        read_splits(meta, NUM_CASES)


def test_a_case_in_no_split(meta: Path) -> None:
    index = read_splits(meta, NUM_CASES)["train"][0]
    edit(meta / "train_indexes.csv", lambda rows: rows.pop(1))
    with raises(f"rows [{index}] of meta.csv (1 in all)", "cover every row", "Take the index"):
        read_splits(meta, NUM_CASES)


def test_a_missing_index_file(meta: Path) -> None:
    (meta / "test_indexes.csv").unlink()
    with raises("test_indexes.csv", "the file is a csv", "Take test_indexes.csv from the release"):
        read_splits(meta, NUM_CASES)


def test_an_index_file_with_another_header(meta: Path) -> None:
    edit(meta / "test_indexes.csv", lambda rows: rows[0].__setitem__(0, "index"))
    with raises("the header is 'index'", "it must be 'indexes'", "Take test_indexes.csv from"):
        read_splits(meta, NUM_CASES)
