"""Every example, tiny: it ends, and writes what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import predictions
import pytest
from safetensors import safe_open
from transformers import ResNetConfig

from mmfusion.evaluation import MissingnessReport, compare
from mmfusion.missingness import PatternSet
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
from mmfusion.recipes.plan import Plan

DRAWN = "derm7pt-synthetic-60"
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


def load(path: Path) -> MissingnessReport:
    """What an example wrote, with the seven subsets of three modalities and four rates."""
    report = MissingnessReport.from_json(path)
    assert [len(report.conditions(kind)) for kind in ("subset", "per_modality")] == [7, 4]
    assert all(0 <= one.values["auc_macro"] <= 1 for one in report.scores)
    return report


def test_quickstart(tmp_path: Path) -> None:
    said = run("quickstart.py", "--out", tmp_path, "--seeds", 1, "--epochs", 2)
    assert "late fusion" in said
    ours, floor = (load(tmp_path / f"metrics{name}.json") for name in ("", "-late-fusion"))
    assert ours.table() in said
    assert floor.method == "late fusion"
    assert set(ours.diagnostics) == {"synthesis", "projection", "alignment", "memory"}
    assert "late fusion" in (tmp_path / "report.html").read_text()


def test_cmml_derm7pt(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny = ("--out", out, "--num-cases", 60, "--image-size", 16, 24, "--epochs", 1, "--dim", 16)
    said = run("cmml_derm7pt.py", *tiny, "--ablate")
    assert said.startswith("SYNTHETIC data in the format of Derm7pt: ")
    ours = load(out / "metrics.json")
    ablation = load(out / "metrics-no-CRTA-no-memory.json")
    assert ablation.method == "no CRTA, no memory"
    for report in (ours, ablation):
        assert report.table() in said
        assert report.about["synthetic"] is True
        assert report.about["versions"]["mmfusion"]
    assert compare([ours, ablation]).table() in said
    page = (out / "report.html").read_text()
    assert "SYNTHETIC DATA" in page
    assert ablation.method in page
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["plan"]["seed"] == 0
    drawn = {rate: PatternSet.load(out / f"patterns-{rate}-0.json") for rate in (0.3, 0.5, 0.7)}
    hashes = [one.sha256 for one in ours.scores if one.condition.rate]
    assert [patterns.hash for patterns in drawn.values()] == hashes
    with safe_open(out / "checkpoints/cmml/best.safetensors", framework="pt") as weights:
        assert any("memory" in key for key in weights.keys())
    said = run("cmml_derm7pt.py", "--out", out, "--predict", tmp_path / DRAWN / "meta/meta.csv")
    assert "60 patients, 60 of them now, 0 of these with" in said
    predictions.assert_as_reported(out, lambda row: str(row + 1))


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
        plan=Plan(epochs=1),
    )
    derm7pt.main(settings)
    said = capsys.readouterr().out
    assert damaged.name in said
    assert "pigment_network" in said
    report = MissingnessReport.from_json(tmp_path / "run/metrics.json")
    assert len(report.about["tasks"]) == 7
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert sum(map(len, config["broken"].values())) == 1

    settings.on_broken = "raise"
    with pytest.raises(ValueError, match=r"meta.csv row \d+.*Restore images/"):
        derm7pt.main(settings)

    settings.on_broken, settings.resume = "missing", True
    derm7pt.main(settings)
    again = MissingnessReport.from_json(tmp_path / "run/metrics.json")
    assert again.table() == report.table()
    derm7pt.main(derm7pt.Settings(out=tmp_path / "run", predict=root / "meta/meta.csv"))
    rows = predictions.read(tmp_path / "run")
    assert sum(damaged.name in row["error"] for row in rows.values()) == 1
    assert rows["1"]["predicted"].count("=") == 7
    with pytest.raises(ValueError, match=r"target='diagnosis5', and the run .*Leave out target"):
        derm7pt.main(
            derm7pt.Settings(
                out=tmp_path / "run", predict=root / "meta/meta.csv", target="diagnosis5"
            )
        )
    resumed = json.loads((tmp_path / "run/config.json").read_text())
    assert resumed["settings"]["resume"] is True

    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*s*")}
    settings.columns = "safe"
    with pytest.raises(ValueError, match=r"columns='safe', .* has 'paper': .*leave out resume"):
        derm7pt.main(settings)
    assert {path: path.read_bytes() for path in files} == files
