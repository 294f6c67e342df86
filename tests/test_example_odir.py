"""The ODIR example, tiny: it ends, and writes what it says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import predictions
import pytest

from mmfusion.evaluation import MissingnessReport
from mmfusion.recipes.odir import patient_ids
from mmfusion.recipes.splits import hash_split, load_split

EXAMPLE = Path(__file__).parents[1] / "examples" / "cmml_odir.py"
TINY = ("--num-patients", 200, "--image-size", 16, 16, "--dim", 8, "--num-heads", 2, "--epochs", 1)


def run(out: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--out", str(out), *map(str, (*TINY, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("odir") / "run"
    ended = run(out, "--preset", "small")
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


def test_it_says_synthetic_and_writes_all_files(done: tuple[Path, str]) -> None:
    out, said = done
    assert said.startswith("SYNTHETIC data in the format of ODIR-5K: ")
    assert {path.name for path in out.iterdir()} == {
        "checkpoints",
        "config.json",
        "history.json",
        "metrics.json",
        "reading.json",
        "report.html",
        "report.png",
        "split.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["synthetic"] is True
    assert config["settings"]["plan"]["weight_decay"] == 0.05  # of the preset
    assert config["versions"]["mmfusion"]
    assert "SYNTHETIC" in (out / "report.html").read_text()


def test_the_report_is_of_eight_labels_and_three_modalities(done: tuple[Path, str]) -> None:
    report = MissingnessReport.from_json(done[0] / "metrics.json")
    assert (report.target, len(report.classes)) == ("multilabel", 8)
    assert report.metrics[:2] == ("auc_macro", "odir_score")
    assert report.names == ("left", "right", "table")
    assert len(report.conditions("subset")) == 7
    assert all(0 <= one.values["odir_score"] <= 1 for one in report.scores)
    assert set(report.diagnostics["synthesis"]) == {"left", "right", "table"}


def test_the_split_deals_out_every_patient(done: tuple[Path, str]) -> None:
    out, _ = done
    ids = patient_ids(out.parent / "odir-synthetic-200")
    split = load_split(out / "split.json", ids)
    assert [round(len(part) / len(ids), 1) for part in split.values()] == [0.7, 0.1, 0.2]
    about = MissingnessReport.from_json(out / "metrics.json").about
    assert about["split_sha256"] == hash_split(split)


def test_the_same_seed_gives_the_same_metrics(done: tuple[Path, str]) -> None:
    out, _ = done
    again = out.parent / "again"
    ended = run(again, "--preset", "small")
    assert ended.returncode == 0, ended.stderr
    assert (again / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()


def test_new_patients_are_predicted_from_the_folder(done: tuple[Path, str], tmp_path: Path) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "moved"))
    table = done[0].parent / "odir-synthetic-200" / "full_df.csv"
    command = [sys.executable, str(EXAMPLE), "--out", str(out), "--predict", str(table)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = predictions.assert_as_reported(out, str)
    assert len(rows) == len(patient_ids(table))
    assert any(row["synthesised"] for row in rows.values())
