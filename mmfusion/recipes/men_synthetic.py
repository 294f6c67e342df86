"""A synthetic meningioma cohort in the on-disk layout that ``Men`` reads by default.

Volumes and table of a patient are drawn from the same latent causes, so that one modality tells
about another beyond the grade. Files differ as those of hospitals do: in orientation, resolution,
number format, byte order and NIfTI version. No voxel, number or name comes from a patient.
"""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from mmfusion.recipes.men_layout import MEN_LAYOUT
from mmfusion.recipes.men_tumours import CAUSES, PLACES, draw_volumes
from mmfusion.recipes.splits import split_patients
from mmfusion.recipes.synthetic import write_release

Floats = NDArray[np.floating[Any]]

VERSION = 1  # raised with every change of what is drawn, so that older folders are not reused
COLUMNS = "patient_id location sex age adc_value tumour_area oedema_area label".split()
# Patients of each class (inferred for the true cohort), and the mean of the causes in each.
CLASSES = {"grade1": 652, "grade2_invasive": 62, "grade2_noninvasive": 86}
CLASS_MEANS = {
    "grade1": (-0.2, -0.2, -0.2, -0.2),
    "grade2_invasive": (0.5, 0.7, 1.8, 0.9),
    "grade2_noninvasive": (0.8, 1.3, 0.0, 0.4),
}
NUM_SPLITS = 3
FRACTIONS = {"train": 0.55, "valid": 0.15, "test": 0.3}
ORIENTATIONS = ("RAS", "LPS", "LAS", "LIA")
ENCODINGS = ("int16", "scaled", "big-endian", "float64", "nifti2")


def write_synthetic_men(
    root: str | Path,
    *,
    num_patients: int = 240,
    seed: int = 0,
    shape: tuple[int, int, int] = (60, 60, 40),
) -> Path:
    """Write a synthetic cohort that ``Men`` reads like a true one, or reuse its twin.

    The folder appears whole or not at all. One that already holds the cohort of the same arguments
    is left as it is; one that holds anything else is refused, never overwritten. Some patients lack
    sequences, label maps or cells; classes are as frequent as in the true cohort, but for 8 at
    least of each, so that every split holds each.

    Args:
        root: The folder to make; its parents are made too.
        num_patients: At least 30.
        seed: Same seed and sizes, same cohort.
        shape: Voxels of most volumes, over a field of view of 240 x 240 x 155 mm; ADC has half as
            many along x and y. ``(240, 240, 155)`` is as large as true volumes.

    Returns:
        ``root``, to be passed to ``Men``.

    Raises:
        ValueError: If a size is too small, or ``root`` holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_men(folder, num_patients=30, shape=(12, 12, 8))
        ...     sorted(path.name for path in root.iterdir())
        ['SYNTHETIC.txt', 'splits', 'table.csv', 'volumes']
    """
    if num_patients < 30 or min(shape) < 8 or seed < 0:
        raise ValueError(
            f"num_patients={num_patients}, seed={seed}, shape={shape}: a cohort has at least 30 "
            "patients and volumes of at least 8 voxels each way, and a seed is not negative. "
            "Raise what is too small."
        )
    about = {"version": VERSION, "num_patients": num_patients, "seed": seed, "shape": shape}
    return write_release(
        root, "Men", about, lambda cohort: _write(cohort, num_patients, seed, shape)
    )


