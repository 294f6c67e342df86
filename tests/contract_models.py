"""Rows of the contract's list: the edge, with and without encoders, and CMML in its variants."""

from collections.abc import Mapping
from typing import Any

import torch
from contract_case import (
    CLASSES,
    CONTEXT,
    DIM,
    HEADS,
    LENGTH,
    NEIGHBOURS,
    SLOTS,
    Batch,
    Case,
    Ignored,
    Outputs,
    draw_present,
    named,
    rows,
)
from contract_layers import fill_bank
from torch import Generator, Tensor, nn

from mmfusion import CMML, layers
from mmfusion.losses import TARGETS, is_known
from mmfusion.missingness import hide

SHAPES = ((5,), (4, 6), (3, 2, 2), (2,))  # a vector, a sequence, a map, a short vector
WIDTHS = (5, 6, 3, 2)


def names(modalities: int) -> list[str]:
    return [f"m{number}" for number in range(modalities)]


def widths(modalities: int) -> dict[str, int]:
    return dict(zip(names(modalities), WIDTHS, strict=False))


class Table(nn.Module):
    """Imputes cells itself."""

    accepts_nan = True
    in_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 6)

    def forward(self, cells: Tensor) -> Tensor:
        return self.project(torch.where(cells.isnan(), 0, cells))


class Text(nn.Module):
    """Takes a dict, returns tokens and which of them are real."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)

    def forward(self, text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.embed(text["ids"]), text["attend"]


def encoders(modalities: int) -> dict[str, Any]:
    photo = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(1, 4))
    made = {"table": (Table(), 6), "text": (Text(), 5), "photo": (photo, 4)}
    return dict(list(made.items())[:modalities])


def feature_inputs(batch_size: int, modalities: int, generator: Generator) -> Batch:
    return {
        name: torch.randn(batch_size, *shape, generator=generator)
        for name, shape in zip(names(modalities), SHAPES, strict=False)
    }


def encoder_inputs(batch_size: int, modalities: int, generator: Generator) -> Batch:
    table = torch.randn(batch_size, 4, generator=generator)
    table[::2, 1] = torch.nan  # a cell, not the row
    text = {
        "ids": torch.randint(11, (batch_size, 5), generator=generator),
        "attend": torch.arange(5) < torch.randint(1, 6, (batch_size, 1), generator=generator),
    }
    photo = torch.randn(batch_size, 3, 4, 4, generator=generator)
    return dict(list({"table": table, "text": text, "photo": photo}.items())[:modalities])


def edge_batch(inputs: Any) -> Any:
    def batch(batch_size: int, modalities: int, generator: Generator, present: Any = None) -> Batch:
        if present is None:
            present = draw_present(batch_size, modalities, generator)
        return {"inputs": inputs(batch_size, modalities, generator), "present": present}

    return batch


def absent_inputs(batch: Batch) -> Ignored:
    absent = ~batch["present"]
    return [(("inputs", name), absent[:, m]) for m, name in enumerate(batch["inputs"])]


def cut_padding(module: Any, batch: Batch) -> tuple[Outputs, Outputs]:
    """Steps of a sequence that are not ``valid`` do not exist."""
    sequence = batch["inputs"]["m1"]
    valid = torch.arange(sequence.shape[1]) < torch.arange(1, len(sequence) + 1).unsqueeze(1)
    dirty = torch.where(valid.unsqueeze(-1), sequence, 1e4)
    everything = torch.ones_like(batch["present"])

    def tokens(inputs: Batch, present: Tensor) -> Tensor:
        made = module(inputs, present)
        return made[0] if isinstance(made, tuple) else made

    whole = tokens(batch["inputs"] | {"m1": (dirty, valid)}, everything)
    kept, alone = {}, {}
    for i, steps in enumerate(valid):
        row = rows(batch["inputs"], slice(i, i + 1)) | {"m1": sequence[i : i + 1, steps]}
        kept[str(i)] = whole[i : i + 1]
        alone[str(i)] = tokens(row, everything[i : i + 1])
    return kept, alone


def build_cmml(target: str = "multiclass", with_encoders: bool = False, **stages: Any) -> Any:
    """Stages are None, "default", or functions from (modalities, dropout and kind) to a module."""

    def build(modalities: int, **kind: Any) -> CMML:
        made = {
            name: make(modalities, **kind) if callable(make) else make
            for name, make in ({"memory": _small_bank(target)} | stages).items()
        }
        return CMML(
            encoders(modalities) if with_encoders else widths(modalities),
            num_classes=1 if target == "binary" else CLASSES,
            target=target,
            dim=DIM,
            num_tokens=LENGTH,
            num_heads=HEADS,
            num_context=CONTEXT,
            num_blocks=2,
            **({"dropout": 0.0} | kind),
            **made,
        )

    return build


def _small_bank(target: str) -> Any:
    num_labels = CLASSES if target in ("multilabel", "regression") else 1

    def make(modalities: int, dropout: float = 0.0, **kind: Any) -> Any:
        return layers.MemoryBank(modalities, SLOTS, DIM, NEIGHBOURS, num_labels=num_labels, **kind)

    return make


def _prototypes(modalities: int, dropout: float = 0.0, **kind: Any) -> Any:
    return layers.PrototypeMemory(modalities, SLOTS, DIM, **kind)


def _evidence(target: str) -> Any:
    num_classes = 1 if target == "binary" else CLASSES

    def make(modalities: int, **kind: Any) -> Any:
        return layers.ModalityEvidence(modalities, DIM, num_classes, target, **kind)

    return make


def draw_labels(target: str, batch_size: int, generator: Generator) -> Tensor:
    """Labels of which the second is missing."""
    if target == "multiclass":
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
    elif target == "regression":
        labels = torch.randn(batch_size, CLASSES, generator=generator)
    else:
        shape = (batch_size, CLASSES) if target == "multilabel" else (batch_size,)
        labels = torch.randint(2, shape, generator=generator).float()
    labels[1:2] = torch.nan if labels.is_floating_point() else -100
    return labels


def model_batch(target: str, inputs: Any) -> Any:
    edge = edge_batch(inputs)

    def batch(batch_size: int, modalities: int, generator: Generator, present: Any = None) -> Batch:
        made = edge(batch_size, modalities, generator, present)
        return made | {
            "visible": hide(made["present"], 0.4, generator),
            "labels": draw_labels(target, batch_size, generator),
            "sample_ids": 98 + torch.arange(batch_size),
        }

    return batch


def call_model(module: Any, batch: Batch) -> Outputs:
    """Every per-sample tensor of the output; losses are the batch's and stay in ``model_loss``."""
    out = module(**{key: value for key, value in batch.items() if key != "labels"})._asdict()
    return {key: value for key, value in out.items() if isinstance(value, Tensor)}


