"""The reader of a meningioma cohort (or one like it): volumes of a few sequences and a table.

The MEN cohort of the CMML paper is private and its files are described nowhere, so the layout is
our design; another one is a small TOML file away, and BraTS meningioma comes ready.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfusion.recipes.cells import TableCoding
from mmfusion.recipes.images import check_choice, transformed
from mmfusion.recipes.men_layout import MEN_LAYOUT, Layout
from mmfusion.recipes.men_table import SPLITS, Patient, check_split, read_patients, read_split
from mmfusion.recipes.men_volumes import Broken, VolumeReader, value_of
from mmfusion.recipes.reading import Reading
from mmfusion.recipes.synthetic import MARKER
from mmfusion.recipes.volume_inputs import Size, check_settings


class Men(Dataset[dict[str, Any]]):
    """Read one split of a cohort, real or synthetic, as complete or incomplete samples.

    An item is ``{"inputs": {"ce_t1": ..., "ce_t2_flair": ..., "adc": ..., "table": ...},
    "labels": int, "sample_ids": int}``; an absent modality is None, a blank cell NaN. Every volume
    is read here, once: cut to the box of the tumour, the same in millimetres for all volumes of a
    patient, resampled, clipped, z-scored over its non-zero voxels. Without a label map or a box in
    the table the middle of the first volume is taken (see ``uncut``).

    Args:
        root: The folder of the cohort.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        splits: Which ``splits/<n>.csv`` deals out the patients; or split -> their ids, as
            ``splits.split_patients`` and ``splits.folds`` give it.
        layout: Where the cohort keeps what: ``MEN_LAYOUT``, ``BRATS_LAYOUT``, your own, or the path
            of a TOML file.
        target: ``"subtype"``: the classes of the layout; ``"grade"``: what their names hold before
            an underscore, so that both kinds of grade 2 are one class.
        size: Voxels along x, y and z.
        clip: Lowest and highest value, in the units of the files; None clips to percentiles.
        margin: Added to the tumour box on every side, mm.
        cache: Folder for prepared volumes, so that the next run reads them in no time; None keeps
            them in memory (``4*X*Y*Z`` bytes each, 1.6 MB at the default size).
        transform: Called once per item with the dict of the volumes present, so that what it draws
            holds for all; returns the same keys. See ``volume_inputs``.
        on_broken: ``"raise"``, or ``"missing"``: what cannot be read is absent and in ``broken``.

    Attributes:
        names: The modalities: volumes as the layout names them, then ``table``.
        patient_ids: Of every case; ``sample_ids`` are their rows of the table.
        labels: Of every case, as one tensor.
        present: ``(num_patients, M)`` bool, columns as ``names``.
        broken: The files and cells that could not be read.
        uncut: Patients whose box is not of a tumour, for want of a label map.
        tasks: Label column -> its classes.
        class_names: In the order of the logits; ``class_counts`` belongs to it.
        num_classes: Width of the logits.
        feature_names: The columns of ``table``.
        shapes: Shape of each modality, as ``presence.collate`` takes it.
        is_synthetic: True where the cohort was written by ``write_synthetic_men``.

    Shape:
        - volumes: ``(1, X, Y, Z)``, axes to the right, to the front, up; ``table``: ``(F,)``

    Raises:
        ValueError: If an argument, the table, the splits, a cell or a file is not as it should be;
            the message names it.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.men_synthetic import write_synthetic_men
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_men(folder, num_patients=30, shape=(12, 12, 8))
        ...     cases = Men(root, "valid", size=(16, 16, 8))
        >>> cases.names, cases.class_names
        (('ce_t1', 'ce_t2_flair', 'adc', 'table'), ('grade1', 'grade2_invasive', 'grade2_noninvasive'))
        >>> cases.shapes["adc"], cases[0]["inputs"]["table"].shape
        ((1, 16, 16, 8), torch.Size([9]))
    """  # noqa: E501  one result a line

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "valid", "test"],
        *,
        splits: int | Mapping[str, Sequence[str]] = 0,
        layout: Layout | str | Path = MEN_LAYOUT,
        target: Literal["subtype", "grade"] = "subtype",
        size: Size = (128, 128, 24),
        clip: tuple[float, float] | None = None,
        margin: float = 5.0,
        cache: str | Path | None = None,
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        on_broken: Literal["raise", "missing"] = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("target", target, ("subtype", "grade"))
        check_choice("on_broken", on_broken, ("raise", "missing"))
        check_settings(size, clip)
        self.root, self.size, self.clip, self.margin = Path(root).expanduser(), size, clip, margin
        self.layout = layout if isinstance(layout, Layout) else Layout.from_toml(layout)
        self.cache = None if cache is None else Path(cache).expanduser()
        self.transform = transform
        self.is_synthetic = (self.root / MARKER).is_file()
        patients = read_patients(self.root, self.layout)
        if isinstance(splits, int):
            splits = read_split(self.root / "splits" / f"{splits}.csv")
        names = {name: name for name in self.layout.classes.values()}
        if target == "grade":
            names = {name: name.partition("_")[0] for name in names}
        labels = {patient.patient_id: names[patient.label] for patient in patients}
        self.class_names = tuple(dict.fromkeys(names.values()))
        self.num_classes = len(self.class_names)
        self.tasks = {self.layout.label: self.class_names}
        check_split(splits, labels, self.class_names)
        rows = {patient.patient_id: row for row, patient in enumerate(patients)}
        chosen = {name: sorted(rows[patient] for patient in splits[name]) for name in splits}
        self.patients = [patients[row] for row in chosen[split]]
        self.patient_ids = tuple(patient.patient_id for patient in self.patients)
        self.sample_ids = torch.tensor(chosen[split])
        self.names = self.layout.names
        codes = [self.class_names.index(labels[patient]) for patient in self.patient_ids]
        self.labels = torch.tensor(codes)
        self.class_counts = self.labels.bincount(minlength=self.num_classes)
        self._set_table([patients[row] for row in chosen["train"]])
        self._set_volumes()
        if self.broken and on_broken == "raise":
            first = self.broken[0]
            raise ValueError(
                f"patient {first.patient_id}, {first.column}={first.value!r}: {first.reason} "
                f"(broken in this split: {len(self.broken)}): what a cohort names can be read. "
                "Restore it, leave it out, or pass on_broken='missing' to have it absent."
            )

    def _set_table(self, train: Sequence[Patient]) -> None:
        self.coding = coding = TableCoding(
            [patient.cells for patient in train],
            categorical=self.layout.categorical,
            numeric=self.layout.numeric,
        )
        self.feature_names = coding.feature_names
        coded = [coding.encode(patient.cells) for patient in self.patients]
        self.table = torch.stack([values for values, _ in coded])
        self.broken = tuple(
            Broken(patient.patient_id, *cell)
            for patient, (_, bad) in zip(self.patients, coded, strict=True)
            for cell in bad
        )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shapes |= {name: (1, *self.size) for name in self.layout.volumes}
        self.shapes |= {"table": (len(self.feature_names),)} if "table" in self.names else {}

    def _set_volumes(self) -> None:
        load = VolumeReader(self.layout, self.size, self.clip, self.margin, self.cache)
        with ThreadPoolExecutor() as pool:  # decompressing and resampling release the GIL
            results = list(pool.map(load, self.patients))
        self.volumes = [volumes for volumes, _ in results]
        self.broken += tuple(broken for _, found in results for broken in found)
        lost = {broken.patient_id for broken in self.broken if broken.column == "tumour"}
        self.uncut = tuple(
            patient.patient_id
            for patient in self.patients
            if patient.files
            and patient.box is None
            and (patient.tumour is None or patient.patient_id in lost)
        )
        here = [[name in volumes for name in self.layout.volumes] for volumes in self.volumes]
        self.present = torch.tensor(here)
        if "table" in self.names:
            known = ~self.table.isnan().all(1, keepdim=True)
            self.present = torch.cat([self.present, known], dim=1)

    def reading(self) -> Reading:
        """What it takes to read new patients as these."""
        about = {"layout": asdict(self.layout), "table": self.coding.kept()}
        return Reading(
            self.names,
            self.shapes,
            self.class_names,
            self.feature_names,
            dict(zip(map(str, self.sample_ids.tolist()), self.patient_ids, strict=True)),
            about | {"clip": self.clip, "margin": self.margin},
            self.is_synthetic,
        )

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> dict[str, Any]:
        volumes = {name: value_of(volume) for name, volume in self.volumes[index].items()}
        volumes = transformed(volumes, self.transform)
        values = volumes | {"table": self.table[index]}
        return {
            "inputs": {name: values.get(name) for name in self.names},
            "labels": int(self.labels[index]),
            "sample_ids": int(self.sample_ids[index]),
        }
