"""Cells as numbers: what training rows hold sets the coding, and nothing else does."""

import re

import pytest

from mmfusion.recipes.cells import TableCoding

ROWS = [
    {"sex": "m", "age": "40", "note": "x"},
    {"sex": "f", "age": "60", "note": "y"},
    {"sex": "", "age": "", "note": "z"},
]


def test_one_hot_and_standardised() -> None:
    coding = TableCoding(ROWS, categorical=["sex"], numeric=["age"])
    assert coding.feature_names == ("sex=f", "sex=m", "age")
    rows = [coding.encode(row) for row in ROWS]
    assert [values.tolist() for values, _ in rows[:2]] == [[0, 1, -1], [1, 0, 1]]
    assert rows[2][0].isnan().all()
    assert [bad for _, bad in rows] == [[], [], []]


def test_a_constant_column_is_zero() -> None:
    coding = TableCoding([{"age": "5"}] * 3, numeric=["age"])
    assert coding.encode({"age": "7"})[0].tolist() == [2.0]


@pytest.mark.parametrize("cell", ["x", "54,3", "nan", "inf", "1e999"])
def test_a_number_that_is_none_is_absent_and_told(cell: str) -> None:
    coding = TableCoding(ROWS, categorical=["sex"], numeric=["age"])
    values, bad = coding.encode({"sex": "f", "age": cell})
    assert values[:2].tolist() == [1, 0]
    assert values[2].isnan()
    assert bad == [("age", cell, "is not a finite number")]


def test_an_unknown_category_is_absent_and_told() -> None:
    coding = TableCoding(ROWS, categorical=["sex"])
    values, bad = coding.encode({"sex": "F"})
    assert values.isnan().all()
    assert bad == [("sex", "F", "is not among f, m of the training rows")]


@pytest.mark.parametrize("kind", ["categorical", "numeric"])
def test_a_column_that_tells_nothing(kind: str) -> None:
    with pytest.raises(ValueError, match=r"column 'age' holds \[\] in the 2 .*Leave it out"):
        TableCoding([{"age": ""}] * 2, **{kind: ["age"]})


def test_a_numeric_column_of_words() -> None:
    rule = re.escape("column 'note' holds ['x', 'y', 'z'] in the 3 training rows")
    with pytest.raises(ValueError, match=rule):
        TableCoding(ROWS, numeric=["note"])
