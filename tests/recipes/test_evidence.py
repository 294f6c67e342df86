import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from mmfusion.recipes.evidence import LinearEvidence

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
