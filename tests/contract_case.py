"""What a row of the contract's list says, and what the checks do to its batch.

A batch is a dict of arguments whose every tensor leaf has the batch as first axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

DIM, HEADS, LENGTH, CONTEXT, SLOTS, NEIGHBOURS = 8, 2, 2, 3, 7, 3
HELD = 5  # of SLOTS, after ``fill``
CLASSES = 3

Batch = dict[str, Any]
Outputs = dict[str, Tensor]
Ignored = list[tuple[tuple[str, ...], Tensor]]
Cut = Callable[[nn.Module, Batch], tuple[Outputs, Outputs]]


def nothing_ignored(batch: Batch) -> Ignored:
    return []


@dataclass(frozen=True)
class Case:
    """One row: what it stands for, how it is built, fed and called.

    ``ignored`` names the arguments that hold content nobody may read, and where (leading axes).
    ``own_rows`` keeps the outputs that such content may decide out of G1; ``fillers`` says what may
    lie there. ``cut`` gives the outputs beside those of the call with the absent part cut out.
    """

    name: str
    covers: Any
    build: Callable[..., nn.Module]  # (modalities, **{dropout, device, dtype})
    batch: Callable[..., Batch]  # (batch_size, modalities, generator, present)
    call: Callable[[Any, Batch], Outputs]
    ignored: Callable[[Batch], Ignored] = nothing_ignored
    fill: Callable[[nn.Module], None] = lambda module: None
    cut: Cut | None = None
    own_rows: Callable[[Outputs, Batch], Outputs] = lambda outputs, batch: outputs
    fillers: tuple[str, ...] = ("nan", "inf", "noise")
    has_dropout: bool = False
    loss: Callable[[Any, Batch], Tensor] | None = None

    def ready(self, modalities: int = 3, seed: int = 0, filled: bool = True, **kind: Any) -> Any:
        """A module in eval whose every parameter is off its initial value, so nothing is hidden."""
        torch.manual_seed(seed)
        module = self.build(modalities, **kind)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        if filled:
            self.fill(module)
        return module.eval()

    def objective(self, module: Any, batch: Batch) -> Tensor:
        """A scalar that every output enters, each entry with a weight of its own."""
        total = torch.zeros((), dtype=torch.float64)
        for value in self.own_rows(self.call(module, batch), batch).values():
            if value.is_floating_point() and value.requires_grad:
                weight = torch.randn(value.shape, generator=Generator().manual_seed(1))
                total = total + (value * weight.to(value.dtype)).sum().double()
        return total if self.loss is None else total + self.loss(module, batch).double()


def draw_present(batch_size: int, modalities: int, generator: Generator) -> Tensor:
    """Random patterns, with an empty first row and a complete last one where there is room."""
    present = torch.rand(batch_size, modalities, generator=generator) < 0.6
    if batch_size > 1:
        present[0], present[-1] = False, True
    return present


def rows(batch: Any, index: Any) -> Any:
    """The batch of some of its samples, in that order."""
    return tree_map(lambda leaf: leaf[index], batch)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Floating leaves in another type."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)


def require_grad(batch: Any) -> Any:
    """Floating leaves as fresh leaves of autograd."""

    def fresh(leaf: Tensor) -> Tensor:
        return leaf.clone().requires_grad_(leaf.is_floating_point())

    return tree_map(fresh, batch)


def at(batch: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        batch = batch[key]
    return batch


def spread(where: Tensor, leaf: Tensor) -> Tensor:
    """A table over the leading axes, over all of ``leaf``."""
    return where.reshape(*where.shape, *[1] * (leaf.ndim - where.ndim)).expand_as(leaf)


def poison(batch: Batch, ignored: Ignored, filler: str) -> Batch:
    """The batch with something else where nobody may look."""

    def replace(leaf: Tensor, where: Tensor) -> Tensor:
        if leaf.dtype == torch.bool:
            other = ~leaf
        elif not leaf.is_floating_point():
            other = torch.full_like(leaf, 10**6)
        elif filler == "noise":
            other = 1e4 * torch.randn(leaf.shape, generator=Generator().manual_seed(2))
        else:
            other = torch.full_like(leaf, float(filler))
        return torch.where(spread(where, leaf), other.to(leaf.dtype), leaf)

    changed = tree_map(lambda leaf: leaf, batch)
    for path, where in ignored:
        new = tree_map(lambda leaf, where=where: replace(leaf, where), at(batch, path))
        at(changed, path[:-1])[path[-1]] = new
    return changed


def under_absent(*fields: str, table: str = "present") -> Callable[[Batch], Ignored]:
    """``ignored`` for arguments ``(B, M, ...)``: the content where ``table`` is False."""
    return lambda batch: [((field,), ~batch[table]) for field in fields]


def cut_columns(
    call: Callable[[Any, Batch], Outputs],
    *fields: str,
    table: str = "present",
    modal: tuple[str, ...] = (),
    smaller: Callable[[Any, Tensor], Any] = lambda module, pattern: module,
) -> Cut:
    """``cut`` sample by sample, absent columns taken out.

    The outputs in ``modal`` have a modality axis; of the others every entry is compared. For a
    layer that knows ``M``, ``smaller`` is the one of some of the modalities.
    """

    def cut(module: nn.Module, batch: Batch) -> tuple[Outputs, Outputs]:
        whole = call(module, batch)
        kept, alone = {}, {}
        for i, pattern in enumerate(batch[table]):
            if not pattern.any():
                continue
            row = rows(batch, slice(i, i + 1))
            row |= {field: row[field][:, pattern] for field in (*fields, table)}
            for name, value in call(smaller(module, pattern), row).items():
                full = whole[name][i : i + 1]
                kept[f"{name}[{i}]"] = full[:, pattern] if name in modal else full
                alone[f"{name}[{i}]"] = value
        return kept, alone

    return cut


def finite(values: Any) -> bool:
    """True if every floating leaf is finite; a missing gradient counts as zero."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def tensors(*shapes: tuple[str, tuple[Any, ...]], table: str = "present") -> Any:
    """A ``batch`` of random tensors; "M" in a shape is the number of modalities."""

    def batch(
        batch_size: int, modalities: int, generator: Generator, present: Tensor | None = None
    ) -> Batch:
        made: Batch = {}
        for name, shape in shapes:
            sizes = [modalities if size == "M" else size for size in shape]
            made[name] = torch.randn(batch_size, *sizes, generator=generator)
        if present is None:
            present = draw_present(batch_size, modalities, generator)
        return made | ({table: present} if table else {})

    return batch


def named(*names: str) -> Callable[[Any, Batch], Outputs]:
    """``call`` with the batch as keyword arguments; results get names."""

    def call(module: Any, batch: Batch) -> Outputs:
        results = module(**batch)
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip(names, results, strict=True))

    return call
