"""What ``present`` means: normalise inputs once, collate samples, say what attention may see.

``present`` is a boolean tensor ``(B, M)``; True means the modality was observed. Its columns follow
the order in which the modalities were declared. Everything past this file is dense and static.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

__all__ = ["check_table", "check_visible", "collate", "may_look", "normalise", "visibility"]


def normalise(
    inputs: Mapping[str, Any],
    names: Sequence[str],
    present: Tensor | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    accepts_nan: Collection[str] = (),
    check_values: bool = True,
) -> tuple[dict[str, Any], Tensor]:
    """Turn whatever the caller has into tensors without absent content, and ``present``.

    A modality is absent for the whole batch (key missing, or None) or for single samples
    (``present`` False, or a row that is NaN throughout). Absent rows come out as zeros, so nothing
    in them reaches any arithmetic, forward or backward. Gradients flow to observed rows only.

    Args:
        inputs: Modality name to a tensor, to None, or to a structure of tensors (a dict with an
            attention mask, say). The first axis of every tensor is the batch.
        names: The declared modalities, in the order of the columns of ``present``.
        present: What was observed; None infers it from None values and NaN rows.
        shapes: Per-sample shapes of modalities. They are checked, and a modality that is absent for
            the whole batch is filled with zeros of its shape; without one it stays None.
        accepts_nan: Names whose observed rows may hold NaN cells (a table encoder imputes them).
        check_values: Look for contradictions in the values. This waits for a GPU; it is skipped
            while compiling, and inside the transforms of ``torch.func``.

    Returns:
        The tensors by name, in declared order, and ``present``.

    Shape:
        - ``inputs[name]``: ``(B, ...)``
        - ``present``: ``(B, M)`` bool

    Raises:
        ValueError: If a modality is unknown, batch sizes differ, a shape is wrong, ``present`` is
            not ``(B, M)`` bool, an observed row is missing or NaN, or it holds NaN or Inf cells.

    Example:
        >>> nan = float("nan")
        >>> photo = torch.tensor([[1.0, 2.0], [nan, nan]])
        >>> tensors, present = normalise({"photo": photo, "table": None}, ("photo", "table"))
        >>> present.tolist()
        [[True, False], [False, False]]
        >>> tensors["photo"].tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """
    if not names:
        raise ValueError("names is empty: there is at least one modality. Name what inputs holds.")
    _check_names(inputs, names)
    shapes = shapes or {}
    values = {name: _plain(inputs.get(name)) for name in names}
    batch_size, device = _batch(values, present)
    if present is not None:
        _check_present(present, batch_size, names, device)
    for name, value in values.items():
        if value is not None and name in shapes:
            _check_shape(name, value, tuple(shapes[name]))
    looks = check_values and (present is None or may_look(present))
    absent: dict[str, Tensor] = {}
    if present is None or looks:
        absent = {name: _nan_rows(value, batch_size, device) for name, value in values.items()}
    if present is None:
        present = ~torch.stack([absent[name] for name in names], dim=1)
    if looks and may_look(present):
        _check_values(values, names, present, absent, accepts_nan)
    tensors = {}
    for column, name in enumerate(names):
        value = values[name]
        if value is None and name in shapes:
            value = torch.zeros(batch_size, *shapes[name], device=device)
        elif value is not None:
            value = _zero_absent(value, present[:, column])
        tensors[name] = value
    return tensors, present


def collate(
    samples: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Batch samples that lack modalities; use ``functools.partial(collate, names=...)`` in a loader.

    A sample is ``{"inputs": {name: value}, ...}``. A modality is absent where its key is missing, its
    value is None, or all of it is NaN; the batch holds zeros there. Every other entry (``labels``,
    ``sample_ids``) goes through torch's ``default_collate``, so that ``model(**batch)`` works.

    Args:
        samples: What the dataset returned. Values are tensors, numpy arrays, numbers, or structures
            of them; one modality has one shape.
        names: The declared modalities, in the order of the columns of ``present``.
        shapes: Per-sample shapes, to fill a modality that the whole batch lacks, in the floating
            type of what the batch has. Without one it is None in the batch.

    Returns:
        ``{"inputs": {name: tensor | None}, "present": (B, M) bool, ...}``

    Raises:
        ValueError: If a sample has no ``inputs``, a modality is unknown, or its shapes differ.

    Example:
        >>> samples = [{"inputs": {"a": [1.0, 2.0]}, "labels": 0}, {"inputs": {"b": [3.0]}, "labels": 1}]
        >>> batch = collate(samples, names=("a", "b"))
        >>> batch["present"].tolist(), batch["labels"].tolist()
        ([[True, False], [False, True]], [0, 1])
        >>> batch["inputs"]["a"].tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """  # noqa: E501  the example shows one sample a line
    shapes = shapes or {}
    for row, sample in enumerate(samples):
        if "inputs" not in sample:
            raise ValueError(
                f"sample {row} of the batch has the keys {sorted(map(str, sample))}: a sample "
                "holds its modalities under 'inputs'. Return {'inputs': {name: value}, ...} from "
                "the dataset."
            )
        _check_names(sample["inputs"], names)
    inputs: dict[str, Any] = {}
    columns = []
    for name in names:
        rows = [_as_tensors(sample["inputs"].get(name)) for sample in samples]
        observed = [value is not None for value in rows]
        columns.append(torch.tensor(observed))
        inputs[name] = _stack(name, rows, observed)
    floats = [x.dtype for x in tree_leaves(inputs) if x is not None and x.is_floating_point()]
    for name in names:
        if inputs[name] is None and name in shapes:
            kind = floats[0] if floats else None
            inputs[name] = torch.zeros(len(samples), *shapes[name], dtype=kind)
    rest = {key for sample in samples for key in sample} - {"inputs"}
    for row, sample in enumerate(samples):
        if lacking := rest - set(sample):
            raise ValueError(
                f"sample {row} of the batch has no {min(lacking)!r}, others do: all samples have "
                "the same keys. Return it from the dataset, a missing label as -100 or NaN."
            )
    others = {key: default_collate([sample[key] for sample in samples]) for key in sorted(rest)}
    return {"inputs": inputs, "present": torch.stack(columns, dim=1), **others}


