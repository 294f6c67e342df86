"""The reader, on synthetic releases with the traps of the true ones."""

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
from mmfusion.recipes.images import random_flips
from mmfusion.recipes.odir import Odir, patient_ids
from mmfusion.recipes.odir_format import CSV, LABELS, XLSX
from mmfusion.recipes.odir_synthetic import write_synthetic_odir
from mmfusion.recipes.splits import split_patients
from mmfusion.recipes.synthetic import MARKER

read = functools.partial(Odir, image_size=16)
IMAGES = {"kaggle": "preprocessed_images", "xlsx": "Training Images"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odir")
    return {
        layout: write_synthetic_odir(
            folder / layout, num_patients=60, seed=2, image_size=16, layout=layout
        )
        for layout in ("kaggle", "xlsx")
    }


@pytest.fixture
def release(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["kaggle"], tmp_path / "odir"))


def put(root: Path, number: int, **cells: Any) -> None:
    """Set cells in all rows of a patient."""
    rows = pd.read_csv(root / CSV)
    for column, value in cells.items():
        rows[column] = rows[column].astype(object).where(rows["ID"] != number, value)
    rows.to_csv(root / CSV, index=False)


def whole(root: Path) -> int:
    """A patient with both photos."""
    ids = pd.read_csv(root / CSV)["ID"]
    return int(ids[ids.duplicated()].iloc[0])


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_an_item_has_the_shapes_of_the_docstring(written: dict[str, Path]) -> None:
    patients = read(written["kaggle"], [whole(written["kaggle"])])
    item = patients[0]
    assert sorted(item) == ["inputs", "labels", "sample_ids"]
    assert list(item["inputs"]) == list(Odir.names) == ["left", "right", "table"]
    for name, value in item["inputs"].items():
        assert (value.shape, value.dtype) == (patients.shapes[name], torch.float32)
    assert 0 <= item["inputs"]["left"].min() < 0.2 < item["inputs"]["left"].max() <= 1
    assert (item["labels"].shape, item["labels"].dtype) == ((8,), torch.float32)
    assert item["sample_ids"] == whole(written["kaggle"])
    assert type(item["sample_ids"]) is int


def test_labels_and_counts_are_those_of_the_patient(written: dict[str, Path]) -> None:
    patients = read(written["kaggle"])
    rows = pd.read_csv(written["kaggle"] / CSV).drop_duplicates("ID").set_index("ID")
    assert patients.sample_ids.tolist() == sorted(rows.index)
    for number, labels in zip(patients.sample_ids.tolist(), patients.labels, strict=True):
        assert labels.tolist() == rows.loc[number, [*LABELS]].tolist()
    assert patients.class_counts.tolist() == rows[[*LABELS]].sum().tolist()
    assert patients.num_classes == len(patients.class_names) == 8


def test_both_layouts_give_the_same_patients(written: dict[str, Path]) -> None:
    kaggle = read(written["kaggle"])
    original = read(written["xlsx"], kaggle.sample_ids.tolist(), on_broken="missing")
    assert torch.equal(kaggle.photos, original.photos)
    assert torch.equal(kaggle.present, original.present)
    assert torch.equal(kaggle.labels, original.labels)
    assert torch.equal(kaggle.table.nan_to_num(), original.table.nan_to_num())
    assert kaggle.broken == ()
    assert len(original.broken) == (~kaggle.present[:, :2]).sum()


def test_an_eye_without_a_row_is_absent_and_no_black_image(written: dict[str, Path]) -> None:
    patients, rows = read(written["kaggle"]), pd.read_csv(written["kaggle"] / CSV)
    files = set(rows["filename"])
    single = 0
    for index, number in enumerate(patients.sample_ids.tolist()):
        inputs = patients[index]["inputs"]
        for eye in ("left", "right"):
            assert (inputs[eye] is not None) == (f"{number}_{eye}.jpg" in files)
        single += (inputs["left"] is None) + (inputs["right"] is None)
    assert single == (~patients.present).sum() == 6


def test_a_patient_without_any_photo_has_a_table(written: dict[str, Path]) -> None:
    patients = read(written["xlsx"], on_broken="missing")
    none = (~patients.present[:, :2]).all(1).nonzero()[:, 0].tolist()
    assert len(none) == 2
    for index in none:
        inputs = patients[index]["inputs"]
        assert inputs["left"] is inputs["right"] is None
        assert inputs["table"].shape == (3,)


def test_a_loader_gives_batches_for_a_model(written: dict[str, Path]) -> None:
    patients = read(written["kaggle"])
    join = functools.partial(collate, names=patients.names, shapes=patients.shapes)
    batches = list(DataLoader(patients, batch_size=8, collate_fn=join))
    for key, expected in (("present", patients.present), ("labels", patients.labels)):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


def test_patients_are_read_in_the_order_asked_for(written: dict[str, Path]) -> None:
    everyone = read(written["kaggle"])
    some = everyone.sample_ids[[9, 2, 5]].tolist()
    few = read(written["kaggle"], some)
    assert few.sample_ids.tolist() == some
    assert torch.equal(few.photos, everyone.photos[[9, 2, 5]])
    none = read(written["kaggle"], [])
    assert (len(none), none.present.dtype, none.labels.shape) == (0, torch.bool, (0, 8))


