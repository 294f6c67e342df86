"""Derm7pt on disk: the tree, the columns, what a cell may hold, and the checks of all three.

What the reader (``derm7pt``) and the writer of a synthetic release (``derm7pt_synthetic``) share.
"""

from pathlib import Path

from mmfusion.recipes.tables import read_rows

SPLITS = ("train", "valid", "test")
COLUMNS = (
    "case_num diagnosis seven_point_score pigment_network streaks pigmentation "
    "regression_structures dots_and_globules blue_whitish_veil vascular_structures "
    "level_of_diagnostic_difficulty elevation location sex management clinic derm case_id notes"
).split()
CRITERIA = COLUMNS[3:10]
INPUTS = {"safe": COLUMNS[11:14], "paper": COLUMNS[10:15]}

# What a cell may hold, mildest value first, and how often the true release holds it.
VALUES: dict[str, dict[str, int]] = {
    column: {name: int(count) for name, _, count in (v.rpartition(" ") for v in cell.split(", "))}
    for column, cell in {
        "diagnosis": "basal cell carcinoma 42, "
        "clark nevus 399, reed or spitz nevus 79, dermal nevus 33, blue nevus 28, "
        "congenital nevus 17, combined nevus 13, recurrent nevus 6, "
        "melanoma (in situ) 64, melanoma (less than 0.76 mm) 102, melanoma (0.76 to 1.5 mm) 53, "
        "melanoma (more than 1.5 mm) 28, melanoma metastasis 4, melanoma 1, "
        "vascular lesion 29, lentigo 24, dermatofibroma 20, melanosis 16, miscellaneous 8, "
        "seborrheic keratosis 45",
        "pigment_network": "absent 400, typical 381, atypical 230",
        "streaks": "absent 653, regular 107, irregular 251",
        "pigmentation": "absent 588, localized regular 3, diffuse regular 115, "
        "localized irregular 40, diffuse irregular 265",
        "regression_structures": "absent 758, white areas 38, blue areas 116, combinations 99",
        "dots_and_globules": "absent 229, regular 334, irregular 448",
        "blue_whitish_veil": "absent 816, present 195",
        "vascular_structures": "absent 823, comma 23, hairpin 15, arborizing 31, wreath 2, "
        "within regression 46, dotted 53, linear irregular 18",
        "level_of_diagnostic_difficulty": "low 385, medium 372, high 254",
        "elevation": "flat 448, palpable 440, nodular 123",
        "location": "back 281, lower limbs 200, abdomen 125, upper limbs 122, chest 100, "
        "head neck 92, acral 62, buttocks 21, genital areas 8",
        "sex": "female 522, male 489",
        "management": "no further examination 110, clinical follow up 296, excision 605",
    }.items()
}


def _group(column: str, value: str) -> str:
    """The class of a cell, by the groups of the upstream package."""
    if column == "diagnosis":
        kinds = {"basal cell carcinoma": "BCC", "seborrheic keratosis": "SK"}
        kinds |= {"nevus": "NEV", "melanoma": "MEL"}
        return next((kind for word, kind in kinds.items() if word in value), "MISC")
    if column == "regression_structures" and value != "absent":
        return "present"
    if column == "pigmentation":
        return value.split()[-1]
    if column == "vascular_structures" and value != "absent":
        return "irregular" if value in ("dotted", "linear irregular") else "regular"
    return value


# Label column -> cell -> class; classes are numbered in the order they first appear.
GROUPS = {name: {v: _group(name, v) for v in VALUES[name]} for name in ("diagnosis", *CRITERIA)}


def find_release(root: Path) -> Path:
    """The release folder: ``root`` itself, or ``release_v0`` inside it.

    Args:
        root: What the user calls the data root.

    Raises:
        ValueError: If neither holds ``meta/meta.csv`` and ``images``.
    """
    for folder in (root, root / "release_v0"):
        if (folder / "meta" / "meta.csv").is_file() and (folder / "images").is_dir():
            return folder
    raise ValueError(
        f"root={str(root)!r} holds no meta/meta.csv beside images/, nor does its release_v0/: root "
        "is the unpacked release_v0 or the folder that holds it. Request the data from "
        "derm.cs.sfu.ca, or write a stand-in with write_synthetic_release."
    )


def read_table(path: Path) -> list[dict[str, str]]:
    """Read meta.csv and refuse every cell that the release could not hold.

    Blank cells pass in the input columns alone; the rows keep their order, since the index files
    count them.

    Args:
        path: ``meta.csv``.

    Raises:
        ValueError: If the header or a cell is not as in the release.
    """
    table = read_rows(path, COLUMNS)
    allowed = {column: tuple(values) for column, values in VALUES.items()}
    allowed["seven_point_score"] = tuple(str(score) for score in range(11))
    for position, row in enumerate(table):
        for column, values in allowed.items():
            blank = row[column] == "" and column in INPUTS["paper"]
            if row[column] not in values and not blank:
                raise ValueError(
                    f"{path} row {position} (case_num {row['case_num']}), column {column!r} holds "
                    f"{row[column]!r}: allowed are {', '.join(map(repr, values))}. Take the cell "
                    "from the release, in its exact spelling."
                )
    if {row["case_num"] for row in table} != {str(i + 1) for i in range(len(table))}:
        raise ValueError(
            f"{path}: case_num of its {len(table)} rows is not 1..{len(table)}, each once: the "
            "index files count the rows of the whole table. Take meta.csv whole, without rows "
            "added, dropped or repeated."
        )
    return table


def read_splits(folder: Path, num_rows: int) -> dict[str, list[int]]:
    r"""Read the three index files: 0-based rows of meta.csv, every row in exactly one of them.

    Args:
        folder: ``meta``.
        num_rows: Rows of meta.csv.

    Raises:
        ValueError: If an index is no number, out of range, repeated, or a row is in no file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for split, row in zip(SPLITS, (2, 0, 1), strict=True):
        ...         path = Path(folder) / f"{split}_indexes.csv"
        ...         _ = path.write_text(f"indexes\n{row}\n", encoding="utf-8")
        ...     read_splits(Path(folder), num_rows=3)
        {'train': [2], 'valid': [0], 'test': [1]}
    """
    cure = f"Take the index files and meta.csv ({num_rows} rows) from one release."
    owners: dict[int, str] = {}
    for split in SPLITS:
        path = folder / f"{split}_indexes.csv"
        for position, row in enumerate(read_rows(path, ["indexes"])):
            cell = row["indexes"]
            if not (cell.isascii() and cell.isdigit() and int(cell) < num_rows):
                raise ValueError(
                    f"{path} row {position}: indexes={cell!r}: an index is a 0-based row position "
                    f"of meta.csv, 0..{num_rows - 1}, not a case_num. {cure}"
                )
            if int(cell) in owners:
                raise ValueError(
                    f"{path} row {position}: indexes={cell} is already in {owners[int(cell)]}: a "
                    f"case belongs to one split, once. {cure}"
                )
            owners[int(cell)] = path.name
    lost = sorted(set(range(num_rows)) - set(owners))
    if lost:
        raise ValueError(
            f"{folder}: rows {lost[:5]} of meta.csv ({len(lost)} in all) are in no index file: "
            f"train, valid and test together cover every row. {cure}"
        )
    return {s: [i for i, name in owners.items() if name.startswith(s)] for s in SPLITS}