def visibility(
    present: Tensor,
    lengths: Sequence[int] | None,
    num_context: int = 0,
    allow: Tensor | None = None,
) -> Tensor:
    """Say which keys attention may read: the one place where ``attend`` is made from ``present``.

    Args:
        present: Which modalities may be read.
        lengths: Tokens of each modality, in the order of the columns of ``present``; None if every
            token has a column of its own.
        num_context: Context tokens, which come first and are always visible.
        allow: Which modality (row) may look at which (column); context sees and is seen by all.

    Returns:
        ``attend``, True where a key may be attended: the sense of ``scaled_dot_product_attention``.

    Shape:
        - ``present``: ``(B, M)``
        - ``allow``: ``(M, M)``
        - ``attend``: ``(B, C + N)``, or ``(B, 1, C + N, C + N)`` with ``allow``; torch's SDPA
          takes the former as ``attend[:, None, None]``

    Raises:
        ValueError: If ``present`` is not bool ``(B, M)`` with one length per modality, or
            ``allow`` not bool ``(M, M)``.

    Example:
        >>> visibility(torch.tensor([[True, False]]), lengths=(2, 1), num_context=1).tolist()
        [[True, True, True, False]]
    """
    counted = lengths is None or present.shape[1:] == (len(lengths),)
    if present.ndim != 2 or present.dtype != torch.bool or not counted:
        raise ValueError(
            f"present is {tuple(present.shape)} {present.dtype} with lengths={lengths}: it is bool "
            "(B, M), and every modality has a length. Give one length per column."
        )
    attend = _repeat_columns(present, lengths)
    if num_context:
        attend = torch.cat([attend.new_ones(attend.shape[0], num_context), attend], dim=1)
    if allow is None:
        return attend
    if allow.dtype != torch.bool or allow.shape != (present.shape[1],) * 2:
        raise ValueError(
            f"allow is {tuple(allow.shape)} {allow.dtype}: it is bool (M, M) = "
            f"{(present.shape[1],) * 2}, which modality may look at which. Give one row and one "
            "column per modality."
        )
    tokens = _repeat_columns(_repeat_columns(allow, lengths).mT, lengths).mT  # (N, N)
    tokens = torch.nn.functional.pad(tokens, (num_context, 0, num_context, 0), value=True)
    return attend[:, None, None, :] & tokens  # (B, 1, C + N, C + N)


def check_table(name: str, table: Tensor, shape: Sequence[int]) -> None:
    """Refuse a table of modalities that is not bool ``(B, M)``.

    Raises:
        ValueError: If it is no tensor, or has another type or shape.

    Example:
        >>> check_table("present", torch.tensor([[True, False]]), (1, 2))
    """
    if not isinstance(table, Tensor) or table.dtype != torch.bool or table.shape != shape:
        is_tensor = isinstance(table, Tensor)
        what = f"{tuple(table.shape)} {table.dtype}" if is_tensor else f"a {type(table).__name__}"
        raise ValueError(
            f"{name} is {what}: it is bool (B, M) = {tuple(shape)}, one column per modality. "
            f"Convert it with {name}.bool(), or reshape it."
        )


