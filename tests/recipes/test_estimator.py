import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from mmfusion.layers import MemoryBank, PrototypeMemory
from mmfusion.recipes.estimator import METHODS, CMMLClassifier, CMMLRegressor
from mmfusion.recipes.members import method_named

SMALL = {"dim": 8, "num_members": 2, "epochs": 3, "progress": False, "device": "cpu"}


def made(rows=60, seed=0, absent=0.3):
    """Three modalities that see the class through noise; some rows of each are absent."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=rows)
    inputs = {
        name: rng.normal(np.eye(3)[y] @ rng.normal(size=(3, width)), 0.7)
        for name, width in (("photo", 5), ("lab", 3), ("table", 2))
    }
    present = rng.random((rows, 3)) >= absent
    for column, values in enumerate(inputs.values()):
        values[~present[:, column]] = np.nan
    return inputs, y, present


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_same_path(method):
    inputs, y, present = made()
    model = CMMLClassifier(method, **SMALL).fit(inputs, y)
    probabilities = model.predict_proba(inputs)
    assert probabilities.shape == (60, 3)
    assert_allclose(probabilities.sum(1), 1)
    assert_array_equal(probabilities, model.predict_proba(inputs, present))
    assert model.transform(inputs).shape == (60, 16)
    shallow = {"linear", "forest", "discriminant"}
    kinds = {"fusion"} | ({"evidence"} | shallow if method == "CMML" else set())
    assert set(model.decisions_["weights"]) == kinds


def test_it_learns_and_absence_costs():
    inputs, y, _ = made(240, absent=0.0)
    train, test = (
        {n: x[rows] for n, x in inputs.items()} for rows in (slice(160), slice(160, 240))
    )
    model = CMMLClassifier(**SMALL | {"epochs": 30}).fit(train, y[:160])
    whole = roc_auc_score(y[160:], model.predict_proba(test), multi_class="ovr")
    part = roc_auc_score(y[160:], model.predict_proba(test | {"photo": None}), multi_class="ovr")
    assert whole > 0.95
    assert whole > part > 0.7
    assert model.score(test, y[160:]) > 0.7


def test_the_same_seed_gives_the_same_predictions_and_leaves_torch_alone():
    inputs, y, _ = made()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = CMMLClassifier(**SMALL).fit(inputs, y).predict_proba(inputs)
    assert torch.equal(before, torch.get_rng_state())
    again = clone(CMMLClassifier(**SMALL)).fit(inputs, y).predict_proba(inputs)
    assert_array_equal(first, again)
    other = CMMLClassifier(random_state=1, **SMALL).fit(inputs, y).predict_proba(inputs)
    assert not np.array_equal(first, other)


def test_what_stands_under_absent_never_matters():
    inputs, y, present = made()
    noise = {name: np.where(np.isnan(x), 1e6, x) for name, x in inputs.items()}
    first = CMMLClassifier(**SMALL).fit(inputs, y)
    second = CMMLClassifier(**SMALL).fit(noise, y, present)
    assert_array_equal(first.predict_proba(inputs), second.predict_proba(noise, present))


def test_arrays_frames_and_tensors_are_alike():
    inputs, y, _ = made()
    expected = CMMLClassifier(**SMALL).fit(inputs, y).predict_proba(inputs)
    frames = {name: pd.DataFrame(x) for name, x in inputs.items()}
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    model = CMMLClassifier(**SMALL).fit(frames, pd.Series(y))
    assert_array_equal(model.predict_proba(tensors), expected)


def test_class_names_come_back():
    inputs, y, _ = made()
    names = np.array(["benign", "grade 1", "grade 2"])
    model = CMMLClassifier(**SMALL).fit(inputs, names[y])
    assert model.classes_.tolist() == names.tolist()
    assert set(model.predict(inputs)) <= set(names)


def test_several_labels_per_row():
    inputs, y, _ = made()
    labels = np.stack([y == 0, y > 0], axis=1).astype(int)
    model = CMMLClassifier(**SMALL).fit(inputs, labels)
    assert model.predict_proba(inputs).shape == (60, 2)
    assert set(model.predict(inputs).ravel()) <= {0, 1}


@pytest.mark.parametrize("columns", [1, 2])
def test_regression_keeps_scale_and_shape(columns):
    inputs, _, _ = made(120, absent=0.0)
    y = 100 + 10 * inputs["lab"][:, :columns].copy()
    y = y[:, 0] if columns == 1 else y
    model = CMMLRegressor(**SMALL | {"epochs": 20}).fit(inputs, y)
    assert model.predict(inputs).shape == y.shape
    assert model.score(inputs, y) > 0.6


@pytest.mark.parametrize("suffix", ["classes", "labels", "values"])
def test_what_is_saved_comes_back_to_the_bit(tmp_path, suffix):
    inputs, y, _ = made()
    kind = CMMLRegressor if suffix == "values" else CMMLClassifier
    target = np.stack([y == 0, y > 0], 1).astype(int) if suffix == "labels" else y
    model = kind(**SMALL).fit(inputs, target)
    model.save(tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    again = kind.load(tmp_path / "model.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert_array_equal(model.predict(inputs), again.predict(inputs))
    assert_array_equal(model.transform(inputs), again.transform(inputs))
    assert again.decisions_ == model.decisions_
    assert again.get_params() == model.get_params()
    other = CMMLClassifier if kind is CMMLRegressor else CMMLRegressor
    with pytest.raises(ValueError, match=rf"holds a {kind.__name__}.*Load it with"):
        other.load(tmp_path / "model.safetensors")


def test_explain_names_what_was_used_and_lent():
    inputs, y, present = made()
    model = CMMLClassifier(**SMALL).fit(inputs, y)
    found = model.explain(inputs)
    assert_array_equal(found.present, present)
    assert found.evidence.shape == (60, 3, 3)
    assert (found.evidence[~present] == 0).all()
    assert found.neighbour_ids.shape[:3] == (2, 60, 3)
    assert set(np.unique(found.neighbour_ids)) <= set(range(-1, 60))
    bare = CMMLClassifier("ZeroFill", **SMALL).fit(inputs, y).explain(inputs)
    assert (bare.evidence, bare.neighbour_ids) == (None, None)
    prototypes = {"memory": PrototypeMemory(3, num_slots=4, dim=8)}
    learned = CMMLClassifier(**SMALL, options=prototypes).fit(inputs, y).explain(inputs)
    assert learned.neighbour_ids is None  # they are nobody's rows


def test_synthesise_gives_every_modality_for_every_row():
    inputs, y, _ = made()
    found = CMMLClassifier(**SMALL).fit(inputs, y).synthesise({"photo": None} | inputs)
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(inputs, (60, 16))
    assert all(np.isfinite(x).all() for x in found.values())
    with pytest.raises(ValueError, match=r"method='ZeroFill' synthesises nothing.*Use CMML"):
        CMMLClassifier("ZeroFill", **SMALL).fit(inputs, y).synthesise(inputs)


def test_groups_decide_the_folds():
    from mmfusion.recipes.crossfit import folds
    from mmfusion.recipes.members import Rows

    groups = np.repeat(np.arange(10), 6)
    rows = Rows({}, torch.ones(60, 1).bool(), torch.arange(60) % 3, groups)
    parts = folds(rows, 5, "multiclass", seed=0)
    assert sorted(torch.cat([held for _, held in parts]).tolist()) == list(range(60))
    for kept, held in parts:
        assert not set(groups[kept]) & set(groups[held])


def test_fewer_groups_than_members_are_refused():
    inputs, y, _ = made()
    with pytest.raises(ValueError, match=r"groups holds 3 values with num_members=4.*Lower num_m"):
        CMMLClassifier(**SMALL | {"num_members": 4}).fit(inputs, y, groups=np.arange(60) % 3)


def test_a_layer_among_the_options_is_not_shared_by_members():
    """Else what one member left out is remembered by the memory of all."""
    inputs, y, _ = made()
    memory = MemoryBank(3, 40, 8, num_neighbours=4)
    model = CMMLClassifier(options={"memory": memory}, **SMALL).fit(inputs, y)
    assert not memory.held.any()
    held = [set(m.model.memory.ids[m.model.memory.ids >= 0].tolist()) for m in model.members_]
    assert held[0]
    assert held[1]
    assert not held[0] & held[1]


DAYS = pd.date_range("2020", periods=60)
WRONG = [
    ({"method": "Magic"}, {}, r"method='Magic'.*one of.*Choose"),
    ({"shallow": ("linear", "kernel")}, {}, r"shallow=\('linear', 'kernel'\).*some of.*Name"),
    ({"shallow": "linear"}, {}, r"shallow='linear'.*some of.*Name"),
    ({}, {"inputs": {}}, r"inputs holds no modality.*Pass"),
    ({}, {"inputs": {"lab": None}}, r"inputs holds no modality.*Pass"),
    ({}, {"inputs": {"lab": np.ones(60)}}, r"inputs\['lab'\] has shape \(60,\).*Reshape"),
    ({}, {"y": np.zeros(60)}, r"y holds 1 class.*at least two"),
    ({}, {"y": np.full((60, 2), 3)}, r"y of shape \(60, 2\) holds 3.*0 or 1.*Encode"),
    ({}, {"y": np.zeros(59).astype(int) + np.arange(59) % 2}, r"59 targets for 60 rows.*Pass"),
    ({"num_members": 40}, {}, r"num_members=40.*lower num_members"),
    ({"num_members": 1}, {}, r"num_members=1:.*two or more.*Pass"),
    ({"options": {"dim": 4}}, {}, r"options=\['dim'\].*Leave"),
    ({"options": {"foo": 4}}, {}, r"options=\['foo'\] with method='cmml'.*takes.*Name"),
    ({"options": "foo"}, {}, r"options='foo': it is a mapping.*Pass"),
    ({"input_dropout": 1.0}, {}, r"input_dropout=1\.0: it is a share.*Pass"),
    ({"dropout": 1.5}, {}, r"dropout=1\.5: it is a share.*Pass"),
    ({"hide_rate": -0.1}, {}, r"hide_rate=-0\.1: it is a share.*Pass"),
    ({"epochs": 0}, {}, r"epochs=0: it is a whole number from 1 on\. Pass"),
    ({"dim": 0}, {}, r"dim=0: it is a whole number from 1 on\. Pass"),
    ({"num_members": 2.0}, {}, r"num_members=2\.0: it is two or more, a whole.*Pass"),
    ({"num_components": 0}, {}, r"num_components=0: it is a whole number from 1 on, or None"),
    ({"learning_rate": -1}, {}, r"learning_rate=-1: it is a finite number above 0\. Pass"),
    ({"random_state": 1.5}, {}, r"random_state=1\.5: it is a whole number.*Pass"),
    ({"random_state": -1}, {}, r"random_state=-1: it is a whole number.*Pass"),
    ({"random_state": 2**40}, {}, r"random_state=1099511627776: it is a whole number.*Pass"),
    ({}, {"inputs": np.ones((60, 2))}, r"inputs is a ndarray: modalities have names.*Pass a dict"),
    ({}, {"inputs": pd.DataFrame(np.ones((60, 2)))}, r"inputs is a DataFrame.*Pass a dict"),
    ({}, {"inputs": {"lab": csr_matrix(np.eye(60))}}, r"inputs\['lab'\] is a sparse.*toarray"),
    ({}, {"inputs": {"lab": np.eye(60) * 1j}}, r"inputs\['lab'\] does not hold real.*Encode"),
    ({}, {"inputs": {"lab": torch.eye(60) * 1j}}, r"inputs\['lab'\] does not hold real.*Encode"),
    ({}, {"inputs": {"lab": pd.DataFrame({"sex": ["m"] * 60, "age": 9.0})}}, r"real numbers.*'m'"),
    ({}, {"inputs": {"lab": pd.DataFrame({"on": DAYS})}}, r"inputs\['lab'\] does not hold real"),
    ({}, {"inputs": {"lab": np.full((60, 1), 1e300)}}, r"inputs\['lab'\]\[0, 0\] is 1e\+300.*unit"),
    ({}, {"y": np.zeros((60, 2, 2))}, r"y has shape \(60, 2, 2\).*Reshape"),
    ({}, {"y": np.linspace(0, 1, 60) + 0.1}, r"y holds 0\.1: a class is a string.*CMMLRegressor"),
    ({}, {"y": np.array([b"no", b"yes"] * 30)}, r"y holds b'no': a class is a string.*Convert"),
    ({}, {"y": np.array(["2020", "2021"] * 30, "M8[D]")}, r"y holds .*2020.*a class is.*Convert"),
    ({}, {"y": ["a", 0] * 30}, r"y holds strings beside numbers.*Convert"),
    ({}, {"groups": range(59)}, r"groups has shape \(59,\) for 60 rows.*Pass \(60,\)"),
    ({}, {"groups": np.ones((60, 1))}, r"groups has shape \(60, 1\) for 60 rows.*Pass"),
    ({}, {"groups": ["a"] * 58 + [None] * 2}, r"groups\[58\] is None \(so are 1 others\).*Name"),
    ({}, {"groups": [1.0] * 59 + [np.nan]}, r"groups\[59\] is nan.*Name"),
    ({}, {"present": np.full((60, 3), "no")}, r"present is a ndarray of <U2.*booleans\. Pass"),
    ({}, {"present": {"photo": [True] * 60}}, r"present is a dict of object.*booleans\. Pass"),
    ({}, {"y": ["a", None] * 30}, r"y lacks 30 labels.*Drop"),
    ({}, {"y": np.array([0.0, np.nan] * 30)}, r"y lacks 30 labels.*Drop"),
]


@pytest.mark.parametrize(("settings", "changed", "message"), WRONG)
def test_wrong_calls_say_what_to_do(settings, changed, message):
    inputs, y, _ = made()
    given = {"inputs": inputs, "y": y} | changed
    with pytest.raises(ValueError, match=message):
        CMMLClassifier(**SMALL | settings).fit(**given)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((60, 2, 2)), r"y has shape \(60, 2, 2\).*Reshape"),
        (3.0, r"y has shape \(\).*Reshape"),
        (["a"] * 60, r"y holds 'a'.*real numbers.*CMMLClassifier"),
        (np.ones(60) * 1j, r"y holds .*1j.*real numbers.*Convert"),
        (np.linspace(0, 1e300, 60), r"y holds 59 NaN or Inf, or numbers beyond.*another unit"),
    ],
)
def test_targets_that_are_no_numbers_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        CMMLRegressor(**SMALL).fit(made()[0], y)


def test_frames_in_another_order_are_refused():
    inputs, y, present = made()
    frames = {name: pd.DataFrame(x) for name, x in inputs.items()}
    series = pd.Series(y)
    turned = frames | {"lab": frames["lab"][::-1]}
    with pytest.raises(
        ValueError, match=r"row 0 is 0 in inputs\['photo'\] and 59 in inputs\['lab'"
    ):
        CMMLClassifier(**SMALL).fit(turned, series)
    with pytest.raises(ValueError, match=r"row 0 is 0 in inputs\['photo'\] and 59 in y.*Reindex"):
        CMMLClassifier(**SMALL).fit(frames, series[::-1])
    model = CMMLClassifier("MeanFill", **SMALL).fit(frames | {"lab": inputs["lab"]}, series)
    table = pd.DataFrame(present, columns=[*inputs])
    with pytest.raises(ValueError, match=r"59 in inputs\['lab'\].*Reindex"):
        model.predict(turned)
    with pytest.raises(ValueError, match=r"59 in present.*Reindex"):
        model.predict(frames, table[::-1])


def test_a_row_without_a_finite_answer_is_refused_and_named():
    inputs, y, _ = made(absent=0.0)
    model = CMMLClassifier(**SMALL).fit(inputs, y)
    far = {name: x.copy() for name, x in inputs.items()}
    far["lab"][7] = 1e25
    with pytest.raises(ValueError, match=r"inputs\['lab'\]\[7\] lies .* deviations.*Correct it"):
        model.predict(far)
    far["lab"][7] = 1e300
    with pytest.raises(ValueError, match=r"inputs\['lab'\]\[7, 0\] is 1e\+300: beyond.*Correct it"):
        model.predict(far)


def test_scores_take_weights():
    inputs, y, _ = made()
    model = CMMLClassifier("MeanFill", **SMALL).fit(inputs, y)
    right = model.predict(inputs) == y
    assert model.score(inputs, y, sample_weight=right) == 1
    number = CMMLRegressor("MeanFill", **SMALL).fit(inputs, y)
    assert number.score(inputs, y, sample_weight=right + 0.1) != number.score(inputs, y)


def test_where_a_file_can_be(tmp_path, monkeypatch):
    inputs, y, _ = made()
    model = CMMLClassifier("MeanFill", **SMALL).fit(inputs, y)
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save("~/model.safetensors")
    assert (tmp_path / "model.safetensors").exists()
    assert_array_equal(
        CMMLClassifier.load("~/model.safetensors").predict(inputs), model.predict(inputs)
    )
    for path in ("", tmp_path, tmp_path / "none" / "model"):
        with pytest.raises(ValueError, match=r"path=.*a file, in a folder that exists\. Pass"):
            model.save(path)
    with pytest.raises(ValueError, match=r"missing is not there: load reads.*Correct the path"):
        CMMLClassifier.load(tmp_path / "missing")


def test_a_single_column_of_classes_is_a_class_per_row():
    inputs, y, _ = made()
    expected = CMMLClassifier(**SMALL).fit(inputs, y).predict_proba(inputs)
    for column in (y[:, None], pd.DataFrame({"y": y})):
        model = CMMLClassifier(**SMALL).fit(inputs, column)
        assert_array_equal(model.predict_proba(inputs), expected)


def test_frames_are_told_apart_by_their_columns():
    inputs, y, present = made()
    frames = {n: pd.DataFrame(x, columns=[*"abcdef"][: x.shape[1]]) for n, x in inputs.items()}
    model = CMMLClassifier(**SMALL).fit(frames, y)
    expected = model.predict_proba(frames)
    assert_array_equal(model.predict_proba(inputs), expected)
    turned = frames | {"lab": frames["lab"][frames["lab"].columns[::-1]]}
    with pytest.raises(ValueError, match=r"inputs\['lab'\] has the columns.*in that order"):
        model.predict_proba(turned)
    names = [*inputs]
    table = pd.DataFrame(dict(zip(names, present.T, strict=True)))[names[::-1]]
    assert_array_equal(model.predict_proba(frames, table), expected)
    with pytest.raises(ValueError, match=r"present has the columns.*without \['lab'\].*Name"):
        model.predict_proba(frames, table.drop(columns="lab"))


def test_arrays_may_lie_backwards_in_memory():
    inputs, y, _ = made()
    turned = {name: np.flip(np.flip(x).copy()) for name, x in inputs.items()}
    expected = CMMLClassifier(**SMALL).fit(inputs, y).predict_proba(inputs)
    assert_array_equal(CMMLClassifier(**SMALL).fit(turned, y).predict_proba(turned), expected)


@pytest.mark.parametrize("method", ["cmml", "MeanFill"])
def test_large_numbers_lose_nothing(method):
    inputs, y, _ = made()
    dates = {name: x + 1.7e9 for name, x in inputs.items()}
    expected = CMMLClassifier(method, **SMALL).fit(inputs, y).predict_proba(inputs)
    found = CMMLClassifier(method, **SMALL).fit(dates, y).predict_proba(dates)
    assert_allclose(found, expected, atol=0.02)


def test_a_row_with_gaps_is_refused_unless_it_is_not_there():
    inputs, y, present = made(absent=0.0)
    inputs["lab"][3, 0] = np.nan
    with pytest.raises(ValueError, match=r"inputs\['lab'\] has 1 rows with NaN.*Fill"):
        CMMLClassifier(**SMALL).fit(inputs, y)
    present[3, list(inputs).index("lab")] = False
    CMMLClassifier(**SMALL).fit(inputs, y, present)


def test_a_fit_that_is_refused_changes_nothing():
    inputs, y, _ = made()
    model = CMMLClassifier(**SMALL).fit(inputs, y)
    expected = model.predict_proba(inputs)
    with pytest.raises(ValueError, match="59 targets"):
        model.fit({"other": inputs["lab"]}, y[:59])
    assert_array_equal(model.predict_proba(inputs), expected)


def test_a_file_keeps_the_arguments_of_fit(tmp_path):
    inputs, y, _ = made()
    given = SMALL | {"dim": np.int64(8), "random_state": np.random.RandomState(0)}
    model = CMMLClassifier(**given, options={"num_tokens": 2}).fit(inputs, y)
    model.set_params(dim=16, num_components=1)
    model.save(tmp_path / "model.safetensors")
    again = CMMLClassifier.load(tmp_path / "model.safetensors")
    assert_array_equal(again.predict_proba(inputs), model.predict_proba(inputs))
    assert again.explain(inputs).neighbour_ids.shape[3] == 2
    memory = MemoryBank(3, 40, 8, num_neighbours=4)
    model = CMMLClassifier(options={"memory": memory}, **SMALL).fit(inputs, y)
    with pytest.raises(ValueError, match=r"options\['memory'\] is a MemoryBank.*Pickle"):
        model.save(tmp_path / "other.safetensors")


def test_members_with_few_rows_explain_alike():
    inputs, _, _ = made(9, absent=0.0)
    found = CMMLClassifier(**SMALL).fit(inputs, np.arange(9) % 2).explain(inputs)
    assert found.neighbour_ids.shape == (2, 9, 3, 1, 4)


def test_the_state_is_a_seed_or_what_scikit_learn_takes():
    inputs, y, _ = made()

    def predicted(state):
        model = CMMLClassifier("MeanFill", **SMALL | {"random_state": state})
        return model.fit(inputs, y).predict_proba(inputs)

    assert_array_equal(predicted(np.int64(3)), predicted(3))
    assert_array_equal(predicted(np.random.RandomState(3)), predicted(np.random.RandomState(3)))
    assert np.abs(predicted(None) - predicted(None)).max() > 0


@pytest.mark.parametrize("method", ["cmml", "MeanFill"])
@pytest.mark.parametrize("shallow", [(), ("forest",), ("linear", "forest")])
def test_shallow_evidence_is_what_was_asked_for(method, shallow):
    inputs, y, _ = made()
    model = CMMLClassifier(method, shallow=shallow, **SMALL).fit(inputs, y)
    own = ("fusion", "evidence") if method == "cmml" else ("fusion",)
    assert tuple(model.decisions_["weights"]) == own + shallow
    assert tuple(model.decisions_["settings"]) == shallow
    assert np.isfinite(model.predict_proba(inputs)).all()


def test_a_discriminant_is_for_classes():
    inputs, y, _ = made()
    model = CMMLRegressor(**SMALL).fit(inputs, y)
    assert sorted(model.decisions_["weights"]) == ["evidence", "forest", "fusion", "linear"]
    with pytest.raises(ValueError, match=r"shallow=\('discriminant',\): for regression.*Name"):
        CMMLRegressor(shallow=("discriminant",), **SMALL).fit(inputs, y)
    labels = np.stack([y == 0, y == 1], 1).astype(int)
    many = CMMLClassifier(shallow=("discriminant",), **SMALL).fit(inputs, labels)
    assert np.isfinite(many.predict_proba(inputs)).all()


def test_a_modality_without_a_row_is_refused_and_an_unknown_one_too():
    inputs, y, _ = made()
    with pytest.raises(ValueError, match=r"inputs\['photo'\] is None.*Leave it out"):
        CMMLClassifier(**SMALL).fit(inputs | {"photo": None}, y)
    model = CMMLClassifier(**SMALL).fit(inputs, y)
    with pytest.raises(ValueError, match="scan"):
        model.predict(inputs | {"scan": np.ones((60, 2))})
    with pytest.raises(ValueError, match=r"y holds 1 NaN or Inf.*Drop"):
        CMMLRegressor(**SMALL).fit(inputs, np.r_[y[:-1], np.nan])
    with pytest.raises(NotFittedError):
        CMMLClassifier().predict(inputs)


def test_a_class_with_one_row_and_rows_with_nothing_are_no_trouble():
    inputs, y, present = made()
    y[:1] = 9
    present[:5] = False
    model = CMMLClassifier(**SMALL).fit(inputs, y, present & ~np.isnan(inputs["lab"][:, :1]))
    assert np.isfinite(model.predict_proba(inputs, present & False)).all()


@pytest.mark.parametrize("method", ["cmml", "masked_transformer", "LateFusion"])
def test_a_method_is_found_however_its_name_is_written(method):
    wanted = method.replace("_", "").lower()
    assert method_named(method).__name__.lower() == wanted
