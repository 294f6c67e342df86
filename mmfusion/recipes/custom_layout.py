"""Where a data set of your own keeps what: a TOML file, the cases it leads to, and their splits."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from mmfusion.recipes.men_table import SPLITS, read_table
from mmfusion.recipes.named_files import claimed_twice, find_file
from mmfusion.recipes.splits import split_patients

Names = Mapping[str, str]
TABLES, PARTS = ("classes", "photos", "volumes", "vectors", "tables"), ("categorical", "numeric")


class Case(NamedTuple):
    """One row of the table, and the files that belong to it.

    Attributes:
        id: As the table spells it.
        label: The class.
        group: Cases of one group, such as a patient, are in one split.
        split: ``"train"``, ``"valid"``, ``"test"``, or blank.
        cells: Input columns -> cell, blank where the table is.
        files: Modality -> file; without those that the case lacks.
    """

    id: str
    label: str
    group: str
    split: str
    cells: dict[str, str]
    files: dict[str, Path]


@dataclass(frozen=True)
class CustomLayout:
    """Where a data set keeps what: columns of its table, and files of a case.

    A file is named by a pattern or by a column. A pattern holds columns in braces and may hold
    ``*``, as in ``"photos/{id}_*.jpg"``; a case without such a file, or with a blank cell in
    such a column, lacks the modality. A column holds paths; a blank cell lacks the modality. Paths
    are relative to the folder of the TOML file.

    Args:
        label: Column of the class.
        classes: Cell of that column -> class; classes are numbered in this order.
        table: CSV, Parquet or xlsx.
        id: Column; each case once.
        group: Column of what must not be split, such as the patient; "" for the case itself.
        split: Column that deals out the cases (train, valid, test); "" to draw a split.
        photos: Modality -> pattern or column of images.
        volumes: Modality -> pattern or column of NIfTI files.
        vectors: Modality -> pattern or column of ``.npy`` files, one vector each.
        tables: Modality -> ``{"categorical": columns, "numeric": columns}``.

    Raises:
        ValueError: If there is no modality or class, or a modality or column is used twice.

    Example:
        >>> layout = CustomLayout("y", {"0": "no", "1": "yes"}, photos={"skin": "{id}.jpg"})
        >>> layout.names
        ('skin',)
    """

    label: str
    classes: Names
    table: str = "table.csv"
    id: str = "id"
    group: str = ""
    split: str = ""
    photos: Names = field(default_factory=dict)
    volumes: Names = field(default_factory=dict)
    vectors: Names = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = [self.id, self.label, self.split, *self.cells]
        used = [*filter(None, columns), *self.names]
        twice = sorted({name for name in used if used.count(name) > 1})
        twice += [self.group] if self.group in (self.label, self.split, *self.cells) else []
        if any(twice) or not self.names or not self.classes:
            raise ValueError(
                f"modalities={self.names}, classes={dict(self.classes)}, used twice: {twice}: a "
                "layout names a modality and a class, and uses each name for one modality or "
                "column. Correct the layout."
            )

    @property
    def files(self) -> dict[str, str]:
        """The modalities that are files: name -> pattern or column."""
        return {**self.photos, **self.volumes, **self.vectors}

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities: photos, volumes, vectors, tables."""
        return (*self.photos, *self.volumes, *self.vectors, *self.tables)

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns that are input."""
        return tuple(c for table in self.tables.values() for part in table.values() for c in part)

    @classmethod
    def from_toml(cls, path: str | Path) -> "CustomLayout":
        """Read a layout from a TOML file, whose keys are the arguments.

        Raises:
            ValueError: If the file is no TOML, or a key or the type of a value is not as above.
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(
                f"{path}: {error}: a layout is a TOML file in UTF-8. Correct it."
            ) from None
        known = [f.name for f in fields(cls)]
        wrong = [f"no {key}" for key in ("label", "classes") if key not in content]
        wrong += [f"{k} = {v!r}" for k, v in content.items() if k not in known or not _fits(k, v)]
        if wrong:
            raise ValueError(
                f"{path}: {', '.join(wrong)}: a layout has {', '.join(known)}; {', '.join(TABLES)} "
                "are tables, each of [tables] holds lists of columns, categorical or numeric, and "
                "all else are strings. Correct the file."
            )
        return cls(**content)


