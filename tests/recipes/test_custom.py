"""Data of one's own: what a TOML file says is what is read, and what is wrong is named."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mmfusion.presence import collate
from mmfusion.recipes.custom import Custom
from mmfusion.recipes.custom_layout import Case, CustomLayout, deal, read_cases
from mmfusion.recipes.custom_synthetic import LAYOUT, write_synthetic_custom

SIZES = {"image_size": (12, 16), "volume_size": (8, 8, 4)}
Edit = Callable[[list[dict[str, str]]], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_custom(tmp_path_factory.mktemp("custom") / "data", num_cases=60)


@pytest.fixture
def toml(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written.parent, tmp_path / "data")) / "layout.toml"


def edit(toml: Path, change: Edit) -> None:
    path = toml.parent / "table.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_items_hold_what_is_on_disk(written: Path) -> None:
    cases = Custom(written, "train", **SIZES)
    assert cases.is_synthetic
    assert cases.names == ("photo", "scan", "signal", "clinic")
    assert cases.shapes == {
        "photo": (3, 12, 16),
        "scan": (1, 8, 8, 4),
        "signal": (32,),
        "clinic": (4,),
    }
    for row, case in enumerate(cases.cases):
        item = cases[row]
        for name, folder in (("photo", "photos"), ("scan", "scans"), ("signal", "signals")):
            there = any((written.parent / folder).glob(f"{case.id}.*"))
            assert (item["inputs"][name] is not None) == there
        if (signal := item["inputs"]["signal"]) is not None:
            assert np.array_equal(signal, np.load(written.parent / "signals" / f"{case.id}.npy"))
        assert cases.class_names[item["labels"]] == case.label
    batch = collate([cases[row] for row in range(len(cases))], cases.names, cases.shapes)
    assert torch.equal(batch["present"], cases.present)
    scan = batch["inputs"]["scan"][batch["present"][:, 1]]
    assert scan.mean().abs() < 1


def test_numbers_are_standardised_by_training_rows(written: Path) -> None:
    train, test = (Custom(written, split, **SIZES) for split in ("train", "test"))
    age = train.feature_names["clinic"].index("age")
    assert train.tables["clinic"][:, age].nanmean().abs() < 1e-6
    assert test.tables["clinic"][:, age].nanmean().abs() > 1e-3
    assert train.tables["clinic"].isnan().any()


def test_cases_of_a_patient_are_never_in_two_splits(written: Path) -> None:
    cases = read_cases(written.parent, CustomLayout.from_toml(written))
    assert len({case.group for case in cases}) < len(cases)
    splits = [deal(cases, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    where = {one: split for split, ids in splits[0].items() for one in ids}
    assert len(where) == len(cases)
    for first in cases:
        assert {where[one.id] for one in cases if one.group == first.group} == {where[first.id]}


def test_a_split_column_is_followed(toml: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["part"] = {"0": "train", "1": "train", "2": "valid"}.get(row["patient"][-1], "test")

    edit(toml, change)
    toml.write_text(LAYOUT.replace('# split = "split" ', 'split = "part"'))
    layout = CustomLayout.from_toml(toml)
    split = deal(read_cases(toml.parent, layout))
    assert Custom(toml, "valid", **SIZES).ids == tuple(split["valid"])

    edit(toml, lambda rows: rows[4].update(part="test", patient=rows[0]["patient"]))
    with pytest.raises(ValueError, match=r"'p0000' is in 'train' and 'test'.*one split.*Correct"):
        deal(read_cases(toml.parent, layout))
    edit(toml, lambda rows: rows[4].update(part="dev"))
    with pytest.raises(
        ValueError, match=r"row 4 \(v0004\): part='dev'.*train, valid, test.*Correct"
    ):
        read_cases(toml.parent, layout)


def test_splits_from_elsewhere_keep_groups_together_too(written: Path) -> None:
    cases = read_cases(written.parent, CustomLayout.from_toml(written))
    groups = [case.group for case in cases]
    case = next(case for case in cases if groups.count(case.group) > 1)
    split = deal(cases)
    [home] = [name for name, ids in split.items() if case.id in ids]
    other = {"train": "test"}.get(home, "train")
    split[home].remove(case.id)
    split[other].append(case.id)
    with pytest.raises(ValueError, match=rf"group '{case.group}' is in .*one split.*deal\(cases\)"):
        Custom(written, "train", splits=split, **SIZES)
    del split["test"]
    with pytest.raises(ValueError, match=r"patients in no split.*custom_layout.deal"):
        Custom(written, "train", splits=split, **SIZES)


def table_of(root: Path, photo: str, rows: list[str]) -> list[Case]:
    (root / "table.csv").write_text("\n".join(["id,who,y", *rows, ""]))
    return read_cases(root, CustomLayout("y", {"0": "no"}, photos={"photo": photo}))


@pytest.mark.parametrize(
    ("photo", "ids", "file"), [("{id}*.png", "1 10", "10_a.png"), ("{id}.*", "P1 P1.2", "P1.2.png")]
)
def test_a_file_of_two_cases_is_refused(tmp_path: Path, photo: str, ids: str, file: str) -> None:
    (tmp_path / file).touch()
    one, other = ids.split()
    told = rf"{file} fits .* for '{one}' and for '{other}': .*one of them. Narrow"
    with pytest.raises(ValueError, match=told):
        table_of(tmp_path, photo, [f"{one},a,0", f"{other},a,0"])


def test_what_a_pattern_finds_for_shared_and_blank_cells(tmp_path: Path) -> None:
    """The cases of Ann share her photo; a blank cell would let ``*`` fit any."""
    (tmp_path / "ann_1.png").touch()
    cases = table_of(tmp_path, "{who}*.png", ["1,ann,0", "2,ann,0", "3,,0"])
    assert [sorted(case.files) for case in cases] == [["photo"], ["photo"], []]


def test_groups_of_mixed_classes_can_be_dealt() -> None:
    cases = [Case(str(i), "ab"[i % 2], str(i // 2), "", {}, {}) for i in range(40)]
    assert [len(ids) for ids in deal(cases).values()] == [28, 4, 8]


def test_tables_alone_are_enough(toml: Path) -> None:
    text, _, _ = LAYOUT.partition("[photos]")
    tables = '[tables.a]\nnumeric = ["age"]\n[tables.b]\ncategorical = ["ward"]\n'
    toml.write_text(text + tables)
    cases = Custom(toml, "train")
    assert cases.shapes == {"a": (1,), "b": (2,)}
    assert cases.present.shape == (len(cases), 2)
    assert not cases.present.all()


def test_a_transform_sees_photos_and_volumes_together(written: Path) -> None:
    seen = []

    def flip(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(set(images))
        return {name: image.flip(-1) for name, image in images.items()}

    plain, flipped = (Custom(written, "train", transform=t, **SIZES) for t in (None, flip))
    row = int(plain.present[:, :2].all(1).nonzero()[0])
    inputs, others = plain[row]["inputs"], flipped[row]["inputs"]
    assert seen == [{"photo", "scan"}]
    assert torch.equal(inputs["scan"].flip(-1), others["scan"])
    assert torch.equal(inputs["photo"].flip(-1), others["photo"])


def test_a_transform_in_place_leaves_the_data_set_as_it_was(written: Path) -> None:
    cases = Custom(
        written, "train", transform=lambda x: {n: v.mul_(0) for n, v in x.items()}, **SIZES
    )
    row = int(cases.present[:, 1].nonzero()[0])
    assert not cases[row]["inputs"]["scan"].any()
    cases.transform = None
    assert cases[row]["inputs"]["scan"].any()


def damage_photo(root: Path, case: Case) -> str:
    path = case.files["photo"]
    path.write_bytes(path.read_bytes()[:100])
    return "cannot be decoded"


def damage_scan(root: Path, case: Case) -> str:
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 2)), np.eye(4)), case.files["scan"])
    return "holds 2 volumes"


def damage_signal(root: Path, case: Case) -> str:
    np.save(case.files["signal"], np.ones(7))
    return "has 7 numbers, and the first one 32"


def damage_with_nan(root: Path, case: Case) -> str:
    np.save(case.files["signal"], np.full(32, np.nan))
    return "one vector of finite numbers"


def damage_with_pickle(root: Path, case: Case) -> str:
    np.save(case.files["signal"], np.array([{}], dtype=object), allow_pickle=True)
    return "cannot be read as numbers"


def damage_path(root: Path, case: Case) -> str:
    case.files["scan"].unlink()
    return "is not there|cannot be read|No such file"


@pytest.mark.parametrize(
    ("damage", "column"),
    [
        (damage_photo, "photo"),
        (damage_scan, "scan"),
        (damage_path, "scan"),
        (damage_signal, "signal"),
        (damage_with_nan, "signal"),
        (damage_with_pickle, "signal"),
    ],
)
def test_a_broken_file_is_named_or_missing(
    toml: Path, damage: Callable[[Path, Case], str], column: str
) -> None:
    cases = Custom(toml, "train", **SIZES).cases
    case = [case for case in cases if column in case.files][-1]
    reason = damage(toml.parent, case)
    with pytest.raises(
        ValueError, match=rf"(?s){case.id}, {column}=.*({reason}).*on_broken='missing'"
    ):
        Custom(toml, "train", **SIZES)
    lenient = Custom(toml, "train", on_broken="missing", **SIZES)
    assert [(one.patient_id, one.column) for one in lenient.broken] == [(case.id, column)]
    assert lenient[lenient.ids.index(case.id)]["inputs"][column] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].update(visit=""), r"row 3: visit='' is blank: each case.*Name"),
        (lambda rows: rows[3].update(visit="v0001"), r"row 3: visit='v0001' is that of.*join"),
        (
            lambda rows: rows[3].update(outcome="2"),
            r"row 3 \(v0003\): outcome='2': .*0, 1. Correct",
        ),
        (lambda rows: [row.update(scan_file="") for row in rows], r"no case has 'scan' by.*leave"),
        (lambda rows: [row.pop("age") for row in rows], r"it must have age too. Correct"),
        (lambda rows: rows[0].update(age="old"), r"v0000, age='old': is not a finite number"),
    ],
)
def test_a_wrong_table_is_refused_by_row_and_column(toml: Path, change: Edit, message: str) -> None:
    edit(toml, change)
    with pytest.raises(ValueError, match=message):
        [Custom(toml, split, **SIZES) for split in ("train", "valid", "test")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label =", "labels =", r"no label, labels = 'outcome': a layout has label.*Correct"),
        ('["ward"]', '"ward"', r"tables = .*lists of columns.*Correct"),
        ('signal = "sig', 'photo = "sig', r"used twice: \['photo'\].*each name for one.*Correct"),
        ('["age", ', '["age", "outcome", ', r"used twice: \['outcome'\]"),
        ("{visit}.*", "{case}.*", r"'photos/\{case\}.\*'.*braces hold a column"),
        ("[classes]", "[classes", r"a layout is a TOML file"),
    ],
)
def test_a_wrong_layout_is_refused(toml: Path, old: str, new: str, message: str) -> None:
    assert old in LAYOUT
    toml.write_text(LAYOUT.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Custom(toml, "train", **SIZES)


def test_the_synthetic_data_are_the_same_for_a_seed(written: Path, tmp_path: Path) -> None:
    again, other = (
        write_synthetic_custom(tmp_path / str(seed), num_cases=60, seed=seed) for seed in (0, 1)
    )
    files = sorted(path.relative_to(again.parent) for path in again.parent.rglob("*.n*"))
    assert len(files) > 80
    for file in ("table.csv", *files):
        assert (again.parent / file).read_bytes() == (written.parent / file).read_bytes()
    assert (other.parent / "table.csv").read_text() != (again.parent / "table.csv").read_text()
    with pytest.raises(ValueError, match=r"num_cases=39.*at least 40.*Raise"):
        write_synthetic_custom(tmp_path / "few", num_cases=39)
