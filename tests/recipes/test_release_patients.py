"""New patients in the tables of releases: read as the training reads them, labels unknown."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from recipes.test_layout_patients import assert_alike, edited, saved

from mmfusion.recipes.derm7pt import Derm7pt
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
from mmfusion.recipes.odir import Odir
from mmfusion.recipes.odir_format import CSV, LABELS, XLSX
from mmfusion.recipes.odir_synthetic import write_synthetic_odir
from mmfusion.recipes.reading import Reading
from mmfusion.recipes.release_patients import derm7pt_patients, odir_patients

Table = pd.DataFrame


@pytest.fixture(scope="module")
def odir(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odir")
    kind: dict[str, Any] = {"num_patients": 60, "seed": 2, "image_size": 16}
    return {
        name: write_synthetic_odir(folder / name, layout=name, **kind)
        for name in ("kaggle", "xlsx")
    }


def reading_of(root: Path, folder: Path) -> tuple[Reading, Odir]:
    train = Odir(root, image_size=(12, 16), on_broken="missing")
    return saved(train.reading(), folder), train


@pytest.mark.parametrize(("name", "file"), [("kaggle", CSV), ("xlsx", XLSX)])
def test_odir_is_read_as_in_training(
    name: str, file: str, odir: dict[str, Path], tmp_path: Path
) -> None:
    reading, train = reading_of(odir[name], tmp_path)
    patients = odir_patients(odir[name] / file, reading)
    assert sorted(map(int, patients.ids)) == sorted(train.sample_ids.tolist())
    assert name == "xlsx" or list(patients.ids) == list(dict.fromkeys(ids_in(odir[name] / file)))
    for row in range(len(train)):
        item = patients[patients.ids.index(str(int(train.sample_ids[row])))]
        assert_alike(item, train[row])
        named = [one for one in train.broken if str(one.file) in item["error"]]
        assert bool(item["error"]) == bool(named)


def ids_in(path: Path) -> list[str]:
    return pd.read_csv(path, dtype=str)["ID"].tolist()


def test_rows_of_a_patient_that_contradict_each_other_are_told(
    odir: dict[str, Path], tmp_path: Path
) -> None:
    reading, _ = reading_of(odir["kaggle"], tmp_path)
    ids = ids_in(odir["kaggle"] / CSV)
    both = next(id for id in ids if ids.count(id) == 2)

    def change(table: Table) -> None:
        rows = table.index[table["ID"] == both]
        table.loc[rows, "Patient Age"] = ["60", "70"]

    path = Path(shutil.copy(odir["kaggle"] / CSV, tmp_path))
    images = odir["kaggle"] / "preprocessed_images"
    patients = odir_patients(edited(path, change), reading, images)
    item = patients[patients.ids.index(both)]
    assert item["error"] == "rows of this patient contradict each other: the first one counts"
    assert item["inputs"]["table"][0] == 0


def test_odir_takes_patients_without_labels_and_tells_faults(
    odir: dict[str, Path], tmp_path: Path
) -> None:
    reading, _ = reading_of(odir["xlsx"], tmp_path)
    root = Path(shutil.copytree(odir["xlsx"], tmp_path / "new"))
    images = root / "Training Images"
    table = pd.read_excel(root / XLSX, dtype=str, keep_default_na=False)
    table = table.drop(columns=[*LABELS, "Left-Diagnostic Keywords"])
    table.loc[0, ["Patient Age", "Patient Sex"]] = ["about 60", "Diverse"]
    table.loc[1, ["Left-Fundus", "Right-Fundus"]] = ["", "nowhere.jpg"]
    table.loc[3, "Patient Age"] = ""
    photo = images / table.loc[2, "Left-Fundus"]
    photo.write_bytes(photo.read_bytes()[:300])
    table.to_csv(root / "new.csv", index=False)
    patients = odir_patients(root / "new.csv", reading, images)
    first, second, third, fourth = (patients[row] for row in range(4))
    assert first["inputs"]["table"].isnan().all()
    assert "table: Patient Age='about 60' is not a whole number below 120" in first["error"]
    assert "table: Patient Sex='Diverse' is not Female, Male" in first["error"]
    assert second["inputs"]["left"] is second["inputs"]["right"] is None
    assert second["error"] == "right: nowhere.jpg is not there"
    assert third["inputs"]["left"] is None
    assert third["error"].startswith(f"left: {photo.name} cannot be decoded")
    assert fourth["inputs"]["table"].isnan().tolist() == [True, False, False]
    shutil.rmtree(images)
    with pytest.raises(ValueError, match=r"photos in the table there are some in no folder"):
        odir_patients(root / "new.csv", reading)


@pytest.fixture(scope="module")
def derm7pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("derm7pt") / "release_v0"
    return write_synthetic_release(root, num_cases=60, seed=2, image_size=(16, 24))


@pytest.mark.parametrize("target", ["diagnosis2", "criteria"])
def test_derm7pt_is_read_as_in_training(target: Any, derm7pt: Path, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"target": target, "columns": "paper", "image_size": (12, 16)}
    reading = saved(Derm7pt(derm7pt, "train", **kind).reading(), tmp_path)
    test = Derm7pt(derm7pt, "test", **kind)
    patients = derm7pt_patients(derm7pt / "meta" / "meta.csv", reading)
    named = tuple(name.replace(": ", "=") for name in patients.class_names)
    assert (len(patients), named) == (60, test.class_names)
    assert isinstance(reading.classes, dict) == (target == "criteria")
    for row, number in enumerate(test.sample_ids.tolist()):
        assert patients.ids[number] == str(number + 1)
        assert_alike(patients[number], test[row])
        assert patients[number]["error"] == ""


def test_a_case_keeps_its_number_whatever_the_order_of_the_rows(
    derm7pt: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(derm7pt, tmp_path / "release"))
    edited(root / "meta" / "meta.csv", lambda table: table.iloc[::-1])
    cases = Derm7pt(root, "train", image_size=16)
    table = pd.read_csv(root / "meta" / "meta.csv", dtype=str)
    kept = cases.reading().train_ids
    assert kept == {str(row): table["case_num"][row] for row in cases.sample_ids.tolist()}
    assert kept != {str(row): str(row + 1) for row in cases.sample_ids.tolist()}


def test_derm7pt_takes_cases_without_labels_and_tells_faults(derm7pt: Path, tmp_path: Path) -> None:
    reading = saved(Derm7pt(derm7pt, "train", image_size=(12, 16)).reading(), tmp_path)
    root = Path(shutil.copytree(derm7pt, tmp_path / "new"))
    path = root / "meta" / "meta.csv"

    def change(table: Table) -> Table:
        table.loc[0, ["location", "clinic"]] = ["tail", ""]
        table.loc[1, ["elevation", "location", "sex"]] = ""
        return table[["case_num", "clinic", "derm", "elevation", "location", "sex"]]

    derm = root / "images" / pd.read_csv(path)["derm"][1]
    derm.write_bytes(derm.read_bytes()[:300])
    patients = derm7pt_patients(edited(path, change), reading)
    assert patients[0]["inputs"]["clinic"] is None
    assert patients[0]["error"].startswith("meta: location='tail' is not among back, lower limbs")
    cell = torch.tensor([name.startswith("location=") for name in reading.feature_names])
    assert torch.equal(patients[0]["inputs"]["meta"].isnan(), cell)
    assert patients[1]["inputs"]["derm"] is None
    assert patients[1]["inputs"]["meta"].isnan().all()
    assert patients[1]["error"].startswith("derm: ")
    shutil.rmtree(root / "images")
    with pytest.raises(ValueError, match=r"images is not there: .* Move them there"):
        derm7pt_patients(path, reading)
