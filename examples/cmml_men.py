"""CMML on meningioma MRI: three volumes and a table of a patient, any part missing; which grade?

Data: a cohort of your own (the one of the CMML paper is private), or BraTS meningioma with a table
of grades; docs/men.md shows the layout, and how to describe another. Without `--data-root` a
SYNTHETIC cohort in the same on-disk format is written and read back: it shows that all works, and
says nothing about tumours.

    python examples/cmml_men.py                                   # synthetic, a minute or two
    python examples/cmml_men.py --data-root cohort --preset cfcml --encoder resnet18 \
        --weights resnet_18_23dataset.pth --cache prepared        # 128 x 128 x 24 voxels
    python examples/cmml_men.py --num-folds 5 --split 3           # the fourth of five folds
    torchrun --nproc-per-node 2 examples/cmml_men.py              # two processes
    python examples/cmml_men.py --predict new/table.csv           # with that run: docs/predict.md

Writes to `runs/cmml_men/`: report.html, report.png, metrics.json (for
`MissingnessReport.from_json`), config.json, split.json, history.json and the checkpoints. A killed
run goes on with `--resume`. What is read, and how: docs/men.md.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import mmfusion
from mmfusion.recipes import reporting
from mmfusion.recipes.checkpoint import check_folder
from mmfusion.recipes.encoders import TableEncoder
from mmfusion.recipes.encoders3d import Backbone3D, SmallCNN3D
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.layout_patients import men_patients
from mmfusion.recipes.men import Men
from mmfusion.recipes.men_layout import BRATS_LAYOUT, MEN_LAYOUT, Layout
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.men_table import read_patients, read_split
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.presets import CFCML, SMALL, parse
from mmfusion.recipes.reading import Patients, Reading
from mmfusion.recipes.restoring import check_resumed, restored
from mmfusion.recipes.run import predict_new, run
from mmfusion.recipes.splits import folds, save_split
from mmfusion.recipes.volume_inputs import random_mirror

PRESETS = {"cfcml": CFCML["men"] | {"size": (128, 128, 24)}, "small": SMALL}


@dataclass
class Settings:
    """What to run."""

    preset: Literal["none", "cfcml", "small"] = "none"
    """Other defaults: those of the nearest published recipe, or for small data."""
    data_root: Path | None = None
    """The folder of a real cohort; without it a synthetic one is written to runs/."""
    layout: str = "men"
    """Where it keeps what: "men", "brats", or a TOML file."""
    num_patients: int = 240
    """Patients of the synthetic cohort."""
    out: Path = Path("runs/cmml_men")
    """Folder for everything written."""
    target: Literal["subtype", "grade"] = "subtype"
    """All classes of the layout, or both kinds of grade 2 as one."""
    split: int = 0
    """Which splits/<split>.csv of the cohort, or which fold."""
    num_folds: int = 0
    """Draw so many folds instead of reading splits/."""
    size: tuple[int, int, int] = (32, 32, 16)
    """Voxels of the tumour box along x, y and z."""
    cache: Path | None = None
    """Folder for prepared volumes, which the next run reads; else they are kept in memory."""
    on_broken: Literal["raise", "missing"] = "raise"
    """A file or cell that cannot be read stops the run, or counts as missing."""
    encoder: str = "small"
    """"small", or a 3-D network of MONAI such as resnet18; one for each sequence."""
    weights: Path | None = None
    """A file of MedicalNet weights for such a network."""
    dim: int = 64
    """Width of a token."""
    num_tokens: int = 4
    """Tokens per modality."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """In cascade, alignment and head."""
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=lambda: Plan(epochs=20))
    """How to train."""
    resume: bool = False
    """Go on with a run that was killed."""
    predict: Path | None = None
    """A table of new patients: train nothing, predict them with the run in --out."""


def read(settings: Settings) -> tuple[dict[str, Men], dict[str, list[str]]]:
    """The three splits, of a real cohort or of a synthetic one, and who is in which."""
    root = settings.data_root
    if root is None:
        root = settings.out.parent / f"men-synthetic-{settings.num_patients}"
        write_synthetic_men(root, num_patients=settings.num_patients)
    known = {"men": MEN_LAYOUT, "brats": BRATS_LAYOUT}
    layout = known.get(settings.layout) or Layout.from_toml(settings.layout)
    if settings.num_folds:
        if not 0 <= settings.split < settings.num_folds:
            raise ValueError(
                f"split={settings.split} of num_folds={settings.num_folds}: folds are counted from "
                "0. Pass a split below num_folds."
            )
        patients = read_patients(root, layout)
        ids, labels = [one.patient_id for one in patients], [one.label for one in patients]
        split = folds(ids, settings.num_folds, valid=0.2, labels=labels)[settings.split]
    else:
        split = read_split(root / "splits" / f"{settings.split}.csv")
    kind: dict[str, Any] = {
        key: getattr(settings, key) for key in ("target", "size", "cache", "on_broken")
    }
    kind |= {"splits": split, "layout": layout}
    data = {
        "train": Men(root, "train", transform=random_mirror, **kind),
        "valid": Men(root, "valid", **kind),
        "test": Men(root, "test", **kind),
    }
    return data, split


def build(settings: Settings, data: Men | Patients) -> mmfusion.CMML:
    """CMML over an encoder of its own for each sequence and one for the table."""
    if settings.weights and settings.encoder == "small":
        raise ValueError(
            f"weights={str(settings.weights)!r} with encoder='small', which starts from scratch: "
            "they are those of a network of MONAI. Pass its name as encoder, or leave out weights."
        )
    torch.manual_seed(settings.plan.seed)
    modalities: dict[str, Any] = {}
    for name in data.layout.volumes:
        if settings.encoder == "small":
            modalities[name] = SmallCNN3D(64, size=settings.size), 64
        else:
            network: Any = Backbone3D(
                settings.encoder, size=settings.size, weights=settings.weights
            )
            network.pretrained = settings.weights is not None  # learns at --backbone-rate
            modalities[name] = network, network.width
    if "table" in data.names:
        cells = [feature.partition("=")[0] for feature in data.feature_names]
        modalities["table"] = TableEncoder(cells, settings.dim), settings.dim
    return mmfusion.CMML(
        modalities,
        num_classes=data.num_classes,
        dim=settings.dim,
        num_tokens=settings.num_tokens,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
    )


def main(settings: Settings) -> None:
    """Read, train, evaluate, print and write."""
    if settings.predict:
        trained = restored(settings, "predict", "cache")
        patients = men_patients(settings.predict, Reading.load(settings.out), settings.cache)
        return predict_new(build(trained, patients), patients, settings.out)
    state = join_processes()
    say = print if state.is_main_process else (lambda *_: None)
    if state.is_main_process:
        check_folder(settings.out)
    with state.main_process_first():  # which writes the synthetic cohort, and the cache
        data, split = read(settings)
    check_resumed(settings, split, "cache")
    train, test = data["train"], data["test"]
    kind = "SYNTHETIC data in the format of MEN" if test.is_synthetic else "meningioma cohort"
    say(f"{kind}: {', '.join(f'{len(cases)} {name}' for name, cases in data.items())}")
    for name, cases in data.items():
        absent, counts = (~cases.present).sum(0).tolist(), cases.class_counts.tolist()
        say(f"{name}: absent {dict(zip(cases.names, absent, strict=True))}")
        say(f"{name}: patients {dict(zip(cases.class_names, counts, strict=True))}")
        if cases.uncut:
            say(f"{name}: without a tumour box, cut in the middle: {', '.join(cases.uncut)}")
        for one in cases.broken:
            say(f"{name}: {one.patient_id}, {one.column} {one.value} {one.reason}: missing")
    about = {"title": f"CMML, {kind}, test split", "synthetic": test.is_synthetic}
    model = build(settings, train)
    if state.is_main_process:
        about["split_sha256"] = save_split(settings.out / "split.json", split)
        train.reading().save(settings.out)
        config = {"settings": asdict(settings), "versions": reporting.versions(), **about}
        reporting.write_json(settings.out / "config.json", config)
    run(
        model,
        data,
        settings.plan,
        settings.out,
        about,
        classes=train.labels,
        resume=settings.resume,
    )


if __name__ == "__main__":
    main(parse(Settings, PRESETS, description=__doc__))