def read_cases(root: Path, layout: CustomLayout) -> list[Case]:
    """Read the table and find the files of every case; none is opened.

    Args:
        root: The folder that paths are relative to.
        layout: Where it keeps what.

    Raises:
        ValueError: If the table is not there or lacks a column, an id is blank or repeated, a label
            or split is unknown, a pattern fits two files or gives one file to two rows, or
            no case has some modality.
    """
    path = root / layout.table
    places = [place for place in layout.files.values() if "{" not in place]
    columns = [layout.id, layout.label, layout.group, layout.split, *layout.cells, *places]
    rows = read_table(path, [*filter(None, columns)], "Correct the table, or the layout.")
    allowed = {layout.label: [*layout.classes]} | (
        {layout.split: [*SPLITS]} if layout.split else {}
    )
    cases: dict[str, Case] = {}
    for position, row in enumerate(rows):
        name = row[layout.id]
        if not name or name in cases:
            raise ValueError(
                f"{path} row {position}: {layout.id}={name!r} is "
                f"{'that of a row before' if name else 'blank'}: each case has an id of its own. "
                "Name the case, or join the rows."
            )
        for column, words in allowed.items():
            if row[column] not in words:
                raise ValueError(
                    f"{path} row {position} ({name}): {column}={row[column]!r}: it is one of "
                    f"{', '.join(words)}. Correct the cell, or the layout."
                )
        found = {of: find_file(root, place, row) for of, place in layout.files.items()}
        cases[name] = Case(
            id=name,
            label=layout.classes[row[layout.label]],
            group=row[layout.group] if layout.group else name,
            split=row[layout.split] if layout.split else "",
            cells={column: row[column] for column in layout.cells},
            files={of: file for of, file in found.items() if file is not None},
        )
    for of, place in layout.files.items():
        files = [case.files.get(of) for case in cases.values()]
        for told in claimed_twice(place, rows, files, layout.id).values():
            raise ValueError(told)
        if not any(of in case.files for case in cases.values()):
            raise ValueError(
                f"root={str(root)!r}: no case has {of!r} by {place!r}: a layout names modalities "
                "that some case has. Correct the pattern or column, or leave the modality out."
            )
    return [*cases.values()]


def deal(cases: Sequence[Case], seed: int = 0) -> dict[str, list[str]]:
    """Split -> ids: as the table says, else 70 % train, 10 % valid and 20 % test of the groups.

    Where all cases of a group are of one class, every split gets its share of every class.

    Args:
        cases: From ``read_cases``.
        seed: Of the draw.

    Raises:
        ValueError: If the table has a group in two splits, or there are too few groups to draw.

    Example:
        >>> cases = [Case(str(i), "a", "b", "", {}, {}) for i in range(10)]
        >>> cases = [case._replace(group=case.id) for case in cases]
        >>> {split: len(ids) for split, ids in deal(cases).items()}
        {'train': 7, 'valid': 1, 'test': 2}
    """
    where = check_groups(cases, {case.id: case.split for case in cases})
    if not any(where.values()):
        labels: dict[str, set[str]] = {}
        for case in cases:
            labels.setdefault(case.group, set()).add(case.label)
        strata = [min(found) for found in labels.values()]
        pure = all(len(found) == 1 for found in labels.values())
        drawn = split_patients([*labels], seed=seed, labels=strata if pure else None)
        where = {group: split for split, groups in drawn.items() for group in groups}
    return {split: [case.id for case in cases if where[case.group] == split] for split in SPLITS}


def check_groups(cases: Sequence[Case], where: Mapping[str, str]) -> dict[str, str]:
    """Group -> split, if no group is in two.

    Args:
        cases: From ``read_cases``.
        where: Id of a case -> split.

    Raises:
        ValueError: If one is.
    """
    found: dict[str, str] = {}
    for case in cases:
        first = found.setdefault(case.group, where[case.id])
        if first != where[case.id]:
            raise ValueError(
                f"group {case.group!r} is in {first!r} and {where[case.id]!r} (case {case.id}): "
                "all cases of a group are in one split, or the test is not fair. Correct the table "
                "or splits; without split in the layout, deal(cases) draws a fair one."
            )
    return found


def _fits(key: str, value: Any) -> bool:
    """Whether TOML gave the type that ``CustomLayout`` wants."""
    if key != "tables":
        texts = value.values() if key in TABLES and isinstance(value, dict) else [value]
        return isinstance(value, dict) == (key in TABLES) and all(isinstance(t, str) for t in texts)
    return isinstance(value, dict) and all(
        isinstance(table, dict)
        and all(part in PARTS and isinstance(columns, list) for part, columns in table.items())
        and all(isinstance(column, str) for columns in table.values() for column in columns)
        and any(table.values())
        for table in value.values()
    )
