"""A whole script on two processes: the same scores as on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmfusion.evaluation import MissingnessReport

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmml_derm7pt.py"
# Ranks draw different dropout, so there is none; batches of ten divide over both.
TINY = ["--num-cases=60", "--epochs=2", "--dim=16", "--batch-size=10"]
TINY += ["--image-size", "16", "24", "--dropout=0", "--cell-dropout=0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def run(
    folder: Path, launcher: list[str], **environment: str
) -> tuple[list[dict[str, Any]], MissingnessReport]:
    """The history of a run and its report."""
    command = [sys.executable, *launcher, str(EXAMPLE), *TINY, f"--out={folder / 'run'}"]
    kind: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=env, **kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SYNTHETIC data in the format of Derm7pt:") == 1  # one rank speaks
    assert "Warning" not in done.stderr
    history = json.loads((folder / "run" / "history.json").read_text())["CMML"]
    return history, MissingnessReport.from_json(folder / "run" / "metrics.json")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return run(tmp_path_factory.mktemp("one"), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        (TORCHRUN, {}),
        ([*ACCELERATE, "--main_process_port=0"], {"ACCELERATE_USE_CPU": "true"}),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_two_processes_score_like_one(
    one: tuple[Any, ...], tmp_path: Path, launcher: list[str], environment: dict[str, str]
) -> None:
    two = run(tmp_path, launcher, **environment)
    for ours, theirs in zip(two[0], one[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-2)
    auc = [[row.values["auc_macro"] for row in report.scores] for _, report in (one, two)]
    assert auc[0] == pytest.approx(auc[1], abs=2e-2)  # one swap of two cases is 0.013
