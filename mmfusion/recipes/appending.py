"""A CSV that grows by whole chunks, so that a killed run goes on where it stopped."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion.recipes.reporting import write_json


class AppendedCsv:
    """Rows that are appended in chunks, and what they hang on in a JSON file beside them.

    A file that is there already is continued if it hangs on the same, and else left alone. What a
    kill cut off within a chunk is removed. A row is a line: line breaks in cells become spaces.

    Args:
        path: The CSV, in a folder that exists; the JSON file has its name, with another suffix.
        columns: The header.
        about: What the rows hang on, as plain data.
        chunk: Rows that are appended together.

    Attributes:
        done: Rows that are there, whole chunks of them (the last may be shorter).

    Raises:
        ValueError: If ``path`` is there, and hangs on something else or on nobody knows what, the
            JSON file is somebody else's, or both have one name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     about = {"columns": ["id"], "seed": 0, "rows": 3}
        ...     rows = AppendedCsv(Path(folder, "rows.csv"), ["id"], about, chunk=2)
        ...     rows.add([["a"], ["b"]])
        ...     again = AppendedCsv(Path(folder, "rows.csv"), ["id"], about, chunk=2)
        ...     again.done
        2
    """

    def __init__(
        self, path: Path, columns: Sequence[str], about: Mapping[str, Any], chunk: int
    ) -> None:
        self.path, self.done = path, 0
        beside = path.with_suffix(".json")
        if beside == path:
            raise ValueError(
                f"{path}: rows are a CSV, and what they hang on is a JSON file of that very name. "
                f"Pass {path.with_suffix('.csv')}."
            )
        if path.exists():
            self._compare(beside, json.loads(json.dumps(about)))
            self.done = self._whole_rows(chunk, int(about["rows"]))
        else:
            if beside.exists() and _keys(beside) != set(about):
                raise ValueError(
                    f"{beside} is there, and of something else: what the rows hang on is written "
                    "under that name. Move it away, or pass another path."
                )
            write_json(beside, about)
        if not path.exists() or not path.stat().st_size:
            self._append([columns])

    def add(self, rows: Sequence[Sequence[str]]) -> None:
        """Append a chunk, and flush it to the disk.

        Raises:
            OSError: If it cannot be written.
        """
        self._append(rows)
        self.done += len(rows)

    def _append(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        lines = ([" ".join(cell.splitlines()) for cell in row] for row in rows)
        csv.writer(text, lineterminator="\n").writerows(lines)
        try:
            with self.path.open("ab") as file:
                file.write(text.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}): {self.done} rows are there "
                "and whole. Free some space, and run the same again to go on."
            ) from error

    def _compare(self, beside: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
            other = [name for name in about if before.get(name) != about[name]]
        except (OSError, ValueError, AttributeError):
            other = [f"unknown origin, {beside.name} being lost,"]
        if other:
            raise ValueError(
                f"{self.path} is there, and made with another {', '.join(other)}: rows of two "
                "kinds are never mixed. Move it away, or pass another path."
            )

    def _whole_rows(self, chunk: int, total: int) -> int:
        """Count the rows of whole chunks, and remove what comes after them."""
        kept = place = count = 0
        with self.path.open("rb+") as file:
            for number, line in enumerate(file):  # the header is number 0
                place += len(line)
                if line.endswith(b"\n") and (number % chunk == 0 or number == total):
                    kept, count = place, number
            file.truncate(kept)
        return count


def _keys(path: Path) -> set[str]:
    try:
        return set(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return set()
