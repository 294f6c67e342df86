"""The reader of ODIR-5K: two fundus photos, age and sex of a patient, and eight yes-or-no labels.

The images belong to their owners (odir2019.grand-challenge.org) and are never part of this package.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfusion.recipes.images import (
    BrokenPhoto,
    Photos,
    check_choice,
    check_size,
    read_photos,
    transformed,
)
from mmfusion.recipes.odir_format import (
    EYES,
    LABELS,
    SEXES,
    Patient,
    find_images,
    find_table,
    read_patients,
)
from mmfusion.recipes.reading import Reading
from mmfusion.recipes.synthetic import MARKER

NAN = float("nan")


def patient_ids(root: str | Path) -> list[int]:
    """All patients of a release, to be dealt out by ``split_patients`` before ``Odir`` reads them.

    Args:
        root: As for ``Odir``.

    Raises:
        ValueError: If the table is not as in the release.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.odir_synthetic import write_synthetic_odir
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_odir(folder, num_patients=30, image_size=16)
        ...     patient_ids(root)[:3]
        [0, 80, 128]
    """
    return [patient.id for patient in read_patients(find_table(root))]


class Odir(Dataset[dict[str, Any]]):
    """Read patients of ODIR-5K, real or synthetic, as complete or incomplete samples.

    An item is ``{"inputs": {"left": ..., "right": ..., "table": ...}, "labels": ...,
    "sample_ids": int}``. Labels are the patient's (columns N to O), never those of a single eye,
    which contradict them; keywords, which contain the diagnosis, are not read. An eye without a
    photo is None: in the csv one without a row, in the xlsx one without a name. Every photo is
    decoded here, once, as by ``Derm7pt``, and kept as uint8 (``6*H*W`` bytes a patient).

    Args:
        root: The folder of ``full_df.csv`` or of the original xlsx, or that file itself.
        ids: The patients to read, in this order; None reads all. Deal them out with
            ``split_patients``: the two eyes of a patient belong to one side.
        images: The folder of the photos; None looks for it below the folder of the table.
        image_size: Side of the square photos, or ``(height, width)``.
        placeholder_age: An age that stands for none, a missing cell; None takes all ages.
        transform: Called once per item with the dict of the photos present; returns the same keys.
            See ``random_flips``.
        on_broken: ``"raise"``, or ``"missing"``: a photo that is named and not there, or
            unreadable, is absent and in ``broken``.

    Attributes:
        names: The modalities: ``left``, ``right``, ``table``.
        labels: Of every patient, as one tensor; ``sample_ids`` likewise.
        present: ``(num_patients, 3)`` bool, columns as ``names``.
        broken: The photos that could not be read.
        class_names: The labels in order; ``class_counts`` belongs to it.
        num_classes: 8.
        feature_names: The columns of ``table``.
        shapes: Shape of each modality, as ``presence.collate`` takes it.
        is_synthetic: True where the release was written by ``write_synthetic_odir``.

    Shape:
        - ``left``, ``right``: ``(3, H, W)``, 0..1
        - ``table``: ``(3,)``: age in decades from 60, and the sex, one-hot; NaN where missing
        - ``labels``: ``(8,)``, 0.0 or 1.0
        - ``sample_ids``: the ID of the patient

    Raises:
        ValueError: If an argument, the table or a photo is not as the release has it; the message
            names the file, row, column and value.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.odir_synthetic import write_synthetic_odir
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_odir(folder, num_patients=30, image_size=32)
        ...     patients = Odir(root, image_size=32)
        >>> patients[0]["inputs"]["left"].shape, patients.feature_names
        (torch.Size([3, 32, 32]), ('age', 'sex=Female', 'sex=Male'))
        >>> patients.class_names[:4], patients.is_synthetic
        (('normal', 'diabetes', 'glaucoma', 'cataract'), True)

    References:
        Peking University International Competition on Ocular Disease Intelligent Recognition
        (ODIR-2019), odir2019.grand-challenge.org.
    """

    names = (*EYES, "table")
    class_names = tuple(LABELS.values())
    num_classes = len(LABELS)
    feature_names = ("age", *(f"sex={sex}" for sex in SEXES))

    def __init__(
        self,
        root: str | Path,
        ids: Sequence[int] | None = None,
        *,
        images: str | Path | None = None,
        image_size: int | tuple[int, int] = 224,
        placeholder_age: int | None = 1,
        transform: Callable[[Photos], Photos] | None = None,
        on_broken: Literal["raise", "missing"] = "raise",
    ) -> None:
        check_choice("on_broken", on_broken, ("raise", "missing"))
        self.image_size = check_size(image_size)
        self.transform, self.placeholder_age = transform, placeholder_age
        table = find_table(root)
        self.is_synthetic = (table.parent / MARKER).is_file()
        patients = {patient.id: patient for patient in read_patients(table)}
        ids = list(patients) if ids is None else ids
        if unknown := sorted({*ids} - {*patients}):
            raise ValueError(
                f"ids has {unknown[:5]} ({len(unknown)} in all), which {table} has not: ids are of "
                "patients in the table. Take them from patient_ids(root)."
            )
        files = [file for patient in patients.values() for file in patient.photos if file]
        self.images = find_images(table.parent, files, images)
        chosen = [patients[number] for number in ids]
        self.sample_ids = torch.tensor([each.id for each in chosen], dtype=torch.int64)
        self.labels = torch.tensor([each.labels for each in chosen]).float().reshape(-1, 8)
        self.class_counts = self.labels.sum(0).long()
        self.table = torch.tensor([cells_of(each, placeholder_age) for each in chosen]).reshape(
            -1, 3
        )
        photo = (3, *self.image_size)
        self.shapes = {"left": photo, "right": photo, "table": (len(self.feature_names),)}
        self._set_photos(chosen)
        if self.broken and on_broken == "raise":
            row, column, file, reason = self.broken[0]
            raise ValueError(
                f"{table} row {row}, column {column!r}, file {file!r} {reason}: every photo that "
                f"the table names is readable (broken here: {len(self.broken)}). Restore "
                f"{self.images} from the release, or pass on_broken='missing' to have such photos "
                "absent."
            )

    def _set_photos(self, patients: Sequence[Patient]) -> None:
        files = [patient.photos for patient in patients]
        self.photos, reasons = read_photos(self.images, files, self.image_size)
        here = [[file is not None for file in pair] for pair in files]
        for case, photo in reasons:
            here[case][photo] = False
        table = ~self.table.isnan().all(dim=1, keepdim=True)
        self.present = torch.cat(
            [torch.tensor(here, dtype=torch.bool).reshape(-1, 2), table], dim=1
        )
        self.broken = tuple(
            BrokenPhoto(patients[case].row, self.names[photo], files[case][photo] or "", reason)
            for (case, photo), reason in reasons.items()
        )

    def reading(self) -> Reading:
        """What it takes to read new patients as these."""
        ids = {str(number): str(number) for number in self.sample_ids.tolist()}
        coding = {"placeholder_age": self.placeholder_age}
        about = (self.names, self.shapes, self.class_names, self.feature_names)
        return Reading(*about, ids, coding, self.is_synthetic)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photos = {
            eye: photo.float() / 255
            for eye, photo, here in zip(EYES, self.photos[index], self.present[index], strict=False)
            if here
        }
        photos = transformed(photos, self.transform)
        inputs: dict[str, Tensor | None] = {eye: photos.get(eye) for eye in EYES}
        return {
            "inputs": inputs | {"table": self.table[index]},
            "labels": self.labels[index],
            "sample_ids": int(self.sample_ids[index]),
        }


def cells_of(patient: Patient, placeholder_age: int | None) -> list[float]:
    """Age and sex as numbers; fixed units, so that no statistics of a split are needed.

    Example:
        >>> cells_of(Patient(7, 0, 70, "Male", (), ()), placeholder_age=1)
        [1.0, 0.0, 1.0]
    """
    age = NAN if patient.age in (None, placeholder_age) else (patient.age - 60) / 10
    return [age, *(float(patient.sex == sex) if patient.sex else NAN for sex in SEXES)]
