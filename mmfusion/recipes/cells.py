"""Cells of a table as numbers: one-hot blocks and standardised columns, learned from training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Row = Mapping[str, str]


class BadCell(NamedTuple):
    """A cell that the coding cannot read.

    Attributes:
        column: Of the table.
        value: What the cell holds.
        reason: Why it cannot be read.
    """

    column: str
    value: str
    reason: str


class TableCoding:
    """Turn rows of text into numbers, by what the training rows hold.

    Args:
        rows: The training rows: column -> cell, "" where blank.
        categorical: Columns that become a one-hot block, over the values of the training rows.
        numeric: Columns that come to mean 0 and standard deviation 1 over the training rows.

    Attributes:
        feature_names: ``column=value`` of a block, else the column.

    Raises:
        ValueError: If all training rows are blank in a column, or a numeric one holds no numbers.

    Example:
        >>> rows = [{"sex": "f", "age": "40"}, {"sex": "m", "age": "60"}]
        >>> coding = TableCoding(rows, categorical=["sex"], numeric=["age"])
        >>> coding.feature_names
        ('sex=f', 'sex=m', 'age')
        >>> coding.encode({"sex": "m", "age": "70"})[0].tolist()
        [0.0, 1.0, 2.0]
        >>> values, bad = coding.encode({"sex": "?", "age": ""})
        >>> values.tolist(), bad[0].reason
        ([nan, nan, nan], 'is not among f, m of the training rows')
    """

    def __init__(
        self, rows: Sequence[Row], *, categorical: Sequence[str] = (), numeric: Sequence[str] = ()
    ) -> None:
        self.values: dict[str, Sequence[str]] = {}
        self.scales: dict[str, tuple[float, float]] = {}
        for column in (*categorical, *numeric):
            cells = [row[column] for row in rows if row[column]]
            if column in categorical:
                self.values[column] = sorted(set(cells))
            else:
                numbers = np.array(
                    [number for cell in cells if (number := _number(cell)) is not None]
                )
                self.scales[column] = _scale(numbers) if len(numbers) else (0.0, 1.0)
            if not cells or (column in numeric and not len(numbers)):
                raise ValueError(
                    f"column {column!r} holds {cells[:3]} in the {len(rows)} training rows: an "
                    "input column tells something. Leave it out of the layout."
                )
        self._name_features()

    def _name_features(self) -> None:
        self.feature_names = (
            *(f"{column}={value}" for column, values in self.values.items() for value in values),
            *self.scales,
        )

    def kept(self) -> dict[str, Any]:
        """What ``restored`` takes: plain data, which JSON holds exactly."""
        return {"values": self.values, "scales": self.scales}

    @classmethod
    def restored(cls, kept: Mapping[str, Any]) -> "TableCoding":
        """The coding that ``kept`` is of.

        Example:
            >>> coding = TableCoding([{"age": "40"}, {"age": "60"}], numeric=["age"])
            >>> TableCoding.restored(coding.kept()).encode({"age": "70"})[0].tolist()
            [2.0]
        """
        coding = cls([])
        coding.values.update(kept["values"])
        coding.scales.update(kept["scales"])
        coding._name_features()
        return coding

    def encode(self, row: Row) -> tuple[Tensor, list[BadCell]]:
        """The numbers of a row, NaN where a cell is blank or bad, and the bad cells.

        Shape:
            - numbers: ``(F,)``, as ``feature_names``
        """
        numbers: list[float] = []
        bad = []
        for column, values in self.values.items():
            cell = row[column]
            known = cell in values
            if cell and not known:
                reason = f"is not among {', '.join(values)} of the training rows"
                bad.append(BadCell(column, cell, reason))
            numbers += [float(cell == value) if known else float("nan") for value in values]
        for column, (mean, scale) in self.scales.items():
            number = _number(row[column])
            if row[column] and number is None:
                bad.append(BadCell(column, row[column], "is not a finite number"))
            numbers.append(float("nan") if number is None else (number - mean) / scale)
        return torch.tensor(numbers), bad


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _scale(numbers: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; 1 where all are the same."""
    return float(numbers.mean()), float(numbers.std()) or 1.0
