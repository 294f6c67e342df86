"""Whether what is given for the same rows fits together, and can be computed with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

LARGEST = float(np.finfo(np.float32).max)  # beyond it nothing can be computed with


def refuse_other_order(inputs: Mapping[str, Any], **others: Any) -> None:
    """Refuse frames and series that do not have the same rows in the same order.

    Args:
        inputs: Modalities, of which those that are frames are looked at.
        others: What else is given, by the name of its argument.

    Raises:
        ValueError: If two indices differ.

    Example:
        >>> one = pd.DataFrame({"age": [50, 60]}, index=["Bo", "Al"])
        >>> refuse_other_order({"lab": one}, y=pd.Series([0, 1], index=["Bo", "Al"]))
    """
    given = {f"inputs[{name!r}]": part for name, part in inputs.items()} | others
    indices = {name: part.index for name, part in given.items() if hasattr(part, "iloc")}
    for name, index in indices.items():
        first, known = next(iter(indices.items()))
        if len(index) != len(known) or index.equals(known):
            continue  # another number of rows is refused elsewhere
        row = int(np.argmax(np.asarray(index) != np.asarray(known)))
        one, other = known.tolist()[row], index.tolist()[row]
        raise ValueError(
            f"row {row} is {one!r} in {first} and {other!r} in {name}: rows are told apart by "
            "their place, so frames have one order. Reindex one, or pass arrays."
        )


def group_numbers(groups: Any, num_rows: int) -> np.ndarray:
    """Groups as numbers, one a row.

    Raises:
        ValueError: If there is not one for each row, or one is missing.

    Example:
        >>> group_numbers(["Bo", "Al", "Bo"], 3).tolist()
        [1, 0, 1]
    """
    values = np.asarray(groups, dtype=object)
    if values.shape != (num_rows,):
        raise ValueError(
            f"groups has shape {values.shape} for {num_rows} rows: each row has one group. Pass "
            f"({num_rows},)."
        )
    if len(missing := np.flatnonzero(pd.isna(values))):
        raise ValueError(
            f"groups[{missing[0]}] is {values[missing[0]]} (so are {len(missing) - 1} others): "
            "whose row it is decides its fold. Name a group of its own, or drop the row."
        )
    return pd.factorize(values, sort=True)[0]


def refuse_huge(inputs: Mapping[str, Tensor]) -> None:
    """Refuse numbers that float32 cannot hold.

    Raises:
        ValueError: If there is one.
    """
    for name, rows in inputs.items():
        for row, column in (rows.abs() > LARGEST).nonzero().tolist():
            raise ValueError(
                f"inputs[{name!r}][{row}, {column}] is {rows[row, column]:.3g}: beyond "
                f"{LARGEST:.1e} nothing can be computed with. Correct it, or use another unit."
            )


def refuse_overflow(answers: Tensor, columns: Mapping[str, Tensor]) -> None:
    """Refuse answers that are no numbers, and name the modality to blame.

    Args:
        answers: Of a model.
        columns: What it was asked, standardised.

    Shape:
        - ``answers``: ``(B, ...)``; ``columns[name]``: ``(B, F)``

    Raises:
        ValueError: If an answer is not finite.
    """
    for row in (~answers.flatten(1).isfinite()).any(1).nonzero().flatten().tolist():
        sizes = {name: float(x[row].abs().max()) for name, x in columns.items() if x.shape[1]}
        name = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"inputs[{name!r}][{row}] lies {sizes[name]:.1e} standard deviations of fit from its "
            "mean: the answer to such a row is not a finite number. Correct it, or leave it out."
        )