def model_loss(module: Any, batch: Batch) -> Tensor:
    return module(**batch).loss


def fill_model(model: Any) -> None:
    if isinstance(model.memory, layers.MemoryBank):
        fill_bank(model.memory)
    if model.evidence is not None:
        labels = draw_labels(model.target, 9, Generator().manual_seed(3))
        model.evidence.count(labels, is_known(labels))


def cmml(
    variant: str, target: str = "multiclass", with_encoders: bool = False, **stages: Any
) -> Case:
    return Case(
        f"CMML-{variant}",
        CMML,
        build_cmml(target, with_encoders, **stages),
        model_batch(target, encoder_inputs if with_encoders else feature_inputs),
        call_model,
        absent_inputs,
        fill_model,
        has_dropout="encoders" not in variant,
        loss=model_loss,
    )


CASES = [
    Case(
        "ModalityTokens",
        layers.ModalityTokens,
        lambda m, **kind: layers.ModalityTokens(widths(m), DIM, LENGTH, **kind),
        edge_batch(feature_inputs),
        named("tokens"),
        absent_inputs,
        cut=cut_padding,
    ),
    Case(
        "ModalityEncoders",
        layers.ModalityEncoders,
        lambda m, **kind: layers.ModalityEncoders(widths(m), DIM, LENGTH, **kind),
        edge_batch(feature_inputs),
        named("tokens", "present"),
        absent_inputs,
        cut=cut_padding,
    ),
    cmml("default", memory="default"),
    cmml("without-crta", crta=None),
    cmml("without-memory", memory=None),
    cmml("without-alignment", alignment=None),
    cmml("bare", crta=None, memory=None, alignment=None),
    cmml("prototypes", memory=_prototypes),
    *(cmml(f"evidence-{target}", target, evidence=_evidence(target)) for target in TARGETS),
    cmml("encoders", with_encoders=True),
    cmml("multilabel", "multilabel"),
    cmml("binary", "binary"),
    cmml("regression", "regression"),
]
