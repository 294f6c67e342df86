"""benchmarks/accuracy.py, tiny: it runs, goes on where it was stopped, and sums up."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["CMML", "ZeroFill", "late fusion (LR)", "mean fill (LR)", "ZeroFill + shallow"]


def run(out, *methods, epochs="1"):
    sizes = ["--num-members", "2", "--seeds", "1", "--rates", "0.5", "--jobs", "1"]
    command = [sys.executable, "benchmarks/accuracy.py", "--data", "breast_cancer@60", *sizes]
    command += ["--epochs", epochs]
    done = subprocess.run(
        [*command, "--methods", *methods, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    with (out / "results.csv").open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def test_a_stopped_run_goes_on_and_every_method_is_in_the_table(tmp_path):
    _, first = run(tmp_path, *METHODS[:2])
    (tmp_path / "runs" / "breast_cancer@60 ZeroFill 0.5 0.json").unlink()  # killed before it came
    printed, rows = run(tmp_path, *METHODS)
    assert sorted(row["method"] for row in rows) == sorted(METHODS)
    assert first[0] in rows  # not trained again: its seconds are the same
    assert all(json.loads(row["decisions"]) for row in rows)
    assert all(0.5 < float(row["auc_macro"]) <= 1 for row in rows)
    assert (tmp_path / "table.md").read_text().strip() in printed
    assert all(f"| {method} |" in printed for method in METHODS)
    assert "CMML minus best other of each set" in printed
    compared = (tmp_path / "comparison.txt").read_text()
    assert "paired bootstrap" in compared
    assert all(method in compared for method in METHODS)
    assert "ZeroFill" in (tmp_path / "report-breast_cancer@60.html").read_text()
    (tmp_path / "runs" / "breast_cancer@60 ZeroFill 0.5 0.json").unlink()
    for path in (tmp_path / "runs").glob("*CMML*"):
        path.unlink()
    _, again = run(tmp_path, "CMML")
    assert [row["method"] for row in again] == [row["method"] for row in rows]  # what was, stays
    assert [row for row in again if row["method"] != "CMML"] == [
        row for row in rows if row["method"] != "CMML"
    ]
    assert "| ZeroFill |" in (tmp_path / "table.md").read_text()
    with pytest.raises(subprocess.CalledProcessError) as told:
        run(tmp_path, *METHODS, epochs="2")
    assert "ValueError: epochs=2" in told.value.stderr
