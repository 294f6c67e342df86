"""Scores of the examples on their synthetic data, over seeds.

python benchmarks/synthetic.py derm7pt                      # minutes a seed on two cores
python benchmarks/synthetic.py odir men --seeds 3
python benchmarks/synthetic.py derm7pt odir men --fill-only # only the tables in docs/

Runs an example with its defaults for each seed, joins the reports of each model into a file of
`benchmarks/results/<name>_synthetic/`, and puts a table of them into docs/<name>.md. That of
Derm7pt trains a second model, without cascade and memory.
"""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mmfusion.evaluation import MissingnessReport, merge

HERE = Path(__file__).resolve().parents[1]
# What an example is told, and the reports that it writes.
EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "derm7pt": (["--ablate"], ["metrics.json", "metrics-no-CRTA-no-memory.json"]),
    "odir": ([], ["metrics.json"]),
    "men": ([], ["metrics.json"]),
}


@dataclass
class Settings:
    """What to run."""

    names: tyro.conf.Positional[tuple[Literal["derm7pt", "odir", "men"], ...]]
    """The examples."""
    seeds: int = 3
    """Seeds 0, 1, ..."""
    fill_only: bool = False
    """Fill the tables from the results that are there."""


def results(name: str) -> Path:
    return HERE / f"benchmarks/results/{name}_synthetic"


def measure(name: str, seeds: int) -> None:
    options, files = EXAMPLES[name]
    found: dict[str, list[MissingnessReport]] = {file: [] for file in files}
    about: dict[str, Any] = {"seconds": []}
    for seed in range(seeds):
        out = Path(f"runs/{name}_synthetic/seed-{seed}")
        command = [sys.executable, str(HERE / f"examples/cmml_{name}.py"), *options]
        subprocess.run([*command, f"--seed={seed}", f"--out={out}"], check=True)
        for file, reports in found.items():
            reports.append(MissingnessReport.from_json(out / file))
            if not reports[-1].about["synthetic"]:
                raise ValueError(f"{out} is not synthetic: only such results are collected here.")
        about["settings"] = json.loads((out / "config.json").read_text())["settings"]
        about["seconds"].append(json.loads((out / "history.json").read_text())["seconds"])
    results(name).mkdir(parents=True, exist_ok=True)
    for file, reports in found.items():
        joint = merge(reports)
        joint.about |= about
        joint.to_json(results(name) / file, predictions=False)


def table(name: str) -> str:
    """A row for each condition, a column for each model, and what the first is ahead by."""
    reports = [MissingnessReport.from_json(results(name) / file) for file in EXAMPLES[name][1]]
    seconds, heads = reports[0].about["seconds"], [report.method for report in reports]
    heads += ["difference"] * (len(reports) > 1)
    lines = [f"| SYNTHETIC: AUC, {len(seconds)} seeds | cases | {' | '.join(heads)} |"]
    lines.append("|---" * (2 + len(heads)) + "|")
    for condition in reports[0].conditions():
        rows = [[one for one in r.scores if one.condition == condition] for r in reports]
        auc = [[one.values["auc_macro"] for one in row] for row in rows]
        cells = [spread(values) for values in auc]
        if len(auc) > 1:
            cells.append(spread([ours - theirs for ours, theirs in zip(*auc, strict=True)], "+"))
        counts = sorted({one.cases for one in rows[0]})
        cases = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"| {condition.name} | {cases} | {' | '.join(cells)} |")
    lines.append(f"\nTime: {spread(seconds, '', 0)} s a seed.")
    return "\n".join(lines)


def spread(values: list[Any], sign: str = "", digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.{digits}f} ({deviation:.{digits}f})"


def filled(name: str) -> str:
    """The page of a data set, with its table of now."""
    before, after = "<!-- table: begin -->\n", "\n<!-- table: end -->"
    page = (HERE / f"docs/{name}.md").read_text(encoding="utf-8")
    pattern = re.compile(re.escape(before) + ".*?" + re.escape(after), re.DOTALL)
    return pattern.sub(lambda _: before + table(name) + after, page)


def main(settings: Settings) -> None:
    for name in settings.names:
        if not settings.fill_only:
            measure(name, settings.seeds)
        (HERE / f"docs/{name}.md").write_text(filled(name), encoding="utf-8")
        print(table(name))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
