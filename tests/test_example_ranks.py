"""Each further example on two processes: the same scores as on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmfusion.evaluation import MissingnessReport
from mmfusion.recipes.custom_synthetic import write_synthetic_custom
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.odir_synthetic import write_synthetic_odir

EXAMPLES = Path(__file__).parents[1] / "examples"
# Ranks draw different dropout, so there is none; batches of ten divide over both.
TINY = "--epochs 2 --dim 16 --num-heads 2 --num-tokens 2 --batch-size 10 --dropout 0".split()
# That of cells is no setting of these examples.
WITHOUT_DROPOUT = """
import functools, runpy, sys
from mmfusion.recipes import encoders
encoders.TableEncoder = functools.partial(encoders.TableEncoder, dropout=0.0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def odir(root: Path) -> list[str]:
    write_synthetic_odir(root, num_patients=200, image_size=16)
    return [f"--data-root={root}", "--image-size", "16", "16"]


def men(root: Path) -> list[str]:
    write_synthetic_men(root, num_patients=60, shape=(20, 20, 14))
    return [f"--data-root={root}", "--size", "16", "16", "8"]


def custom(root: Path) -> list[str]:
    toml = write_synthetic_custom(root, num_cases=60)
    return [f"--data={toml}", "--image-size", "16", "16", "--volume-size", "16", "16", "8"]


def run(folder: Path, launcher: list[str], example: str, options: list[str]) -> tuple[Any, Any]:
    """The history of a run and its report."""
    folder.mkdir()
    script = folder / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    command = [sys.executable, *launcher, str(script), str(EXAMPLES / example)]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    kind: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "env": env}
    done = subprocess.run([*command, *TINY, *options, f"--out={folder / 'run'}"], **kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SYNTHETIC") == 2  # one rank speaks: at the start, and of the report
    assert "Warning" not in done.stderr
    history = json.loads((folder / "run" / "history.json").read_text())["epochs"]
    return history, MissingnessReport.from_json(folder / "run" / "metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize("data", [odir, men, custom])
def test_two_processes_score_like_one(tmp_path: Path, data: Any) -> None:
    options = data(tmp_path / "data")
    example = f"cmml_{data.__name__}.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one = run(tmp_path / "one", [], example, options)
    two = run(tmp_path / "two", torchrun, example, options)
    for ours, theirs in zip(two[0], one[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-2)
    auc = [[row.values["auc_macro"] for row in report.scores] for _, report in (one, two)]
    assert auc[0] == pytest.approx(auc[1], abs=2e-2)
