"""Scores of examples/cmml_derm7pt.py on its synthetic release, over seeds.

python benchmarks/derm7pt_synthetic.py               # about three minutes a seed on two cores
python benchmarks/derm7pt_synthetic.py --fill-only   # only the table in docs/derm7pt.md

Runs the example with `--ablate` for each seed, collects the scores in
`benchmarks/results/derm7pt_synthetic/metrics.json`, and puts their table into docs/derm7pt.md.
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

from mmfusion.recipes.reporting import write_json

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "benchmarks/results/derm7pt_synthetic/metrics.json"
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
    found = []
    for seed in range(settings.seeds):
        out = settings.runs / f"seed-{seed}"
        command = [sys.executable, str(HERE / "examples/cmml_derm7pt.py"), "--ablate"]
        subprocess.run([*command, f"--seed={seed}", f"--out={out}"], check=True)
        metrics = json.loads((out / "metrics.json").read_text())
        if not metrics["synthetic"]:
            raise ValueError(f"{out} is not synthetic: only such results are collected here.")
        del metrics["history"]
        found.append(metrics)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS, {"synthetic": True, "seeds": found})


def table() -> str:
    seeds = json.loads(RESULTS.read_text())["seeds"]
    models = list(seeds[0]["results"])
    lines = [f"| SYNTHETIC: AUC, {len(seeds)} seeds | cases | {' | '.join(models)} | difference |"]
    lines.append("|---" * (3 + len(models)) + "|")
    for kind in ("subsets", "rates"):
        for place, row in enumerate(seeds[0]["results"][models[0]][kind]):
            auc = [[one["results"][m][kind][place]["auc"] for one in seeds] for m in models]
            gain = [ours - theirs for ours, theirs in zip(*auc, strict=True)]
            cells = " | ".join(spread(values) for values in auc)
            lines.append(f"| {row['name']} | {row['cases']} | {cells} | {spread(gain, '+')} |")
    lines.append(
        f"\nTime: {spread([one['seconds'] for one in seeds], '', 0)} s for both trainings."
    )
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
