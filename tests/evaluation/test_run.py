import time

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import mmfusion
from mmfusion.evaluation import MissingnessReport, evaluate, merge
from mmfusion.evaluation.metrics import METRICS
from mmfusion.missingness import PatternSet

WIDTHS = {"clinic": 4, "derm": 3, "meta": 2}
NAMES = tuple(WIDTHS)
NAN = float("nan")


def labels_of(target, cases):
    draw = torch.Generator().manual_seed(7)
    if target == "multiclass":
        return torch.arange(cases) % 3
    if target == "binary":
        return torch.arange(cases) % 2
    if target == "regression":
        return torch.randn(cases, 2, generator=draw)
    return (torch.rand(cases, 2, generator=draw) > 0.5).long()


def data(target="multiclass", cases=60, widths=WIDTHS):
    """Each modality tells something of the labels."""
    draw = torch.Generator().manual_seed(0)
    labels = labels_of(target, cases)
    signal = labels.float().reshape(cases, -1)[:, :1]
    inputs = {n: signal + torch.randn(cases, w, generator=draw) for n, w in widths.items()}
    return {"inputs": inputs, "labels": labels}


def sum_up(inputs, present):
    """Votes for the class nearest to the mean of what is there."""
    total = sum(value.mean(1) for value in inputs.values() if value is not None)
    mean = total / present.sum(1).clamp(min=1)
    return -((mean[:, None] - torch.arange(3.0)) ** 2)


def log_odds(inputs, present):
    return sum(value.mean(1) - 0.5 * present[:, i] for i, value in enumerate(inputs.values()))


def run(model=sum_up, of=None, **options):
    options = {"target": "multiclass", "num_bootstrap": 20} | options
    return evaluate(model, data() if of is None else of, **options)


def model_for(target, widths=WIDTHS):
    torch.manual_seed(0)
    outputs = {"multiclass": 3, "binary": 1}.get(target, 2)
    return mmfusion.CMML(widths, num_classes=outputs, target=target, dim=8)


def numbers(report):
    return [list(one.values.values()) for one in report.scores]


