"""Launchers of the memory lookup: which kernels run, on what tiles, with how much workspace."""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from mmfusion.kernels import retrieve_bwd, retrieve_fwd
from mmfusion.kernels.launch import on_device, options, pick, precision

__all__ = ["retrieve_backward", "retrieve_forward"]

_LOG2E = 1.4426950408889634
SMALL = 2048  # slots up to which one streaming launch finds the groups
WORKSPACE = 256 << 20  # bytes of maxima held at once; queries come in chunks above it
PROGRAMS = 264  # two per multiprocessor of the largest device
RASTER = 32  # query tiles that share their key tiles
_SORT_FROM = 1024  # queries from which it pays to bring wanted rows together


def retrieve_forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    held: Tensor | None,
    exclude: Tensor | None,
    slot_ids: Tensor | None,
    wanted: Tensor | None,
    key_scale: Tensor | None,
    k: int,
    temperature: float,
    cosine: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Readout, weights, indices and, with ``save``, the k keys and values that were read.

    Shapes are those of ``reference.retrieve``; ``slot_ids`` turns ``exclude`` from slot numbers
    into ids. What is not saved, or is the same as the keys, comes back with no elements.
    """
    lookup = _Lookup(query, keys, values, held, exclude, slot_ids, wanted, key_scale, k, cosine)
    banks, queries = query.shape[:2]
    new: dict[str, Any] = {"device": query.device}
    read = lookup.keys if values is None else lookup.values
    readout = torch.empty((banks, queries, read.shape[2]), dtype=query.dtype, **new)
    weights = torch.empty((banks, queries, k), dtype=torch.float32, **new)
    indices = torch.empty((banks, queries, k), dtype=torch.int64, **new)
    near = (banks, queries, k)
    near_keys = torch.empty((*near, keys.shape[2]) if save else (0,), dtype=keys.dtype, **new)
    size = (*near, read.shape[2]) if save and values is not None else (0,)
    near_values = torch.empty(size, dtype=read.dtype, **new)
    if queries * banks == 0:
        return readout, weights, indices, near_keys, near_values
    with on_device(query):
        for first, count in lookup.chunks():
            groups, tile = lookup.groups(first, count)
            lookup.read(
                groups,
                tile,
                (readout, weights, indices, near_keys, near_values),
                (first, count),
                temperature,
                save,
            )
    return readout, weights, indices, near_keys, near_values


@dataclass
class _Lookup:
    """The operands of one call in the form kernels want."""

    query: Tensor
    keys: Tensor
    values_or_none: Tensor | None
    held: Tensor | None
    exclude: Tensor | None
    slot_ids: Tensor | None
    wanted: Tensor | None
    scale: Tensor | None
    k: int
    cosine: bool
    values: Tensor = field(init=False)
    order: Tensor | None = field(init=False, default=None)
    streams: bool = field(init=False)

    def __post_init__(self) -> None:
        keys = self.keys = _rows_contiguous(self.keys)
        self.values = keys if self.values_or_none is None else _rows_contiguous(self.values_or_none)
        if keys.shape[1] >= 2**31:
            raise ValueError(
                f"keys has {keys.shape[1]} slots: a packed index has 31 bits. Shard the bank."
            )
        self.query = self.query.to(keys.dtype).contiguous()  # both backends rank the same numbers
        if self.held is None:
            self.held = torch.full(keys.shape[:1], keys.shape[1], device=keys.device)
        self.held = self.held.long().contiguous()
        self.exclude = None if self.exclude is None else self.exclude.contiguous()
        self.slot_ids = None if self.slot_ids is None else self.slot_ids.contiguous()
        if self.wanted is not None:
            self.wanted = self.wanted.contiguous()
            if self.wanted.shape[1] >= _SORT_FROM:  # static shapes, no wait for the device
                self.order = (~self.wanted).byte().argsort(stable=True, dim=1).contiguous()
            self.wanted = self.wanted.view(torch.uint8)
        if self.cosine and self.scale is None:
            norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
            self.scale = norm.masked_fill(norm <= 1e-12, torch.inf).reciprocal()
        self.scale = None if self.scale is None else self.scale.float().contiguous()
        self.padded_k = max(4, triton.next_power_of_2(self.k))
        self.streams = keys.shape[1] <= SMALL

    def chunks(self) -> list[tuple[int, int]]:
        """Shares of the queries whose maxima fit into the workspace; streaming needs none."""
        banks, queries = self.query.shape[:2]
        if self.streams:
            return [(0, queries)]
        cut = self.pool_tile().constants
        tiles = triton.cdiv(self.keys.shape[1], cut["BLOCK_S"])
        per_query = 4 * banks * tiles * (cut["BLOCK_S"] // self.group_size() + 1)
        fit = WORKSPACE // per_query // cut["BLOCK_Q"] * cut["BLOCK_Q"]
        if fit == 0 and WORKSPACE // per_query < queries:
            self.streams = True
            return [(0, queries)]
        step = queries if WORKSPACE // per_query >= queries else fit
        return [(first, min(step, queries - first)) for first in range(0, queries, step)]

    def pool_tile(self) -> Any:
        return pick("retrieve_pool", self.keys, size=self.query.shape[1])

    def group_size(self) -> int:
        """Balances traffic of the maxima, 8QS/G bytes, against rescoring, Q k G D e bytes."""
        width, slots = self.keys.shape[2], self.keys.shape[1]
        best = (8 * slots / (self.keys.element_size() * self.k * width)) ** 0.5
        return 8 if best < 12 else 16 if best < 24 else 32

    def shared(self) -> dict[str, Any]:
        """Pointers that every kernel over the bank takes; unused ones still have to be valid."""
        return {
            "query_ptr": self.query,
            "keys_ptr": self.keys,
            "exclude_ptr": self.held if self.exclude is None else self.exclude,
            "ids_ptr": self.held if self.slot_ids is None else self.slot_ids,
            "held_ptr": self.held,
            "Q": self.query.shape[1],
            "S": self.keys.shape[1],
            "D": self.keys.shape[2],
            "keys_bank": self.keys.stride(0),
            "keys_slot": self.keys.stride(1),
            "COSINE": self.cosine,
            "EXCLUDE": 0 if self.exclude is None else 1 if self.slot_ids is None else 2,
        }

    def asked(self) -> dict[str, Any]:
        """Which rows are answered, and in what order."""
        return {
            "order_ptr": self.held if self.order is None else self.order,
            "wanted_ptr": self.held if self.wanted is None else self.wanted,
            "HAS_ORDER": self.order is not None,
            "WANTED": self.wanted is not None,
        }

    def groups(self, first: int, count: int) -> tuple[Tensor, dict[str, int]]:
        """(M, P, padded k) numbers of the groups that hold the top k, and how slots are cut."""
        shape = (self.query.shape[0], count, self.padded_k)
        groups = torch.empty(shape, dtype=torch.int32, device=self.query.device)
        if self.streams:
            return groups, self._stream(groups, first, count)
        return groups, self._pool(groups, first, count)

    def _pool(self, groups: Tensor, first: int, count: int) -> dict[str, int]:
        tile, size = self.pool_tile(), self.group_size()
        cut = tile.constants
        banks, slots = groups.shape[0], self.keys.shape[1]
        tiles = triton.cdiv(slots, cut["BLOCK_S"])
        shape = (banks, count, tiles)
        new: dict[str, Any] = {"dtype": torch.float32, "device": groups.device}
        maxima = torch.empty((*shape, cut["BLOCK_S"] // size), **new)
        tops = torch.empty(shape, **new)
        common = {"first": first, "P": count, "tiles": tiles, "GROUP": size}
        retrieve_fwd.retrieve_pool_kernel[(banks * triton.cdiv(count, cut["BLOCK_Q"]) * tiles,)](
            maxima_ptr=maxima,
            tops_ptr=tops,
            scale_ptr=tops if self.scale is None else self.scale,
            RASTER=RASTER,
            **self.shared(),
            **self.asked(),
            **common,
            **cut,
            **precision(self.keys),
            **options(tile),
        )
        tile = pick("retrieve_select", self.keys, size=self.padded_k)
        retrieve_fwd.retrieve_select_kernel[(banks * count,)](
            maxima_ptr=maxima,
            tops_ptr=tops,
            groups_ptr=groups,
            held_ptr=self.held,
            Q=self.query.shape[1],
            S=slots,
            KP=self.padded_k,
            BLOCK_S=cut["BLOCK_S"],
            **self.asked(),
            **common,
            **tile.constants,
            **options(tile),
        )
        return {"BLOCK_S": cut["BLOCK_S"], "GROUP": size}

    def _stream(self, groups: Tensor, first: int, count: int) -> dict[str, int]:
        tile = pick("retrieve_stream", self.keys, size=self.padded_k)
        cut = tile.constants
        banks, padded_k = groups.shape[0], self.padded_k
        tiles = triton.cdiv(self.keys.shape[1], cut["BLOCK_S"])
        programs = banks * triton.cdiv(count, cut["BLOCK_Q"])
        splits = min(tiles, max(1, PROGRAMS // programs))
        per_split = triton.cdiv(tiles, splits)
        splits = triton.cdiv(tiles, per_split)
        packed = groups
        if splits > 1:
            shape = (banks, count, splits, padded_k)
            packed = torch.empty(shape, dtype=torch.int64, device=groups.device)
        retrieve_fwd.retrieve_stream_kernel[(programs * splits,)](
            packed_ptr=packed,
            groups_ptr=groups,
            scale_ptr=groups if self.scale is None else self.scale,
            first=first,
            P=count,
            splits=splits,
            per_split=per_split,
            KP=padded_k,
            ONE_SPLIT=splits == 1,
            **self.shared(),
            **self.asked(),
            **cut,
            **precision(self.keys),
            **options(tile),
        )
        if splits > 1:
            tile = pick("retrieve_merge", self.keys, size=padded_k)
            retrieve_fwd.retrieve_merge_kernel[(banks * count,)](
                packed_ptr=packed,
                groups_ptr=groups,
                first=first,
                P=count,
                Q=self.query.shape[1],
                splits=splits,
                KP=padded_k,
                **self.asked(),
                **tile.constants,
                **options(tile),
            )
        return {"BLOCK_S": cut["BLOCK_S"], "GROUP": cut["GROUP"]}

    def read(
        self,
        groups: Tensor,
        cut: dict[str, int],
        results: tuple[Tensor, ...],
        chunk: tuple[int, int],
        temperature: float,
        save: bool,
    ) -> None:
        """Fill the results of the chunk from the chosen groups."""
        tile = pick("retrieve_read", self.keys, size=self.padded_k)
        names = ("readout_ptr", "weights_ptr", "indices_ptr", "near_keys_ptr", "near_values_ptr")
        retrieve_fwd.retrieve_read_kernel[(groups.shape[0] * chunk[1],)](
            values_ptr=self.values,
            groups_ptr=groups,
            **dict(zip(names, results, strict=True)),
            inverse_temperature=_LOG2E / temperature,
            first=chunk[0],
            P=chunk[1],
            Dv=self.values.shape[2],
            K=self.k,
            values_bank=self.values.stride(0),
            values_slot=self.values.stride(1),
            KP=self.padded_k,
            HAS_VALUES=self.values_or_none is not None,
            SAVE=save,
            **self.shared(),
            **self.asked(),
            **cut,
            **tile.constants,
            **options(tile),
        )


def retrieve_backward(
    grad: Tensor,
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    weights: Tensor,
    indices: Tensor,
    num_slots: int,
    temperature: float,
    cosine: bool,
    want_keys: bool,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values; those of the bank are empty unless wanted.

    Without ``near_values`` the keys were also the values, and ``dkeys`` holds both gradients.
    """
    near_keys, weights, indices = (x.contiguous() for x in (near_keys, weights, indices))
    same = near_values.ndim == 1
    near_values = near_keys if same else near_values.contiguous()
    grad = grad.contiguous()
    wide = query.to(near_keys.dtype).contiguous()
    banks, queries, k, width = near_keys.shape
    new: dict[str, Any] = {"dtype": torch.float32, "device": grad.device}
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    coefficients = torch.empty((2, banks, queries, k) if want_keys else 0, **new)
    alpha, beta = coefficients if want_keys else (weights, weights)
    dkeys = torch.zeros((banks, num_slots, width) if want_keys else 0, **new)
    wants = want_values and not same
    dvalues = torch.zeros((banks, num_slots, near_values.shape[3]) if wants else 0, **new)
    if banks * queries:
        tile = pick("retrieve_bwd", near_keys, size=max(4, triton.next_power_of_2(k)))
        with on_device(grad):
            retrieve_bwd.retrieve_bwd_kernel[(banks * queries,)](
                grad,
                wide,
                near_keys,
                near_values,
                weights,
                dq,
                alpha,
                beta,
                1 / temperature,
                queries,
                width,
                near_values.shape[3],
                k,
                KP=max(4, triton.next_power_of_2(k)),
                COSINE=cosine,
                WANT_KEYS=want_keys,
                **tile.constants,
                **options(tile),
            )
            add = _Sums(indices, tile)
            if want_keys:
                add(dkeys, wide, alpha, beta if cosine else None, near_keys)
            if wants or (want_keys and same):
                add(dkeys if same else dvalues, grad, weights, None, near_keys)
    return dq, dkeys.to(near_keys.dtype), dvalues.to(near_values.dtype)


