"""Rows of the contract's list: the layers a network is built from."""

import copy
from typing import Any

import torch
from contract_case import (
    CLASSES,
    CONTEXT,
    DIM,
    HEADS,
    HELD,
    LENGTH,
    NEIGHBOURS,
    SLOTS,
    Batch,
    Case,
    Outputs,
    cut_columns,
    named,
    rows,
    spread,
    tensors,
    under_absent,
)
from torch import Generator, Tensor, nn

from mmfusion import layers


def call_crta(module: Any, batch: Batch) -> Outputs:
    out = module(**batch)
    stages = {f"stage{i}": stage for i, stage in enumerate(out.stages)}
    return {"synthesised": out.synthesised, "completed": out.completed, "context": out.context} | (
        stages
    )


def smaller_block(block: Any, kept: Any) -> Any:
    """The block of some of the modalities; the context's decoder comes first."""
    made = copy.deepcopy(block)
    for name in ("residual_weight", "residual_bias"):
        whole = getattr(block, name)
        setattr(made, name, nn.Parameter(torch.cat([whole[:1], whole[1:][kept]])))
    return made


def cut_crta(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
    """The first block's reading: each absent modality is guessed from the present ones alone."""
    stage, block = module(**batch).stages[0], module.blocks[0]
    whole, alone = {}, {}
    for i, pattern in enumerate(batch["present"]):
        context = batch["context"][i : i + 1]
        for absent in (~pattern).nonzero().flatten().tolist():
            columns = [*pattern.nonzero().flatten().tolist(), absent]
            tokens = batch["tokens"][i : i + 1, columns].clone()
            tokens[:, -1] = module.absent.tokens[absent]
            read = torch.tensor([[True] * (len(columns) - 1) + [False]])
            residual, _ = smaller_block(block, columns)(tokens, context, read)
            whole[f"{i}, {absent}"] = stage[i, absent]
            alone[f"{i}, {absent}"] = (tokens + residual)[0, -1]
    return whole, alone


def present_rows(outputs: Outputs, batch: Batch) -> Outputs:
    """A block's absent tokens are queries: they decide their own residual, and no other."""
    rows_present = spread(batch["present"], outputs["d_tokens"])
    return outputs | {"d_tokens": torch.where(rows_present, outputs["d_tokens"], 0)}


def fill_bank(bank: Any) -> None:
    """``HELD`` vectors per modality, of samples 100, 101, ..."""
    modalities, _, dim = bank.slots.shape
    generator = Generator().manual_seed(3)
    vectors = torch.randn(HELD, modalities, dim, generator=generator).to(bank.slots.dtype)
    labels = torch.zeros(HELD, bank.labels.shape[-1])
    everything = torch.ones(HELD, modalities, dtype=torch.bool)
    bank.train().write(vectors, everything, 100 + torch.arange(HELD), labels)


def bank_batch(*sizes: int) -> Any:
    """Queries of samples 98, 99, ...: some ask a bank that remembers them."""
    draw = tensors(("query", ("M", *sizes, DIM)))

    def batch(batch_size: int, modalities: int, generator: Generator, present: Any = None) -> Batch:
        made = draw(batch_size, modalities, generator, present)
        return made | {"sample_ids": 98 + torch.arange(batch_size)}

    return batch


def cut_bank(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
    """Slots that are not held, or are the asker's own, do not exist."""
    whole, alone = {}, {}
    for i in range(len(batch["query"])):
        row = rows(batch, slice(i, i + 1))
        kept = (module.ids[0, :HELD] != row["sample_ids"]).nonzero().flatten()
        smaller = layers.MemoryBank(len(module.ids), len(kept), DIM, NEIGHBOURS)
        state = {k: v[:, kept] if v.ndim > 1 else v for k, v in module.named_buffers()}
        state["held"] = torch.full_like(module.held, len(kept))
        smaller.load_state_dict(
            state | {f"gate.{k}": v for k, v in module.gate.state_dict().items()}
        )
        whole[str(i)] = module.lookup(**row).readout
        alone[str(i)] = smaller.lookup(row["query"], row["present"]).readout
    return whole, alone


def gate_batch(
    batch_size: int, modalities: int, generator: Generator, present: Any = None
) -> Batch:
    shape = ("M", LENGTH, DIM)
    draw = tensors(("query", shape), ("readout", shape))
    return draw(batch_size, modalities, generator, present)


def cut_modalities(call: Any, smaller: Any) -> Any:
    """``cut`` for layers that know ``M``: ``smaller`` is the one of some of the modalities."""

    def cut(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
        whole, alone = {}, {}
        for i, pattern in enumerate(batch["present"]):
            if pattern.any():
                row = rows(batch, slice(i, i + 1))
                kept = {key: value[:, pattern] for key, value in row.items()}
                whole[str(i)] = call(module(**row))
                alone[str(i)] = call(smaller(module, pattern)(**kept))
        return whole, alone

    return cut


def smaller_pool(pool: Any, kept: Tensor) -> Any:
    made = layers.ConcatPool(int(kept.sum()), DIM)
    weight = pool.project.weight.unflatten(1, (-1, DIM))[:, kept].flatten(1)
    made.load_state_dict(pool.state_dict() | {"project.weight": weight})
    return made


def smaller_evidence(evidence: Any, kept: Tensor) -> Any:
    made = copy.deepcopy(evidence)
    for m in (~kept).nonzero().flatten().flip(0).tolist():
        del made.hidden[m], made.heads[m]
    return made


def count_some(evidence: Any) -> None:
    """A prior that says something: three of the first class."""
    evidence.count(torch.zeros(3, dtype=torch.int64), known=torch.ones(3, dtype=torch.bool))


TOKENS = ("tokens", ("M", LENGTH, DIM))
CONTEXTS = ("context", (CONTEXT, DIM))
call_attention, call_block = named("read"), named("d_tokens", "d_context")
call_alignment, call_pool = named("aligned", "reference"), named("pooled")
call_evidence = named("scores", "evidence", "logits")

CASES = [
    Case(
        "PresenceAttention",
        layers.PresenceAttention,
        lambda m, **kind: layers.PresenceAttention(DIM, HEADS, **kind),
        tensors(("queries", (4, DIM)), ("keys", ("M", DIM)), table="attend"),
        call_attention,
        under_absent("keys", table="attend"),
        cut=cut_columns(call_attention, "keys", table="attend"),
        has_dropout=True,
    ),
    Case(
        "CRTABlock",
        layers.CRTABlock,
        lambda m, **kind: layers.CRTABlock(m, DIM, HEADS, **kind),
        tensors(TOKENS, CONTEXTS),
        call_block,
        under_absent("tokens"),
        cut=cut_columns(call_block, "tokens", modal=("d_tokens",), smaller=smaller_block),
        own_rows=present_rows,
        fillers=("noise",),  # absent tokens are queries, and queries are finite
        has_dropout=True,
    ),
    Case(
        "CRTA",
        layers.CRTA,
        lambda m, **kind: layers.CRTA(m, LENGTH, DIM, HEADS, 2, **kind),
        tensors(TOKENS, CONTEXTS),
        call_crta,
        under_absent("tokens"),
        cut=cut_crta,
        has_dropout=True,
    ),
    Case(
        "ContextTokens",
        layers.ContextTokens,
        lambda m, **kind: layers.ContextTokens(CONTEXT, DIM, **kind),
        tensors(("samples", ()), table=""),
        lambda module, batch: {"context": module(batch["samples"].shape[0])},
    ),
    Case(
        "AbsentTokens",
        layers.AbsentTokens,
        lambda m, **kind: layers.AbsentTokens(m, LENGTH, DIM, **kind),
        tensors(TOKENS),
        named("tokens"),
        under_absent("tokens"),
    ),
    Case(
        "MemoryBank",
        layers.MemoryBank,
        lambda m, **kind: layers.MemoryBank(m, SLOTS, DIM, NEIGHBOURS, **kind),
        bank_batch(LENGTH),
        named("enriched"),
        fill=fill_bank,
        cut=cut_bank,
    ),
    Case(
        "PrototypeMemory",
        layers.PrototypeMemory,
        lambda m, **kind: layers.PrototypeMemory(m, SLOTS, DIM, **kind),
        bank_batch(),
        named("enriched"),
    ),
    Case(
        "ReadoutGate",
        layers.ReadoutGate,
        lambda m, **kind: layers.ReadoutGate(DIM, **kind),
        gate_batch,
        named("enriched"),
    ),
    Case(
        "ReferenceAlignment",
        layers.ReferenceAlignment,
        lambda m, **kind: layers.ReferenceAlignment(DIM, HEADS, **kind),
        tensors(("completed", TOKENS[1]), CONTEXTS),
        call_alignment,
        under_absent("completed"),
        cut=cut_columns(call_alignment, "completed", modal=("aligned",)),
        has_dropout=True,
    ),
    Case(
        "PresencePool",
        layers.PresencePool,
        lambda m, **kind: layers.PresencePool(DIM, **kind),
        tensors(TOKENS),
        call_pool,
        under_absent("tokens"),
        cut=cut_columns(call_pool, "tokens"),
    ),
    Case(
        "ConcatPool",
        layers.ConcatPool,
        lambda m, **kind: layers.ConcatPool(m, DIM, **kind),
        tensors(TOKENS),
        call_pool,
        under_absent("tokens"),
        cut=cut_modalities(lambda pooled: pooled, smaller_pool),
        has_dropout=True,
    ),
    Case(
        "ModalityEvidence",
        layers.ModalityEvidence,
        lambda m, **kind: layers.ModalityEvidence(m, DIM, CLASSES, "multiclass", **kind),
        tensors(TOKENS),
        call_evidence,
        under_absent("tokens"),
        count_some,
        cut=cut_modalities(lambda out: out.logits, smaller_evidence),
        has_dropout=True,
    ),
    Case(
        "Head",
        layers.Head,
        lambda m, **kind: layers.Head(DIM, CLASSES, **kind),
        tensors(("fused", (DIM,)), table=""),
        named("logits"),
        has_dropout=True,
    ),
]
