"""CMML on data of your own: a table, photos, volumes and feature vectors, any of them missing.

Describe the data in a TOML file such as `examples/custom.toml` (docs/custom.md explains it); no
reader has to be written. Without one, a SYNTHETIC data set of a photo, a scan, a signal and a table
is written and read back: it shows that all works, and means nothing.

    python examples/cmml_custom.py                                # synthetic, a minute or two
    python examples/cmml_custom.py --data my_data/layout.toml --image-size 128 128
    python examples/cmml_custom.py --predict new/table.csv        # with that run: docs/predict.md

Writes to `runs/cmml_custom/`: report.html, report.png, metrics.json (for
`MissingnessReport.from_json`), config.json, split.json, history.json and the checkpoints. A killed
run goes on with `--resume`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

import mmfusion
from mmfusion.recipes import reporting
from mmfusion.recipes.checkpoint import check_folder
from mmfusion.recipes.custom import Custom
from mmfusion.recipes.custom_layout import CustomLayout, deal, read_cases
from mmfusion.recipes.custom_synthetic import write_synthetic_custom
from mmfusion.recipes.encoders import SmallCNN, TableEncoder
from mmfusion.recipes.encoders3d import SmallCNN3D
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.layout_patients import custom_patients
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.presets import SMALL, parse
from mmfusion.recipes.reading import Patients, Reading
from mmfusion.recipes.restoring import check_resumed, restored
from mmfusion.recipes.run import predict_new, run
from mmfusion.recipes.splits import save_split


@dataclass
class Settings:
    """What to run."""

    preset: Literal["none", "small"] = "none"
    """Other defaults: those for small data."""
    data: Path | None = None
    """The TOML file of the data; without it a synthetic data set is written to runs/."""
    num_cases: int = 300
    """Cases of the synthetic data set."""
    out: Path = Path("runs/cmml_custom")
    """Folder for everything written."""
    split_seed: int = 0
    """Which split is drawn, where the table has none."""
    on_broken: Literal["raise", "missing"] = "raise"
    """A file or cell that cannot be read stops the run, or counts as missing."""
    image_size: tuple[int, int] = (48, 48)
    """Height and width of the photos."""
    volume_size: tuple[int, int, int] = (24, 24, 16)
    """Voxels of the volumes along x, y and z."""
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
    """A table of new cases: train nothing, predict them with the run in --out."""


def read(settings: Settings) -> tuple[dict[str, Custom], dict[str, list[str]]]:
    """The three splits of the data, or of a synthetic data set, and who is in which."""
    toml = settings.data
    if toml is None:
        root = settings.out.parent / f"custom-synthetic-{settings.num_cases}"
        toml = write_synthetic_custom(root, num_cases=settings.num_cases)
    split = deal(read_cases(toml.parent, CustomLayout.from_toml(toml)), settings.split_seed)
    kind: dict[str, Any] = {
        key: getattr(settings, key) for key in ("image_size", "volume_size", "on_broken")
    }
    data = {name: Custom(toml, name, splits=split, **kind) for name in ("train", "valid", "test")}
    return data, split


def build(settings: Settings, data: Custom | Patients) -> mmfusion.CMML:
    """CMML over an encoder for each modality: put your own networks here."""
    torch.manual_seed(settings.plan.seed)
    modalities: dict[str, Any] = {}
    for name in data.layout.photos:
        modalities[name] = SmallCNN(64, image_size=settings.image_size), 64
    for name in data.layout.volumes:
        modalities[name] = SmallCNN3D(64, size=settings.volume_size), 64
    for name in data.layout.vectors:
        [width] = data.shapes[name]
        modalities[name] = nn.LayerNorm(width), width
    for name, features in data.feature_names.items():
        cells = [feature.partition("=")[0] for feature in features]
        modalities[name] = TableEncoder(cells, settings.dim), settings.dim
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
        trained = restored(settings, "predict")
        patients = custom_patients(settings.predict, Reading.load(settings.out))
        return predict_new(build(trained, patients), patients, settings.out)
    state = join_processes()
    say = print if state.is_main_process else (lambda *_: None)
    if state.is_main_process:
        check_folder(settings.out)
    with state.main_process_first():  # which writes the synthetic data
        data, split = read(settings)
    check_resumed(settings, split)
    train, test = data["train"], data["test"]
    kind = "SYNTHETIC custom data" if test.is_synthetic else f"data of {settings.data}"
    say(f"{kind}: {', '.join(f'{len(cases)} {name}' for name, cases in data.items())}")
    for name, cases in data.items():
        absent, counts = (~cases.present).sum(0).tolist(), cases.class_counts.tolist()
        say(f"{name}: absent {dict(zip(cases.names, absent, strict=True))}")
        say(f"{name}: cases {dict(zip(cases.class_names, counts, strict=True))}")
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
    main(parse(Settings, {"small": SMALL}, description=__doc__))
