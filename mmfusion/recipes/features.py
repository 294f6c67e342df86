"""Feature vectors to what a fusion model likes: standardised, and narrow where they were wide."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn


class FeatureScaler(nn.Module):
    """Standardise each modality, and project it on its leading principal components.

    Fitted on the observed rows alone; a constant column becomes zero. Modalities no wider than
    ``num_components`` are standardised only.

    Args:
        widths: Name to feature width.
        num_components: Most components of a modality; None keeps all columns as they are.

    Shape:
        - ``inputs[name]``: ``(B, F)``, zeros where absent; result: name to ``(B, P)``
        - ``present``: ``(B, M)`` bool

    Example:
        >>> scaler = FeatureScaler({"lab": 2}, num_components=None)
        >>> inputs = {"lab": torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 0.0]])}
        >>> _ = scaler.fit(inputs, torch.tensor([[True], [True], [False]]))
        >>> scaler(inputs)["lab"][:2].tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    def __init__(self, widths: Mapping[str, int], num_components: int | None) -> None:
        super().__init__()
        self.names = tuple(widths)
        self.out_widths = {
            name: width if num_components is None else min(width, num_components)
            for name, width in widths.items()
        }
        for number, (name, width) in enumerate(widths.items()):
            self.register_buffer(f"mean_{number}", torch.zeros(width))
            self.register_buffer(f"project_{number}", torch.zeros(width, self.out_widths[name]))

    def fit(self, inputs: Mapping[str, Tensor], present: Tensor) -> "FeatureScaler":
        """Take mean, spread and components from the observed rows."""
        for number, name in enumerate(self.names):
            rows = inputs[name][present[:, number]].double().numpy()
            mean, project = self._fitted(rows, self.out_widths[name])
            getattr(self, f"mean_{number}").copy_(torch.from_numpy(mean))
            getattr(self, f"project_{number}").copy_(torch.from_numpy(project))
        return self

    @staticmethod
    def _fitted(rows: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
        width = rows.shape[1]
        if not len(rows):  # never observed: zeros for ever
            return np.zeros(width), np.zeros((width, num_components))
        spread = rows.std(0)
        scale = np.where(spread > 1e-12, 1 / np.maximum(spread, 1e-12), 0)
        if num_components == width:
            return rows.mean(0), np.diag(scale)
        project = np.zeros((width, num_components))
        kept = min(num_components, len(rows))
        pca = PCA(kept, svd_solver="full").fit((rows - rows.mean(0)) * scale)
        project[:, :kept] = pca.components_.T
        return rows.mean(0), scale[:, None] * project

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standardised, projected modalities."""
        return {
            name: (inputs[name] - getattr(self, f"mean_{n}")) @ getattr(self, f"project_{n}")
            for n, name in enumerate(self.names)
        }


def as_tensors(inputs: Mapping[str, object], names: Sequence[str]) -> dict[str, Tensor | None]:
    """Arrays, frames and tensors as float32 tensors ``(B, F)``; None stays.

    Raises:
        ValueError: If a modality is not two-dimensional.

    Example:
        >>> as_tensors({"lab": [[1, 2]], "photo": None}, ("lab", "photo"))
        {'lab': tensor([[1., 2.]]), 'photo': None}
    """
    tensors: dict[str, Tensor | None] = {}
    for name in [*names, *(name for name in inputs if name not in names)]:
        value = inputs.get(name)
        if value is None:
            tensors[name] = None
            continue
        tensor = (
            value if isinstance(value, Tensor) else torch.tensor(np.asarray(value, dtype=float))
        )
        if tensor.ndim != 2:
            raise ValueError(
                f"inputs[{name!r}] has shape {tuple(tensor.shape)}: a modality is (rows, "
                "features). Reshape it; a single column is (rows, 1)."
            )
        tensors[name] = tensor.float().cpu()
    return tensors