def check_visible(
    visible: Tensor, present: Tensor, names: Sequence[str], *, check_values: bool = True
) -> None:
    """Refuse a ``visible`` that is not a subset of ``present``; the latter test waits for a GPU.

    Raises:
        ValueError: If ``visible`` has another shape or type, or shows what is absent.

    Example:
        >>> present = torch.tensor([[True, False]])
        >>> check_visible(torch.tensor([[False, False]]), present, ("a", "b"))
    """
    if not isinstance(visible, Tensor):
        raise ValueError(
            f"visible is a {type(visible).__name__}: it is a bool tensor of present's shape "
            f"{tuple(present.shape)}. Use torch.as_tensor(visible)."
        )
    if visible.dtype != torch.bool or visible.shape != present.shape:
        raise ValueError(
            f"visible is {tuple(visible.shape)} {visible.dtype}: it has present's shape "
            f"{tuple(present.shape)} and is bool. Draw it with mmfusion.missingness.hide(present, "
            "rate)."
        )
    if not (check_values and may_look(present)):
        return
    if bool((visible & ~present).any()):
        row, column = (visible & ~present).nonzero()[0].tolist()
        raise ValueError(
            f"visible[{row}, '{names[column]}'] is True but present is False there: visible is a "
            "subset of present. Use present & visible."
        )


def may_look(tensor: Tensor) -> bool:
    """Whether a check may look at values.

    Not while compiling or exporting, not on the meta device, and not inside the transforms of
    ``torch.func``, where one tensor may stand for many.

    Example:
        >>> may_look(torch.ones(1)), may_look(torch.ones(1, device="meta"))
        (True, False)
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _check_names(inputs: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise ValueError(
            f"inputs holds {unknown[0]!r}, which is not a declared modality: the declared ones are "
            f"{list(names)}. Drop or rename that key."
        )


def _batch(values: Mapping[str, Any], present: Tensor | None) -> tuple[int, torch.device]:
    sizes: dict[str, int] = {}
    device = torch.device("cpu")
    for name, value in values.items():
        for leaf in tree_leaves(value):
            if leaf is None:
                continue
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                raise ValueError(
                    f"inputs[{name!r}] holds {_describe(leaf)}: every leaf is a tensor whose first "
                    "axis is the batch. Use torch.as_tensor and add the batch axis."
                )
            if not sizes:
                device = leaf.device
            sizes.setdefault(name, leaf.shape[0])
            first = next(iter(sizes))
            if leaf.shape[0] != sizes[first]:
                raise ValueError(
                    f"inputs[{name!r}] has {leaf.shape[0]} rows and inputs[{first!r}] "
                    f"{sizes[first]}: all modalities share one batch. Keep a sample's row and set "
                    "present to False where the modality is absent."
                )
    if sizes:
        return next(iter(sizes.values())), device
    if present is None:
        raise ValueError(
            "inputs holds no tensor at all, so the batch size is unknown: it comes from a tensor "
            "or from present. Pass present=torch.zeros(B, M, dtype=torch.bool)."
        )
    return present.shape[0], present.device


def _check_present(
    present: Tensor, batch_size: int, names: Sequence[str], device: torch.device
) -> None:
    shape = (batch_size, len(names))
    if not isinstance(present, Tensor):
        raise ValueError(
            f"present is a {type(present).__name__}: it is a bool tensor (B, M) = {shape}. Use "
            "torch.as_tensor(present)."
        )
    if present.dtype != torch.bool or tuple(present.shape) != shape or present.device != device:
        raise ValueError(
            f"present is {tuple(present.shape)} {present.dtype} on {present.device}: it is bool "
            f"(B, M) = {shape} on {device}, True where observed, columns {list(names)}. Convert it "
            "with present.bool(), and move it to the inputs' device."
        )


def _check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if isinstance(value, Tensor) and tuple(value.shape[1:]) != shape:
        raise ValueError(
            f"inputs[{name!r}] has rows of shape {tuple(value.shape[1:])}: that modality was "
            f"declared with {shape}. Reshape it, or declare the other shape."
        )


def _nan_rows(value: Any, batch_size: int, device: torch.device) -> Tensor:
    """(B,) True where the modality is absent by its value: None, or every float in the row NaN."""
    floats = [leaf for leaf in tree_leaves(value) if leaf is not None and leaf.is_floating_point()]
    if value is None:
        return torch.ones(batch_size, dtype=torch.bool, device=device)
    if not floats:
        return torch.zeros(batch_size, dtype=torch.bool, device=device)
    rows = _cells(floats[0]).isnan().all(1)
    for leaf in floats[1:]:
        rows = rows & _cells(leaf).isnan().all(1)
    return rows


def _cells(leaf: Tensor) -> Tensor:
    return leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1)


def _check_values(
    values: Mapping[str, Any],
    names: Sequence[str],
    present: Tensor,
    absent: Mapping[str, Tensor],
    accepts_nan: Collection[str],
) -> None:
    lacking, broken = [], []
    for column, name in enumerate(names):
        observed = present[:, column]
        lacking.append(observed & absent[name])
        bad = torch.zeros_like(observed)
        for leaf in tree_leaves(values[name]):
            if leaf is not None and leaf.is_floating_point():
                cells = _cells(leaf)
                cells = cells.isinf() if name in accepts_nan else ~cells.isfinite()
                bad = bad | cells.any(1)
        broken.append(observed & bad)
    found = torch.stack([torch.stack(lacking, 1), torch.stack(broken, 1)])  # (2, B, M)
    if not bool(found.any()):
        return
    kind, column = found.any(1).nonzero()[0].tolist()
    rows, name = found[kind, :, column].nonzero().flatten().tolist(), names[column]
    others = f" (also rows {', '.join(map(str, rows[1:6]))})" if len(rows) > 1 else ""
    if kind == 1:
        takes_nan = name in accepts_nan
        raise ValueError(
            f"inputs[{name!r}] row {rows[0]} is observed but holds "
            f"{'Inf' if takes_nan else 'NaN or Inf'}{others}: an observed row holds finite numbers"
            f"{', or NaN, which its encoder accepts' if takes_nan else ''}. Repair or impute it, "
            "mark it absent in present, or "
            + ("put NaN there." if takes_nan else "give NaN an encoder with accepts_nan = True.")
        )
    what = f"that row of inputs[{name!r}] is NaN"
    if values[name] is None:
        what = f"inputs[{name!r}] is None"
    elif all(leaf is None or leaf.numel() == 0 for leaf in tree_leaves(values[name])):
        what = f"inputs[{name!r}] is empty"
    raise ValueError(
        f"present[{rows[0]}, {name!r}] is True but {what}{others}: an observed row holds numbers. "
        "Pass present=None to infer absence from None and NaN rows, or fill them."
    )


def _plain(value: Any) -> Any:
    """A mapping of another class (what tokenisers return) as a dict, which torch can look into."""
    return dict(value) if isinstance(value, Mapping) else value


def _zero_absent(value: Any, observed: Tensor) -> Any:
    def blank(leaf: Any) -> Any:
        if leaf is None:
            return None
        # a zero of the leaf's own type: with a plain 0 a bool leaf would turn into int64
        zero = leaf.new_zeros(())
        return torch.where(observed.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, zero)

    return blank(value) if isinstance(value, Tensor) else tree_map(blank, value)


def _repeat_columns(table: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(R, M) -> (R, N), column m repeated lengths[m] times, without a host-made index tensor."""
    if lengths is None:
        return table
    if len(set(lengths)) == 1:
        return table.unsqueeze(-1).expand(*table.shape, lengths[0]).flatten(1)
    columns = zip(table.split(1, dim=1), lengths, strict=True)
    return torch.cat([column.expand(-1, length) for column, length in columns], dim=1)


