"""The reader of Derm7pt: a clinical photo, a dermoscopic photo and a short table per case.

The images belong to their owners (derm.cs.sfu.ca) and are never part of this package.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfusion.recipes.derm7pt_format import (
    CRITERIA,
    GROUPS,
    INPUTS,
    SPLITS,
    VALUES,
    find_release,
    read_splits,
    read_table,
)
from mmfusion.recipes.images import (
    BrokenPhoto,
    check_choice,
    check_size,
    read_photos,
    transformed,
)
from mmfusion.recipes.images import random_flips as random_flips
from mmfusion.recipes.reading import Reading
from mmfusion.recipes.synthetic import MARKER

PHOTOS = ("clinic", "derm")


class Derm7pt(Dataset[dict[str, Any]]):
    """Read one split of Derm7pt, real or synthetic, as complete or incomplete samples.

    An item is ``{"inputs": {"clinic": ..., "derm": ..., "meta": ...}, "labels": ...,
    "sample_ids": int}``. An absent photo is None; a clinical photo is absent where the row repeats
    the dermoscopic one (``clinic == derm``). A blank cell of the table is NaN in its one-hot block.
    Every photo is decoded here, once: cut to the largest centred box of the wanted aspect ratio,
    scaled with antialiasing, kept as uint8 (``6*H*W`` bytes a case). No item touches the disk.

    Args:
        root: ``release_v0`` or the folder that holds it.
        split: ``"train"``, ``"valid"`` or ``"test"``, as the release divides the cases.
        target: ``"diagnosis5"`` (BCC, NEV, MEL, MISC, SK), ``"diagnosis2"`` (NEV, MEL; all other
            cases are left out) or ``"criteria"`` (seven tasks, in the order of ``tasks``).
        columns: ``"safe"``: elevation, location and sex. ``"paper"`` adds two that leak the label:
            difficulty, judged after looking, and management, which follows the diagnosis.
        image_size: Side of the square photos, or ``(height, width)``; ``(224, 336)`` cuts nothing
            off a photo of 768 x 512.
        transform: Called once per item with the dict of the photos present, so that what it draws
            holds for both; returns the same keys. See ``random_flips``.
        on_broken: ``"raise"``, or ``"missing"``: an unreadable photo is absent and in ``broken``.

    Attributes:
        names: The modalities: ``clinic``, ``derm``, ``meta``.
        labels: Of every case, as one tensor; ``sample_ids`` likewise, and ``case_nums`` as text.
        present: ``(num_cases, 3)`` bool, columns as ``names``.
        broken: The photos that could not be read.
        tasks: Label column -> its classes.
        class_names: All classes in the order of the logits; ``class_counts`` belongs to it.
        num_classes: Width of the logits: 5, 2, or 19 for the criteria.
        feature_names: The columns of ``meta``.
        shapes: Shape of each modality, as ``presence.collate`` takes it.
        is_synthetic: True where the release was written by ``write_synthetic_release``.

    Shape:
        - ``clinic``, ``derm``: ``(3, H, W)``, 0..1; ``meta``: ``(F,)``, F = 14 safe or 20 paper
        - ``labels``: an int; with ``target="criteria"`` ``(7,)``, int64
        - ``sample_ids``: 0-based row of meta.csv, the same in every split and target

    Raises:
        ValueError: If an argument, the tree, a header, a cell, the splits or a photo is not as the
            release has it; the message names the file, row, column and value.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_release(folder, num_cases=30)
        ...     cases = Derm7pt(root, "test", image_size=32)
        >>> cases[0]["inputs"]["derm"].shape, cases[0]["inputs"]["meta"].sum()
        (torch.Size([3, 32, 32]), tensor(3.))
        >>> cases.class_names, cases.is_synthetic
        (('BCC', 'NEV', 'MEL', 'MISC', 'SK'), True)

    References:
        Kawahara et al., "Seven-point checklist and skin lesion classification using multitask
        multimodal neural nets", IEEE J. Biomed. Health Inform. 23(2), 2019.
    """

    names = ("clinic", "derm", "meta")

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "valid", "test"],
        *,
        target: Literal["diagnosis5", "diagnosis2", "criteria"] = "diagnosis5",
        columns: Literal["safe", "paper"] = "safe",
        image_size: int | tuple[int, int] = 224,
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        on_broken: Literal["raise", "missing"] = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("target", target, ("diagnosis5", "diagnosis2", "criteria"))
        check_choice("columns", columns, tuple(INPUTS))
        check_choice("on_broken", on_broken, ("raise", "missing"))
        self.image_size = check_size(image_size)
        self.root = find_release(Path(root).expanduser())
        self.is_synthetic = (self.root / MARKER).is_file()
        self.transform = transform
        table = read_table(self.root / "meta" / "meta.csv")
        rows = read_splits(self.root / "meta", len(table))[split]
        if target == "diagnosis2":
            rows = [i for i in rows if GROUPS["diagnosis"][table[i]["diagnosis"]] in ("NEV", "MEL")]
        self.sample_ids = torch.tensor(rows)
        self.case_nums = tuple(table[i]["case_num"] for i in rows)
        self._set_labels([table[i] for i in rows], target)
        self._set_meta([table[i] for i in rows], INPUTS[columns])
        self._set_photos(table, rows)
        if self.broken and on_broken == "raise":
            row, column, file, reason = self.broken[0]
            raise ValueError(
                f"meta.csv row {row} (case_num {table[row]['case_num']}), column {column!r}, file "
                f"{file!r} {reason}: every photo that meta.csv names is readable (broken in this "
                f"split: {len(self.broken)}). Restore images/ from the release, or pass "
                "on_broken='missing' to have such photos absent."
            )

    def _set_labels(self, table: Sequence[dict[str, str]], target: str) -> None:
        tasks = CRITERIA if target == "criteria" else ("diagnosis",)
        self.tasks = {task: tuple(dict.fromkeys(GROUPS[task].values())) for task in tasks}
        if target == "diagnosis2":
            self.tasks = {"diagnosis": ("NEV", "MEL")}
        codes = [[self.tasks[t].index(GROUPS[t][row[t]]) for t in tasks] for row in table]
        labels = torch.tensor(codes, dtype=torch.int64).reshape(-1, len(tasks))
        self.labels = labels if target == "criteria" else labels[:, 0]
        self.class_names = tuple(
            f"{task}={name}" if target == "criteria" else name
            for task, classes in self.tasks.items()
            for name in classes
        )
        self.num_classes = len(self.class_names)
        counts = [labels[:, i].bincount(minlength=len(self.tasks[t])) for i, t in enumerate(tasks)]
        self.class_counts = torch.cat(counts)

    def _set_meta(self, table: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
        features = [(column, value) for column in columns for value in VALUES[column]]
        self.feature_names = tuple(f"{column}={value}" for column, value in features)
        cells = [[float(r[c] == v) if r[c] else float("nan") for c, v in features] for r in table]
        self.meta = torch.tensor(cells).reshape(-1, len(features))
        photo = (3, *self.image_size)
        self.shapes = {"clinic": photo, "derm": photo, "meta": (len(features),)}

    def _set_photos(self, table: Sequence[dict[str, str]], rows: Sequence[int]) -> None:
        self.present = torch.ones(len(rows), 3, dtype=torch.bool)
        self.present[:, 0] = torch.tensor([table[i]["clinic"] != table[i]["derm"] for i in rows])
        self.present[:, 2] = ~self.meta.isnan().all(dim=1)
        files = [
            [table[i][name] if here else None for name, here in zip(PHOTOS, seen, strict=False)]
            for i, seen in zip(rows, self.present.tolist(), strict=True)
        ]
        self.photos, reasons = read_photos(self.root / "images", files, self.image_size)
        self.broken = tuple(
            BrokenPhoto(rows[case], PHOTOS[photo], table[rows[case]][PHOTOS[photo]], reason)
            for (case, photo), reason in reasons.items()
        )
        for case, photo in reasons:
            self.present[case, photo] = False

    def reading(self) -> Reading:
        """What it takes to read new cases as these."""
        ids = dict(zip(map(str, self.sample_ids.tolist()), self.case_nums, strict=True))
        classes = self.tasks if len(self.tasks) > 1 else self.class_names
        about = (self.names, self.shapes, classes, self.feature_names)
        return Reading(*about, ids, {}, self.is_synthetic)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        here = [i for i in range(len(PHOTOS)) if self.present[index, i]]
        photos = {PHOTOS[i]: self.photos[index, i].float() / 255 for i in here}
        photos = transformed(photos, self.transform)
        inputs = {name: photos.get(name) for name in PHOTOS} | {"meta": self.meta[index]}
        labels = self.labels[index]
        return {
            "inputs": inputs,
            "labels": labels if labels.dim() else int(labels),
            "sample_ids": int(self.sample_ids[index]),
        }
