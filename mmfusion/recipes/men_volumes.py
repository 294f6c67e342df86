"""The volumes of a patient: cut to the tumour, resampled, normalised, kept in a cache."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfusion.recipes.men_layout import Layout
from mmfusion.recipes.men_table import Patient
from mmfusion.recipes.volume_inputs import Size, cached, prepare, sweep
from mmfusion.recipes.volumes import read_centre_box, tumour_box


class Broken(NamedTuple):
    """A file or cell that cannot be read.

    Attributes:
        patient_id: As the table spells it.
        column: A volume, ``"tumour"``, or a column of the table.
        value: The file, or what the cell holds.
        reason: Why it cannot be read.
    """

    patient_id: str
    column: str
    value: str
    reason: str


class VolumeReader:
    """Read the volumes of one patient after the other, each patient by itself.

    Args:
        layout: Says what in the label map is tumour.
        size: Voxels along x, y and z.
        clip: As for ``Men``; so are ``margin`` and ``cache``.
        margin: Added to the tumour box on every side, mm.
        cache: Folder for prepared volumes, or None.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.men_layout import MEN_LAYOUT
        >>> from mmfusion.recipes.men_synthetic import write_synthetic_men
        >>> from mmfusion.recipes.men_table import read_patients
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_men(folder, num_patients=30, shape=(12, 12, 8))
        ...     patient = read_patients(root)[0]
        ...     volumes, broken = VolumeReader(MEN_LAYOUT, (16, 16, 8))(patient)
        >>> sorted(volumes) == sorted(patient.files), broken
        (True, [])
    """

    def __init__(
        self,
        layout: Layout,
        size: Size,
        clip: tuple[float, float] | None = None,
        margin: float = 5.0,
        cache: Path | None = None,
    ) -> None:
        self.layout, self.size, self.clip = layout, size, clip
        self.margin, self.cache = margin, cache
        if cache is not None:
            sweep(cache)

    def __call__(self, patient: Patient) -> tuple[dict[str, Tensor | Path], list[Broken]]:
        """The volumes of a patient, or where they are cached, and what is broken of them."""
        broken: list[Broken] = []
        volumes: dict[str, Tensor | Path] = {}
        box = patient.box
        if box is not None:
            box = box + np.array([[-self.margin], [self.margin]])
        elif patient.tumour is not None:
            try:
                make = partial(self._tumour_box, patient.tumour)
                box = value_of(self._keep(make, patient.tumour, "tumour", self.margin)).numpy()
            except ValueError as error:
                broken.append(Broken(patient.patient_id, "tumour", str(patient.tumour), str(error)))
        for name, file in patient.files.items():
            try:
                box = read_centre_box(file) if box is None else box
                make = partial(prepare, file, box, self.size, self.clip)
                volumes[name] = self._keep(make, file, box.tolist(), self.size, self.clip)
            except ValueError as error:
                broken.append(Broken(patient.patient_id, name, str(file), str(error)))
        return volumes, broken

    def _tumour_box(self, path: Path) -> Tensor:
        box = tumour_box(path, labels=self.layout.tumour_labels, margin=self.margin)
        return torch.from_numpy(box)

    def _keep(self, make: Callable[[], Tensor], source: Path, *about: Any) -> Tensor | Path:
        if self.cache is None or not source.is_file():  # make() says so
            return make()
        return cached(make, self.cache, source, (*about, *self.layout.tumour_labels))


def value_of(kept: Tensor | Path) -> Tensor:
    """A volume that is in memory, or in a file of the cache.

    Example:
        >>> value_of(torch.ones(1))
        tensor([1.])
    """
    return kept if isinstance(kept, Tensor) else torch.from_numpy(np.load(kept))
