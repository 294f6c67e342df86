"""What the reports of ``accuracy.py`` come to: one table, tests between methods, and pages."""

import csv
import json
from pathlib import Path

import numpy as np

from mmfusion.evaluation import MissingnessReport, compare, merge
from mmfusion.evaluation.statistics import holm, wilcoxon
from mmfusion.recipes.checkpoint import write_whole

COLUMNS = ("data", "rate", "seed", "method")
Key = tuple[str, float, int, str]
Values = dict[str, dict[str, dict[tuple[float, int], float]]]  # data, method, run: AUC


def sum_up(out: Path) -> str:
    """Write ``results.csv``, ``table.md``, ``comparison.txt`` and pages from all of ``runs/``.

    Rows that ``results.csv`` has beside those stay: each names the commit that made it. Tests
    between methods need predictions, so that these and the pages are of ``runs/`` alone.
    """
    rows = _rows_before(out / "results.csv")
    parts: dict[str, dict[str, list[MissingnessReport]]] = {}
    for path in sorted((out / "runs").glob("*.json")):
        report, data = MissingnessReport.from_json(path), path.name.partition(" ")[0]
        parts.setdefault(data, {}).setdefault(report.method, []).append(report)
        (one,) = report.scores
        key = data, one.condition.rate, one.seed, report.method
        rows[key] = (
            dict(zip(COLUMNS, key, strict=True))
            | {metric: round(value, 5) for metric, value in one.values.items()}
            | {name: report.about[name] for name in ("seconds", "commit")}
            | {"decisions": json.dumps(report.about["decisions"])}
        )
    rows = dict(sorted(rows.items()))

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, next(iter(rows.values())), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())

    write_whole(out / "results.csv", write)
    text = table(_complete(_values(rows)))
    write_whole(out / "table.md", lambda part: part.write_text(text + "\n"))
    of_reports = {key: row for key, row in rows.items() if key[3] in parts.get(key[0], {})}
    ranked = []
    for data, of in _complete(_values(of_reports)).items():
        first, *others = (merge(parts[data][method]) for method in of)
        first.to_html(out / f"report-{data}.html", others)
        ranked.append(f"{data}\n{compare([first, *others]).table()}")
    write_whole(out / "comparison.txt", lambda part: part.write_text("\n\n".join(ranked) + "\n"))
    return text


def _rows_before(path: Path) -> dict[Key, dict]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["data"], float(row["rate"]), int(row["seed"]), row["method"]): row for row in rows}


def _values(rows: dict[Key, dict]) -> Values:
    found: Values = {}
    for (data, rate, seed, method), row in rows.items():
        found.setdefault(data, {}).setdefault(method, {})[rate, seed] = float(row["auc_macro"])
    return found


def _complete(found: Values) -> Values:
    """The runs that CMML has (else all), methods with all of these, CMML first, then by mean."""
    runs = {
        data: set(each["CMML"] if "CMML" in each else {run for of in each.values() for run in of})
        for data, each in found.items()
    }
    methods = [
        method
        for method in dict.fromkeys(method for each in found.values() for method in each)
        if all(runs[data] <= set(each.get(method, ())) for data, each in found.items())
    ]
    kept = {
        data: {m: {run: each[m][run] for run in sorted(runs[data])} for m in methods}
        for data, each in found.items()
    }
    methods.sort(key=lambda m: (m != "CMML", -np.mean([_mean(each[m]) for each in kept.values()])))
    return {data: {method: each[method] for method in methods} for data, each in kept.items()}


def table(found: Values) -> str:
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
    count = len(found[sets[0]][methods[0]])
    note = f"Macro one-vs-rest AUC x 100; runs (seeds x rates) per data set: {count}."
    if p_values:
        note += f" p: Wilcoxon test against {methods[0]} over data sets and seeds, by Holm."
    else:
        rows = [row[:-1] for row in rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note])


def _against_first(found: Values, methods: list[str]) -> dict[str, str]:
    """P values over pairs (data set, seed), each averaged over rates; {} where they say nothing."""
    pairs = [
        (data, seed)
        for data, each in found.items()
        for seed in sorted({seed for _, seed in each[methods[0]]})
    ]
    if len(pairs) < 6:
        return {}
    first, *others = (
        [
            np.mean([v for (_, k), v in found[data][method].items() if k == seed])
            for data, seed in pairs
        ]
        for method in methods
    )
    adjusted = holm([wilcoxon(row, first) for row in others])
    return {method: f"{p:.2g}" for method, p in zip(methods[1:], adjusted, strict=True)}


def _mean(of: dict[tuple[float, int], float]) -> float:
    return float(np.mean(list(of.values())))


def _cells(values: np.ndarray, how: str) -> list[str]:
    return [f"{100 * value:{how}}" for value in (*values, values.mean())]
