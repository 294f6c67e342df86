"""A reader for data of your own: a table, and photos, volumes and vectors in files.

A TOML file says where everything is, so that nothing has to be programmed; see ``custom_layout``.
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
from mmfusion.recipes.custom_files import read_modality, width_of
from mmfusion.recipes.custom_layout import Case, CustomLayout, check_groups, deal, read_cases
from mmfusion.recipes.images import check_choice, check_size, transformed
from mmfusion.recipes.men_table import SPLITS, check_split
from mmfusion.recipes.men_volumes import Broken
from mmfusion.recipes.reading import Reading
from mmfusion.recipes.synthetic import MARKER
from mmfusion.recipes.volume_inputs import Size, check_settings


class Custom(Dataset[dict[str, Any]]):
    """Read one split of a data set that a TOML file describes, as complete or incomplete samples.

    An item is ``{"inputs": {modality: tensor or None}, "labels": int, "sample_ids": int}``; a blank
    cell of a table is NaN. All files are read here, once, and kept in memory. A volume is taken
    whole, resampled, and z-scored over its non-zero voxels; a vector is taken as it is. Categories
    and the mean and spread of numbers come from the training rows.

    Args:
        toml: The layout; paths in it are relative to its folder.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        splits: Split -> ids of its cases; None asks ``custom_layout.deal``.
        image_size: Side of the square photos, or ``(height, width)``.
        volume_size: Voxels along x, y and z.
        transform: Called once per item with the dict of the photos and volumes present; returns the
            same keys. What it draws holds for all of them.
        on_broken: ``"raise"``, or ``"missing"``: what cannot be read is absent and in ``broken``.

    Attributes:
        layout: The layout.
        names: The modalities: photos, volumes, vectors, tables.
        ids: Of every case; ``sample_ids`` are their rows of the table.
        labels: Of every case, as one tensor.
        present: ``(num_cases, M)`` bool, columns as ``names``.
        broken: The files and cells that could not be read.
        class_names: In the order of the logits; ``class_counts`` belongs to it.
        num_classes: Width of the logits.
        feature_names: Table -> its columns.
        shapes: Shape of each modality, as ``presence.collate`` takes it.
        is_synthetic: True where the data were written by ``write_synthetic_custom``.

    Shape:
        - photos: ``(3, H, W)``, 0..1; volumes: ``(1, X, Y, Z)``; vectors, tables: ``(F,)``

    Raises:
        ValueError: If an argument, the layout, the table, the splits, a cell or a file is not as it
            should be; the message names it.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.custom_synthetic import write_synthetic_custom
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     toml = write_synthetic_custom(folder, num_cases=40)
        ...     cases = Custom(toml, "valid", image_size=16, volume_size=(8, 8, 8))
        >>> cases.shapes
        {'photo': (3, 16, 16), 'scan': (1, 8, 8, 8), 'signal': (32,), 'clinic': (4,)}
    """

    def __init__(
        self,
        toml: str | Path,
        split: Literal["train", "valid", "test"],
        *,
        splits: Mapping[str, Sequence[str]] | None = None,
        image_size: int | tuple[int, int] = 224,
        volume_size: Size = (128, 128, 24),
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        on_broken: Literal["raise", "missing"] = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("on_broken", on_broken, ("raise", "missing"))
        check_settings(volume_size, None)
        self.image_size, self.volume_size = check_size(image_size), volume_size
        self.transform = transform
        toml = Path(toml).expanduser().resolve()
        self.root, self.layout = toml.parent, CustomLayout.from_toml(toml)
        self.is_synthetic = (self.root / MARKER).is_file()
        cases = read_cases(self.root, self.layout)
        splits = deal(cases) if splits is None else splits
        self.names = self.layout.names
        self.class_names = tuple(dict.fromkeys(self.layout.classes.values()))
        self.num_classes = len(self.class_names)
        cure = "Correct it, or split anew with mmfusion.recipes.custom_layout.deal(cases, seed)"
        check_split(splits, {case.id: case.label for case in cases}, self.class_names, cure)
        check_groups(cases, {case: name for name in splits for case in splits[name]})
        rows = {case.id: row for row, case in enumerate(cases)}
        chosen = {name: sorted(rows[case] for case in splits[name]) for name in splits}
        self.cases = [cases[row] for row in chosen[split]]
        self.ids = tuple(case.id for case in self.cases)
        self.sample_ids = torch.tensor(chosen[split])
        self.labels = torch.tensor([self.class_names.index(case.label) for case in self.cases])
        self.class_counts = self.labels.bincount(minlength=self.num_classes)
        self.shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(self.layout.photos, (3, *self.image_size)),
            **dict.fromkeys(self.layout.volumes, (1, *volume_size)),
            **{name: (width_of(name, cases),) for name in self.layout.vectors},
        }
        self._set_tables([cases[row] for row in chosen["train"]])
        self._set_files()
        if self.broken and on_broken == "raise":
            first = self.broken[0]
            raise ValueError(
                f"case {first.patient_id}, {first.column}={first.value!r}: {first.reason} (broken "
                f"in this split: {len(self.broken)}): what a table names can be read. Restore it, "
                "leave it out, or pass on_broken='missing' to have it absent."
            )

    def _set_tables(self, train: Sequence[Case]) -> None:
        self.tables: dict[str, Tensor] = {}
        self.codings: dict[str, TableCoding] = {}
        self.feature_names: dict[str, tuple[str, ...]] = {}
        self.broken: tuple[Broken, ...] = ()
        for name, columns in self.layout.tables.items():
            coding = self.codings[name] = TableCoding([case.cells for case in train], **columns)
            coded = [coding.encode(case.cells) for case in self.cases]
            self.tables[name] = torch.stack([values for values, _ in coded])
            self.feature_names[name] = coding.feature_names
            self.shapes[name] = (len(coding.feature_names),)
            for case, (_, bad) in zip(self.cases, coded, strict=True):
                self.broken += tuple(Broken(case.id, *cell) for cell in bad)

    def _set_files(self) -> None:
        with ThreadPoolExecutor() as pool:  # decoding and resampling release the GIL
            results = list(pool.map(self._load, self.cases))
        self.values = [values for values, _ in results]
        self.broken += tuple(broken for _, found in results for broken in found)
        here = [[name in values for name in self.layout.files] for values in self.values]
        known = [~table.isnan().all(1, keepdim=True) for table in self.tables.values()]
        files = torch.tensor(here, dtype=torch.bool).reshape(len(here), -1)
        self.present = torch.cat([files, *known], dim=1)

    def _load(self, case: Case) -> tuple[dict[str, Tensor], list[Broken]]:
        """The files of a case, and what is broken of them."""
        values, broken = {}, []
        for name, file in case.files.items():
            try:
                shape = self.shapes[name]
                values[name] = read_modality(self.root, file, name, self.layout, shape)
            except ValueError as error:
                broken.append(Broken(case.id, name, str(file), str(error)))
        return values, broken

    def reading(self) -> Reading:
        """What it takes to read new cases as these."""
        kept = {name: coding.kept() for name, coding in self.codings.items()}
        return Reading(
            self.names,
            self.shapes,
            self.class_names,
            self.feature_names,
            dict(zip(map(str, self.sample_ids.tolist()), self.ids, strict=True)),
            {"layout": asdict(self.layout), "tables": kept},
            self.is_synthetic,
        )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = dict(self.values[index])
        values |= {name: table[index] for name, table in self.tables.items()}
        for name in self.layout.photos:
            if name in values:
                values[name] = values[name].float() / 255
        images = (*self.layout.photos, *self.layout.volumes)
        shown = {name: values[name] for name in images if name in values}
        values |= transformed(shown, self.transform)
        return {
            "inputs": {name: values.get(name) for name in self.names},
            "labels": int(self.labels[index]),
            "sample_ids": int(self.sample_ids[index]),
        }
