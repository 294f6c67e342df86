"""The file that a row of a table has by a pattern or by a column."""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter


def find_file(root: Path, place: str, row: dict[str, str]) -> Path | None:
    """The file of a patient; None where the patient has none, or a cell of the pattern is blank."""
    if "{" not in place:
        return root / row[place] if row[place] else None
    try:
        if not all(_cells_of(place, row).values()):
            return None
        pattern = place.format_map({column: glob.escape(cell) for column, cell in row.items()})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"pattern {place!r} of the layout: {error!r}: braces hold a column of the table "
            f"({', '.join(row)}). Correct the layout."
        ) from None
    found = sorted(glob.glob(pattern, root_dir=root))
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(found)} in {str(root)!r} all fit {place!r}: a patient has one file of a "
            "kind. Remove the others, or narrow the pattern."
        )
    return root / found[0] if found else None


def find_each(
    root: Path, place: str, rows: Sequence[dict[str, str]], id: str
) -> list[Path | str | None]:
    """The file of each row, or what is wrong with it; None where a row has none.

    Args:
        root: What paths are relative to.
        place: Pattern or column.
        rows: Of the table.
        id: The column that names a row.
    """
    found: list[Path | str | None] = []
    for row in rows:
        try:
            found.append(find_file(root, place, row))
        except ValueError as error:
            found.append(str(error))
    files = [one if isinstance(one, Path) else None for one in found]
    wrong = claimed_twice(place, rows, files, id)
    return [wrong.get(one, one) if isinstance(one, Path) else one for one in found]


def claimed_twice(
    place: str, rows: Sequence[Mapping[str, str]], files: Sequence[Path | None], id: str
) -> dict[Path, str]:
    """Files that a pattern gives to rows of different cells -> what is wrong.

    Rows may share a file that their common cells name, such as the scan of a patient with two
    lesions.

    Args:
        place: Pattern or column.
        rows: Of the table.
        files: What ``find_file`` found for each.
        id: The column that names a row.

    Example:
        >>> found = [Path("1.jpg"), Path("10_a.jpg"), Path("10_a.jpg")]
        >>> claimed_twice("{n}*.jpg", [{"n": "2"}, {"n": "1"}, {"n": "10"}], found, "n")
        {PosixPath('10_a.jpg'): "10_a.jpg fits '{n}*.jpg' for '1' and for '10': ..."}
    """
    owners: dict[Path, Mapping[str, str]] = {}
    wrong = {}
    for row, file in zip(rows, files, strict=True):
        if file is None or "{" not in place:
            continue
        owner = owners.setdefault(file, row)
        if _cells_of(place, owner) != _cells_of(place, row):
            wrong[file] = (
                f"{file} fits {place!r} for {owner[id]!r} and for {row[id]!r}: a file belongs to "
                "one of them. Narrow the pattern: {id}_*.jpg or {id}.jpg, say, for {id}*.jpg."
            )
    return wrong


def _cells_of(place: str, row: Mapping[str, str]) -> dict[str, str]:
    """The cells that a pattern names."""
    names = [re.split(r"[.[]", name)[0] for _, name, _, _ in Formatter().parse(place) if name]
    return {name: row[name] for name in names}
