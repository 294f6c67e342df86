"""What a report says, in sentences made from its numbers."""

import math
from collections.abc import Sequence

import numpy as np

from mmfusion.evaluation.compare import Comparison
from mmfusion.evaluation.lines import (
    RATE_KINDS,
    Line,
    condition_name,
    lines,
    metric_name,
    subset_name,
)
from mmfusion.evaluation.numbers import shown
from mmfusion.evaluation.report import Condition, MissingnessReport
from mmfusion.evaluation.scores import higher_is_better

__all__ = ["miscalibration", "shown_chance", "summarise"]

_AT_RATE = {
    "per_modality": "each modality is absent with a chance of {:g}",
    "sample_rate": "a share of {:g} of the cases lose a modality",
    "slot_rate": "a share of {:g} of all entries is absent",
}


def shown_chance(value: float) -> str:
    """A p value as the page prints it.

    Example:
        >>> shown_chance(0.0421), shown_chance(1e-9)
        ('0.042', 'below 0.001')
    """
    return "below 0.001" if value < 0.001 else shown(value)


def miscalibration(report: MissingnessReport, condition: Condition) -> tuple[float, float]:
    """Mean distance of confidence from accuracy over bins, and by how much it is too high.

    Of a binary or multilabel target, of the label's probability from its frequency. Averaged over
    seeds; NaN without a calibration.
    """
    scores = [one for one in report.scores if one.condition == condition and one.calibration]
    found = []
    for one in scores:
        confidence, accuracy, count = np.array(one.calibration).T
        excess, share = confidence - accuracy, count / count.sum()
        found.append((abs(excess) @ share, excess @ share))
    error, excess = np.mean(found, axis=0) if found else (math.nan, math.nan)
    return float(error), float(excess)


