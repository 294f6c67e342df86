"""Reports as JSON files: whole or not at all, and read back as they were."""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.evaluation.records import Condition, Scores

__all__ = ["decode", "encode", "write_whole"]

FORMAT = 1
KEYS = ("method", "names", "classes", "target", "metrics", "scores", "about", "diagnostics")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that it is there whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "note.txt"), b"whole")
        ...     Path(folder, "note.txt").read_text()
        'whole'
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def encode(report: Any, left_out: Collection[str] = ()) -> str:
    """The fields of a report as JSON, one entry of its scores a line.

    NaN is null, and an array a list.

    Args:
        report: A ``MissingnessReport``.
        left_out: Fields of ``Scores`` to leave out.

    Example:
        >>> from mmfusion.evaluation import MissingnessReport
        >>> json.loads(encode(MissingnessReport("CMML", ("a",), (), "binary", (), [])))["format"]
        1
    """
    content = {"format": FORMAT, **_fields(report)}
    rows = [
        json.dumps({k: _plain(v) for k, v in _fields(one).items() if k not in left_out})
        for one in content.pop("scores")
    ]
    head = json.dumps(_plain(content), indent=1).removesuffix("\n}")
    return head + ',\n "scores": [\n' + ",\n".join(rows) + "\n ]\n}\n"


def decode(text: str | bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a report that ``encode`` wrote to ``path``.

    Raises:
        ValueError: If it is of another format, or nothing that ``encode`` wrote.

    Example:
        >>> decode('{"format": 0}', "metrics.json")
        Traceback (most recent call last):
        ValueError: metrics.json has format 0: this version of mmfusion reads format 1. Use
        the version that wrote it, or evaluate again.
    """
    try:
        content = json.loads(text)
        version = content.pop("format")
        if version == FORMAT:
            content = {key: content[key] for key in KEYS}
            content["scores"] = [_scores(row, content["target"]) for row in content["scores"]]
            for key in ("names", "classes", "metrics"):
                if not isinstance(content[key], list):
                    raise TypeError(f"{key} is {content[key]!r}, not a list")
                content[key] = tuple(content[key])
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): a report is a file that "
            "MissingnessReport.to_json wrote. Restore it, or evaluate again."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}: this version of mmfusion reads format {FORMAT}. Use "
            "the version that wrote it, or evaluate again."
        )
    return content


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass, not copied."""
    return {one.name: getattr(record, one.name) for one in fields(record)}


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN becomes None, an array a list."""
    if isinstance(value, Condition):
        return _plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        if value.dtype == np.float32:  # as few digits as tell it from its neighbours
            value = value.astype(str).astype(np.float64)
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _scores(row: dict[str, Any], target: str) -> Scores:
    """One entry of ``scores``, from what ``_plain`` made of it."""
    where = row["condition"]
    pattern = where.pop("pattern")
    row["condition"] = Condition(**where, pattern=pattern and tuple(pattern))
    row["values"] = {metric: _number(value) for metric, value in row["values"].items()}
    row["intervals"] = {
        metric: tuple(map(_number, ends)) for metric, ends in row["intervals"].items()
    }
    row["realised"] = {kind: _number(rate) for kind, rate in row["realised"].items()}
    row["calibration"] = tuple((a, b, int(count)) for a, b, count in row["calibration"])
    kinds = (np.float64, np.float64) if target == "regression" else (np.float32, np.int64)
    for key, kind in zip(("probabilities", "labels", "case_ids"), (*kinds, None), strict=True):
        if row.get(key) is not None:
            row[key] = np.array(row[key], dtype=kind)
    return Scores(**row)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
