"""Every example, tiny: it ends, and writes what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from transformers import ResNetConfig

from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: Any) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def derm7pt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cmml_derm7pt", EXAMPLES / "cmml_derm7pt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_quickstart(tmp_path: Path) -> None:
    said = run("quickstart.py", "--out", tmp_path, "--seeds", 1, "--epochs", 2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["auc"]["CMML"][0]) == 7 + 3
    assert (tmp_path / "auc.png").stat().st_size > 5000
    assert "late fusion" in said


def test_cmml_derm7pt(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny = ("--out", out, "--num-cases", 60, "--image-size", 16, 24, "--epochs", 1, "--dim", 16)
    said = run("cmml_derm7pt.py", *tiny, "--ablate")
    assert said.startswith("SYNTHETIC data in the format of Derm7pt: ")
    assert "no CRTA, no memory: AUC" in said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["synthetic"] is True
    assert metrics["settings"]["seed"] == 0
    assert metrics["versions"]["mmfusion"]
    assert list(metrics["results"]) == ["CMML", "no CRTA, no memory"]
    for report in metrics["results"].values():
        assert [len(report["subsets"]), len(report["rates"])] == [7, 3]
        assert all(0 <= row["auc"] <= 1 for row in report["subsets"] + report["rates"])
    assert (out / "auc.png").stat().st_size > 5000
    names = {path.name for path in out.iterdir()}
    patterns = {f"patterns-test-{rate}.json" for rate in (0.3, 0.5, 0.7)}
    assert names == {"auc.png", "checkpoints", "config.json", "metrics.json", *patterns}
    with safe_open(out / "checkpoints/cmml/best.safetensors", framework="pt") as weights:
        assert any("memory" in key for key in weights.keys())


def test_cmml_derm7pt_criteria_with_a_named_backbone_and_a_broken_photo(
    derm7pt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_synthetic_release(tmp_path / "release", num_cases=60, image_size=(16, 24))
    damaged = sorted((root / "images").rglob("*.jpg"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).save_pretrained(
        tmp_path / "resnet"
    )
    settings = derm7pt.Settings(
        data_root=root,
        out=tmp_path / "run",
        target="criteria",
        columns="paper",
        on_broken="missing",
        image_size=(32, 32),
        encoder=str(tmp_path / "resnet"),
        pretrained=False,
        dim=16,
        epochs=1,
    )
    derm7pt.main(settings)
    said = capsys.readouterr().out
    assert damaged.name in said
    assert "pigment_network" in said
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(metrics["results"]["CMML"]["subsets"][-1]["tasks"]) == 7
    assert sum(map(len, metrics["broken"].values())) == 1

    settings.on_broken = "raise"
    with pytest.raises(ValueError, match=r"meta.csv row \d+.*Restore images/"):
        derm7pt.main(settings)

    settings.on_broken, settings.resume = "missing", True
    before = metrics.pop("seconds"), metrics.pop("settings")
    derm7pt.main(settings)
    again = json.loads((tmp_path / "run/metrics.json").read_text())
    assert again["results"] == metrics["results"]
    assert before[1] != again["settings"]
