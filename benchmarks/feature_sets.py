"""Data sets of feature vectors for the benchmarks: modalities, splits, and what is present.

A data set is ``digits`` or ``breast_cancer``, which ship with scikit-learn, or an .npz with ``y``
and one array per modality, rows aligned. ``:1600`` takes the first 1600 rows for training, else
70 % at random, stratified; ``@250`` keeps 250 of the training rows.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Generator

from mmfusion.missingness import per_modality


class Job(NamedTuple):
    """One training: what identifies a run."""

    data: str
    rate: float
    seed: int
    method: str


def load(data: str, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Modalities, labels, and the numbers of training and test rows."""
    source, _, keep = data.partition("@")
    source, _, first = source.partition(":")
    if source == "digits":
        found = load_digits()
        quarters = found.images.reshape(-1, 2, 4, 2, 4).transpose(1, 3, 0, 2, 4).reshape(4, -1, 16)
        views = dict(
            zip(("upper left", "upper right", "lower left", "lower right"), quarters, strict=True)
        )
        labels = found.target
    elif source == "breast_cancer":
        found = load_breast_cancer()
        views = dict(zip(("mean", "error", "worst"), np.split(found.data, 3, axis=1), strict=True))
        labels = found.target
    else:
        with np.load(source) as file:
            views = {name: file[name] for name in file.files if name != "y"}
            labels = file["y"]
    rows = np.arange(len(labels))
    if first:
        train, test = np.split(rows, [int(first)])
    else:
        train, test = train_test_split(rows, test_size=0.3, random_state=seed, stratify=labels)
    if keep:
        train, _ = train_test_split(
            train, train_size=int(keep), random_state=seed, stratify=labels[train]
        )
    return {name: x.astype(np.float32) for name, x in views.items()}, labels, train, test


def present_rows(job: Job, num_rows: int, num_modalities: int) -> np.ndarray:
    """What is present of each row: it depends on data, rate and seed alone."""
    number = zlib.crc32(f"{Path(job.data).name} {job.rate} {job.seed}".encode())
    rates = [job.rate] * num_modalities
    return per_modality(num_rows, rates, Generator().manual_seed(number)).numpy()


def name_of(data: str) -> str:
    """Without folder, suffix and split rule: ``protein@250``."""
    source, _, keep = data.partition("@")
    return Path(source.partition(":")[0]).stem + (f"@{keep}" if keep else "")
