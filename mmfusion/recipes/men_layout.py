"""Where a cohort keeps what: the columns of its table, and the files of a patient."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

KINDS: dict[str, type] = {"volumes": dict, "classes": dict}
KINDS |= {name: list for name in ("categorical", "numeric", "tumour_labels", "box")}


@dataclass(frozen=True)
class Layout:
    """Where a cohort keeps what: columns of its table, and files of a patient.

    A file is named by a pattern or by a column. A pattern holds columns in braces and may hold
    ``*``, as in ``"volumes/{patient_id}/ce_t1.nii*"``; a patient without such a file lacks the
    modality. A column holds paths; a blank cell lacks the modality. Paths are relative to the root.

    Args:
        volumes: Modality -> pattern or column.
        classes: Cell of the label column -> class; classes are numbered in this order. Subtypes
            share what stands before an underscore.
        table: CSV, Parquet or xlsx, relative to the root.
        patient_id: Column; each patient once.
        label: Column.
        categorical: Columns that become one-hot blocks.
        numeric: Columns that are standardised.
        tumour: Pattern or column of a label map, whose box is cut out; "" for none.
        tumour_labels: Labels of that map that are tumour; empty takes all but 0.
        box: Six columns with a tumour box instead: lowest x, y, z and highest x, y, z, in mm, RAS+.

    Raises:
        ValueError: If there is no volume or class, a name is used twice, or ``box`` is not of six
            columns.

    Example:
        >>> layout = Layout({"t1": "{id}/*-t1.nii.gz"}, {"1": "grade1", "2": "grade2"}, label="who")
        >>> layout.names
        ('t1',)
    """

    volumes: Mapping[str, str]
    classes: Mapping[str, str]
    table: str = "table.csv"
    patient_id: str = "patient_id"
    label: str = "label"
    categorical: Sequence[str] = ()
    numeric: Sequence[str] = ()
    tumour: str = ""
    tumour_labels: Sequence[int] = ()
    box: Sequence[str] = ()

    def __post_init__(self) -> None:
        columns = [self.patient_id, self.label, *self.categorical, *self.numeric]
        twice = sorted({c for c in columns if columns.count(c) > 1} | {*self.volumes} & {"table"})
        if twice or not self.volumes or not self.classes or len(self.box) not in (0, 6):
            raise ValueError(
                f"volumes={dict(self.volumes)}, classes={dict(self.classes)}, box={self.box}, used "
                f"twice: {twice}: a layout names a volume and a class, uses a column once, keeps "
                "'table' for the table, and a box has six columns. Correct the layout."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities: the volumes, then ``table`` where it has columns."""
        return (*self.volumes, *(["table"] if [*self.categorical, *self.numeric] else []))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Layout":
        """Read a layout from a TOML file, whose keys are the arguments.

        Raises:
            ValueError: If the file is no TOML, or a key or the type of a value is not as above.

        Example:
            >>> import tempfile
            >>> text = '''
            ... table = "clinic.xlsx"
            ... patient_id = "ID"
            ... label = "WHO"
            ... numeric = ["age"]
            ... [volumes]
            ... ce_t1 = "{ID}/t1*.nii.gz"
            ... adc = "path_of_adc"
            ... [classes]
            ... 1 = "grade1"
            ... 2 = "grade2"
            ... '''
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder, "cohort.toml")
            ...     _ = path.write_text(text)
            ...     Layout.from_toml(path).names
            ('ce_t1', 'adc', 'table')
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(
                f"{path}: {error}: a layout is a TOML file in UTF-8. Correct it."
            ) from None
        known = [f.name for f in fields(cls)]
        wrong = [f"{key} = {content[key]!r}" for key in content if key not in known]
        wrong += [f"{k} = {v!r}" for k, v in content.items() if k in known and not _fits(k, v)]
        wrong += [f"no {key}" for key in ("volumes", "classes") if key not in content]
        if wrong:
            raise ValueError(
                f"{path}: {', '.join(wrong)}: a layout has {', '.join(known)}; volumes and classes "
                "are tables of strings and needed, tumour_labels is a list of integers, and the "
                "rest as in mmfusion.recipes.men_layout.Layout. Correct the file."
            )
        return cls(**content)


def _fits(key: str, value: Any) -> bool:
    """Whether TOML gave the type that ``Layout`` wants; a string counts as its characters."""
    outer = KINDS.get(key, str)
    inner = int if key == "tumour_labels" else str
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, outer) and all(isinstance(item, inner) for item in items)


MEN_LAYOUT = Layout(
    volumes={
        name: f"volumes/{{patient_id}}/{name}.nii*" for name in ("ce_t1", "ce_t2_flair", "adc")
    },
    classes={name: name for name in ("grade1", "grade2_invasive", "grade2_noninvasive")},
    categorical=("location", "sex"),
    numeric=("age", "adc_value", "tumour_area", "oedema_area"),
    tumour="volumes/{patient_id}/tumour.nii*",
)
# BraTS meningioma, with a table of grades that its user adds; oedema (label 2) is no tumour.
BRATS_LAYOUT = Layout(
    volumes={name: f"{{patient_id}}/*-{name}.nii.gz" for name in ("t1n", "t1c", "t2w", "t2f")},
    classes={"1": "grade1", "2": "grade2", "3": "grade3"},
    label="grade",
    tumour="{patient_id}/*-seg.nii.gz",
    tumour_labels=(1, 3),
)
