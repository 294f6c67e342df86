"""CMML on ODIR-5K: a fundus photo of each eye, age and sex, and eight labels; any part missing.

Data: ODIR-5K, 3500 patients with public labels. Request it from its organisers
(odir2019.grand-challenge.org); it may not be passed on. Without `--data-root` a SYNTHETIC release
in the same on-disk format is written and read back: it shows that all works, and says nothing about
eyes.

    python examples/cmml_odir.py                                  # synthetic, a minute or two
    python examples/cmml_odir.py --data-root ODIR-5K --image-size 224 224 \
        --encoder microsoft/swin-tiny-patch4-window7-224 --backbone-rate 0.1
    torchrun --nproc-per-node 2 examples/cmml_odir.py             # two processes
    python examples/cmml_odir.py --predict new/table.csv          # with that run: docs/predict.md

Writes to `runs/cmml_odir/`: report.html, report.png, metrics.json (for
`MissingnessReport.from_json`), config.json, split.json, history.json and the checkpoints. A killed
run goes on with `--resume`. What is read, and how: docs/odir.md.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import mmfusion
from mmfusion.recipes import reporting
from mmfusion.recipes.checkpoint import check_folder
from mmfusion.recipes.encoders import SmallCNN, TableEncoder, backbone
from mmfusion.recipes.images import random_flips
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.odir import Odir
from mmfusion.recipes.odir_format import find_table, read_patients
from mmfusion.recipes.odir_synthetic import write_synthetic_odir
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.presets import SMALL, parse
from mmfusion.recipes.reading import Patients, Reading
from mmfusion.recipes.release_patients import odir_patients
from mmfusion.recipes.restoring import check_resumed, restored
from mmfusion.recipes.run import predict_new, run
from mmfusion.recipes.splits import save_split, split_patients

METRICS = ("auc_macro", "odir_score", "auprc_macro", "f1_macro")


@dataclass
class Settings:
    """What to run."""

    preset: Literal["none", "small"] = "none"
    """Other defaults: those for small data."""
    data_root: Path | None = None
    """The real release: the folder of full_df.csv or of the xlsx; without it a synthetic one."""
    images: Path | None = None
    """The folder of its photos, where there are several."""
    num_patients: int = 600
    """Patients of the synthetic release."""
    out: Path = Path("runs/cmml_odir")
    """Folder for everything written."""
    split_seed: int = 0
    """Which of the possible splits of the patients, 70 % train, 10 % valid, 20 % test."""
    on_broken: Literal["raise", "missing"] = "raise"
    """An unreadable photo stops the run, or counts as a missing modality."""
    image_size: tuple[int, int] = (48, 48)
    """Height and width of the photos."""
    encoder: str = "small"
    """"small", a transformers name or folder, or a MONAI name; one network for both eyes."""
    pretrained: bool = True
    """Load weights for such an encoder, or draw them anew."""
    dim: int = 64
    """Width of a token."""
    num_tokens: int = 4
    """Tokens per modality."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """In cascade, alignment and head."""
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Plan(epochs=12, batch_size=8)
    )
    """How to train."""
    resume: bool = False
    """Go on with a run that was killed."""
    predict: Path | None = None
    """A table of new patients: train nothing, predict them with the run in --out."""


def read(settings: Settings) -> tuple[dict[str, Odir], dict[str, list[int]]]:
    """The three splits, of the real release or of a synthetic one, and who is in which."""
    root = settings.data_root
    if root is None:
        root = settings.out.parent / f"odir-synthetic-{settings.num_patients}"
        write_synthetic_odir(root, num_patients=settings.num_patients, image_size=128)
    patients = read_patients(find_table(root))
    counts = torch.tensor([patient.labels for patient in patients]).sum(0).tolist()
    # By the rarest label of each patient, so that every split has every label.
    rarest = [
        min((count, label) for label, count in enumerate(counts) if patient.labels[label])[1]
        for patient in patients
    ]
    ids = [patient.id for patient in patients]
    split = split_patients(ids, seed=settings.split_seed, labels=rarest)
    kind: dict[str, Any] = {
        key: getattr(settings, key) for key in ("images", "image_size", "on_broken")
    }
    transforms = {"train": random_flips}
    data = {
        name: Odir(root, part, transform=transforms.get(name), **kind)
        for name, part in split.items()
    }
    return data, split


def build(settings: Settings, data: Odir | Patients) -> mmfusion.CMML:
    """CMML over one encoder for both eyes, which are alike, and one for age and sex."""
    torch.manual_seed(settings.plan.seed)
    eye: Any
    if settings.encoder == "small":
        eye, width = SmallCNN(64, image_size=settings.image_size), 64
    else:
        eye = backbone(
            settings.encoder, image_size=settings.image_size, pretrained=settings.pretrained
        )
        eye.pretrained, width = settings.pretrained, eye.width  # learns at --backbone-rate
    cells = [feature.partition("=")[0] for feature in data.feature_names]
    return mmfusion.CMML(
        {
            "left": (eye, width),
            "right": (eye, width),
            "table": (TableEncoder(cells, settings.dim), settings.dim),
        },
        num_classes=data.num_classes,
        target="multilabel",
        dim=settings.dim,
        num_tokens=settings.num_tokens,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
    )


def main(settings: Settings) -> None:
    """Read, train, evaluate, print and write."""
    if settings.predict:
        trained = restored(settings, "predict", "images")
        patients = odir_patients(settings.predict, Reading.load(settings.out), settings.images)
        return predict_new(build(trained, patients), patients, settings.out)
    state = join_processes()
    say = print if state.is_main_process else (lambda *_: None)
    if state.is_main_process:
        check_folder(settings.out)
    with state.main_process_first():  # which writes the synthetic release
        data, split = read(settings)
    check_resumed(settings, split, "images")
    train, test = data["train"], data["test"]
    kind = "SYNTHETIC data in the format of ODIR-5K" if test.is_synthetic else "ODIR-5K"
    say(f"{kind}: {', '.join(f'{len(cases)} {name}' for name, cases in data.items())}")
    for name, cases in data.items():
        absent = (~cases.present).sum(0).tolist()
        counts = cases.class_counts.tolist()
        say(f"{name}: absent {dict(zip(cases.names, absent, strict=True))}")
        say(f"{name}: patients {dict(zip(cases.class_names, counts, strict=True))}")
        for photo in cases.broken:
            say(f"{name}: row {photo.row}, {photo.column} {photo.file} {photo.reason}: missing")
    about = {"title": f"CMML, {kind}, test split", "synthetic": test.is_synthetic}
    model = build(settings, train)
    if state.is_main_process:
        about["split_sha256"] = save_split(settings.out / "split.json", split)
        train.reading().save(settings.out)
        config = {"settings": asdict(settings), "versions": reporting.versions(), **about}
        reporting.write_json(settings.out / "config.json", config)
    run(model, data, settings.plan, settings.out, about, metrics=METRICS, resume=settings.resume)


if __name__ == "__main__":
    main(parse(Settings, {"small": SMALL}, description=__doc__))
