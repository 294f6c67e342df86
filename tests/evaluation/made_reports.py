"""Reports with every kind of content, made without a model."""

from itertools import product

import numpy as np

from mmfusion.evaluation import Condition, MissingnessReport, Scores

METRICS = {"multiclass": ("auc_macro", "ece"), "regression": ("r2", "mae")}


def make_report(
    method="CMML",
    names=("clinic", "derm", "meta"),
    *,
    skill=0.4,
    seeds=(0, 1),
    target="multiclass",
    rates=("per_modality", "sample_rate", "slot_rate"),
    train_rates=(None,),
    undefined=(),
    synthetic=True,
    diagnostics=None,
):
    """More modalities score better, the first is worth most; ``undefined`` subsets have no value.

    Of more than six modalities only single ones, all but one and all are scored, as in
    ``evaluate``.
    """
    size = len(names)
    patterns = [p for p in product((False, True), repeat=size) if any(p)]
    if size > 6:
        patterns = [p for p in patterns if sum(p) in (1, size - 1, size)]
    patterns.sort(key=lambda p: (sum(p), [not x for x in p]))
    worth = np.linspace(1, 0.4, size) / np.linspace(1, 0.4, size).sum()
    scores = []

    def add(condition, share, seed):
        value = 0.5 + skill * share + 0.01 * seed
        known = condition.name not in undefined
        scores.append(
            Scores(
                condition,
                seed,
                40,
                dict.fromkeys(METRICS[target], value if known else float("nan")),
                dict.fromkeys(METRICS[target], (value - 0.02, value + 0.03)) if known else {},
                {} if known else {METRICS[target][0]: "none of 40 cases is MEL"},
                {"sample_rate": 0.75, "slot_rate": 0.25},
                f"{condition.name}{seed}".encode().hex().ljust(64, "0"),
                ()
                if target == "regression"
                else ((0.3, 0.35, 10), (0.75, 0.7, 20), (0.9, 0.8, 10)),
            )
        )

    for train_rate in train_rates:
        for seed in seeds:
            for pattern in patterns:
                name = " + ".join(n for n, left in zip(names, pattern, strict=True) if left)
                condition = Condition("subset", name, None, pattern, train_rate)
                add(condition, worth @ np.array(pattern), seed)
            for kind in rates:
                for rate in (0.0, 0.3, 0.6):
                    condition = Condition(kind, f"{kind} {rate}", rate, None, train_rate)
                    add(condition, 1 - rate, seed)
            for gone in names if size > 1 else ():
                condition = Condition("always_missing", f"without {gone}", None, None, train_rate)
                add(condition, 0.5, seed)
    return MissingnessReport(
        method,
        tuple(names),
        ("age",) if target == "regression" else ("NEV", "MEL"),
        target,
        METRICS[target],
        scores,
        {"title": "Lesions", "synthetic": synthetic, "versions": {"mmfusion": "0.1.0"}},
        diagnostics or {},
    )


def make_diagnostics(names=("clinic", "derm", "meta")):
    """What ``diagnose`` gives, with a None where it may have one."""
    points = np.random.default_rng(0).normal(size=(2, 30, 2)).round(3).tolist()
    close = {"cosine": 0.8, "r2": 0.5}
    return {
        "synthesis": {
            name: {
                "cases": 40,
                "model": close,
                "class_mean": None if i else {"cosine": 0.9, "r2": 0.6},
                "nearest_neighbour": {"cosine": 0.6, "r2": -0.2},
            }
            for i, name in enumerate(names)
        },
        "projection": {
            name: {"observed": points[0], "synthesised": points[1], "explained": [0.5, 0.2]}
            for name in names
        },
        "memory": {
            name: {"held": 64, "used": 0.5, "hit_rate": 1.0, "sources": 20, "same_label": None}
            for name in names
        },
        "alignment": {name: {"before": 0.4, "after": 0.1} for name in names},
    }
