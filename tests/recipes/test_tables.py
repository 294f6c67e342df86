"""Tables: cells as text, csv and xlsx alike, and no header but the right one."""

import re
from pathlib import Path

import pandas as pd
import pytest

from mmfusion.recipes.tables import read_rows

ROWS = [{"ID": "7", "age": "61", "note": "a,b"}, {"ID": "8", "age": "", "note": "ü"}]
COLUMNS = ["ID", "age", "note"]


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_csv_and_xlsx_give_the_same_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ID": [7, 8], "age": [61.0, None], "note": ["a,b", "ü"]})
    frame.to_excel(tmp_path / "table.xlsx", index=False)
    pd.DataFrame(ROWS).to_csv(tmp_path / "table.csv", index=False)
    assert read_rows(tmp_path / "table.csv", COLUMNS) == ROWS
    assert read_rows(tmp_path / "table.xlsx", COLUMNS) == ROWS


def test_rows_without_any_cell_are_none(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("ID,age\n\n7,\n\n", encoding="utf-8")
    frame = pd.DataFrame([["ID", "age"], [None, None], [7, None], [None, None]])
    frame.to_excel(tmp_path / "table.xlsx", index=False, header=False)
    for name in ("table.csv", "table.xlsx"):
        assert read_rows(tmp_path / name, ["ID", "age"]) == [{"ID": "7", "age": ""}]


def test_an_empty_workbook_has_no_header(tmp_path: Path) -> None:
    pd.DataFrame().to_excel(tmp_path / "table.xlsx")
    with raises("the header is ''", "it must be 'ID,age,note'", "Take table.xlsx from the release"):
        read_rows(tmp_path / "table.xlsx", COLUMNS)


@pytest.mark.parametrize("name", ["table.csv", "table.xlsx"])
def test_a_table_that_is_not_there(tmp_path: Path, name: str) -> None:
    with raises(str(tmp_path / name), "No such file", f"Take {name} from the release"):
        read_rows(tmp_path / name, COLUMNS)
