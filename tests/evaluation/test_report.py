import json
import math

import numpy as np
import pytest

from mmfusion.evaluation import Condition, MissingnessReport, Scores
from mmfusion.evaluation.report import write_whole

NAMES = ("clinic", "derm", "meta")
NAN = math.nan


def entry(condition, auc, seed=0, low=NAN, high=NAN, why=None, **more):
    return Scores(
        condition=condition,
        seed=seed,
        cases=4,
        values={"auc_macro": auc, "ece": 0.1 if why else 0.1 + auc / 10},
        intervals={"auc_macro": (low, high), "ece": (0.0, 0.2)},
        undefined={"auc_macro": why} if why else {},
        realised={"sample_rate": 0.5, "slot_rate": 0.25},
        sha256=f"{seed}abcdef" * 8,
        calibration=((0.25, 0.5, 2), (0.75, 1.0, 2)),
        **more,
    )


def subset(*kept, train_rate=None):
    pattern = tuple(name in kept for name in NAMES)
    return Condition("subset", " + ".join(kept), pattern=pattern, train_rate=train_rate)


def rate(value, kind="per_modality", train_rate=None):
    return Condition(kind, f"rate {value}", rate=value, train_rate=train_rate)


def report(*scores, **more):
    fields = {"method": "CMML", "names": NAMES, "classes": ("no", "yes"), "target": "multiclass"}
    fields |= {"metrics": ("auc_macro", "ece"), "scores": list(scores)}
    return MissingnessReport(**fields | more)


def full():
    kept = {
        "probabilities": np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
        "labels": np.array([1, -100]),
        "case_ids": np.array(["a7", "b9"]),
        "dropped": {"auc_macro": 3},
        "threshold": 0.25,
    }
    return report(
        entry(subset("derm"), NAN, why="none of 4 cases is yes"),
        entry(rate(0.5, train_rate=0.3), 0.75, low=0.5, high=0.875, **kept),
        about={"title": "Skin", "synthetic": True, "path": [np.float64(0.5), NAN]},
        diagnostics={"memory": {"held": [3, 4]}},
    )


def same(one, other):
    """Whether all fields agree, those of the scores too."""
    for name in ("method", "names", "classes", "target", "metrics", "diagnostics"):
        assert getattr(one, name) == getattr(other, name)
    assert len(one.scores) == len(other.scores)
    for a, b in zip(one.scores, other.scores, strict=True):
        for name, value in vars(a).items():
            np.testing.assert_equal(vars(b)[name], value)
            assert type(vars(b)[name]) is type(value)


def test_what_was_written_is_read(tmp_path):
    full().to_json(tmp_path / "metrics.json")
    read = MissingnessReport.from_json(tmp_path / "metrics.json")
    same(read, full())
    assert read.about == {"title": "Skin", "synthetic": True, "path": [0.5, None]}
    assert read.scores[1].labels.dtype == np.int64
    assert read.table() == full().table()
    read.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()


def test_labels_of_a_regression_stay_floating(tmp_path):
    kept = {"labels": np.array([[1.5, NAN]], np.float64), "case_ids": np.array([7])}
    kept["probabilities"] = np.array([[1.123456789, 1e-9]], np.float64)
    report(entry(rate(0.5), 1.0, **kept), target="regression").to_json(tmp_path / "metrics.json")
    read = MissingnessReport.from_json(tmp_path / "metrics.json").scores[0]
    np.testing.assert_equal(read.labels, kept["labels"])
    assert read.labels.dtype == np.float64
    np.testing.assert_equal(read.probabilities, kept["probabilities"])  # ranks are in the last bit
    assert "[[1.123456789, 1e-09]]" in (tmp_path / "metrics.json").read_text()


def test_predictions_stay_out_on_request(tmp_path):
    full().to_json(tmp_path / "metrics.json", predictions=False)
    text = (tmp_path / "metrics.json").read_text()
    assert not any(key in text for key in ("probabilities", "labels", "case_ids", "b9"))
    read = MissingnessReport.from_json(tmp_path / "metrics.json")
    assert read.scores[1].probabilities is None
    assert read.table() == full().table()


def test_the_file_is_plain_json_without_nan(tmp_path):
    full().to_json(tmp_path / "metrics.json")

    def refuse(word):
        raise AssertionError(word)

    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert content["format"] == 1
    assert content["scores"][0]["values"]["auc_macro"] is None
    assert content["scores"][0]["condition"]["pattern"] == [False, True, False]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    full().to_json(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report(about={"model": object()}).to_json(path)
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "scores": [], "target": "binary", "names": 3}',
        '{"format": 1, "scores": [{}], "target": "binary"}',
        '{"format": 1, "method": "a", "names": [], "classes": [], "target": "binary", '
        '"metrics": [], "scores": [{}], "about": {}, "diagnostics": {}}',
    ],
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"metrics\.json cannot be read \(.*to_json wrote\. Restore"
    ):
        MissingnessReport.from_json(path)


