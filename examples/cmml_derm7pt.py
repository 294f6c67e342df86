"""CMML on Derm7pt: two photos and a table of a skin lesion, any of them missing.

Data: Derm7pt (Kawahara et al. 2019), 1011 cases. Request it from its owners (derm.cs.sfu.ca); it
is for academic research and may not be passed on. Without `--data-root` a SYNTHETIC release in the
same on-disk format is written and read back: it shows that all works, and says nothing about skin.

    python examples/cmml_derm7pt.py                               # synthetic, about a minute
    python examples/cmml_derm7pt.py --ablate                      # and without CRTA and memory
    python examples/cmml_derm7pt.py --data-root release_v0 --preset cfcml   # Swin-T at 224 pixels
    torchrun --nproc-per-node 2 examples/cmml_derm7pt.py          # two processes, on CPUs or GPUs
    python examples/cmml_derm7pt.py --predict new/meta/meta.csv   # with that run: docs/predict.md

Writes to `runs/cmml_derm7pt/`: report.html, report.png, metrics.json, config.json, history.json,
the test patterns and the checkpoints. A killed run goes on with `--resume`. Expected scores, with
spread: docs/derm7pt.md.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from accelerate.utils import gather_object

import mmfusion
from mmfusion.evaluation import MissingnessReport, compare, diagnose, evaluate
from mmfusion.presence import collate
from mmfusion.recipes import reporting
from mmfusion.recipes.caching import encode, from_features
from mmfusion.recipes.checkpoint import check_folder
from mmfusion.recipes.derm7pt import Derm7pt, random_flips
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
from mmfusion.recipes.encoders import SmallCNN, TableEncoder, backbone
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.presets import CFCML, SMALL, parse
from mmfusion.recipes.reading import Patients, Reading
from mmfusion.recipes.release_patients import derm7pt_patients
from mmfusion.recipes.restoring import check_resumed, restored
from mmfusion.recipes.run import predict_new
from mmfusion.recipes.splits import hash_split
from mmfusion.recipes.training import fit

WITHOUT_SYNTHESIS = {"crta": None, "memory": None}


@dataclass
class Settings:
    """What to run."""

    preset: Literal["none", "cfcml", "small"] = "none"
    """Other defaults: those of the nearest published recipe, or for small data."""
    data_root: Path | None = None
    """The real release (release_v0); without it a synthetic one is written to runs/."""
    num_cases: int = 1011
    """Cases of the synthetic release."""
    out: Path = Path("runs/cmml_derm7pt")
    """Folder for everything written."""
    target: Literal["diagnosis2", "diagnosis5", "criteria"] = "diagnosis2"
    """Nevus against melanoma, five diagnoses, or the seven criteria."""
    columns: Literal["safe", "paper"] = "safe"
    """Table columns; "paper" adds two that leak the label."""
    on_broken: Literal["raise", "missing"] = "raise"
    """An unreadable photo stops the run, or counts as a missing modality."""
    image_size: tuple[int, int] = (64, 96)
    """Height and width of the photos."""
    encoder: str = "small"
    """"small", a transformers name or folder, or a MONAI name such as monai:DenseNet121."""
    pretrained: bool = True
    """Load weights for such an encoder, or draw them anew."""
    freeze: bool = False
    """Run such an encoder once over the photos, and train the rest on its features."""
    dim: int = 64
    """Width of a token."""
    num_tokens: int = 4
    """Tokens per modality."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """In cascade, alignment and head."""
    cell_dropout: float = 0.3
    """Share of table cells that count as missing while training."""
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=lambda: Plan(epochs=20))
    """How to train."""
    resume: bool = False
    """Go on with a run that was killed."""
    predict: Path | None = None
    """A table of new cases: train nothing, predict them with the run in --out."""
    ablate: bool = False
    """Also train without CRTA and memory, and print both."""


def read(settings: Settings) -> dict[str, Derm7pt]:
    """The three splits, of the real release or of a synthetic one."""
    root = settings.data_root
    if root is None:
        root = settings.out.parent / f"derm7pt-synthetic-{settings.num_cases}"
        write_synthetic_release(root, num_cases=settings.num_cases)
    kind = {key: getattr(settings, key) for key in ("target", "columns", "on_broken", "image_size")}
    return {
        "train": Derm7pt(
            root, "train", transform=None if settings.freeze else random_flips, **kind
        ),
        "valid": Derm7pt(root, "valid", **kind),
        "test": Derm7pt(root, "test", **kind),
    }


def build(settings: Settings, data: Derm7pt | Patients, **stages: Any) -> mmfusion.CMML:
    """CMML over an encoder of its own for each photo and one for the table."""
    if settings.freeze and (settings.encoder == "small" or not settings.pretrained):
        raise ValueError(
            f"freeze=True with encoder={settings.encoder!r}, which starts from scratch: frozen, it "
            "stays there. Pass a pretrained encoder, or leave out freeze."
        )
    torch.manual_seed(settings.plan.seed)
    modalities: dict[str, Any] = {}
    for photo in ("clinic", "derm"):
        if settings.encoder == "small":
            modalities[photo] = SmallCNN(64, image_size=settings.image_size), 64
        else:
            network = backbone(
                settings.encoder, image_size=settings.image_size, pretrained=settings.pretrained
            )
            network.pretrained = settings.pretrained  # learns at --backbone-rate
            modalities[photo] = network, network.width
    cells = [feature.partition("=")[0] for feature in data.feature_names]
    modalities["meta"] = (
        TableEncoder(cells, settings.dim, dropout=settings.cell_dropout),
        settings.dim,
    )
    return mmfusion.CMML(
        modalities,
        num_classes=data.num_classes,
        target="multilabel" if settings.target == "criteria" else "multiclass",
        dim=settings.dim,
        num_tokens=settings.num_tokens,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
        **stages,
    )


def batches(samples: Sequence[Any], data: Derm7pt) -> dict[str, Any]:
    """Join samples; the seven criteria become 19 yes-or-no labels, one for each of their values."""
    batch = collate(samples, data.names)
    if batch["labels"].ndim == 2:
        classes = zip(batch["labels"].unbind(1), data.tasks.values(), strict=True)
        batch["labels"] = torch.cat([F.one_hot(one, len(of)) for one, of in classes], dim=1)
    return batch


def in_batches(data: Derm7pt) -> Any:
    """All samples, in order, for each rank."""
    return reporting.in_order(data, functools.partial(batches, data=data), all_ranks=True)


def score(model: torch.nn.Module, samples: Any, data: Derm7pt, **how: Any) -> MissingnessReport:
    """Evaluate; the seven criteria are tasks side by side."""
    loader = reporting.in_order(samples, functools.partial(collate, names=data.names))
    how |= {"target": "multiclass", "classes": data.tasks, "gather": gather_object}
    return evaluate(model, loader, **how)


def train(settings: Settings, data: dict[str, Derm7pt], folder: Path, **stages: Any):
    """Train one model; the epoch is selected by validation AUC, over all subsets in one ranking."""
    model = build(settings, data["train"], **stages)
    join = functools.partial(batches, data=data["train"])
    samples: dict[str, Any] = {split: data[split] for split in ("train", "valid")}
    photos = ("clinic", "derm") if settings.freeze else ()
    if settings.freeze:
        samples = {split: encode(model, cases, join, photos) for split, cases in samples.items()}

    def validation_auc(model: torch.nn.Module) -> float:
        how = {"kinds": ["subset"], "metrics": ["auc_macro"], "num_bootstrap": 0}
        return reporting.pooled(score(model, samples["valid"], data["valid"], **how))

    with from_features(model, samples["train"], photos):
        history = fit(
            model,
            samples["train"],
            validation_auc,
            settings.plan,
            folder,
            collate=join,
            classes=None if settings.target == "criteria" else data["train"].labels,
            resume=settings.resume,
            track=True,
        )
    return model, history


def main(settings: Settings) -> None:
    """Read, train, evaluate, print and write."""
    if settings.predict:
        trained = restored(settings, "predict")
        patients = derm7pt_patients(settings.predict, Reading.load(settings.out))
        return predict_new(build(trained, patients), patients, settings.out, "cmml")
    started = time.perf_counter()
    state = join_processes()
    main_process = state.is_main_process
    if main_process:
        check_folder(settings.out)
    with state.main_process_first():  # which writes the synthetic release
        data = read(settings)
    rows = {split: cases.sample_ids.tolist() for split, cases in data.items()}
    check_resumed(settings, rows, "ablate")
    test = data["test"]
    say = print if main_process else (lambda *_: None)
    kind = "SYNTHETIC data in the format of Derm7pt" if test.is_synthetic else "Derm7pt"
    sizes = ", ".join(f"{len(cases)} {split}" for split, cases in data.items())
    say(f"{kind}: {sizes}; {settings.target}, {settings.columns} columns")
    for split, cases in data.items():
        absent = (~cases.present).sum(0).tolist()
        say(f"{split}: absent {dict(zip(cases.names, absent, strict=True))}")
        for photo in cases.broken:
            say(f"{split}: row {photo.row}, {photo.column} {photo.file} {photo.reason}: missing")
    about = {"synthetic": test.is_synthetic, "versions": reporting.versions()}
    about["split_sha256"] = hash_split(rows)
    if main_process:
        broken = {split: [b._asdict() for b in cases.broken] for split, cases in data.items()}
        config = {"settings": asdict(settings), **about, "broken": broken}
        reporting.write_json(settings.out / "config.json", config)
        data["train"].reading().save(settings.out)
    about["title"] = f"CMML, {kind}, {settings.target}, test split"
    models = {"CMML": {}} | ({"no CRTA, no memory": WITHOUT_SYNTHESIS} if settings.ablate else {})
    reports, histories = [], {}
    for name, stages in models.items():
        say(f"training {name}")
        folder = settings.out / "checkpoints" / ("ablation" if stages else "cmml")
        model, histories[name] = train(settings, data, folder, **stages)
        report = score(model, test, test, method=name, seeds=[settings.plan.seed], about=about)
        report.diagnostics = diagnose(model, in_batches(data["train"]), in_batches(test))
        reports.append(report)
    state.destroy_process_group()
    if not main_process:
        return
    for report in reports:
        say(f"\n{kind}, test split\n{report.table()}")
        for task, values in reporting.by_task(report).items():
            say(f"{task}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    if settings.ablate:
        say(f"\n{compare(reports).table()}")
    reporting.write_reports(reports, settings.out)
    reporting.write_patterns(reports[0], len(test), settings.out)
    seconds = round(time.perf_counter() - started, 1)
    reporting.write_json(settings.out / "history.json", histories | {"seconds": seconds})
    say(f"\nwrote {settings.out}/report.html and metrics.json, {seconds} s in all")


if __name__ == "__main__":
    main(parse(Settings, {"cfcml": CFCML["derm7pt"], "small": SMALL}, description=__doc__))
