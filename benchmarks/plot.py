"""Draw every benchmark CSV in a folder: time with its floor, and the ratio to ours.

Also writes ``ratios.csv``: our time over the others', forward and both passes; the docs show it.

python benchmarks/plot.py benchmarks/results/cpu
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def read(path):
    """Rows that hold a time, graph time where there is one."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"].endswith("_us")]
    for row in rows:
        try:
            row["value"] = float(row["value"])
        except ValueError:
            row["value"] = None  # not captured
        row["x"] = float(row["x"])
    return [row for row in rows if row["value"] is not None]


def panels(rows):
    """One panel per mode and set of options that is not the x axis."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        config = json.loads(row["config"])
        fixed = {k: config[k] for k in ("dtype", "f") if k in config}
        name = ", ".join([row["mode"], row["metric"], *(f"{k}={v}" for k, v in fixed.items())])
        found[name][row["provider"]].append(row)
    return dict(sorted(found.items()))


def draw(path):
    rows = read(path)
    parts = panels(rows)
    if not parts:
        return
    names = sorted({provider for providers in parts.values() for provider in providers})
    colours = dict(zip(names, mpl.color_sequences["tab20"], strict=False))  # one in every panel
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(11, 3.2 * len(parts)), squeeze=False, layout="constrained"
    )
    for (name, providers), (left, right) in zip(parts.items(), axes, strict=True):
        ours = {}
        for row in providers.get("mmfusion", providers.get("CMML", [])):
            ours[row["x"], row["config"]] = row["value"]
        for provider, points in sorted(providers.items()):
            points.sort(key=lambda row: (row["x"], row["config"]))
            x = [row["x"] for row in points]
            style = {"label": provider, "color": colours[provider], "markersize": 3}
            left.plot(x, [row["value"] for row in points], "o-", **style)
            shared = [row for row in points if (row["x"], row["config"]) in ours]
            pairs = [(row["x"], row["value"] / ours[row["x"], row["config"]]) for row in shared]
            if pairs and provider != "mmfusion":
                right.plot(*zip(*pairs, strict=True), "o-", **style)
        floors = [
            (row["x"], row["value"] * float(row["percent_of_floor"]) / 100)
            for row in sorted(providers.get("mmfusion", []), key=lambda row: row["x"])
            if row["percent_of_floor"]
        ]
        if floors:
            left.plot(*zip(*floors, strict=True), "k--", label="floor", linewidth=1)
        right.axhline(1.0, color="k", linewidth=1)
        for axis, label in ((left, "microseconds"), (right, "time / mmfusion")):
            axis.set(xscale="log", yscale="log", xlabel=rows[0]["x_name"], ylabel=label)
            axis.set_title(name, fontsize=8)
            axis.grid(alpha=0.3)
        left.legend(fontsize=6)
    about = rows[0]
    figure.suptitle(f"{path.stem} on {about['gpu']}, torch {about['torch']}, {about['date']}")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def ratios(paths):
    """Lines of (op, size, against, forward, both); eager times, ours in the numerator."""
    found = defaultdict(dict)
    for row in (row for path in paths for row in read(path) if row["metric"] == "eager_us"):
        config = json.loads(row["config"])
        size = f"{row['x_name']} {row['x']:.0f}" + (f", f {config['f']}" if "f" in config else "")
        found[row["op"], size, row["config"]][row["provider"], row["mode"]] = row["value"]
    for (op, size, _), times in found.items():
        ours = "CMML" if op == "cmml_step" else "mmfusion"
        others = {name for name, _ in times} - {ours, "mmfusion torch"}
        for other in sorted(name for name in others if not name.endswith(" again")):
            cells = [
                f"{times[ours, mode] / times[other, mode]:.2f}"
                if {(ours, mode), (other, mode)} <= times.keys()
                else ""
                for mode in ("forward", "both")
            ]
            yield op, size, other, *cells


def write_ratios(folder, paths):
    part = folder / "ratios.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["op", "size", "against", "forward", "both"])
        writer.writerows(ratios(paths))
    part.replace(folder / "ratios.csv")


if __name__ == "__main__":
    results = Path(sys.argv[1])
    measured = sorted(path for path in results.glob("*.csv") if path.name != "ratios.csv")
    for csv_path in measured:
        draw(csv_path)
    write_ratios(results, measured)
