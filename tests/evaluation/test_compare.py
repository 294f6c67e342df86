import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmfusion.evaluation import MissingnessReport, compare, evaluate, merge
from mmfusion.evaluation.statistics import delong, holm, wilcoxon

NAN = float("nan")


def data(target, cases=80, labels=None):
    draw = torch.Generator().manual_seed(0)
    classes = 2 if target == "binary" else 3
    labels = torch.arange(cases) % classes if labels is None else labels
    if target == "regression":
        labels = labels + torch.rand(cases, generator=draw)
    signal = labels[:, None].float()
    noise = torch.randn(cases, 4, generator=draw)
    inputs = {
        "a": signal + 0.7 * noise[:, :1],
        "b": signal + 1.3 * noise[:, 1:2],
        "c": noise[:, 2:3],
    }
    return {"inputs": inputs, "labels": labels}


def method(name, target, of=None, **options):
    """A model that looks at one modality, or at the mean of a and b."""

    def model(inputs, present):
        seen = (inputs["a"] + inputs["b"]) / 2 if name == "mean" else inputs[name]
        if target != "multiclass":
            return seen
        return -((seen - torch.arange(3.0)) ** 2)

    options = {"rates": (0.0, 0.3, 0.5), "num_bootstrap": 5} | options
    of = data(target) if of is None else of
    return evaluate(model, of, target=target, method=name, **options)


def reports(target, *names, **options):
    return [method(name, target, **options) for name in names or ("c", "b", "a")]


@pytest.mark.parametrize("target", ["binary", "multiclass", "regression"])
def test_the_best_comes_first_and_the_worst_has_marks(target):
    found = compare(reports(target))
    assert [one.method for one in found.ranked] == ["a", "b", "c"]
    best, _, worst = found.ranked
    assert (best.difference, best.marks) == (0, "")
    assert math.isnan(best.p)
    assert worst.difference < 0
    assert worst.low <= worst.difference <= worst.high < 0
    assert worst.adjusted < 0.05
    assert worst.marks.startswith("*")
    assert found.conditions == ("rate 0.3", "rate 0.5")


def test_small_errors_are_printed_with_their_digits():
    of = data("regression")
    of = {"inputs": {n: x * 1e-5 for n, x in of["inputs"].items()}, "labels": of["labels"] * 1e-5}
    several = [method(name, "regression", of, metrics=["mae", "r2"]) for name in "ab"]
    best = compare(several).ranked[0].mean
    assert 0 < best < 1e-4
    assert f"{best:.3g}" in compare(several).table()
    assert f"{several[0].estimate(several[0].conditions()[0]).mean:.3g}" in several[0].table()


def test_a_rate_is_the_same_as_whole_number():
    several = [
        method(name, "binary", rates=rates) for name, rates in (("a", (0, 0.5)), ("b", (0.0, 0.5)))
    ]
    assert several[0].conditions() == several[1].conditions()
    compare(several)


def test_where_less_is_better_the_lowest_comes_first():
    found = compare(reports("regression"), "mae")
    assert [one.method for one in found.ranked] == ["a", "b", "c"]
    assert all(one.difference > 0 for one in found.ranked[1:])
    assert found.ranked[2].marks.startswith("*")


def test_the_mean_is_that_over_rates_above_zero():
    several = reports("multiclass", "a", "b", seeds=(0, 1))
    found = compare(several)
    one = several[0]
    rates = [one.estimate(c).mean for c in one.conditions("per_modality") if c.rate]
    assert found.ranked[0].mean == pytest.approx(np.mean(rates))
    assert found.ranked[1].difference == pytest.approx(found.ranked[1].mean - np.mean(rates))


def test_without_rates_the_mean_is_over_all_conditions():
    found = compare(reports("multiclass", kinds=("subset",)))
    assert len(found.conditions) == 7


def test_a_binary_auc_is_compared_by_delong():
    several = reports("binary", "a", "b", "c", rates=(0.5,))
    found = compare(several[::-1])
    assert found.test == "DeLong"
    scores = [one.scores[-1] for one in several]
    expected = [delong(x.probabilities, scores[0].probabilities, x.labels) for x in scores[1:]]
    assert [one.p for one in found.ranked[1:]] == pytest.approx([one.p for one in expected])
    assert [one.low for one in found.ranked[1:]] == pytest.approx([one.low for one in expected])
    adjusted = [one.adjusted for one in found.ranked[1:]]
    assert adjusted == pytest.approx(holm([one.p for one in expected]))
    assert [one.difference for one in found.ranked[1:]] == pytest.approx(
        [one.value for one in expected], abs=1e-6
    )


