import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from mmfusion.recipes.features import FeatureScaler, as_tensors


@pytest.mark.parametrize("num_components", [None, 3])
def test_it_is_sklearn_on_the_observed_rows(num_components):
    rows = torch.randn(40, 6) * torch.arange(1, 7) + 5
    present = torch.rand(40, 1) > 0.4
    scaler = FeatureScaler({"lab": 6}, num_components).fit({"lab": rows}, present)
    seen = rows[present[:, 0]].double().numpy()
    expected = StandardScaler().fit(seen).transform(rows.double().numpy())
    found = scaler({"lab": rows})["lab"]
    if num_components:
        pca = PCA(3, svd_solver="full").fit(StandardScaler().fit_transform(seen))
        expected = pca.transform(expected)
        assert scaler.out_widths == {"lab": 3}
    torch.testing.assert_close(found.double(), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_constant_columns_few_rows_and_none_are_zero_and_finite():
    inputs = {"flat": torch.ones(5, 2), "wide": torch.randn(5, 9), "never": torch.randn(5, 3)}
    present = torch.tensor([[True, row < 2, False] for row in range(5)])
    scaler = FeatureScaler({"flat": 2, "wide": 9, "never": 3}, 4).fit(inputs, present)
    found = scaler(inputs)
    assert found["flat"].eq(0).all()
    assert found["never"].eq(0).all()
    assert found["wide"].shape == (5, 4)
    assert found["wide"].isfinite().all()


def test_as_tensors_keeps_unknown_names_for_the_check_that_names_them():
    found = as_tensors({"scan": np.ones((2, 1), dtype=np.float64)}, ("lab",))
    assert found["lab"] is None
    assert found["scan"].dtype == torch.float64
    with pytest.raises(ValueError, match=r"inputs\['lab'\] has shape \(2, 1, 1\).*Reshape"):
        as_tensors({"lab": np.ones((2, 1, 1))}, ("lab",))