class _Sums:
    """``into[slot] += coefficient * source`` over all reads of a slot, fast or repeatable."""

    def __init__(self, indices: Tensor, tile: Any) -> None:
        self.indices, self.tile = indices, tile
        self.repeatable = torch.are_deterministic_algorithms_enabled()
        self.sorted: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        into: Tensor,
        source: Tensor,
        coefficient: Tensor,
        beta: Tensor | None,
        near_keys: Tensor,
    ) -> None:
        banks, queries, k = self.indices.shape
        slots, width = into.shape[1:]
        sizes = (queries, slots, width, k)
        rest = {"HAS_BETA": beta is not None, **self.tile.constants, **options(self.tile)}
        beta = coefficient if beta is None else beta
        if not self.repeatable:
            retrieve_bwd.retrieve_scatter_kernel[(banks * queries,)](
                source,
                coefficient,
                beta,
                near_keys,
                self.indices,
                into,
                *sizes,
                KP=max(4, triton.next_power_of_2(k)),
                **rest,
            )
            return
        if self.sorted is None:
            slot, order = self.indices.flatten(1).sort(stable=True, dim=1)
            edges = torch.arange(slots + 1, device=slot.device).expand(banks, -1).contiguous()
            self.sorted = order, torch.searchsorted(slot.contiguous(), edges)
        retrieve_bwd.retrieve_gather_kernel[(banks * slots,)](
            source, coefficient, beta, near_keys, *self.sorted, into, *sizes, **rest
        )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
