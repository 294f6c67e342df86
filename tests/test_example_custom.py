"""The example for data of one's own, tiny: it ends, and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

from mmfusion.evaluation import MissingnessReport
from mmfusion.recipes.custom_synthetic import LAYOUT, write_synthetic_custom

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--image-size 16 16 --volume-size 16 16 8 --dim 8 --num-heads 2 --epochs 1".split()


def test_a_toml_file_is_all_it_takes(tmp_path: Path) -> None:
    toml = write_synthetic_custom(tmp_path / "data", num_cases=60)
    command = [sys.executable, str(EXAMPLES / "cmml_custom.py"), "--data", str(toml)]
    command += ["--out", str(tmp_path / "run"), *TINY]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("SYNTHETIC custom data: ")
    report = MissingnessReport.from_json(tmp_path / "run" / "metrics.json")
    assert report.about["synthetic"] is True
    assert report.classes == ("healthy", "ill")
    assert report.names == ("photo", "scan", "signal", "clinic")
    assert len(report.conditions("subset")) == 15
    assert "SYNTHETIC" in (tmp_path / "run" / "report.html").read_text()
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["sha256"] == report.about["split_sha256"]
    assert sum(map(len, split["split"].values())) == 60


def test_the_layout_to_copy_is_that_of_the_synthetic_data() -> None:
    assert (EXAMPLES / "custom.toml").read_text(encoding="utf-8") == LAYOUT