def test_half_a_file_is_refused(tmp_path):
    path = tmp_path / "metrics.json"
    full().to_json(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cannot be read \(JSONDecodeError.*Restore it"):
        MissingnessReport.from_json(path)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"has format 2: this.*reads format 1\. Use the version"):
        MissingnessReport.from_json(path)


def test_conditions_are_unique_and_in_order():
    found = report(*(entry(c, 0.5, seed) for seed in (0, 1) for c in (rate(0.5), subset("derm"))))
    assert found.conditions() == [rate(0.5), subset("derm")]
    assert found.conditions("subset") == [subset("derm")]
    assert found.conditions("slot_rate") == []


def test_an_estimate_is_over_the_seeds_that_have_a_value():
    where = rate(0.5)
    found = report(
        entry(where, 0.6, seed=0, low=0.5, high=0.7),
        entry(where, 0.8, seed=1, low=0.7, high=0.95),
        entry(where, NAN, seed=2, why="no case"),
    )
    estimate = found.estimate(where)
    assert estimate == found.estimate(where, "auc_macro")
    assert vars(estimate) == pytest.approx(
        {"mean": 0.7, "sd": math.sqrt(0.02), "low": 0.6, "high": 0.825, "seeds": 2}
    )
    assert found.estimate(where, "ece").seeds == 3
    nothing = report(entry(where, NAN)).estimate(where)
    assert nothing.seeds == 0
    assert all(map(math.isnan, list(vars(nothing).values())[:4]))
    assert math.isnan(report(entry(where, 0.5)).estimate(where).sd)


def test_the_area_is_that_of_the_trapezoids_over_the_span():
    curve = {0.7: 0.6, 0.0: 1.0, 0.3: 0.8}
    found = report(*(entry(rate(r), auc) for r, auc in curve.items()))
    assert found.area() == pytest.approx((0.3 * 0.9 + 0.4 * 0.7) / 0.7)
    flat = report(*(entry(rate(r, "slot_rate"), 0.8) for r in (0.1, 0.5)))
    assert flat.area("slot_rate") == pytest.approx(0.8)
    assert flat.area("slot_rate", "ece") == pytest.approx(0.18)


def test_the_area_of_several_train_rates_is_their_mean():
    found = report(
        *(entry(rate(r, train_rate=t), auc) for t, auc in ((0.1, 0.6), (0.5, 0.9)) for r in (0, 1))
    )
    assert found.area() == pytest.approx(0.75)


def test_an_area_needs_two_rates():
    with pytest.raises(ValueError, match=r"'per_modality'.*\['rate 0.5'\].*two rates.*more rates"):
        report(entry(rate(0.5), 0.9)).area()


def test_more_modalities_that_do_worse_are_found():
    aucs = {
        ("clinic",): 0.7,
        ("derm",): 0.8,
        ("meta",): 0.6,
        ("clinic", "derm"): 0.75,  # below derm alone
        ("clinic", "meta"): 0.7,  # level with clinic
        ("derm", "meta"): 0.85,
        NAMES: 0.9,
    }
    scores = [entry(subset(*kept), auc) for kept, auc in aucs.items()]
    [(smaller, larger, loss)] = report(*scores).violations()
    assert (smaller, larger) == ("derm", "clinic + derm")
    assert loss == pytest.approx(0.05)
    # The ece of ``entry`` grows with the auc: nearly every step makes it worse.
    assert len(report(*scores).violations("ece")) == 7
    assert report(*scores).violations("ece")[0][:2] == ("meta", "derm + meta")
    trained = [entry(subset(*kept, train_rate=0.3), -auc) for kept, auc in aucs.items()]
    both = report(*scores, *trained).violations()
    assert len(both) == 8
    assert both[-1][:2] != both[0][:2] == ("meta, trained at 0.3", "derm + meta, trained at 0.3")


def test_among_few_subsets_the_next_larger_one_counts():
    scores = [entry(subset("clinic"), 0.9), entry(subset("derm"), 0.5), entry(subset(*NAMES), 0.7)]
    [(smaller, larger, loss)] = report(*scores).violations()
    assert (smaller, larger) == ("clinic", "clinic + derm + meta")
    assert loss == pytest.approx(0.2)


def test_the_table_of_one_seed():
    assert full().table().splitlines() == [
        "CMML, multiclass: value [95 % interval]",
        "what is present           cases             auc_macro                   ece",
        "derm                          4                   nan  0.100 [0.000, 0.200]",
        "rate 0.5, trained at 0.3      4  0.750 [0.500, 0.875]  0.175 [0.000, 0.200]",
        "nan: derm, seed 0, auc_macro: none of 4 cases is yes",
        "rate 0.5, trained at 0.3: realised sample_rate 0.500, slot_rate 0.250; "
        "sha256 0abcdef0abcd (seed 0)",
    ]


def test_the_table_of_several_seeds():
    scores = [
        entry(where, auc + seed / 10, seed)
        for seed in (0, 1)
        for where, auc in ((subset("derm"), 0.6), (subset("derm", "meta"), 0.5), (rate(0.0), 0.6))
    ]
    scores += [entry(rate(1.0), 0.4, seed) for seed in (0, 1)]
    found = report(*scores, about={"notes": ["not all was scored"]}).table().splitlines()
    assert found[0] == "CMML, multiclass: mean (sd) over seeds"
    assert found[2].split() == ["derm", "4", "0.650", "(0.071)", "0.165", "(0.007)"]
    assert found[6] == "area under per_modality: auc_macro 0.525"
    assert found[7] == "more did worse: derm -> derm + meta, auc_macro by 0.100"
    assert found[8].endswith("sha256 0abcdef0abcd (seed 0), 1abcdef1abcd (seed 1)")
    assert found[-1] == "note: not all was scored"


@pytest.mark.parametrize("ask", ["violations", "area"])
def test_a_metric_that_was_not_scored_is_refused(ask):
    found = report(entry(rate(0.0), 0.5), entry(rate(0.5), 0.5))
    with pytest.raises(ValueError, match=r"metric='mcc': this report holds auc_macro, ece\. Name"):
        getattr(found, ask)(metric="mcc")
