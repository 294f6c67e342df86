"""The reader, on a synthetic release with the traps of the true one."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mmfusion.presence import collate
from mmfusion.recipes.derm7pt import Derm7pt
from mmfusion.recipes.derm7pt_format import COLUMNS, SPLITS
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
from mmfusion.recipes.synthetic import MARKER

read = functools.partial(Derm7pt, image_size=(16, 24))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("derm7pt") / "release_v0"
    return write_synthetic_release(root, num_cases=60, seed=2, image_size=(16, 24))


@pytest.fixture
def release(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "release_v0"))


def rows_of(root: Path) -> list[dict[str, str]]:
    return pd.read_csv(root / "meta/meta.csv", dtype=str, keep_default_na=False).to_dict("records")


def indexes_of(root: Path, split: str) -> list[int]:
    return pd.read_csv(root / "meta" / f"{split}_indexes.csv")["indexes"].tolist()


def put(root: Path, position: int, **cells: str) -> None:
    rows = rows_of(root)
    rows[position].update(cells)
    pd.DataFrame(rows).to_csv(root / "meta" / "meta.csv", index=False, lineterminator="\n")


def whole_case(root: Path) -> int:
    """A test row with two photos of its own."""
    rows = rows_of(root)
    return next(i for i in indexes_of(root, "test") if rows[i]["clinic"] != rows[i]["derm"])


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_an_item_has_the_shapes_of_the_docstring(written: Path) -> None:
    cases = read(written, "test")
    item = cases[0]
    assert sorted(item) == ["inputs", "labels", "sample_ids"]
    assert list(item["inputs"]) == list(Derm7pt.names)
    for name, value in item["inputs"].items():
        assert (value.shape, value.dtype) == (cases.shapes[name], torch.float32)
        assert 0 <= value.min() < 0.5 < value.max() <= 1
    assert type(item["labels"]) is type(item["sample_ids"]) is int


def test_ids_are_row_positions_and_labels_belong_to_the_row(written: Path) -> None:
    rows = rows_of(written)
    words = {"basal": "BCC", "nevus": "NEV", "melanoma": "MEL", "seborrheic": "SK"}
    for split in SPLITS:
        cases = read(written, split)
        assert cases.sample_ids.tolist() == indexes_of(written, split)
        for item in (cases[i] for i in range(len(cases))):
            cell = rows[item["sample_ids"]]["diagnosis"]
            kind = next((kind for word, kind in words.items() if word in cell), "MISC")
            assert cases.class_names[item["labels"]] == kind


def test_a_loader_gives_batches_for_a_model(written: Path) -> None:
    cases = read(written, "train")
    join = functools.partial(collate, names=cases.names, shapes=cases.shapes)
    batches = list(DataLoader(cases, batch_size=8, collate_fn=join))
    for key, expected in (("present", cases.present), ("labels", cases.labels)):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


def test_two_classes_keep_nevi_and_melanomas_alone(written: Path) -> None:
    five, two = read(written, "train"), read(written, "train", target="diagnosis2")
    assert (two.class_names, two.num_classes) == (("NEV", "MEL"), 2)
    assert two.class_counts.tolist() == five.class_counts[1:3].tolist()
    assert two.class_counts.sum() == len(two) < len(five)
    kept = (five.labels == 1) | (five.labels == 2)
    assert torch.equal(two.sample_ids, five.sample_ids[kept])
    assert torch.equal(two.labels, five.labels[kept] - 1)


def test_criteria_are_seven_grouped_tasks(written: Path) -> None:
    cases = read(written, "train", target="criteria")
    assert list(cases.tasks) == COLUMNS[3:10]
    assert [len(classes) for classes in cases.tasks.values()] == [3, 3, 3, 2, 3, 2, 3]
    assert cases.num_classes == len(cases.class_names) == len(cases.class_counts) == 19
    assert cases.class_counts.sum() == 7 * len(cases)
    rows = rows_of(written)
    for i in range(len(cases)):
        item = cases[i]
        assert item["labels"].dtype == torch.int64
        for (task, classes), label in zip(cases.tasks.items(), item["labels"], strict=True):
            cell = rows[item["sample_ids"]][task]
            assert (classes[label] == "absent") == (cell == "absent")
            if task in ("pigment_network", "streaks", "dots_and_globules"):
                assert classes[label] == cell


def test_columns_that_leak_are_left_out_unless_asked_for(written: Path) -> None:
    safe, paper = read(written, "test"), read(written, "test", columns="paper")
    assert (safe.shapes["meta"], paper.shapes["meta"]) == ((14,), (20,))
    assert {name.split("=")[0] for name in safe.feature_names} == {"elevation", "location", "sex"}
    assert {name.split("=")[0] for name in paper.feature_names} == set(COLUMNS[10:15])


def test_the_table_is_one_hot_under_its_feature_names(written: Path) -> None:
    cases, rows = read(written, "test", columns="paper"), rows_of(written)
    for i in range(len(cases)):
        item = cases[i]
        on = [n for n, x in zip(cases.feature_names, item["inputs"]["meta"], strict=True) if x]
        row = rows[item["sample_ids"]]
        assert on == [f"{column}={row[column]}" for column in COLUMNS[10:15]]


def test_a_blank_cell_is_nan_in_its_own_columns_and_a_blank_row_is_absent(release: Path) -> None:
    first, second, *_ = indexes_of(release, "test")
    put(release, first, location="")
    put(release, second, location="", sex="", elevation="")
    cases = read(release, "test")
    blank = [name.startswith("location=") for name in cases.feature_names]
    assert cases[0]["inputs"]["meta"].isnan().tolist() == blank
    assert cases[1]["inputs"]["meta"].isnan().all()
    assert not cases.meta[2:].isnan().any()
    assert cases.present[:, 2].logical_not().nonzero().tolist() == [[1]]


def test_a_clinical_photo_that_repeats_the_dermoscopic_one_is_absent(release: Path) -> None:
    row = whole_case(release)
    put(release, row, clinic=rows_of(release)[row]["derm"], notes="")
    repeats = [i for i, cells in enumerate(rows_of(release)) if cells["clinic"] == cells["derm"]]
    assert len(repeats) == 2  # the one of the generator, and the one made here
    for cases in (read(release, split) for split in SPLITS):
        for i, row in enumerate(cases.sample_ids.tolist()):
            assert (cases[i]["inputs"]["clinic"] is None) == (row in repeats)
            assert cases.present[i].tolist() == [row not in repeats, True, True]
            assert cases[i]["inputs"]["derm"] is not None
        assert cases.broken == ()


@pytest.mark.parametrize("named", [True, False], ids=["file gone", "cell blank"])
def test_a_missing_photo_names_file_row_and_column(release: Path, named: bool) -> None:
    row = whole_case(release)
    file = rows_of(release)[row]["derm"] if named else ""
    if named:
        (release / "images" / file).unlink()
    put(release, row, derm=file)
    place = f"row {row} (case_num {row + 1}), column 'derm', file '{file}' is not there:"
    with raises(place, "every photo that meta.csv names is readable", "on_broken='missing'"):
        read(release, "test")
    read(release, "train")


def test_broken_photos_can_be_absent_and_are_listed(release: Path) -> None:
    row = whole_case(release)
    cells = rows_of(release)[row]
    (release / "images" / cells["clinic"]).write_text("no photo", encoding="utf-8")
    (release / "images" / cells["derm"]).unlink()
    cases = read(release, "test", on_broken="missing")
    assert [(b.row, b.column, b.file) for b in cases.broken] == [
        (row, "clinic", cells["clinic"]),
        (row, "derm", cells["derm"]),
    ]
    assert [b.reason[:17] for b in cases.broken] == ["cannot be decoded", "is not there"]
    position = cases.sample_ids.tolist().index(row)
    assert cases.present[position].tolist() == [False, False, True]
    inputs = cases[position]["inputs"]
    assert inputs["clinic"] is inputs["derm"] is None


def test_photos_keep_their_colours_and_sides(release: Path) -> None:
    row = whole_case(release)
    picture = Image.new("RGB", (768, 512), (255, 255, 255))
    picture.paste((10, 10, 250), (384, 0, 768, 512))  # white left, blue right
    picture.save(release / "images" / rows_of(release)[row]["derm"], quality=95)
    cases = Derm7pt(release, "test", image_size=32)
    photo = cases[cases.sample_ids.tolist().index(row)]["inputs"]["derm"]
    assert photo[:, 16, 4].tolist() == [1, 1, 1]
    assert photo[:, 16, 28].mul(255).tolist() == pytest.approx([10, 10, 250], abs=4)


def test_a_transform_is_called_once_with_the_photos_present(written: Path) -> None:
    seen: list[list[str]] = []

    def note(photos: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sorted(photos))
        return {name: 1 - photo for name, photo in photos.items()}

    cases = next(c for c in (read(written, split) for split in SPLITS) if not c.present.all())
    lacking = int(cases.present[:, 0].logical_not().nonzero()[0])
    before = cases[lacking - 1]["inputs"]["clinic"]
    cases.transform = note
    assert cases[lacking]["inputs"]["clinic"] is None
    assert torch.equal(cases[lacking - 1]["inputs"]["clinic"], 1 - before)
    assert seen == [["derm"], ["clinic", "derm"]]


def test_a_transform_that_loses_a_photo(written: Path) -> None:
    row = whole_case(written)
    cases = read(written, "test", transform=lambda photos: {"derm": photos["derm"]})
    with raises("transform returned ['derm']", "returns the photos it was given", "missingness"):
        cases[cases.sample_ids.tolist().index(row)]


def test_only_the_marker_makes_a_release_synthetic(release: Path) -> None:
    assert read(release.parent, "test").is_synthetic
    (release / MARKER).unlink()
    assert not read(release, "test").is_synthetic


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"split": "val"}, ("split='val'", "Pass one of train, valid, test")),
        ({"target": "diagnosis"}, ("target='diagnosis'", "diagnosis5, diagnosis2, criteria")),
        ({"columns": "all"}, ("columns='all'", "Pass one of safe, paper")),
        ({"on_broken": "skip"}, ("on_broken='skip'", "Pass one of raise, missing")),
        ({"image_size": 0}, ("image_size=0", "at least one pixel", "Pass the side")),
    ],
)
def test_wrong_arguments(written: Path, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(*parts):
        Derm7pt(written, **{"split": "test", **arguments})
