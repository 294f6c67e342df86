"""Scores of examples/cmml_derm7pt.py on its synthetic release, over seeds.

python benchmarks/derm7pt_synthetic.py               # about three minutes a seed on two cores
python benchmarks/derm7pt_synthetic.py --fill-only   # only the table in docs/derm7pt.md

Runs the example with `--ablate` for each seed, joins the reports of each model into a file of
`benchmarks/results/derm7pt_synthetic/`, and puts a table of them into docs/derm7pt.md.
"""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mmfusion.evaluation import MissingnessReport, merge

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "benchmarks/results/derm7pt_synthetic"
FILES = ("metrics.json", "metrics-no-CRTA-no-memory.json")
PAGE = HERE / "docs/derm7pt.md"


@dataclass
class Settings:
    """What to run."""

    seeds: int = 3
    """Seeds 0, 1, ..."""
    runs: Path = Path("runs/derm7pt_synthetic")
    """Folder for the runs."""
    fill_only: bool = False
    """Fill the table from the results that are there."""


def measure(settings: Settings) -> None:
    found: dict[str, list[MissingnessReport]] = {name: [] for name in FILES}
    about: dict[str, Any] = {"seconds": []}
    for seed in range(settings.seeds):
        out = settings.runs / f"seed-{seed}"
        command = [sys.executable, str(HERE / "examples/cmml_derm7pt.py"), "--ablate"]
        subprocess.run([*command, f"--seed={seed}", f"--out={out}"], check=True)
        for name, reports in found.items():
            reports.append(MissingnessReport.from_json(out / name))
            if not reports[-1].about["synthetic"]:
                raise ValueError(f"{out} is not synthetic: only such results are collected here.")
        about["settings"] = json.loads((out / "config.json").read_text())["settings"]
        about["seconds"].append(json.loads((out / "history.json").read_text())["seconds"])
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, reports in found.items():
        joint = merge(reports)
        joint.about |= about
        joint.to_json(RESULTS / name, predictions=False)


def table() -> str:
    reports = [MissingnessReport.from_json(RESULTS / name) for name in FILES]
    seconds, models = reports[0].about["seconds"], [report.method for report in reports]
    lines = [
        f"| SYNTHETIC: AUC, {len(seconds)} seeds | cases | {' | '.join(models)} | difference |"
    ]
    lines.append("|---" * (3 + len(models)) + "|")
    for condition in reports[0].conditions():
        rows = [[one for one in r.scores if one.condition == condition] for r in reports]
        auc = [[one.values["auc_macro"] for one in row] for row in rows]
        gain = [ours - theirs for ours, theirs in zip(*auc, strict=True)]
        cells = " | ".join(spread(values) for values in auc)
        lines.append(f"| {condition.name} | {rows[0][0].cases} | {cells} | {spread(gain, '+')} |")
    lines.append(f"\nTime: {spread(seconds, '', 0)} s for both trainings.")
    return "\n".join(lines)


def spread(values: list[Any], sign: str = "", digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.{digits}f} ({deviation:.{digits}f})"


def fill() -> None:
    before, after = "<!-- table: begin -->\n", "\n<!-- table: end -->"
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(before) + ".*?" + re.escape(after), re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: before + table() + after, page), encoding="utf-8")


def main(settings: Settings) -> None:
    if not settings.fill_only:
        measure(settings)
    fill()
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
