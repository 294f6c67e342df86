"""The MEN example, tiny: it ends, and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import predictions
import pytest

from mmfusion.evaluation import MissingnessReport
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.splits import load_split

EXAMPLE = Path(__file__).parents[1] / "examples" / "cmml_men.py"
TINY = ("--size", 16, 16, 8, "--dim", 8, "--num-heads", 2, "--num-tokens", 2, "--epochs", 1)


def run(
    out: Path, *arguments: Any, tiny: tuple[Any, ...] = TINY
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--out", str(out), *map(str, (*tiny, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_men(
        tmp_path_factory.mktemp("men") / "cohort", num_patients=60, shape=(20, 20, 14)
    )


def test_weights_of_a_network_that_is_not_asked_for_are_refused(
    cohort: Path, tmp_path: Path
) -> None:
    ended = run(tmp_path, "--data-root", cohort, "--weights", "resnet.pth")
    assert ended.returncode == 1
    assert "weights='resnet.pth' with encoder='small'" in ended.stderr
    assert not (tmp_path / "config.json").exists()


def test_three_classes_from_a_saved_split(cohort: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    given = ("--data-root", cohort, "--preset", "cfcml", "--split", 1, "--cache", cache)
    ended = run(out, *given)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("SYNTHETIC data in the format of MEN: ")
    assert len(list(cache.glob("*.npy"))) > 100
    report = MissingnessReport.from_json(out / "metrics.json")
    assert report.about["synthetic"] is True
    assert report.classes == ("grade1", "grade2_invasive", "grade2_noninvasive")
    assert report.names == ("ce_t1", "ce_t2_flair", "adc", "table")
    assert len(report.conditions("subset")) == 15
    assert "SYNTHETIC" in (out / "report.html").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["plan"]["learning_rate"] == 5e-4  # of the preset
    rows = (cohort / "splits" / "1.csv").read_text().split()[1:]
    split = load_split(out / "split.json", [row.split(",")[0] for row in rows])
    assert sorted(f"{one},{name}" for name, part in split.items() for one in part) == sorted(rows)

    table = cohort / "table.csv"
    ids = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    ended = run(out, "--predict", table, tiny=())
    assert ended.returncode == 0, ended.stderr
    predictions.assert_as_reported(out, ids.__getitem__)
    ended = run(out, "--predict", table)
    assert "60 patients, 0 of them now" in ended.stdout, ended.stderr
    ended = run(out, "--predict", table, "--dim", 16)
    assert "dim=16, and the run in" in ended.stderr


def test_two_classes_in_a_fold(cohort: Path, tmp_path: Path) -> None:
    folds = ("--data-root", cohort, "--num-folds", 3)
    ended = run(tmp_path / "run", *folds, "--split", 2, "--target", "grade")
    assert ended.returncode == 0, ended.stderr
    report = MissingnessReport.from_json(tmp_path / "run" / "metrics.json")
    assert report.classes == ("grade1", "grade2")
    split = json.loads((tmp_path / "run" / "split.json").read_text())["split"]
    assert len(split["test"]) == 20
    ended = run(tmp_path / "none", *folds, "--split", 3)
    assert "split=3 of num_folds=3: folds are counted from 0. Pass a split below" in ended.stderr
