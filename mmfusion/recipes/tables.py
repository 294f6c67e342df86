"""Tables of releases, csv or xlsx: cells as text, under exactly the columns of the release."""

import csv
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import pandas as pd


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    r"""Read the rows below the header; a blank line is no row, a blank cell ``""``.

    Args:
        path: A csv in UTF-8, or an xlsx of which the first sheet is read.
        columns: What the header must be.

    Raises:
        ValueError: If the file cannot be read, or the header or the width of a row is another.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "table.csv")
        ...     _ = path.write_text("ID,age\n7,\n", encoding="utf-8")
        ...     read_rows(path, ["ID", "age"])
        [{'ID': '7', 'age': ''}]
    """
    cure = f"Take {path.name} from the release, unchanged."
    kind, read = ("an xlsx", _xlsx) if path.suffix.lower() == ".xlsx" else ("a csv in UTF-8", _csv)
    try:
        header, *rows = [row for row in read(path) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error, BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: {error}: the file is {kind}. {cure}") from None
    if header != list(columns):
        raise ValueError(
            f"{path}: the header is {','.join(header)!r}: it must be {','.join(columns)!r}, in "
            f"this order. {cure}"
        )
    for position, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"{path} row {position} has {len(row)} cells: each row has {len(columns)}. {cure}"
            )
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def _xlsx(path: Path) -> list[list[str]]:
    sheet = pd.read_excel(path, header=None, dtype=str, keep_default_na=False, engine="openpyxl")
    return [row if any(row) else [] for row in sheet.to_numpy().tolist()]
