import numpy as np
import pytest
import torch
from sklearn.ensemble import ExtraTreesRegressor

from mmfusion.recipes.trees import Trees


def fitted(y, trees=7, **kind):
    x = np.random.default_rng(0).integers(-3, 4, size=(len(y), 3)).astype(np.float32) / 7
    return x, ExtraTreesRegressor(trees, random_state=0, **kind).fit(x, y)


def test_it_says_what_the_forest_says():
    y = np.random.default_rng(1).integers(2, size=(60, 4)).astype(np.float32)
    x, forest = fitted(y, min_samples_leaf=2)
    trees = Trees(4)
    trees.take(forest)
    new = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    for rows in (x, new):
        expected = torch.from_numpy(forest.predict(rows)).float()
        torch.testing.assert_close(trees(torch.from_numpy(rows)), expected, atol=1e-3, rtol=0)


def test_a_row_on_a_threshold_goes_where_sklearn_sends_it():
    """Thresholds are doubles there, and features are not: 1/7 rounded is above or below 1/7."""
    x, forest = fitted(np.random.default_rng(1).normal(size=60))
    for each in forest.estimators_:
        inner = each.tree_.children_left >= 0
        each.tree_.threshold[inner] = np.round(each.tree_.threshold[inner] * 7) / 7
    trees = Trees(1)
    trees.take(forest)
    expected = torch.from_numpy(forest.predict(x)).float()
    torch.testing.assert_close(trees(torch.from_numpy(x))[:, 0], expected, atol=1e-2, rtol=0)


def test_another_forest_takes_its_place_and_its_state_too():
    trees, other = Trees(1), Trees(1)
    for rows in (50, 20, 1):  # one row: no tree has a split
        x, forest = fitted(np.arange(rows, dtype=np.float32) / rows)
        trees.take(forest)
        other.load_state_dict(trees.state_dict())
        expected = torch.from_numpy(forest.predict(x)).float()
        for each in (trees, other):
            found = each(torch.from_numpy(x))[:, 0]
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_leaves_beyond_float16_are_refused_instead_of_infinite():
    _, forest = fitted(np.linspace(0, 1e6, 20))
    trees = Trees(1)
    with pytest.raises(ValueError, match=r"holds 1e\+06: leaves are float16.*Standardise"):
        trees.take(forest)
    assert trees.values.eq(0).all()
