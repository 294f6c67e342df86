"""A synthetic release in the on-disk format of Derm7pt, for tests, demonstrations and teaching.

Both photos and the table of a case are drawn from the same latent causes, so that one modality
tells about another beyond the diagnosis: dermoscopy sees the causes best, the clinical photo
less sharply, the table least. No image, number or name comes from a patient.
"""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmfusion.recipes.derm7pt_format import COLUMNS, CRITERIA, GROUPS, SPLITS, VALUES
from mmfusion.recipes.derm7pt_lesions import CAUSES, draw_photos
from mmfusion.recipes.synthetic import write_release

Floats = NDArray[np.float64]
Words = NDArray[np.str_]

VERSION = 1  # raised with every change of what is drawn, so that older folders are not reused
# Cases of each class in train, valid and test of the true release.
CLASS_SPLITS = {
    "BCC": (19, 7, 16),
    "NEV": (256, 100, 219),
    "MEL": (90, 61, 101),
    "MISC": (32, 25, 40),
    "SK": (16, 10, 19),
}
# Mean of the causes in each class, and how columns lean on them, in the order of CAUSES.
CLASS_MEANS = {
    "BCC": (0.2, 0.2, 0.0, 1.0, -1.0, 1.4),
    "NEV": (-0.6, -0.6, -0.4, -0.3, 0.0, -0.2),
    "MEL": (0.9, 1.0, 0.7, 0.2, 0.8, 0.0),
    "MISC": (0.0, -0.2, -0.2, 0.0, -0.6, 1.0),
    "SK": (0.2, 0.2, 0.6, 1.3, 0.3, -0.9),
}
LEANINGS = {
    "pigment_network": (0.6, 0.0, 0.0, 0.0, 0.8, -0.8),
    "streaks": (0.5, 0.5, 0.5, 0.0, 0.2, 0.0),
    "pigmentation": (0.2, 0.8, 0.2, 0.0, 0.5, 0.0),
    "regression_structures": (0.5, 0.7, 0.0, -0.3, -0.2, 0.0),
    "dots_and_globules": (0.5, 0.6, 0.0, 0.0, 0.2, 0.0),
    "blue_whitish_veil": (0.2, 0.6, 0.0, 0.4, 0.8, 0.0),
    "vascular_structures": (0.0, 0.0, 0.0, 0.4, -0.3, 1.0),
    "level_of_diagnostic_difficulty": (0.3, 0.3, -0.3, 0.0, 0.0, 0.0),
    "elevation": (0.0, 0.0, 0.0, 0.6, 0.0, 0.0),
    "sex": (0.1, 0.0, 0.2, 0.0, 0.0, 0.0),
    "management": (0.4, 0.4, 0.4, 0.2, 0.2, 0.1),
}
# Where a class is found twice as often as the rest.
HAUNTS = {"BCC": "head neck", "MEL": "back", "MISC": "lower limbs", "SK": "chest"}
# Points of the seven-point checklist.
SCORES = {
    "pigment_network": {"atypical": 2},
    "blue_whitish_veil": {"present": 2},
    "vascular_structures": {"irregular": 2},
    "pigmentation": {"irregular": 1},
    "streaks": {"irregular": 1},
    "dots_and_globules": {"irregular": 1},
    "regression_structures": {"present": 1},
}


def write_synthetic_release(
    root: str | Path,
    *,
    num_cases: int = 240,
    seed: int = 0,
    image_size: tuple[int, int] = (64, 96),
) -> Path:
    """Write a synthetic release that ``Derm7pt`` reads like the true one, or reuse its twin.

    The folder appears whole or not at all. One that already holds the release of the same
    arguments is left as it is; one that holds anything else is refused, never overwritten.
    With ``num_cases=1011`` classes, splits and criteria are as frequent as in the true release.

    Args:
        root: The folder to make; its parents are made too.
        num_cases: At least 30, so that each split holds each of the five classes.
        seed: Same seed and sizes, same release.
        image_size: Height and width of most photos; some are smaller, as in the true release.

    Returns:
        ``root``, to be passed to ``Derm7pt``.

    Raises:
        ValueError: If a size is too small, or ``root`` holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_release(folder, num_cases=30)
        ...     sorted(path.name for path in root.iterdir())
        ['SYNTHETIC.txt', 'images', 'meta']
    """
    if num_cases < 30 or min(image_size) < 16 or seed < 0:
        raise ValueError(
            f"num_cases={num_cases}, seed={seed}, image_size={image_size}: a release has at least "
            "30 cases and photos of at least 16 pixels each way, and a seed is not negative. "
            "Raise what is too small."
        )
    size = f"{image_size[0]}x{image_size[1]}"
    return write_release(
        root,
        "Derm7pt",
        {"version": VERSION, "num_cases": num_cases, "seed": seed, "image_size": size},
        lambda release: _write(release, num_cases, seed, image_size),
    )