def _write(cohort: Path, num_patients: int, seed: int, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    labels = _draw_labels(num_patients, rng)
    causes = np.array([CLASS_MEANS[label] for label in labels])
    causes += rng.normal(size=(num_patients, len(CAUSES)))
    # Ids have gaps and leading zeros, as exports from a hospital do.
    ids = [f"{1 + i + i // 9:04d}" for i in range(num_patients)]
    table = _draw_table(ids, labels, causes, rng)
    _write_csv(cohort / "table.csv", [COLUMNS, *table])
    (cohort / "splits").mkdir()
    for number in range(NUM_SPLITS):
        split = split_patients(ids, FRACTIONS, seed=seed + number, labels=labels)
        rows = sorted((patient, name) for name, part in split.items() for patient in part)
        _write_csv(cohort / "splits" / f"{number}.csv", [("patient_id", "split"), *rows])
    places = [row[COLUMNS.index("location")] for row in table]
    for i, patient in enumerate(ids):
        folder = cohort / "volumes" / patient
        folder.mkdir(parents=True)
        own = np.random.default_rng([seed, i])
        drawn = draw_volumes(causes[i], places[i], shape, own)
        lacking = [name for name in MEN_LAYOUT.volumes if own.random() < 0.12]
        if len(lacking) == len(MEN_LAYOUT.volumes):
            lacking = lacking[1:]
        if i % 17 == 11:
            lacking.append("tumour")
        for kind, (name, (data, affine)) in enumerate(drawn.items()):
            if name not in lacking:
                _save(folder, name, data, affine, i + kind)


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _draw_labels(num_patients: int, rng: np.random.Generator) -> list[str]:
    share = np.array([*CLASSES.values()]) * num_patients / sum(CLASSES.values())
    counts = np.maximum(8, np.round(share)).astype(int)
    counts[0] += num_patients - counts.sum()
    return [str(label) for label in rng.permutation(np.repeat([*CLASSES], counts))]


def _draw_table(
    ids: list[str], labels: list[str], causes: Floats, rng: np.random.Generator
) -> list[list[str]]:
    """The rows; each number is a cause seen through noise. One cell in twenty is blank."""
    size, cellularity, oedema, _ = causes.T
    num = len(ids)
    high = np.array([label != "grade1" for label in labels])
    place = np.where(rng.random(num) < 0.5, 0, 1 + (rng.random(num) < 0.5))
    place[high & (rng.random(num) < 0.4)] = 0  # high grades lie over the hemispheres more often
    noise = rng.normal(size=(4, num))
    columns: dict[str, Any] = {
        "location": [[*PLACES][i] for i in place],
        "sex": np.where(rng.random(num) < np.where(high, 0.5, 0.7), "female", "male"),
        "age": [f"{a:.0f}" for a in (56 + 4 * high + 11 * noise[0]).clip(18, 90)],
        "adc_value": [f"{a:.3f}" for a in 0.92 - 0.08 * cellularity + 0.2 * noise[1]],
        "tumour_area": [f"{a:.1f}" for a in 900 * np.exp(0.45 * size + 0.6 * noise[2])],
        "oedema_area": [f"{a:.1f}" for a in 500 * np.exp(0.7 * oedema + 1.0 * noise[3])],
    }
    cells = np.array([columns[name] for name in COLUMNS[1:-1]]).T  # (num, 6)
    blank = rng.random(cells.shape) < 0.05
    blank[:, 0] = False  # the volumes are drawn after the location
    cells[blank] = ""
    return [[i, *row, label] for i, row, label in zip(ids, cells.tolist(), labels, strict=True)]


def _save(folder: Path, name: str, data: Floats, affine: Floats, kind: int) -> None:
    """Write one volume, drawn in RAS, in the orientation and encoding of this ``kind``."""
    encoding = "label map" if name == "tumour" else ENCODINGS[kind % len(ENCODINGS)]
    dtype = {"float64": np.float64, "nifti2": np.float32, "label map": np.uint8}.get(encoding)
    make: Any = nib.Nifti2Image if encoding == "nifti2" else nib.Nifti1Image
    header = make.header_class(endianness=">" if encoding == "big-endian" else "<")
    header.set_data_dtype(dtype or np.int16)
    if encoding == "scaled":  # stored numbers are negative where the volume is dark
        data = 2 * data - 1200
    axes = nib.orientations.axcodes2ornt(ORIENTATIONS[kind % len(ORIENTATIONS)])
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), axes)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    voxels = nib.apply_orientation(data if dtype else data.round(), turn).astype(dtype or np.int16)
    if kind % 6 == 5:  # a time axis with one time
        voxels = voxels[..., None]
    image = make(voxels, affine, header)
    image.set_sform(affine, "scanner")  # the constructor leaves out one that looks like a default
    if encoding == "scaled":
        image.header.set_slope_inter(0.5, 600)  # the constructor forgets it
    content = image.to_bytes()
    if kind % 7 == 3:
        (folder / f"{name}.nii").write_bytes(content)
    else:
        packed = gzip.compress(content, compresslevel=1, mtime=0)
        (folder / f"{name}.nii.gz").write_bytes(packed)