def test_rows_of_one_case_count_once():
    of = data("binary")
    of["sample_ids"] = torch.arange(80) // 2
    assert compare([method(n, "binary", of) for n in "ab"]).test == "paired bootstrap"


def test_delong_and_the_bootstrap_agree():
    several = reports("binary", "a", "b")
    of = data("binary")
    of["present"] = torch.ones(80, 3, dtype=torch.bool)
    of["present"][0] = torch.tensor([False, False, True])  # then cases differ between conditions
    other = compare([method(name, "binary", of) for name in "ab"], num_resamples=2000)
    one = compare(several)
    assert (one.test, other.test) == ("DeLong", "paired bootstrap")
    assert one.ranked[1].low == pytest.approx(other.ranked[1].low, abs=0.03)
    assert one.ranked[1].high == pytest.approx(other.ranked[1].high, abs=0.03)


def test_what_delong_cannot_test_is_bootstrapped():
    assert compare(reports("binary", "a", "c"), "ece").test == "paired bootstrap"
    of = data("binary", labels=(torch.arange(80) == 3).long())  # one positive has no variance
    assert compare([method(name, "binary", of) for name in "ac"]).test == "paired bootstrap"


def test_a_method_does_not_differ_from_itself():
    for target in ("binary", "multiclass"):
        one = method("a", target)
        found = compare([one, replace(one, method="again")]).ranked
        assert [row.method for row in found] == ["a", "again"]
        assert found[1][2:] == (0, 0, 0, 1, 1, "")


def test_similar_methods_do_not_differ_beyond_chance():
    one, other = method("a", "multiclass"), method("mean", "multiclass")
    row = compare([one, other]).ranked[1]
    assert row.low < row.difference < row.high


def test_the_bootstrap_draws_cases_and_not_rows_of_conditions():
    """Over copies of one condition the interval is that of one, not narrower by their number."""
    several = reports("multiclass", "a", "b", rates=(0.5,))
    once = compare(several)
    copies = [
        replace(
            one,
            scores=[
                replace(one.scores[-1], condition=replace(one.scores[-1].condition, name=str(k)))
                for k in range(5)
            ],
        )
        for one in several
    ]
    five = compare(copies)
    assert five.ranked[1].low == pytest.approx(once.ranked[1].low)
    assert five.ranked[1].high == pytest.approx(once.ranked[1].high)


def test_thresholds_and_tasks_are_those_of_the_reports():
    of, valid = data("binary"), data("binary", cases=60)
    several = [
        method(name, "binary", of, validation=valid, metrics=["sensitivity"]) for name in "ab"
    ]
    compared = compare(several)
    shown = [one.estimate(c).mean for one in several for c in one.conditions()[-2:]]
    assert sorted(one.mean for one in compared.ranked) == pytest.approx(
        sorted([np.mean(shown[:2]), np.mean(shown[2:])])
    )
    worst = compared.ranked[1]
    assert worst.low <= worst.difference <= worst.high
    of = data("multiclass")
    of["labels"] = torch.stack([of["labels"], of["labels"].clamp(max=1)], dim=1)
    tasks = {"diagnosis": "ABC", "pigment": ("no", "yes")}

    def model(inputs, present):
        near = -((inputs["a"] - torch.arange(3.0)) ** 2)
        return torch.cat([near, near[:, :2]], dim=1)

    options = {"target": "multiclass", "classes": tasks, "num_bootstrap": 5}
    one = evaluate(model, of, method="one", **options)
    other = evaluate(lambda inputs, present: 0 * model(inputs, present), of, **options)
    assert compare([one, other]).ranked[1].marks == "**"


def test_reports_from_files_compare_as_before(tmp_path):
    several = reports("multiclass")
    before = compare(several)
    read = []
    for one in several:
        one.to_json(tmp_path / "metrics.json")
        read.append(MissingnessReport.from_json(tmp_path / "metrics.json"))
    for one, other in zip(before.ranked, compare(read).ranked, strict=True):
        np.testing.assert_equal(tuple(other), tuple(one))


def without_predictions(report, folder):
    report.to_json(folder / "metrics.json", predictions=False)
    return MissingnessReport.from_json(folder / "metrics.json")


