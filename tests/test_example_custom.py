"""The example for data of one's own, tiny: it ends, and writes what it says."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import predictions

from mmfusion.evaluation import MissingnessReport
from mmfusion.recipes.custom_synthetic import LAYOUT, write_synthetic_custom

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--image-size 16 16 --volume-size 16 16 8 --dim 8 --num-heads 2 --epochs 1".split()


def start(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(EXAMPLES / "cmml_custom.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def run(*arguments: Any) -> str:
    ended = start(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_toml_file_is_all_it_takes(tmp_path: Path) -> None:
    toml = write_synthetic_custom(tmp_path / "data", num_cases=60)
    said = run("--data", toml, "--out", tmp_path / "run", *TINY)
    assert said.startswith("SYNTHETIC custom data: ")
    report = MissingnessReport.from_json(tmp_path / "run" / "metrics.json")
    assert report.about["synthetic"] is True
    assert report.classes == ("healthy", "ill")
    assert report.names == ("photo", "scan", "signal", "clinic")
    assert len(report.conditions("subset")) == 15
    assert "SYNTHETIC" in (tmp_path / "run" / "report.html").read_text()
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["sha256"] == report.about["split_sha256"]
    assert sum(map(len, split["split"].values())) == 60

    # Resuming with another split would train on test cases; nothing is overwritten.
    files = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
    refused = start("--data", toml, "--out", tmp_path / "run", "--resume", "--split-seed", 1, *TINY)
    assert "split_seed=1, and the run in" in refused.stderr
    assert {path: path.read_bytes() for path in files} == files

    # New cases: the same again, but nobody knows the outcome, and the folder is another.
    with (toml.parent / "table.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    ward = Path(shutil.move(toml.parent, tmp_path / "ward"))
    train = split["split"]["train"]
    next(case for case in cases if case["visit"] == train[0])["ward"] = "space"
    kept = [name for name in cases[0] if name not in ("outcome", "patient")]
    with (ward / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, kept, extrasaction="ignore")
        table.writeheader()
        table.writerows(cases)
    said = run("--out", tmp_path / "run", "--predict", ward / "table.csv")
    assert "60 patients, 60 of them now, 1 of these with" in said
    assert "SYNTHETIC: the model was trained on drawn data" in said
    rows = predictions.assert_as_reported(tmp_path / "run", lambda row: cases[row]["visit"])
    assert "ward='space' is not among" in rows[train[0]]["error"]
    for name in ("lent_by", "similar_to"):
        named = [one.split(" (")[0] for row in rows.values() for one in row[name].split("; ")]
        assert set(named) - {""} <= set(train)
        assert len(set(named)) > 5


def test_the_layout_to_copy_is_that_of_the_synthetic_data() -> None:
    assert (EXAMPLES / "custom.toml").read_text(encoding="utf-8") == LAYOUT
