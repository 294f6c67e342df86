"""What estimators learn to predict: classes, labels or numbers, looked at before training."""

from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from mmfusion.recipes.given_rows import LARGEST


def class_targets(y: Any) -> np.ndarray:
    """Classes ``(rows,)``, or 0/1 labels ``(rows, labels)``; a column is one class per row.

    Raises:
        ValueError: If a label is missing, or ``y`` holds what no class or label can be.

    Example:
        >>> class_targets([["benign"], ["malignant"]]).tolist()
        ['benign', 'malignant']
    """
    values = np.asarray(y)
    if values.dtype.kind not in "Mm":  # dates would become numbers of nanoseconds
        values = np.asarray(y, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2):
        raise ValueError(
            f"y has shape {values.shape}: it is (rows,) with a class each, or (rows, labels) of 0 "
            "and 1. Reshape it."
        )
    if missing := int(pd.isna(values).sum()):
        raise ValueError(
            f"y lacks {missing} labels: a classifier learns from known classes. Drop those rows."
        )
    if values.ndim == 2:
        if not (fine := np.isin(values, (0, 1))).all():
            raise ValueError(
                f"y of shape {values.shape} holds {values[~fine][0]}: several labels per row are 0 "
                "or 1 each. Encode them so, or pass one class per row."
            )
        return values.astype(np.float32)
    if wrong := [one for one in values if not _is_class(one)]:
        raise ValueError(
            f"y holds {wrong[0]!r}: a class is a string, a whole number or a boolean. Convert y, "
            "such as by y.astype(str), or take CMMLRegressor for measured numbers."
        )
    if len({isinstance(one, str) for one in values}) > 1:
        raise ValueError(
            "y holds strings beside numbers: classes are sorted, and these have no order. Convert "
            "them to strings."
        )
    return np.array(values.tolist())


def _is_class(one: object) -> bool:
    if isinstance(one, float | np.floating):
        return float(one).is_integer()
    return isinstance(one, str | bool | np.bool_ | int | np.integer)


def number_targets(y: Any) -> np.ndarray:
    """Numbers as doubles, ``(rows,)`` or ``(rows, targets)``.

    Raises:
        ValueError: If ``y`` is of another shape, or holds something else.

    Example:
        >>> number_targets([1, 2]).tolist()
        [1.0, 2.0]
    """
    values = np.asarray(y)
    if values.ndim not in (1, 2):
        raise ValueError(
            f"y has shape {values.shape}: it is (rows,), or (rows, targets). Reshape it."
        )
    try:
        if values.dtype.kind not in "biufO":
            raise TypeError
        values = values.astype(float)
    except (TypeError, ValueError):
        others = (one for one in values.ravel().tolist() if not isinstance(one, Real))
        raise ValueError(
            f"y holds {next(others, values.dtype)!r}: a regression predicts real numbers. Convert "
            "y, or take CMMLClassifier for classes."
        ) from None
    if wrong := int((~(np.abs(values) <= LARGEST)).sum()):
        raise ValueError(
            f"y holds {wrong} NaN or Inf, or numbers beyond {LARGEST:.1e}: targets are finite. "
            "Drop those rows, or use another unit."
        )
    return values