def _as_tensors(value: Any) -> Any:
    """A sample's value as tensors; None where it is absent."""
    if value is None:
        return None
    value = _plain(value)
    if isinstance(value, dict | tuple):
        value = tree_map(_leaf_tensor, value, is_leaf=lambda leaf: isinstance(leaf, list))
    else:
        value = _leaf_tensor(value)
    floats = [leaf for leaf in tree_leaves(value) if leaf.is_floating_point()]
    return None if floats and all(bool(leaf.isnan().all()) for leaf in floats) else value


def _leaf_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype == np.float64:
        leaf = leaf.astype(np.float32)  # what torch.tensor makes of Python floats
    return torch.as_tensor(leaf)


def _stack(name: str, rows: Sequence[Any], observed: Sequence[bool]) -> Any:
    if not any(observed):
        return None
    template = rows[list(observed).index(True)]
    blank = tree_map(torch.zeros_like, template)
    filled = [row if row is not None else blank for row in rows]
    expected = _shapes(template)
    for row, value in enumerate(filled):
        if _shapes(value) != expected:
            raise ValueError(
                f"inputs[{name!r}] of sample {row} of the batch has shape {_shapes(value)}, the "
                f"first observed one {expected}: one modality has one shape. Resize or pad in the "
                "dataset."
            )
    return tree_map(lambda *leaves: torch.stack(leaves), *filled)


def _shapes(value: Any) -> Any:
    """A structure of shapes."""
    return tree_map(lambda leaf: tuple(leaf.shape), value)


def _describe(value: Any) -> str:
    return f"a {value.ndim}-D tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
