"""A fitted forest of scikit-learn as tensors: what is saved needs no pickle."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PARTS = ("roots", "features", "thresholds", "below", "above", "values")


class Trees(nn.Module):
    """The mean over trees of what the leaf of a row holds; an untaught one holds zero.

    Nodes of all trees stand in one list without the leaves. A child that is negative is a leaf,
    ``~child`` its row in ``values``, which are kept as float16.

    Args:
        num_outputs: Values of a leaf, ``Y``.

    Shape:
        - ``x``: ``(B, F)``; result: ``(B, Y)``

    Example:
        >>> from sklearn.ensemble import ExtraTreesRegressor
        >>> x, y = torch.arange(8.0)[:, None], torch.arange(8.0) > 3
        >>> forest = ExtraTreesRegressor(5, random_state=0).fit(x.numpy(), y.float().numpy())
        >>> trees = Trees(1)
        >>> trees.take(forest)
        >>> trees(x)[:, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    """

    roots: Tensor
    features: Tensor
    thresholds: Tensor
    below: Tensor
    above: Tensor
    values: Tensor

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        node = torch.zeros(1, dtype=torch.int32)
        self.register_buffer("roots", torch.full((1,), -1, dtype=torch.int32))
        for name in ("features", "below", "above"):
            self.register_buffer(name, node.clone())
        self.register_buffer("thresholds", torch.zeros(1))
        self.register_buffer("values", torch.zeros(1, num_outputs, dtype=torch.float16))

    def take(self, forest: Any) -> None:
        """Hold the trees of a fitted regressor, splits and leaves as they are.

        Raises:
            ValueError: If a leaf holds more than float16 does.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
        nodes = leaves = 0
        for tree in (each.tree_ for each in forest.estimators_):
            leaf = tree.children_left < 0
            number = np.where(leaf, ~(leaves + leaf.cumsum() - 1), nodes + (~leaf).cumsum() - 1)
            inner = np.flatnonzero(~leaf)
            threshold = tree.threshold[inner].astype(np.float32)
            down = np.nextafter(threshold, np.float32(-np.inf))  # x <= both, or neither, in float32
            made = {
                "roots": number[:1],
                "features": tree.feature[inner],
                "thresholds": np.where(threshold > tree.threshold[inner], down, threshold),
                "below": number[tree.children_left[inner]],
                "above": number[tree.children_right[inner]],
                "values": tree.value[leaf, :, 0],
            }
            for name, part in made.items():
                found[name].append(part)
            nodes, leaves = nodes + len(inner), leaves + int(leaf.sum())
        largest = max(np.abs(part).max() for part in found["values"])
        if largest > torch.finfo(self.values.dtype).max:
            raise ValueError(
                f"a leaf of the forest holds {largest:.6g}: leaves are float16, up to 65504. "
                "Standardise the targets."
            )
        for name, parts in found.items():
            old, new = getattr(self, name), torch.from_numpy(np.concatenate(parts))
            if not len(new):  # no tree has split: the node that nobody reaches stays
                continue
            setattr(self, name, new.to(old))

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for name in PARTS:  # another forest has another number of nodes
            if prefix + name in state:
                setattr(self, name, getattr(self, name).new_empty(state[prefix + name].shape))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Means, in float32."""
        place = self.roots.long().expand(len(x), -1)  # (B, T)
        while (place >= 0).any():
            node = place.clamp(min=0)
            is_below = x.gather(1, self.features[node].long()) <= self.thresholds[node]
            child = torch.where(is_below, self.below[node], self.above[node])
            place = torch.where(place >= 0, child, place)
        return self.values[~place].float().mean(1)
