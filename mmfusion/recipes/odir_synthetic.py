"""A synthetic release in either on-disk format of ODIR-5K, for tests, demonstrations and teaching.

How strong a disease is, how old the patient is and how the eyes are built are drawn once per
patient: both photos show them, age leans on them, so that one modality tells about another beyond
the labels. No image, number or keyword comes from a patient.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmfusion.recipes.images import check_choice
from mmfusion.recipes.odir_eyes import SIGNS, draw_eyes
from mmfusion.recipes.odir_format import (
    COLUMNS,
    COUNTS,
    CSV,
    CSV_COLUMNS,
    EYES,
    KEYWORDS,
    LABELS,
    NUM_IDS,
    NUM_PATIENTS,
    XLSX,
)
from mmfusion.recipes.synthetic import write_release

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

VERSION = 1  # raised with every change of what is drawn, so that older folders are not reused
IMAGES = {"kaggle": "preprocessed_images", "xlsx": "Training Images"}
WORDS = {
    "D": ("mild nonproliferative retinopathy", "moderate non proliferative retinopathy"),
    "G": ("glaucoma", "suspected glaucoma"),
    "C": ("cataract",),
    "A": ("dry age-related macular degeneration", "wet age-related macular degeneration"),
    "H": ("hypertensive retinopathy",),
    "M": ("pathological myopia",),
    "O": ("epiretinal membrane", "macular epiretinal membrane"),
}
# Years by which patients with a disease are older, and how male they are; in the order of SIGNS.
YEARS, MALE = (6, 8, 13, 14, 7, 0, 5), (0.2, 0.0, -0.2, 0.0, 0.3, -0.4, 0.0)
# Patients of the true release without a right eye, a left eye, any; with an age that is none.
LEFT_ONLY, RIGHT_ONLY, NO_PHOTO, AGE_ONE = 164, 160, 142, 15


def write_synthetic_odir(
    root: str | Path,
    *,
    num_patients: int = 200,
    seed: int = 0,
    layout: Literal["kaggle", "xlsx"] = "kaggle",
    image_size: int = 512,
) -> Path:
    """Write a synthetic release that ``Odir`` reads like the true one, or reuse its twin.

    Both layouts hold the same patients and photos. The folder appears whole or not at all; one that
    holds anything but the release of the same arguments is refused, never overwritten. Labels,
    missing eyes and placeholder ages are as frequent as in the true release, with
    ``num_patients=3500`` exactly so.

    Args:
        root: The folder to make; its parents are made too.
        num_patients: At least 30, so that there is every label and every gap.
        seed: Same seed and sizes, same release.
        layout: ``"kaggle"``: ``full_df.csv``, one row per photo, patients without one left out.
            ``"xlsx"``: the original table, one row per patient, which names absent photos too.
        image_size: Side of the photos; 512 as in Kaggle's.

    Returns:
        ``root``, to be passed to ``Odir``.

    Raises:
        ValueError: If an argument is out of range, or ``root`` holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_odir(folder, num_patients=30, image_size=16)
        ...     sorted(path.name for path in root.iterdir())
        ['SYNTHETIC.txt', 'full_df.csv', 'preprocessed_images']
    """
    check_choice("layout", layout, IMAGES)
    if num_patients < 30 or image_size < 16 or seed < 0:
        raise ValueError(
            f"num_patients={num_patients}, seed={seed}, image_size={image_size}: a release has at "
            "least 30 patients and photos of at least 16 pixels, and a seed is not negative. Raise "
            "what is too small."
        )
    about = {"version": VERSION, "layout": layout, "num_patients": num_patients, "seed": seed}
    return write_release(
        root,
        "ODIR-5K",
        about | {"image_size": image_size},
        lambda release: _write(release, num_patients, seed, layout, image_size),
    )


def _write(release: Path, num_patients: int, seed: int, layout: str, image_size: int) -> None:
    rng = np.random.default_rng(seed)
    has = _draw_labels(num_patients, rng)
    # How plain a disease is in the patient, a trace without it; less in an eye that is spared.
    strength = np.where(has, 0.8, 0.05) + rng.normal(0, 0.15, has.shape)
    age = (51.5 + strength @ YEARS + rng.normal(0, 9, num_patients)).clip(14, 91).round()
    affected = has[:, None] & (rng.random((num_patients, 2, len(SIGNS))) < 0.75)
    affected[:, 0] |= has & ~affected.any(1)
    signs = strength[:, None] * np.where(has[:, None] & ~affected, 0.2, 1.0)
    signs = (signs + rng.normal(0, 0.1, signs.shape)).clip(0)
    here = _draw_gaps(num_patients, rng)
    table = _draw_table(has, affected, age, rng)
    folder = release / IMAGES[layout]
    folder.mkdir()
    for patient in np.flatnonzero(here.any(axis=1)).tolist():
        own_rng = np.random.default_rng([seed, patient])
        eyes = draw_eyes(signs[patient], age[patient], image_size, own_rng)
        for (eye, photo), shown in zip(eyes.items(), here[patient], strict=True):
            if shown:
                photo.save(folder / table[EYES[eye]][patient], format="JPEG", quality=90)
    if layout == "xlsx":
        table.to_excel(release / XLSX, sheet_name="Sheet1", index=False)
        return
    photos = [_rows_per_photo(table, affected[:, i], here[:, i], i, rng) for i in (1, 0)]
    rows = pd.concat(photos)[[*CSV_COLUMNS]]
    rows.to_csv(release / CSV, index=False, lineterminator="\n")


def _share(count: int, num_patients: int) -> int:
    """The count of the true release scaled, never none."""
    return max(1, round(count * num_patients / NUM_PATIENTS))


def _draw_labels(num_patients: int, rng: np.random.Generator) -> Flags:
    """Diseases, ``(B, 7)``, each as frequent as it is; the rest of the patients are normal."""
    num_ill = num_patients - _share(COUNTS["N"], num_patients)
    ill = rng.permutation(num_patients)[:num_ill]
    labels = np.repeat(range(len(SIGNS)), [_share(COUNTS[sign], num_patients) for sign in SIGNS])
    has = np.zeros((num_patients, len(SIGNS)), dtype=bool)
    labels = rng.permutation(labels)
    has[ill, labels[:num_ill]] = True  # each ill patient has one
    for label in labels[num_ill:]:
        has[rng.choice(ill[~has[ill, label]]), label] = True
    return has


def _draw_gaps(num_patients: int, rng: np.random.Generator) -> Flags:
    """Which eyes have a photo, ``(B, 2)``."""
    lacking = [_share(count, num_patients) for count in (LEFT_ONLY, RIGHT_ONLY, NO_PHOTO)]
    kinds = rng.permutation(num_patients)
    left_only, right_only, none = np.split(kinds[: sum(lacking)], np.cumsum(lacking)[:-1])
    here = np.ones((num_patients, 2), dtype=bool)
    here[left_only, 1] = here[right_only, 0] = here[none] = False
    return here


def _draw_table(has: Flags, affected: Flags, age: Floats, rng: np.random.Generator) -> pd.DataFrame:
    """The table of the original, one row per patient."""
    num_patients = len(has)
    ids = rng.choice(np.arange(1, NUM_IDS - 1), size=num_patients - 2, replace=False)
    ids = np.sort([0, *ids, NUM_IDS - 1])  # with gaps
    male = rng.normal(size=num_patients) < 0.1 + has @ MALE
    no_age = rng.permutation(num_patients) < _share(AGE_ONE, num_patients)
    table: dict[str, Any] = {"ID": ids, "Patient Age": np.where(no_age, 1, age).astype(int)}
    table["Patient Sex"] = np.where(male, "Male", "Female")
    for eye, column in EYES.items():
        table[column] = [f"{number}_{eye}.jpg" for number in ids]
    for i, column in enumerate(KEYWORDS.values()):
        table[column] = [_keywords(of, rng) for of in affected[:, i]]
    table["N"] = (~has.any(axis=1)).astype(int)
    table |= {sign: has[:, i].astype(int) for i, sign in enumerate(SIGNS)}
    return pd.DataFrame(table)[[*COLUMNS]]


def _keywords(affected: Flags, rng: np.random.Generator) -> str:
    """What an eye was found to have, joined by the full-width comma of the release."""
    words = [str(rng.choice(WORDS[SIGNS[i]])) for i in np.flatnonzero(affected)]
    return "\uff0c".join(words or ["normal fundus"])


def _rows_per_photo(
    table: pd.DataFrame, affected: Flags, here: Flags, eye: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The rows of one side: a label per photo, one-hot, though the patient may have several."""
    found = [[SIGNS[i] for i in np.flatnonzero(of)] or ["N"] for of in affected]
    names = [str(rng.choice(labels)) for labels in found]
    files = table[[*EYES.values()][eye]]
    rows = table.assign(
        filepath="/home/somebody/ODIR-5K/Training Images/" + files,  # of another machine
        labels=[f"['{name}']" for name in names],
        target=[str([int(name == label) for label in LABELS]) for name in names],
        filename=files,
    )
    return rows[here]
