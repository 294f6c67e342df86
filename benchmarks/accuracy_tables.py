"""What the reports of ``accuracy.py`` come to: one table, tests between methods, and pages."""

import csv
import json
from pathlib import Path

import numpy as np

from mmfusion.evaluation import MissingnessReport, compare, merge
from mmfusion.evaluation.statistics import holm, wilcoxon
from mmfusion.recipes.checkpoint import write_whole

COLUMNS = ("data", "rate", "seed", "method")
Found = dict[str, dict[str, MissingnessReport]]


def sum_up(out: Path) -> str:
    """Write ``results.csv``, ``table.md``, ``comparison.txt`` and pages from all of ``runs/``."""
    rows, parts = [], {}
    for path in sorted((out / "runs").glob("*.json")):
        report, data = MissingnessReport.from_json(path), path.name.partition(" ")[0]
        parts.setdefault(data, {}).setdefault(report.method, []).append(report)
        (one,) = report.scores
        rows.append(
            {"data": data, "rate": one.condition.rate, "seed": one.seed, "method": report.method}
            | {metric: round(value, 5) for metric, value in one.values.items()}
            | {name: report.about[name] for name in ("seconds", "commit")}
            | {"decisions": json.dumps(report.about["decisions"])}
        )
    rows.sort(key=lambda row: [row[name] for name in COLUMNS])
    found = {
        data: {method: merge(reports) for method, reports in of.items()}
        for data, of in parts.items()
    }

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(out / "results.csv", write)
    complete = _complete(found)
    text = table(complete)
    write_whole(out / "table.md", lambda part: part.write_text(text + "\n"))
    ranked = "\n\n".join(
        f"{data}\n{compare(list(of.values())).table()}" for data, of in complete.items()
    )
    write_whole(out / "comparison.txt", lambda part: part.write_text(ranked + "\n"))
    for data, of in complete.items():
        first, *others = of.values()
        first.to_html(out / f"report-{data}.html", others)
    return text


def _complete(found: Found) -> Found:
    """Methods with every run on every data set, CMML first, then by mean AUC."""
    runs = {
        data: {key for report in of.values() for key in _values(report)}
        for data, of in found.items()
    }
    methods = [
        method
        for method in dict.fromkeys(method for of in found.values() for method in of)
        if all(
            method in of and set(_values(of[method])) == runs[data] for data, of in found.items()
        )
    ]
    methods.sort(key=lambda m: (m != "CMML", -np.mean([_mean(of[m]) for of in found.values()])))
    return {data: {method: of[method] for method in methods} for data, of in found.items()}


def table(found: Found) -> str:
    """AUC in points, mean over seeds and rates of each data set and over data sets, best first."""
    methods, sets = list(next(iter(found.values()))), list(found)
    means = {m: np.array([_mean(found[data][m]) for data in sets]) for m in methods}
    p_values = _against_first(found, methods)
    rows = [["method", *sets, "mean", "p"], ["---"] * (len(sets) + 3)]
    for method in sorted(methods, key=lambda m: -means[m].mean()):
        rows.append([method, *_cells(means[method], ".2f"), p_values.get(method, "")])
    others = [means[m] for m in methods if not m.startswith("CMML")]
    if methods[0] == "CMML" and others:
        against = {
            "best other of each set": np.max(others, axis=0),
            "best other on average": max(others, key=np.mean),
        }
        for what, values in against.items():
            rows.append([f"CMML minus {what}", *_cells(means["CMML"] - values, "+.2f"), ""])
    count = len(_values(found[sets[0]][methods[0]]))
    note = f"Macro one-vs-rest AUC x 100; runs (seeds x rates) per data set: {count}."
    if p_values:
        note += f" p: Wilcoxon test against {methods[0]} over data sets and seeds, by Holm."
    else:
        rows = [row[:-1] for row in rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note])


def _against_first(found: Found, methods: list[str]) -> dict[str, str]:
    """P values over pairs (data set, seed), each averaged over rates; {} where they say nothing."""
    pairs = [
        (data, seed)
        for data, of in found.items()
        for seed in sorted({seed for _, seed in _values(of[methods[0]])})
    ]
    if len(pairs) < 6:
        return {}
    first, *others = (
        [
            np.mean([v for (_, k), v in _values(found[data][method]).items() if k == seed])
            for data, seed in pairs
        ]
        for method in methods
    )
    adjusted = holm([wilcoxon(row, first) for row in others])
    return {method: f"{p:.2g}" for method, p in zip(methods[1:], adjusted, strict=True)}


def _values(report: MissingnessReport) -> dict[tuple, float]:
    """AUC of every rate and seed."""
    return {(s.condition.rate, s.seed): s.values["auc_macro"] for s in report.scores}


def _mean(report: MissingnessReport) -> float:
    return float(np.mean(list(_values(report).values())))


def _cells(values: np.ndarray, how: str) -> list[str]:
    return [f"{100 * value:{how}}" for value in (*values, values.mean())]