def summarise(
    reports: Sequence[MissingnessReport], metric: str, ranking: Comparison | None = None
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Tiles of (label, number, remark) and sentences about the first report, for a first look.

    Args:
        reports: The first is the subject.
        metric: The metric to speak of.
        ranking: Of the reports, if they could be compared.

    Example:
        >>> subset = Condition("subset", "derm", pattern=(True,))
        >>> from mmfusion.evaluation.report import Scores
        >>> row = Scores(subset, 0, 9, {"auc_macro": 0.75}, {}, {}, {}, "", ())
        >>> about = ("CMML", ("derm",), ("no", "yes"), "binary", ("auc_macro",))
        >>> report = MissingnessReport(*about, [row])
        >>> summarise([report], "auc_macro")[0]
        [('All present', '0.750', 'AUC (macro)')]
    """
    line = lines(reports)[0]
    tiles: list[tuple[str, str, str]] = []
    said: list[str] = []
    whole = line.subset((True,) * len(line.report.names))
    if whole is not None:
        _whole(line, metric, whole, tiles, said)
        _absences(line, metric, whole, tiles, said)
    _steps(line, metric, said)
    _rates(line, metric, tiles, said)
    _calibration(line, tiles, said)
    _guesses(line, said)
    if ranking is not None and len(ranking.ranked) > 1:
        _places(line, ranking, said)
    undefined = sum(len(one.undefined) for one in line.report.scores)
    if undefined:
        said.append(f"{undefined} scores have no value; the reasons stand below the tables.")
    return tiles, said


def _whole(
    line: Line,
    metric: str,
    whole: Condition,
    tiles: list[tuple[str, str, str]],
    said: list[str],
) -> None:
    found, name = line.report.estimate(whole, metric), metric_name(metric)
    if math.isnan(found.mean):
        said.append(f"With every modality present {line.label} has no {name}.")
        return
    known = not math.isnan(found.low)
    between = f"{shown(found.low, metric)} to {shown(found.high, metric)}"
    tiles.append(
        ("All present", shown(found.mean, metric), f"{name}, {between}" if known else name)
    )
    aim = "" if higher_is_better(metric) else " (lower is better)"
    interval = f", 95 % interval {between}" if known else ""
    said.append(
        f"With every modality present {line.label} scores {shown(found.mean, metric)} in "
        f"{name}{aim}{interval}."
    )


def _absences(
    line: Line,
    metric: str,
    whole: Condition,
    tiles: list[tuple[str, str, str]],
    said: list[str],
) -> None:
    """What the absence of each modality costs, the dearest first."""
    names, size = line.report.names, len(line.report.names)
    sign = 1 if higher_is_better(metric) else -1
    full = line.report.estimate(whole, metric)
    limit = full.low if sign > 0 else full.high
    costs = []
    for column, name in enumerate(names):
        others = line.subset(tuple(other != column for other in range(size)))
        if others is not None:
            value = line.report.estimate(others, metric).mean
            if not math.isnan(value - full.mean):
                costs.append((sign * (full.mean - value), name, value))
    if not costs:
        return
    costs.sort(key=lambda one: -one[0])
    cost, name, value = costs[0]
    if cost > 0:
        tiles.append(("Most needed", name, f"without it {shown(value, metric)}"))
    parts = [
        f"without {name} {shown(value, metric)}, {'a loss' if cost > 0 else 'a gain'} of "
        f"{shown(abs(cost), metric)}"
        for cost, name, value in costs[:3]
    ]
    rest = f" The other {len(costs) - 3} cost no more." if len(costs) > 3 else ""
    said.append(f"What the absence of one modality costs: {'; '.join(parts)}.{rest}")
    little = [name for _, name, value in costs if sign * (value - limit) > 0]
    if little:
        which = f"Without {', '.join(little)}"
        which = "Whichever one is absent," if len(little) == size else which
        said.append(f"{which} the score stays inside the interval of the whole.")


def _steps(line: Line, metric: str, said: list[str]) -> None:
    """Whether more modalities ever hurt."""
    report, subsets = line.alone(), line.conditions("subset")
    if len(subsets) < 2:
        return
    known = [
        set(np.flatnonzero(one.pattern or ()).tolist())
        for one in subsets
        if not math.isnan(report.estimate(one, metric).mean)
    ]
    if not any(small < large for small in known for large in known):
        said.append("Whether more modalities do worse is not known: too few subsets have a score.")
        return
    worse = report.violations(metric)
    if not worse:
        said.append("More modalities never did worse.")
        return
    read = {one.label: condition_name(report, one) for one in subsets}
    small, large, loss = worse[0]
    times = "once" if len(worse) == 1 else f"{len(worse)} times"
    said.append(
        f"More modalities did worse {times}; most from {read[small]} to {read[large]}, by "
        f"{shown(loss, metric)}."
    )


def _rates(line: Line, metric: str, tiles: list[tuple[str, str, str]], said: list[str]) -> None:
    """The middle rate of the first kind of rates, if there is one."""
    for kind, meaning in RATE_KINDS.items():
        found = [
            one
            for one in line.conditions(kind)
            if one.rate and not math.isnan(line.report.estimate(one, metric).mean)
        ]
        if found:
            one = min(found, key=lambda one: abs((one.rate or 0) - 0.5))
            value = shown(line.report.estimate(one, metric).mean, metric)
            rows = [row for row in line.report.scores if row.condition == one]
            rate = sum(row.realised.get("slot_rate", math.nan) for row in rows) / len(rows)
            share = "" if math.isnan(rate) else f" ({100 * rate:.0f} % of all entries in fact)"
            tiles.append((f"Rate {one.rate:g}", value, meaning))
            where = _AT_RATE[kind].format(one.rate)
            said.append(f"When {where}{share}, it scores {value}.")
            return


def _calibration(line: Line, tiles: list[tuple[str, str, str]], said: list[str]) -> None:
    found = [
        (*miscalibration(line.report, one), subset_name(line.report.names, one.pattern or ()))
        for one in reversed(line.conditions("subset"))
    ]
    found = [one for one in found if not math.isnan(one[0])]
    if not found:
        return
    error, excess, name = found[0]
    what, leanings = "Probability", ("too low", "too high")
    if line.report.target == "multiclass":
        what, leanings = "Confidence", ("too cautious", "too sure")
    tiles.append((f"{what} off by", f"{100 * error:.1f} points", f"on average, with {name}"))
    said.append(
        f"Its {what.lower()} is off by {100 * error:.1f} percentage points on average with {name}, "
        f"on the whole {leanings[excess > 0]} by {100 * abs(excess):.1f}."
    )
    worst, _, where = max(found)
    if worst > error:
        said.append(f"Its {what.lower()} is worst with {where}: off by {100 * worst:.1f} points.")


def _guesses(line: Line, said: list[str]) -> None:
    """Whether what is synthesised is closer to the truth than simpler guesses."""
    parts = line.report.diagnostics.get("synthesis", {})
    for key, rival in (
        ("nearest_neighbour", "than the nearest training case"),
        ("class_mean", "than the mean of the true class"),
    ):
        known = {name: one for name, one in parts.items() if one.get("model") and one.get(key)}
        better = [n for n, one in known.items() if one["model"]["cosine"] > one[key]["cosine"]]
        if not known:
            continue
        which = "every modality" if len(better) == len(known) else ", ".join(better)
        said.append(
            f"Its guesses are {'closer' if better else 'never closer'} to the hidden truth {rival}"
            f"{f' for {which}' if better else ''} (cosine)."
        )


def _places(line: Line, ranking: Comparison, said: list[str]) -> None:
    place = [one.method for one in ranking.ranked].index(line.report.method)
    one = ranking.ranked[max(place, 1)]
    first, other = ranking.ranked[0].method, one.method
    sure = "" if math.isnan(one.adjusted) else f" (p {shown_chance(one.adjusted)})"
    said.append(
        f"Of {len(ranking.ranked)} methods it ranks {place + 1}; {first} leads {other} by "
        f"{shown(abs(one.difference), ranking.metric)}{sure}."
    )