def test_a_split_by_patient_never_shares_a_photo(written: dict[str, Path]) -> None:
    ids = patient_ids(written["kaggle"])
    parts = {n: read(written["kaggle"], part) for n, part in split_patients(ids).items()}
    assert torch.cat([part.sample_ids for part in parts.values()]).sort().values.tolist() == ids
    photos = [
        photo.numpy().tobytes()
        for part in parts.values()
        for pair, here in zip(part.photos, part.present, strict=True)
        for photo in pair[here[:2]]
    ]
    assert len(photos) == len(set(photos)) == len(pd.read_csv(written["kaggle"] / CSV))


def test_the_table_is_age_in_decades_and_sex(release: Path) -> None:
    number = whole(release)
    put(release, number, **{"Patient Age": 72, "Patient Sex": "Male"})
    patients = read(release, [number])
    assert patients.feature_names == ("age", "sex=Female", "sex=Male")
    assert patients[0]["inputs"]["table"].tolist() == pytest.approx([1.2, 0, 1])


def test_age_one_is_a_missing_cell_unless_asked_for(release: Path) -> None:
    number = whole(release)
    put(release, number, **{"Patient Age": 1})
    cells = read(release, [number])[0]["inputs"]["table"]
    assert cells.isnan().tolist() == [True, False, False]
    cells = read(release, [number], placeholder_age=None)[0]["inputs"]["table"]
    assert cells[0].item() == pytest.approx(-5.9)


def test_a_row_without_age_and_sex_is_an_absent_table(release: Path) -> None:
    number = whole(release)
    put(release, number, **{"Patient Age": "", "Patient Sex": ""})
    patients = read(release, [number])
    assert patients.present.tolist() == [[True, True, False]]
    assert patients[0]["inputs"]["table"].isnan().all()


def test_keywords_are_no_input(release: Path) -> None:
    before = read(release)
    rows = pd.read_csv(release / CSV)
    rows[[c for c in rows.columns if "Keywords" in c]] = "cataract"
    rows.to_csv(release / CSV, index=False)
    after = read(release)
    assert after.shapes["table"] == (3,)
    assert torch.equal(before.table.nan_to_num(), after.table.nan_to_num())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "is not there"), (lambda path: path.write_bytes(b"no"), "cannot be decoded")],
    ids=["gone", "damaged"],
)
def test_a_broken_photo_is_named_or_absent(release: Path, damage: Any, reason: str) -> None:
    number = whole(release)
    file = f"{number}_right.jpg"
    damage(release / IMAGES["kaggle"] / file)
    place = f"column 'right', file '{file}' {reason}"
    with raises(str(release / CSV), place, "every photo that the table names", "on_broken="):
        read(release)
    patients = read(release, [number], on_broken="missing")
    assert patients.present.tolist() == [[True, False, True]]
    assert patients[0]["inputs"]["right"] is None
    (broken,) = patients.broken
    assert (broken.column, broken.file) == ("right", file)
    assert pd.read_csv(release / CSV)["ID"][broken.row] == number
    assert broken.reason.startswith(reason)


def test_images_may_lie_elsewhere(release: Path, tmp_path: Path) -> None:
    before = read(release)
    elsewhere = Path(shutil.move(release / IMAGES["kaggle"], tmp_path / "elsewhere"))
    with raises("in no folder", "Pass images="):
        read(release)
    assert torch.equal(read(release, images=elsewhere).photos, before.photos)


def test_photos_keep_their_colours_and_sides(release: Path) -> None:
    number = whole(release)
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    picture.paste((10, 10, 250), (32, 0, 64, 64))  # white left, blue right
    picture.save(release / IMAGES["kaggle"] / f"{number}_left.jpg", quality=95)
    photo = read(release, [number])[0]["inputs"]["left"]
    assert photo[:, 8, 2].tolist() == [1, 1, 1]
    assert photo[:, 8, 13].mul(255).tolist() == pytest.approx([10, 10, 250], abs=4)


def test_a_transform_is_called_once_with_the_photos_present(written: dict[str, Path]) -> None:
    seen: list[list[str]] = []

    def note(photos: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sorted(photos))
        return random_flips(photos)

    patients = read(written["kaggle"], transform=note)
    one = int((~patients.present[:, 0]).nonzero()[0])
    assert patients[one]["inputs"]["left"] is None
    both = int(patients.present.all(1).nonzero()[0])
    patients[both]
    assert seen == [["right"], ["left", "right"]]


def test_only_the_marker_makes_a_release_synthetic(release: Path) -> None:
    assert read(release).is_synthetic
    (release / MARKER).unlink()
    assert not read(release).is_synthetic


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"ids": [0, 99999]}, ("ids has [99999] (1 in all)", "in the table", "patient_ids(root)")),
        ({"on_broken": "skip"}, ("on_broken='skip'", "Pass one of raise, missing")),
        ({"image_size": 0}, ("image_size=0", "at least one pixel", "Pass the side")),
        ({"root": "/nowhere"}, ("root='/nowhere' holds no table", "Request the data from")),
    ],
)
def test_wrong_arguments(
    written: dict[str, Path], arguments: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with raises(*parts):
        Odir(**{"root": written["kaggle"], **arguments})


def test_the_original_names_photos_that_are_not_there(written: dict[str, Path]) -> None:
    with raises(XLSX, "is not there", "broken here: ", "Restore", "on_broken='missing'"):
        read(written["xlsx"])
