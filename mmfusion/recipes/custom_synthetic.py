"""A synthetic data set of a photo, a scan, a signal and a table, as ``Custom`` reads it.

All four are drawn from the same two causes, so that one modality tells about another beyond the
class. Nothing in it comes from a patient.
"""

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from mmfusion.recipes.synthetic import write_release

VERSION = 1  # raised with every change of what is drawn, so that older folders are not reused
LAYOUT = """\
# Where the data are. Paths are relative to the folder of this file.
table = "table.csv"                # CSV, Parquet or xlsx, one row per case
id = "visit"                       # each case once
group = "patient"                  # optional: cases of one patient are never in two splits
label = "outcome"
# split = "split"                  # optional: a column of train, valid and test

[classes]                          # cell of the label column = class
0 = "healthy"
1 = "ill"

[photos]                           # modality = pattern, with columns in braces and * for anything
photo = "photos/{visit}.*"

[volumes]                          # or modality = a column that holds paths; a blank cell: absent
scan = "scan_file"

[vectors]
signal = "signals/{visit}.npy"

[tables.clinic]                    # as many tables as there are sources that go missing together
numeric = ["age", "pressure"]
categorical = ["ward"]
"""


def write_synthetic_custom(root: str | Path, *, num_cases: int = 300, seed: int = 0) -> Path:
    """Write a synthetic data set with its layout, or reuse its twin.

    The folder appears whole or not at all; one that holds anything but the data set of the same
    arguments is refused, never overwritten. Each file is lacking in one case of six, each cell of
    the table in one of twenty; some patients have two cases.

    Args:
        root: The folder to make; its parents are made too.
        num_cases: At least 40.
        seed: Same seed and size, same data.

    Returns:
        The layout, ``root / "layout.toml"``, to be passed to ``Custom``.

    Raises:
        ValueError: If there are too few cases, or ``root`` holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     toml = write_synthetic_custom(Path(folder, "data"), num_cases=40)
        ...     sorted(path.name for path in toml.parent.iterdir())
        ['SYNTHETIC.txt', 'layout.toml', 'photos', 'scans', 'signals', 'table.csv']
    """
    if num_cases < 40 or seed < 0:
        raise ValueError(
            f"num_cases={num_cases}, seed={seed}: there are at least 40 cases, and a seed is not "
            "negative. Raise what is too small."
        )
    about = {"version": VERSION, "num_cases": num_cases, "seed": seed}
    root = write_release(root, "custom data", about, lambda folder: _write(folder, num_cases, seed))
    return root / "layout.toml"


def _write(folder: Path, num_cases: int, seed: int) -> None:
    (folder / "layout.toml").write_text(LAYOUT, encoding="utf-8", newline="\n")
    for name in ("photos", "scans", "signals"):
        (folder / name).mkdir()
    rows = [["visit", "patient", "outcome", "scan_file", "age", "pressure", "ward"]]
    for i in range(num_cases):
        patient = i - (i % 5 == 4)  # every fifth case is the second of its patient
        causes = np.random.default_rng([seed, patient]).normal(size=2)
        rng = np.random.default_rng([seed, i, 1])
        outcome = int(causes.sum() > 0)
        here = rng.random(3) > 1 / 6
        here[rng.integers(3)] = True
        if here[0]:
            _photo(causes, rng).save(folder / "photos" / f"v{i:04}.png")
        if here[1]:
            scan = nib.Nifti1Image(_scan(causes, rng), np.diag([4.0, 4.0, 6.0, 1.0]))
            nib.save(scan, folder / "scans" / f"v{i:04}.nii.gz")
        if here[2]:
            np.save(folder / "signals" / f"v{i:04}.npy", _signal(causes, rng))
        cells: list[Any] = [
            f"{60 + 8 * causes[0] + 8 * rng.normal():.0f}",
            f"{130 + 10 * causes[1] + 10 * rng.normal():.0f}",
            "acute" if causes.sum() + 2 * rng.normal() > 0 else "routine",
        ]
        kept = rng.random(3) > 1 / 20
        cells = [cell if known else "" for cell, known in zip(cells, kept, strict=True)]
        path = f"scans/v{i:04}.nii.gz" if here[1] else ""
        rows.append([f"v{i:04}", f"p{patient:04}", str(outcome), path, *cells])
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _photo(causes: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A disc: its size is the first cause, its redness the second."""
    y, x = np.mgrid[-1:1:48j, -1:1:48j] - 0.2 * rng.normal(size=(2, 1, 1))
    disc = (np.hypot(x, y) < 0.5 + 0.1 * causes[0]).astype(float)
    colour = np.array([0.5 + 0.12 * causes[1], 0.4, 0.35])
    photo = 0.75 - disc[..., None] * (0.75 - colour) + 0.08 * rng.normal(size=(48, 48, 3))
    return Image.fromarray((photo.clip(0, 1) * 255).astype(np.uint8))


def _scan(causes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A ball in a larger one: its size is the first cause, its brightness the second."""
    grid = np.mgrid[-1:1:24j, -1:1:24j, -1:1:16j]
    centre = 0.15 * rng.normal(size=(3, 1, 1, 1))
    radius, inner = np.linalg.norm(grid, axis=0), np.linalg.norm(grid - centre, axis=0)
    inside = (inner < 0.4 + 0.08 * causes[0]) * (0.6 + 0.25 * causes[1])
    noise = 0.15 * rng.normal(size=radius.shape)
    return ((radius < 0.95) * (400 * (1 + inside + noise)).clip(1)).astype(np.int16)


def _signal(causes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wave: its pace is the first cause, its height the second."""
    time = np.linspace(0, 1, 32)
    wave = (1 + 0.3 * causes[1]) * np.sin(2 * np.pi * (3 + 0.5 * causes[0]) * time)
    return (wave + 0.3 * rng.normal(size=32)).astype(np.float32)