@pytest.mark.parametrize("target", METRICS)
def test_cmml_of_every_target(target, tmp_path):
    of, model = data(target), model_for(target)
    report = evaluate(model, of, metrics=list(METRICS[target]), num_bootstrap=20)
    assert (report.method, report.names, report.target) == ("CMML", NAMES, target)
    assert [one.kind for one in report.conditions()] == ["subset"] * 7 + ["per_modality"] * 4
    assert {one.cases for one in report.scores} == {60}
    for one in report.scores:  # an untrained model may always decide alike
        assert one.undefined in ({}, {"mcc": "the decisions do not vary"})
        assert {name for name, value in one.values.items() if np.isnan(value)} == set(one.undefined)
    assert model.training
    whole = report.scores[6]
    with torch.no_grad():
        logits = model.eval()(**of).logits
    expected = {
        "multiclass": logits.softmax(1),
        "regression": logits,
    }.get(target, logits.sigmoid())
    np.testing.assert_allclose(whole.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(whole.labels, of["labels"])
    assert whole.labels.dtype == (np.float64 if target == "regression" else np.int64)
    assert (whole.calibration == ()) == (target == "regression")
    report.to_json(tmp_path / "metrics.json")
    assert MissingnessReport.from_json(tmp_path / "metrics.json").table() == report.table()


@pytest.mark.parametrize("target", METRICS)
def test_defaults_have_a_value_and_an_interval(target):
    report = evaluate(model_for(target), data(target), kinds=["subset"])
    for one in report.scores:
        assert tuple(one.values) == tuple(one.intervals) == report.metrics
        for metric, value in one.values.items():
            low, high = one.intervals[metric]
            assert low <= value <= high, metric


def test_batches_are_as_the_mapping():
    of = data() | {"sample_ids": torch.arange(60) + 100}
    batches = [
        {
            "inputs": {name: value[rows] for name, value in of["inputs"].items()},
            "labels": of["labels"][rows],
            "sample_ids": of["sample_ids"][rows],
        }
        for rows in torch.arange(60).split(13)
    ]
    kinds = ["subset", "slot_rate", "always_missing", "not_at_random"]
    one, other = run(of=of, kinds=kinds), run(of=batches, kinds=kinds)
    assert numbers(one) == numbers(other)
    assert [s.sha256 for s in one.scores] == [s.sha256 for s in other.scores]
    assert one.scores[0].case_ids.tolist() == other.scores[0].case_ids.tolist()
    assert one.scores[0].case_ids[0] == 100


def test_the_value_is_scikit_learns_of_what_the_pattern_leaves():
    of = data()
    report = run(of=of, kinds=["per_modality"], rates=[0.5], metrics=["auc_macro"], seeds=[3])
    drawn = PatternSet.draw("per_modality", 60, NAMES, [0.5] * 3, seed=3, split="test")
    left = {n: v * drawn.present[:, [i]] for i, (n, v) in enumerate(of["inputs"].items())}
    chances = sum_up(left, drawn.present).softmax(1)
    expected = sk.roc_auc_score(of["labels"], chances, multi_class="ovr")
    [found] = report.scores
    assert found.values["auc_macro"] == pytest.approx(expected, abs=1e-6)
    assert found.sha256 == drawn.hash
    assert found.realised == drawn.realised()


def test_no_model_can_peek():
    def cheat(inputs, present):
        return inputs["clinic"] @ torch.ones(4, 3) + inputs["derm"].sum()

    report = run(cheat, kinds=["always_missing"])
    hidden = report.scores[0].probabilities  # without clinic nothing is left to tell cases apart
    assert np.ptp(hidden, axis=0).max() == 0


def test_incomplete_cases_are_scored_where_they_can_be():
    of = data()
    of["present"] = torch.ones(60, 3, dtype=torch.bool)
    of["present"][:10, 0] = False
    of["present"][:5] = False
    report = run(of=of, kinds=["subset", "always_missing", "per_modality"], rates=[0.0])
    cases = {one.condition.name: one.cases for one in report.scores}
    assert cases == {
        "clinic": 50, "derm": 55, "meta": 55, "clinic + derm": 50, "clinic + meta": 50,
        "derm + meta": 55, "clinic + derm + meta": 50, "without clinic": 55, "without derm": 55,
        "without meta": 55, "rate 0.0": 55,
    }  # fmt: skip
    assert report.scores[0].case_ids.tolist() == list(range(10, 60))
    assert report.scores[-1].realised == {"sample_rate": 5 / 55, "slot_rate": 5 / 165}


def test_cases_without_a_label_are_left_out():
    of = data()
    of["labels"][:4] = -100
    assert {one.cases for one in run(of=of).scores} == {56}
    many = data("multilabel")
    many["labels"] = many["labels"].float()
    many["labels"][0] = NAN
    many["labels"][1, 0] = NAN
    [*_, whole] = evaluate(model_for("multilabel"), many, kinds=["subset"]).scores
    assert whole.cases == 59
    assert whole.labels[0].tolist() == [-100, many["labels"][1, 1]]


def test_a_regression_may_be_of_minus_a_hundred():
    of = data("regression")
    of["labels"] = of["labels"] - 99.5
    of["labels"][0] = -100
    of["labels"][1, 0] = of["labels"][2] = NAN
    [one] = evaluate(
        lambda inputs, present: of["labels"].nan_to_num(),
        of,
        target="regression",
        kinds=["per_modality"],
        rates=[0.0],
        metrics=["mae"],
    ).scores
    assert one.cases == 59
    assert one.labels[0].tolist() == [-100, -100]
    assert one.values == {"mae": 0}


def test_large_values_of_a_regression_keep_all_digits(tmp_path):
    of = data("regression")
    of["labels"] = of["labels"].double() + 1.7e9
    report = evaluate(
        lambda inputs, present: of["labels"],
        of,
        target="regression",
        kinds=["per_modality"],
        rates=[0.0],
        metrics=["rmse", "r2"],
    )
    assert report.scores[0].values == {"rmse": 0, "r2": 1}
    report.to_json(tmp_path / "metrics.json")
    read = MissingnessReport.from_json(tmp_path / "metrics.json")
    np.testing.assert_array_equal(read.scores[0].probabilities, of["labels"].numpy())


def test_rows_of_one_case_are_drawn_together():
    """Else repeating each row would look like more cases, and narrow the intervals."""
    of, ids = data(), torch.arange(60)
    few = run(of=of | {"sample_ids": ids}, num_bootstrap=100)
    again = torch.arange(60).repeat(4)
    inputs = {name: value[again] for name, value in of["inputs"].items()}
    many = {"inputs": inputs, "labels": of["labels"][again], "sample_ids": ids[again]}
    many = run(of=many, num_bootstrap=100)
    for one, other in zip(few.scores, many.scores, strict=True):
        if one.condition.kind == "subset":
            np.testing.assert_allclose(other.intervals["auc_macro"], one.intervals["auc_macro"])


def test_a_class_without_a_case_has_a_reason():
    of = data()
    of["labels"] = of["labels"].clamp(max=1)
    report = run(of=of, classes=["NEV", "MEL", "BCC"], metrics=["auc_macro", "accuracy"])
    assert report.scores[0].undefined == {"auc_macro": "none of 60 cases is BCC"}
    assert "nan: clinic, seed 0, auc_macro: none of 60 cases is BCC" in report.table()
    assert report.scores[0].dropped == {"auc_macro": 20, "accuracy": 0}
    assert not np.isnan(report.scores[0].values["accuracy"])


@pytest.mark.parametrize("count", [1, 8])
def test_one_modality_and_many(count):
    widths = {f"m{place}": 2 for place in range(count)}
    report = evaluate(
        model_for("multiclass", widths),
        data(widths=widths, cases=30),
        kinds=["subset", "per_modality", "sample_rate", "slot_rate", "always_missing"],
        rates=[0.0, 0.5],
        num_bootstrap=5,
    )
    kinds = [one.kind for one in report.conditions()]
    if count == 1:
        assert kinds == ["subset", "per_modality", "sample_rate", "slot_rate"]
        assert report.about["notes"] == [
            f"{kind} 0.5: each case keeps one of its 1 modalities"
            for kind in ("per_modality", "sample_rate", "slot_rate")
        ]
    else:
        assert kinds.count("subset") == 17
        assert kinds.count("always_missing") == 8
        assert report.about["notes"][0].startswith("of 255 subsets 17 were scored")


def test_several_tasks_side_by_side():
    of = data()
    of["labels"] = torch.stack([of["labels"], of["labels"] % 2], dim=1)

    def model(inputs, present):
        near = sum_up(inputs, present)
        return torch.cat([near, near[:, :2]], dim=1)

    tasks = {"diagnosis": ("NEV", "MEL", "BCC"), "pigment": ("no", "yes")}
    report = run(model, of, classes=tasks, metrics=["auc_macro"], kinds=["subset"])
    [*_, whole] = report.scores
    near = sum_up(of["inputs"], torch.ones(60, 3))
    each = [
        sk.roc_auc_score(of["labels"][:, 0], near.softmax(1), multi_class="ovr"),
        sk.roc_auc_score(of["labels"][:, 1], near[:, :2].softmax(1)[:, 1]),
    ]
    assert whole.values["auc_macro"] == pytest.approx(np.mean(each), abs=1e-6)
    assert report.classes[0] == "diagnosis: NEV"
    assert report.about["tasks"] == {task: list(of) for task, of in tasks.items()}
    alone = run(classes={"diagnosis": ("NEV", "MEL", "BCC")}, kinds=["subset"])
    assert alone.classes == ("NEV", "MEL", "BCC")
    assert numbers(alone) == numbers(run(kinds=["subset"]))


def test_one_model_and_several_seeds_draws_anew_and_scores_fixed_patterns_once():
    report = run(seeds=[4, 5], rates=[0.5])
    assert [one.seed for one in report.scores] == [4] * 8 + [5]
    assert report.scores[7].sha256 != report.scores[8].sha256
    assert numbers(report)[7] != numbers(report)[8]


def test_a_model_for_each_seed():
    def other(inputs, present):
        return sum_up(inputs, present).flip(1)

    both = run([sum_up, other], rates=[0.5])
    assert [one.seed for one in both.scores] == [0] * 8 + [1] * 8
    assert numbers(both)[:8] == numbers(run(seeds=[0], rates=[0.5]))
    assert numbers(both)[8:] == numbers(run(other, seeds=[1], rates=[0.5]))
    assert both.estimate(both.conditions()[0]).seeds == 2


def test_the_threshold_comes_from_validation():
    of, validation = data("binary"), data("binary", cases=40)

    def shifted(inputs, present):
        return log_odds(inputs, present) - 3

    options = {"target": "binary", "metrics": ["sensitivity", "specificity", "auc_macro"]}
    plain = run(shifted, of, **options).scores[6]
    chosen = run(shifted, of, validation=validation, **options).scores[6]
    assert plain.threshold == 0.5
    assert plain.values["sensitivity"] < 0.2
    assert 0 < chosen.threshold < 0.2
    assert min(chosen.values["sensitivity"], chosen.values["specificity"]) > 0.6
    assert chosen.values["auc_macro"] == plain.values["auc_macro"]
    # chosen on the validation data, which the decisions on it show
    shift = shifted(validation["inputs"], torch.ones(40, 3)).sigmoid().numpy()
    rates = [
        sk.balanced_accuracy_score(validation["labels"], shift > t)
        for t in (*np.linspace(0, 0.5, 500), chosen.threshold)
    ]
    assert rates[-1] == max(rates)


def test_train_rates_and_seeds_are_joined():
    parts = [run(rates=[0.0, 0.5], train_rate=rate, seeds=[0]) for rate in (0.0, 0.3)]
    more = run(rates=[0.0, 0.5], train_rate=0.3, seeds=[1], about={"title": "later"})
    joined = merge([*parts, more])
    found = [(c.train_rate, c.rate) for c in joined.conditions("per_modality")]
    assert found == [(0.0, 0.0), (0.0, 0.5), (0.3, 0.0), (0.3, 0.5)]
    assert [joined.estimate(c).seeds for c in joined.conditions("per_modality")] == [1, 1, 2, 2]
    assert joined.about["title"] == "later"
    assert len(joined.scores) == 27
    assert len(parts[0].scores) == 9  # left as they were


def test_what_cannot_be_joined():
    one = run(rates=[0.5])
    with pytest.raises(ValueError, match=r"clinic, seed 0 is in several.*one entry a seed\. Evalu"):
        merge([one, one])
    other = run(rates=[0.5], method="late fusion")
    with pytest.raises(ValueError, match=r"reports\[1\]\.method is 'late fusion'.*Use compare"):
        merge([one, other])
    with pytest.raises(ValueError, match=r"reports=\[\]: there is nothing.*Pass one"):
        merge([])


def test_the_report_says_what_it_is_of():
    report = run(about={"title": "Skin", "synthetic": True, "versions": {"data": "2"}})
    assert report.method == "sum_up"
    assert report.classes == ("0", "1", "2")
    assert report.about["title"] == "Skin"
    assert report.about["versions"] == {"data": "2"}  # the caller's
    assert run().about["versions"]["mmfusion"] == mmfusion.__version__
    assert run(method="mean").method == "mean"
    binary = run(log_odds, data("binary"), target="binary")
    assert binary.classes == ("no", "yes")


def test_it_is_deterministic():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = (
        run(kinds=["slot_rate", "not_at_random"]),
        run(kinds=["slot_rate", "not_at_random"]),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(one) == numbers(other)
    assert [s.intervals for s in one.scores] == [s.intervals for s in other.scores]


def test_the_order_of_cases_changes_no_subset():
    of = data()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    inputs = {name: value[order] for name, value in of["inputs"].items()}
    other = run(of={"inputs": inputs, "labels": of["labels"][order]}, kinds=["subset"])
    np.testing.assert_allclose(numbers(run(of=of, kinds=["subset"])), numbers(other))


def test_more_modalities_that_hurt_are_found():
    def distracted(inputs, present):
        return sum_up(inputs, present) * (1 - 2.0 * present[:, 2:])  # meta turns it round

    found = run(distracted, kinds=["subset"]).violations()
    assert {larger for _, larger, _ in found} == {
        "clinic + meta", "derm + meta", "clinic + derm + meta",
    }  # fmt: skip


def test_scoring_takes_little_time_beside_the_model():
    """The issue's budget is 3 s for this; processor time, which others do not lengthen."""
    of = data(cases=400)
    start = time.process_time()
    run(of=of, rates=[0.3, 0.5, 0.7], num_bootstrap=200)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": None}, r"target=None with a model.*what logits mean\. Pass target as one of"),
        ({"target": "ordinal"}, r"target='ordinal': it is one of multiclass.*Choose"),
        ({"metrics": ["auc"]}, r"metrics=\('auc',\) with target='multiclass'.*auc_macro.*Pass"),
        ({"seeds": [1, 1]}, r"1 models with seeds=\[1, 1\]: each model has.*Pass as many"),
        ({"seeds": []}, r"1 models with seeds=\[\].*Pass as many different seeds"),
        ({"model": [sum_up] * 2, "seeds": [1]}, r"2 models with seeds=\[1\].*Pass as many"),
        ({"model": []}, r"0 models with seeds=\[\].*Pass as many"),
        ({"kinds": ["subsets"]}, r"kinds=\['subsets'\]: a kind is one of subset.*Pass"),
        (
            {"kinds": ["slot_rate"], "rates": [0.9]},
            r"rates=\[0\.9\].*have no pattern\. Add 'subset'",
        ),
        ({"rates": [0.5, 0.5]}, r"rates hold 0\.5 twice.*Pass it once"),
        ({"rates": [30]}, r"rates hold 30: a rate is a share.*Pass 0\.3"),
        ({"classes": "AB"}, r"classes='AB' with target='multiclass' and 3 logits.*Pass as many"),
        ({"classes": {"a": "AB"}}, r"classes=\{'a': 'AB'\}.*3 logits: each logit.*Pass as many"),
        ({"target": "binary"}, r"target='binary' and 3 logits.*binary target two.*Pass as many"),
        ({"validation": data()}, r"validation with target='multiclass': a thresh.*Leave it out"),
        ({"num_bootstrap": -5}, r"num_bootstrap=-5: .*resamples\. Pass 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)
