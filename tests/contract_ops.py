"""Rows of the contract's list: the public ops, dressed as modules, for one backend or the other."""

from typing import Any

import torch
import torch.nn.functional as F
from contract_case import (
    DIM,
    HEADS,
    HELD,
    LENGTH,
    NEIGHBOURS,
    SLOTS,
    Batch,
    Case,
    Ignored,
    Outputs,
    named,
    rows,
    tensors,
    under_absent,
)
from torch import Generator, Tensor, nn

from mmfusion import functional


class Retrieve(nn.Module):
    """``functional.retrieve`` over keys of which the last two are not held and hold NaN."""

    def __init__(
        self, modalities: int, backend: str, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.backend = backend
        kind = {"device": device, "dtype": dtype}
        self.keys = nn.Parameter(torch.empty(modalities, SLOTS, DIM, **kind))
        self.values = nn.Parameter(torch.empty(modalities, SLOTS, 5, **kind))
        self.register_buffer("held", torch.empty(modalities, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.held.fill_(HELD)
        for bank in (self.keys, self.values):
            nn.init.normal_(bank)
            with torch.no_grad():
                bank[:, HELD:] = torch.nan

    def forward(self, query: Tensor, wanted: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        return functional.retrieve(
            query,
            self.keys,
            self.values,
            k=NEIGHBOURS,
            temperature=0.5,
            held=self.held,
            exclude=slots,
            wanted=wanted,
            backend=self.backend,
        )


def retrieve_batch(
    batch_size: int, modalities: int, generator: Generator, present: Any = None
) -> Batch:
    made = tensors(("query", ("M", LENGTH, DIM)), table="wanted")(
        batch_size, modalities, generator, present
    )
    return made | {"slots": torch.arange(batch_size) % 4 - 1}


def cut_retrieve(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
    whole, alone = {}, {}
    for i in range(len(batch["query"])):
        row = rows(batch, slice(i, i + 1))
        kept = [slot for slot in range(HELD) if slot != row["slots"].item()]
        readout, weights, indices = functional.retrieve(
            row["query"],
            module.keys[:, kept],
            module.values[:, kept],
            k=NEIGHBOURS,
            temperature=0.5,
            wanted=row["wanted"],
            backend=module.backend,
        )
        back = torch.tensor([*kept, -1])[indices]  # -1 picks the last: no slot
        names_ = ("readout", "weights", "indices")
        whole |= {f"{i} {n}": x for n, x in zip(names_, module(**row), strict=True)}
        alone |= {f"{i} {n}": x for n, x in zip(names_, (readout, weights, back), strict=True)}
    return whole, alone


LENGTHS = (2, 1, 3, 1)


class Attend(nn.Module):
    """``functional.presence_attention`` over modalities of different lengths, after context."""

    def __init__(self, modalities: int, backend: str, **kind: Any) -> None:
        super().__init__()
        self.lengths = LENGTHS[:modalities]
        self.backend = backend
        self.scale = nn.Parameter(torch.empty(DIM // HEADS, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> Tensor:
        return functional.presence_attention(
            q * self.scale,
            k,
            v,
            present,
            lengths=self.lengths,
            num_context=1,
            backend=self.backend,
        )


def attend_batch(
    batch_size: int, modalities: int, generator: Generator, present: Any = None
) -> Batch:
    keys = (1 + sum(LENGTHS[:modalities]), HEADS, DIM // HEADS)
    draw = tensors(("q", (4, *keys[1:])), ("k", keys), ("v", keys))
    return draw(batch_size, modalities, generator, present)


def _key_columns(present: Tensor) -> Tensor:
    """(B, 1 + N) True for context and the keys of present modalities, by plain repetition."""
    lengths = torch.tensor(LENGTHS[: present.shape[1]])
    tokens = present.repeat_interleave(lengths, dim=1)
    return torch.cat([torch.ones(len(present), 1, dtype=torch.bool), tokens], dim=1)


def absent_keys(batch: Batch) -> Ignored:
    hidden = ~_key_columns(batch["present"])
    return [(("k",), hidden), (("v",), hidden)]


def cut_attend(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
    whole, alone = {}, {}
    for i, read in enumerate(_key_columns(batch["present"])):
        row = rows(batch, slice(i, i + 1))
        whole[str(i)] = module(**row)
        q, k, v = (
            x.transpose(1, 2)
            for x in (row["q"] * module.scale, row["k"][:, read], row["v"][:, read])
        )
        alone[str(i)] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return whole, alone


def cases(backend: str) -> list[Case]:
    """The list has those of ``torch``; ``kernels/test_kernel_contract.py`` runs ``triton``'s."""
    return [
        Case(
            f"retrieve-{backend}",
            functional.retrieve,
            lambda m, **kind: Retrieve(m, backend, **kind),
            retrieve_batch,
            named("readout", "weights", "indices"),
            under_absent("query", table="wanted"),
            cut=cut_retrieve,
        ),
        Case(
            f"presence_attention-{backend}",
            functional.presence_attention,
            lambda m, **kind: Attend(m, backend, **kind),
            attend_batch,
            named("read"),
            absent_keys,
            cut=cut_attend,
        ),
    ]


CASES = cases("torch")
