import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression, Ridge

from mmfusion.recipes.discriminant import StudentClasses
from mmfusion.recipes.evidence import DiscriminantEvidence, ForestEvidence, LinearEvidence

WIDTHS = {"a": 3, "b": 2}


def made(rows=50):
    inputs = {name: torch.randn(rows, width) for name, width in WIDTHS.items()}
    return inputs, torch.rand(rows, 2) > 0.3


def test_it_is_the_product_of_logistic_regressions_over_the_prior():
    inputs, present = made()
    labels = torch.arange(50) % 3
    evidence = LinearEvidence(WIDTHS, 3, "multiclass").fit(inputs, present, labels, 0.5)
    prior = np.log((np.bincount(labels) + 1) / 53)
    expected = np.tile(prior, (50, 1))
    for column, x in enumerate(inputs.values()):
        rows = present[:, column].numpy()
        fitted = LogisticRegression(C=0.5, max_iter=200, tol=1e-3).fit(x[rows], labels[rows])
        expected += np.where(rows[:, None], fitted.predict_log_proba(x.numpy()) - prior, 0)
    found = evidence(inputs, present)
    torch.testing.assert_close(found.double(), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    parts = evidence.parts(inputs, present)
    torch.testing.assert_close(found, evidence.prior + parts.sum(1))
    assert parts[~present].eq(0).all()


def test_two_classes_and_labels_agree_with_sklearn():
    inputs, _ = made()
    everything = torch.ones(50, 2, dtype=torch.bool)
    labels = (inputs["a"][:, 0] > 0).long()
    evidence = LinearEvidence({"a": 3}, 2, "multiclass")
    one = {"a": inputs["a"]}
    evidence.fit(one, everything[:, :1], labels, 1.0)
    fitted = LogisticRegression(max_iter=200, tol=1e-3).fit(inputs["a"], labels)
    found = evidence(one, everything[:, :1]).softmax(1).double()
    expected = torch.tensor(fitted.predict_proba(inputs["a"].numpy()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    many = LinearEvidence({"a": 3}, 2, "multilabel")
    both = torch.stack([labels, torch.ones_like(labels)], 1).float()  # the second never varies
    found = many.fit(one, everything[:, :1], both, 1.0)(one, everything[:, :1]).sigmoid()
    torch.testing.assert_close(found[:, 0].double(), expected[:, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 1], torch.full((50,), 51 / 52))


def test_regression_is_the_mean_of_ridges():
    inputs, present = made()
    y = inputs["a"][:, :1] + inputs["b"][:, :1]
    evidence = LinearEvidence(WIDTHS, 1, "regression").fit(inputs, present, y, 2.0)
    said = [
        Ridge(0.5).fit(x[present[:, m]], y[present[:, m]]).predict(x.numpy()).reshape(-1)
        for m, x in enumerate(inputs.values())
    ]
    said, seen = np.stack(said, 1), present.numpy()
    expected = np.where(seen.any(1), (said * seen).sum(1) / seen.sum(1).clip(1), y.mean())
    found = evidence(inputs, present)[:, 0].double()
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_classes_that_a_modality_never_saw_get_no_evidence():
    inputs, _ = made(6)
    present = torch.tensor([[True, row < 3] for row in range(6)])
    labels = torch.tensor([0, 1, 0, 2, 2, 1])
    parts = (
        LinearEvidence(WIDTHS, 3, "multiclass")
        .fit(inputs, present, labels, 1.0)
        .parts(inputs, present)
    )
    assert parts[:, 1, 2].eq(0).all()
    assert parts.isfinite().all()


@pytest.mark.parametrize("target", ["multiclass", "multilabel", "regression"])
def test_forests_are_those_of_sklearn_over_the_prior(target):
    inputs, present = made()
    labels, values, to_score = {
        "multiclass": (torch.arange(50) % 3, torch.eye(3)[torch.arange(50) % 3], torch.log),
        "multilabel": ((torch.rand(50, 3) > 0.5).float(),) * 2 + (torch.logit,),
        "regression": (torch.randn(50, 3),) * 2 + (torch.nn.Identity(),),
    }[target]
    torch.manual_seed(4)
    evidence = ForestEvidence(WIDTHS, 3, target).fit(inputs, present, labels, 2)
    torch.manual_seed(4)
    prior = evidence.prior.softmax(0) if target == "multiclass" else evidence.prior.sigmoid()
    expected = torch.zeros(50, 2, 3)
    for m, x in enumerate(inputs.values()):
        rows = present[:, m].numpy()
        forest = ExtraTreesRegressor(
            100,
            min_samples_leaf=2,
            max_features=1.0 if target == "regression" else "sqrt",
            random_state=int(torch.randint(2**31, ())),
        ).fit(x.numpy()[rows], values.numpy()[rows])
        mean = torch.from_numpy(forest.predict(x.numpy())).float()
        mean = mean if target == "regression" else 0.98 * mean + 0.02 * prior
        expected[:, m] = to_score(mean) - evidence.prior
    found = evidence.parts(inputs, present)
    if target == "regression":
        found = found * present.sum(1).clamp(min=1)[:, None, None]
    torch.testing.assert_close(found[present], expected[present], atol=2e-2, rtol=0)
    assert found[~present].eq(0).all()


@pytest.mark.parametrize("kind", [LinearEvidence, ForestEvidence])
def test_a_modality_that_is_silent_draws_no_regression_to_the_mean(kind):
    inputs, present = made()
    present[:] = torch.tensor([True, False])  # the second one was never observed in fit
    y = inputs["a"][:, :1] * 3
    evidence = kind(WIDTHS, 1, "regression").fit(inputs, present, y, 1.0)
    both = evidence(inputs, torch.ones_like(present))
    torch.testing.assert_close(both, evidence(inputs, present))


def test_a_forest_is_silent_of_what_never_varied():
    inputs, present = made(8)
    present[:, 1] = torch.arange(8) < 4
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    evidence = ForestEvidence(WIDTHS, 3, "multiclass").fit(inputs, present, labels, 2)
    parts = evidence.parts(inputs, present)
    assert parts[:, 1].eq(0).all()  # saw one class alone
    assert parts[:, :, 2].eq(0).all()  # nobody saw this one
    assert parts[present[:, 0], 0, :2].ne(0).any()


def classes_apart(rows, spread, width=4, num_classes=3):
    means = spread * torch.randn(num_classes, width)
    labels = torch.arange(rows) % num_classes
    return means[labels] + torch.randn(rows, width), labels


def test_with_many_rows_it_decides_as_lda_does():
    x, labels = classes_apart(3000, 1.0)
    classes = StudentClasses(4, 3)
    assert classes.take(x.numpy(), labels.numpy(), 0.0)
    classes.FREEDOM = 1e6  # nearly normal
    lda = LinearDiscriminantAnalysis().fit(x, labels)
    found = classes(x).softmax(1).double()
    torch.testing.assert_close(found, torch.tensor(lda.predict_proba(x)), atol=0.02, rtol=0)


def test_its_tails_are_those_of_students_distribution():
    x, labels = classes_apart(300, 1.0)
    classes = StudentClasses(4, 3)
    classes.take(x.numpy(), labels.numpy(), 0.3)
    shape = torch.linalg.inv(classes.whitener.double())
    means = classes.centre.double() + classes.means.double() @ shape.T
    expected = torch.tensor(
        [
            [multivariate_t.logpdf(row, mean, shape @ shape.T, df=30) for mean in means.numpy()]
            for row in x[:5].numpy()
        ]
    )
    found = classes(x[:5]).double()
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], atol=1e-4, rtol=0)


def test_means_are_drawn_to_the_mean_of_all_as_bayes_would():
    errors = []
    for _ in range(30):
        truth = torch.randn(8, 5)
        labels = torch.arange(24) % 8
        x = truth[labels] + 2 * torch.randn(24, 5)
        classes = StudentClasses(5, 8)
        if classes.take(x.numpy(), labels.numpy(), 0.0):
            found = classes.centre + classes.means @ torch.linalg.inv(classes.whitener).T
            plain = torch.stack([x[labels == c].mean(0) for c in range(8)])
            errors.append([(one - truth).square().mean() for one in (found, plain)])
    ours, plain = torch.tensor(errors).mean(0)
    assert ours < 0.75 * plain  # known variances would give (1 + 3/4)^-1 = 0.57


@pytest.mark.parametrize("labels", [torch.zeros(40).long(), torch.arange(40) % 2])
def test_it_is_silent_where_classes_do_not_differ(labels):
    x = {"a": torch.randn(20, 3).repeat_interleave(2, 0)}  # each row in both classes
    present = torch.ones(40, 1, dtype=torch.bool)
    evidence = DiscriminantEvidence({"a": 3}, 2, "multiclass").fit(x, present, labels, 0.2)
    assert evidence.parts(x, present).eq(0).all()


def test_a_label_is_two_classes():
    x, classes = classes_apart(60, 2.0, num_classes=2)
    present = torch.ones(60, 1, dtype=torch.bool)
    one = DiscriminantEvidence({"a": 4}, 2, "multiclass").fit({"a": x}, present, classes, 0.2)
    labels = torch.stack([classes, torch.ones(60)], 1).float()  # the second never varies
    many = DiscriminantEvidence({"a": 4}, 2, "multilabel").fit({"a": x}, present, labels, 0.2)
    found, odds = many({"a": x}, present), one({"a": x}, present).diff(dim=1)[:, 0]
    torch.testing.assert_close(found[:, 0], odds, atol=1e-4, rtol=1e-4)
    assert many.parts({"a": x}, present)[..., 1].eq(0).all()


def test_columns_that_never_vary_within_classes_are_no_trouble():
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    present, labels = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    evidence = DiscriminantEvidence({"a": 2}, 2, "multiclass").fit({"a": x}, present, labels, 0.2)
    assert evidence({"a": x}, present).argmax(1).tolist() == [0, 0, 1, 1]