def _write(release: Path, num_cases: int, seed: int, image_size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    kinds, splits = _draw_classes(num_cases, rng)
    causes = np.array([CLASS_MEANS[kind] for kind in kinds])
    causes += rng.normal(size=(num_cases, len(CAUSES)))
    table = _draw_table(kinds, causes, rng)
    for case in range(num_cases):
        criteria = {column: str(table[column][case]) for column in CRITERIA}
        # The true release has a few photos of other sizes too.
        scale = 0.875 if case % 13 == 5 else 1.0
        size = (round(image_size[0] * scale), round(image_size[1] * scale))
        own_rng = np.random.default_rng([seed, case])
        for column, photo in draw_photos(causes[case], criteria, size, own_rng).items():
            if column == "derm" or table["clinic"][case] != table["derm"][case]:
                path = release / "images" / str(table[column][case])
                path.parent.mkdir(parents=True, exist_ok=True)
                photo.save(path, format="JPEG", quality=90)
    meta = release / "meta"
    meta.mkdir()
    _write_csv(meta / "meta.csv", COLUMNS, np.stack([table[c] for c in COLUMNS], axis=1))
    for split in SPLITS:
        rows = np.flatnonzero(splits == split).astype(str)
        _write_csv(meta / f"{split}_indexes.csv", ["indexes"], rows[:, None])


def _write_csv(path: Path, header: list[str], rows: Words) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows.tolist()])


def _draw_classes(num_cases: int, rng: np.random.Generator) -> tuple[Words, Words]:
    """Class and split of each row: the true proportions, no cell empty, rounded into NEV train."""
    counts = np.array(list(CLASS_SPLITS.values()))
    counts = np.maximum(1, np.round(counts * num_cases / counts.sum())).astype(int)
    counts[1, 0] += num_cases - counts.sum()
    kinds = np.repeat(list(CLASS_SPLITS), counts.sum(axis=1))
    splits = np.concatenate([np.repeat(SPLITS, row) for row in counts])
    order = rng.permutation(num_cases)
    return kinds[order], splits[order]


def _draw_table(kinds: Words, causes: Floats, rng: np.random.Generator) -> dict[str, Words]:
    num_cases = len(kinds)
    table = {column: np.full(num_cases, "", dtype="<U64") for column in COLUMNS}
    table["case_num"][:] = np.arange(1, num_cases + 1).astype(str)
    for kind in CLASS_SPLITS:
        rows = kinds == kind
        names = {v: VALUES["diagnosis"][v] for v, k in GROUPS["diagnosis"].items() if k == kind}
        table["diagnosis"][rows] = _by_rank(causes[rows].sum(axis=1), names)
    for column, leaning in LEANINGS.items():
        score = causes @ np.array(leaning) + rng.normal(0, 0.7, size=num_cases)
        if column == "management":
            score[kinds == "MEL"] += 100.0  # as in truth: every melanoma is excised
        table[column][:] = _by_rank(score, VALUES[column])
    places = list(VALUES["location"])
    for kind in CLASS_SPLITS:
        odds = np.array([*VALUES["location"].values()], dtype=float)
        odds[[place == HAUNTS.get(kind) for place in places]] *= 2
        rows = kinds == kind
        table["location"][rows] = rng.choice(places, size=rows.sum(), p=odds / odds.sum())
    points = [[SCORES[c].get(GROUPS[c][str(cell)], 0) for cell in table[c]] for c in CRITERIA]
    table["seven_point_score"][:] = np.sum(points, axis=0).astype(str)
    table["case_id"][::37] = [f"S{case}" for case in range(0, num_cases, 37)]
    table["clinic"][:], table["derm"][:] = _photo_names(num_cases)
    stand_in = rng.permutation(num_cases)[: max(1, round(num_cases * 9 / 1011))]
    table["clinic"][stand_in] = table["derm"][stand_in]
    table["notes"][stand_in] = "clinical image missing, dermoscopic image in its place"
    return table


def _by_rank(score: Floats, counts: dict[str, int]) -> Words:
    """Give the lowest scores the first value and so on, each value as often as ``counts`` says."""
    bounds = np.cumsum([0, *counts.values()]) / sum(counts.values()) * len(score)
    values = np.repeat(list(counts), np.diff(np.round(bounds).astype(int)))
    ranks = score.argsort(kind="stable").argsort(kind="stable")
    return np.asarray(values[ranks])


def _photo_names(num_cases: int) -> tuple[list[str], list[str]]:
    """Names with the habits of the release: mixed case, 2 or 3 digits, some .JPG, a few tails."""
    clinic, derm = [], []
    for case in range(num_cases):
        number, within = divmod(case, max(28, -(-num_cases // 78)))  # 78 names, then fuller folders
        folder = "NFABCDEGHIJKLMOPQRSTUVWXYZ"[number % 26] + ("EL", "hl", "1l")[number % 3]
        stem = folder.capitalize() + ("d" if case % 5 == 2 else "")
        first = f"{folder.upper() if case % 4 == 0 else stem}{2 * within + 25:03d}"
        second = f"{stem}{2 * within + 26:0{2 + case % 2}d}{'xyz' if case % 50 == 7 else ''}"
        clinic.append(f"{folder}/{first}{'.JPG' if case % 8 == 0 else '.jpg'}")
        derm.append(f"{folder}/{second}.jpg")
    return clinic, derm