def test_without_predictions_the_patterns_of_one_model_are_no_pairs(tmp_path):
    """They share cases and model: counted one by one, chance would pass for a difference."""
    several = [
        without_predictions(one, tmp_path)
        for one in reports("multiclass", "a", "b", seeds=range(8), kinds=["per_modality"])
    ]
    found = compare(several)
    assert found.test.startswith("no test: one model per method")
    assert math.isnan(found.ranked[1].adjusted)
    assert found.ranked[1].marks == ""
    assert "nan" not in found.table()


def test_without_predictions_the_pairs_are_models(tmp_path):
    """Conditions share cases and model: counted one by one, chance would pass for a difference."""
    several = [
        merge(
            [
                without_predictions(method(name, "multiclass", seeds=[seed]), tmp_path)
                for seed in range(7)
            ]
        )
        for name in "ab"
    ]
    found = compare(several)
    assert found.test == "Wilcoxon over seeds"
    pairs = [
        [
            np.mean([s.values["auc_macro"] for s in r.scores if s.condition.rate and s.seed == k])
            for k in range(7)
        ]
        for r in several
    ]
    assert found.ranked[1].p == pytest.approx(wilcoxon(*pairs))
    assert math.isnan(found.ranked[1].low)
    assert "nan" not in found.table()


def test_a_condition_without_a_value_is_left_out():
    several = reports("multiclass", "a", "b")
    first = several[0].scores[-1]
    several[0].scores[-1] = replace(first, values=dict.fromkeys(first.values, NAN))
    assert compare(several).conditions == ("rate 0.3",)
    hollow = data("multiclass", labels=torch.zeros(80, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"metric='auc_macro' has no value under any.*Read the rea"
    ):
        compare([method(name, "multiclass", hollow) for name in "ab"])


def test_the_table():
    lines = compare(reports("binary")).table().splitlines()
    assert lines[0].split()[:2] == ["method", "mean"]
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert lines[3].endswith("*")
    assert lines[-1] == "auc_macro, mean over rate 0.3, rate 0.5; DeLong"


def test_one_method_alone_is_the_best():
    found = compare(reports("multiclass", "a"))
    assert [one.method for one in found.ranked] == ["a"]
    assert len(found.table().splitlines()) == 3


# What cannot be compared -------------------------------------------------------------------------


def refused(several, words, **options):
    with pytest.raises(ValueError, match=words):
        compare(several, **options)


def test_other_patterns():
    one, other = reports("multiclass", "a", "b")
    other.scores[8] = replace(other.scores[8], sha256="0" * 64)
    refused(
        [one, other], r"rate 0\.3, seed 0 has other patterns for 'b' than for 'a'.*Evaluate all"
    )


def test_other_labels():
    of = data("binary")
    turned = of | {"labels": 1 - of["labels"]}
    one, other = method("a", "binary", of), method("b", "binary", turned)
    refused([one, other], r"a, seed 0 has other labels for 'b'.*same truth\. Evaluate all")


def test_other_cases():
    of = data("multiclass")
    ids = of | {"sample_ids": torch.arange(80) + 1}
    one, other = method("a", "multiclass", of), method("b", "multiclass", ids)
    refused([one, other], r"a, seed 0 has other cases for 'b'.*on the same\. Evaluate all")
    fewer = [replace(one.scores[0], cases=79, case_ids=None), *one.scores[1:]]
    refused([one, replace(one, method="b", scores=fewer)], r"a, seed 0 has other cases for 'b'")


def test_other_conditions():
    one = method("a", "multiclass")
    more = method("b", "multiclass", rates=(0.0, 0.3, 0.5, 0.7))
    refused([one, more], r"rate 0\.7, seed 0 is not in the report of 'a'.*same cond.*Evaluate all")
    refused([more, one], r"rate 0\.7, seed 0 is not in the report of 'a'")
    seeds = merge([one, method("a", "multiclass", seeds=[1])])
    refused([seeds, method("b", "multiclass")], r"seed 1 is not in the report of 'b'")


@pytest.mark.parametrize("name", ["names", "target", "classes"])
def test_another_task(name):
    one = method("a", "multiclass")
    other = replace(one, **{"method": "b", name: "x"})
    refused([one, other], rf"{name} of 'b' is 'x', of 'a' .*on one task\. Evaluate them")


def test_names_that_do_not_tell_methods_apart():
    one = method("a", "multiclass")
    refused([one, one], r"methods \['a', 'a'\]: each method has one report.*another method=")
    refused([], r"methods \[\].*each method has one report")


def test_a_metric_that_was_not_scored():
    refused(reports("multiclass", "a", "b"), r"metric='mcc'.*holds auc_macro.*Name", metric="mcc")
