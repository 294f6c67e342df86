"""From a row of a table to the inputs of a patient: what fails is left out, and told."""

import errno
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mmfusion.recipes.cells import Row, TableCoding
from mmfusion.recipes.men_table import read_table
from mmfusion.recipes.reading import Found

Made = TypeVar("Made")


class OpenedTable(NamedTuple):
    """A table of patients.

    Attributes:
        root: What paths are relative to.
        rows: Column -> cell, as stripped text.
        sha256: Of the file.
    """

    root: Path
    rows: list[dict[str, str]]
    sha256: str


def read_each(
    makers: Mapping[str, Callable[[], Made | None]],
) -> tuple[dict[str, Made | None], list[str]]:
    """Make every modality by itself: what fails is left out, with the reason.

    Args:
        makers: Modality -> what reads it; None where there is nothing to read.

    Example:
        >>> inputs, problems = read_each({"a": lambda: None, "b": lambda: [][0]})
        >>> inputs, problems
        ({'a': None}, ['b: IndexError: list index out of range'])
    """
    inputs: dict[str, Made | None] = {}
    problems = []
    for name, make in makers.items():
        try:
            inputs[name] = make()
        except Exception as error:  # whatever a damaged file upsets: the others are still read
            raise_if_of_machine(error)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            problems.append(f"{name}: {kind}{error}")
    return inputs, problems


def raise_if_of_machine(error: Exception) -> None:
    """Raise what says nothing of a patient: no memory, a full disk, a file system that is gone.

    Example:
        >>> raise_if_of_machine(ValueError("a damaged file"))
        >>> raise_if_of_machine(MemoryError())
        Traceback (most recent call last):
        MemoryError
    """
    gone = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.EDQUOT)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, OSError) and error.errno in gone
    ):
        raise error


def open_table(table: str | Path, usual: str, columns: Iterable[str]) -> OpenedTable:
    r"""Read a table of new patients, and find the root of its files.

    Args:
        table: CSV, Parquet or xlsx.
        usual: Where the table of the training lay, below its root.
        columns: What it must have.

    Raises:
        ValueError: If it cannot be read, lacks a column, or has no row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "new.csv")
        ...     _ = path.write_text("id,age\n7,40\n")
        ...     open_table(path, "table.csv", ["id"]).rows
        [{'id': '7', 'age': '40'}]
    """
    path = Path(table).expanduser().resolve()
    rows = read_table(path, columns, "Correct the table.")
    if not rows:
        raise ValueError(f"{path} has no row: there is one for each patient. Pass another table.")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    depth = 0 if Path(usual).is_absolute() else len(Path(usual).parts) - 1
    return OpenedTable(path.parents[depth], rows, sha256)


def columns_of(places: Iterable[str]) -> list[str]:
    """The places of a layout that are columns, not patterns.

    Example:
        >>> columns_of(["photos/{id}.jpg", "scan_file", ""])
        ['scan_file']
    """
    return [place for place in places if place and "{" not in place]


def naming(file: str | Path, make: Callable[[], Tensor]) -> Tensor:
    """What is made from a file, whose name an error tells.

    Raises:
        ValueError: If ``make`` does.
    """
    try:
        return make()
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file} {error}") from None


def add_table(found: Found, name: str, coding: TableCoding, row: Row) -> Found:
    """Add a row as numbers; cells that the coding does not know are missing, and told.

    Example:
        >>> coding = TableCoding([{"sex": "f"}, {"sex": "m"}], categorical=["sex"])
        >>> add_table(({}, []), "clinic", coding, {"sex": "x"})
        ({'clinic': tensor([nan, nan])}, ["clinic: sex='x' is not among f, m of the training rows"])
    """
    inputs, problems = found
    inputs[name], bad = coding.encode(row)
    problems += [f"{name}: {cell.column}={cell.value!r} {cell.reason}" for cell in bad]
    return found
