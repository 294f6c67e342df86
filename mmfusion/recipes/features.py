"""Feature vectors to what a fusion model likes: standardised, and narrow where they were wide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from mmfusion.presence import normalise
from mmfusion.recipes.given_rows import refuse_huge


class FeatureScaler(nn.Module):
    """Standardise each modality, and project it on its leading principal components.

    Fitted on the observed rows alone, in double precision; a constant column becomes zero.
    Modalities no wider than ``num_components`` are standardised only.

    Args:
        widths: Name to feature width.
        num_components: Most components of a modality; None keeps all columns as they are.

    Shape:
        - ``inputs[name]``: ``(B, F)``, zeros where absent; result: name to ``(B, P)`` float32
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
            sizes: dict[str, tuple[int, ...]] = {"mean": (width,), "scale": (width,)}
            if self.out_widths[name] < width:
                sizes["components"] = (width, self.out_widths[name])
            for what, size in sizes.items():
                zeros = torch.zeros(size, dtype=torch.float64)  # a date has ten digits
                self.register_buffer(f"{what}_{number}", zeros)

    def fit(self, inputs: Mapping[str, Tensor], present: Tensor) -> "FeatureScaler":
        """Take mean, spread and components from the observed rows; zeros where there is none."""
        for number, name in enumerate(self.names):
            rows = inputs[name][present[:, number]].double().numpy()
            for what, found in zip(("mean", "scale"), _spread(rows), strict=True):
                getattr(self, f"{what}_{number}").copy_(torch.from_numpy(found))
        for number, columns in enumerate(self.standardised(inputs).values()):
            components = getattr(self, f"components_{number}", None)
            seen = columns[present[:, number]].double().numpy()
            if components is not None and len(seen):
                count = min(components.shape[1], len(seen))
                with np.errstate(invalid="ignore"):  # shares of no variance, which nobody reads
                    pca = PCA(count, svd_solver="full").fit(seen)
                components[:, :count] = torch.from_numpy(pca.components_.T)
        return self

    def standardised(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All columns, before they are projected: ``(B, F)``."""
        return {
            name: (
                (inputs[name].double() - getattr(self, f"mean_{n}")) * getattr(self, f"scale_{n}")
            ).float()
            for n, name in enumerate(self.names)
        }

    def project(self, standardised: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leading components of what ``standardised`` gave."""
        found = {}
        for number, (name, rows) in enumerate(standardised.items()):
            components = getattr(self, f"components_{number}", None)
            found[name] = rows if components is None else rows @ components.float()
        return found

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standardised, projected modalities."""
        return self.project(self.standardised(inputs))


def _spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and one over the standard deviation; zeros where nothing was observed or varies."""
    if not len(rows):
        return np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    spread = rows.std(0)
    varies = spread > 1e-12 * np.abs(rows).max(0)  # more than by rounding
    return rows.mean(0), np.where(varies, 1 / np.where(varies, spread, 1), 0)


def as_tensors(inputs: Mapping[str, object], names: Sequence[str]) -> dict[str, Tensor | None]:
    """Arrays, frames and tensors as float64 tensors ``(B, F)``; None stays.

    Raises:
        ValueError: If inputs are no mapping, or a modality is not a table of real numbers.

    Example:
        >>> as_tensors({"lab": [[1, 2]], "photo": None}, ("lab", "photo"))
        {'lab': tensor([[1., 2.]], dtype=torch.float64), 'photo': None}
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}: modalities have names. Pass a dict, such as "
            '{"lab": array}.'
        )
    tensors: dict[str, Tensor | None] = {}
    for name in [*names, *(name for name in inputs if name not in names)]:
        value = inputs.get(name)
        if value is None:
            tensors[name] = None
            continue
        tensor = _numbers(name, value)
        if tensor.ndim != 2:
            raise ValueError(
                f"inputs[{name!r}] has shape {tuple(tensor.shape)}: a modality is (rows, "
                "features). Reshape it; a single column is (rows, 1)."
            )
        tensors[name] = tensor
    return tensors


def _numbers(name: str, value: Any) -> Tensor:
    """As float64, unless something would be lost or made up."""
    if hasattr(value, "toarray"):
        raise ValueError(
            f"inputs[{name!r}] is a sparse {type(value).__name__}: modalities are dense. Pass "
            f"inputs[{name!r}].toarray()."
        )
    if isinstance(value, Tensor):
        kind, first = "c" if value.is_complex() else "f", value.flatten()[:1].tolist()
    else:
        array = np.asarray(value)
        kind, first = array.dtype.kind, array.flatten()[:1].tolist()
    why: object = f"such as {first}"
    if kind in "biufO":
        try:
            if isinstance(value, Tensor):
                return value.detach().cpu().double()
            return torch.from_numpy(np.array(value, dtype=float, order="C"))
        except (TypeError, ValueError) as error:
            why = error
    raise ValueError(
        f"inputs[{name!r}] does not hold real numbers ({why}): a modality is a table of them. "
        "Encode it first, such as by sklearn.preprocessing.OneHotEncoder, or drop that column."
    ) from None


def columns_of(inputs: Mapping[str, object]) -> dict[str, list[str]]:
    """Names of the columns of those modalities that are frames.

    Example:
        >>> import pandas
        >>> columns_of({"lab": pandas.DataFrame({"age": [1]}), "photo": np.ones((1, 2))})
        {'lab': ['age']}
    """
    return {n: [*map(str, x.columns)] for n, x in inputs.items() if hasattr(x, "columns")}


def read(
    inputs: Mapping[str, object],
    present: object,
    widths: Mapping[str, int],
    columns: Mapping[str, list[str]],
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors without absent content, and what is present, as ``presence.normalise`` gives them.

    Args:
        inputs: Arrays, frames, tensors or None.
        present: What was observed, also as a frame; None infers it.
        widths: Name to feature width.
        columns: Names of the columns that frames have to have.

    Raises:
        ValueError: If frames have other columns, a row has gaps, or ``normalise`` refuses.
    """
    names = tuple(widths)
    tensors = as_tensors(inputs, names)
    for name, found in columns_of(inputs).items():
        if found != (known := columns.get(name, found)):
            raise ValueError(
                f"inputs[{name!r}] has the columns {found}, in fit they were {known}: they are "
                "told apart by their place. Pass the same, in that order."
            )
    table = present_table(present, names)
    refuse_gaps(tensors, table)
    shapes = {name: (width,) for name, width in widths.items()}
    numbers, seen = normalise(tensors, names, table, shapes)
    refuse_huge(numbers)
    return numbers, seen


def present_table(present: object, names: Sequence[str]) -> Tensor | None:
    """What is present as ``(B, M)``; the columns of a frame are found by name.

    Raises:
        ValueError: If a frame lacks a column, or it holds neither booleans nor numbers.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"photo": [True], "lab": [False]})
        >>> present_table(frame, ("lab", "photo")).tolist()
        [[False, True]]
    """
    if present is None or isinstance(present, Tensor):
        return present
    if (columns := getattr(present, "columns", None)) is not None:
        if lacking := [name for name in names if name not in columns]:
            raise ValueError(
                f"present has the columns {[*columns]}, without {lacking}: a frame has one for "
                "each modality, of its name. Name them so, or pass an array in the order of fit."
            )
        present = present[list(names)]  # type: ignore[index]
    table = np.array(present)
    if table.dtype.kind not in "biuf":
        raise ValueError(
            f"present is a {type(present).__name__} of {table.dtype}: it is (rows, modalities) of "
            "booleans. Pass an array in the order of fit, or a frame."
        )
    return torch.from_numpy(table)


def refuse_gaps(tensors: Mapping[str, Tensor | None], present: Tensor | None) -> None:
    """Refuse rows that are there with NaN in some cells.

    Raises:
        ValueError: If there is such a row.

    Example:
        >>> refuse_gaps({"lab": torch.tensor([[torch.nan, 1.0]])}, torch.tensor([[False]]))
    """
    for number, (name, rows) in enumerate(tensors.items()):
        if rows is None:
            continue
        missing = rows.isnan()
        gaps = missing.any(1) & ~missing.all(1)
        if present is not None and present.shape == (len(rows), len(tensors)):
            gaps &= present[:, number].bool().cpu()
        if gaps.any():
            raise ValueError(
                f"inputs[{name!r}] has {int(gaps.sum())} rows with NaN beside numbers: a row is "
                "there, or absent as a whole. Fill the cells first, such as by sklearn.impute."
            )
