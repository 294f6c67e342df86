"""What tests of examples ask of the predictions that a run wrote beside its report."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfusion.evaluation import MissingnessReport


def read(out: Path) -> dict[str, dict[str, str]]:
    """Patient -> row."""
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def assert_as_reported(out: Path, id_of: Callable[[int], str]) -> dict[str, dict[str, str]]:
    """Test cases get the chances that the report has of them, though they were read anew."""
    report = MissingnessReport.from_json(out / "metrics.json")
    [whole] = [one for one in report.scores if one.condition.rate == 0]
    rows = read(out)
    assert whole.cases > 5
    for number, chances in zip(whole.case_ids, whole.probabilities, strict=True):
        row = rows[id_of(int(number))]
        found = [float(row[name]) for name in row if name.startswith("probability_")]
        assert found == pytest.approx(list(chances), abs=1e-5)
        assert row["used"]
        assert row["model"].startswith("SYNTHETIC ")
    return rows
