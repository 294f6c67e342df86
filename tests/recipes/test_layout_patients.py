"""New patients of a layout are read as those of the training, and faults are told, not raised."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import mmfusion
from mmfusion.recipes.custom import Custom
from mmfusion.recipes.custom_synthetic import write_synthetic_custom
from mmfusion.recipes.encoders import TableEncoder
from mmfusion.recipes.layout_patients import custom_patients, men_patients
from mmfusion.recipes.men import Men
from mmfusion.recipes.men_layout import MEN_LAYOUT
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.predict import Member, predict
from mmfusion.recipes.reading import Patients, Reading

Table = pd.DataFrame
MIDDLE = "tumour: no box, so that the middle of the first volume was taken"


def saved(reading: Reading, folder: Path) -> Reading:
    """What a later process has of it."""
    reading.save(folder)
    return Reading.load(folder)


def edited(path: Path, change: Callable[[Table], Table | None]) -> Path:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    found = change(table)
    (table if found is None else found).to_csv(path, index=False)
    return path


def assert_alike(found: dict[str, Any], wanted: dict[str, Any], but: str = "") -> None:
    assert list(found["inputs"]) == list(wanted["inputs"])
    for name, value in wanted["inputs"].items():
        if name == but:
            continue
        if value is None:
            assert found["inputs"][name] is None, name
        else:
            assert torch.equal(found["inputs"][name].nan_to_num(9), value.nan_to_num(9)), name


def iterate(patients: Patients) -> list[dict[str, Any]]:
    return [patients[row] for row in range(len(patients))]


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reading, Custom]:
    folder = tmp_path_factory.mktemp("custom")
    toml = write_synthetic_custom(folder / "data", num_cases=60)
    kind: dict[str, Any] = {"image_size": (12, 16), "volume_size": (8, 8, 4)}
    reading = saved(Custom(toml, "train", **kind).reading(), folder)
    return toml.parent, reading, Custom(toml, "test", **kind)


@pytest.fixture
def ward(custom: tuple[Path, Reading, Custom], tmp_path: Path) -> Path:
    """A folder of new cases, of which nobody knows the outcome."""
    root = Path(shutil.copytree(custom[0], tmp_path / "ward"))
    (root / "layout.toml").unlink()
    edited(root / "table.csv", lambda table: table.drop(columns=["outcome", "patient"]))
    return root


def test_new_cases_are_read_as_the_training_reads_them(custom: Any, ward: Path) -> None:
    _, reading, test = custom
    patients = custom_patients(ward / "table.csv", reading)
    assert (patients.names, patients.num_classes) == (test.names, 2)
    assert patients.class_names == test.class_names
    assert patients.layout.photos == test.layout.photos
    for row, id in enumerate(test.ids):
        item = patients[patients.ids.index(id)]
        assert_alike(item, test[row])
        assert item["error"] == ""


def test_rows_of_files_that_have_been_repaired_are_not_kept(custom: Any, ward: Path) -> None:
    _, reading, _ = custom
    photo = next((ward / "photos").iterdir())
    whole = photo.read_bytes()
    photo.write_bytes(whole[:200])
    predicted(custom_patients(ward / "table.csv", reading), ward)
    predicted(custom_patients(ward / "table.csv", reading), ward)  # the same again
    photo.write_bytes(whole)
    with pytest.raises(ValueError, match=r"made with another state of files: .*Move it away"):
        predicted(custom_patients(ward / "table.csv", reading), ward)


def test_a_file_of_two_new_cases_is_taken_for_neither(custom: Any, ward: Path) -> None:
    _, reading, _ = custom
    one, other = "v1", "v1.2"
    edited(ward / "table.csv", lambda table: table.iloc[:2].assign(visit=[one, other]))
    [first, *_] = sorted((ward / "photos").iterdir())
    shutil.copy(first, ward / "photos" / f"{other}.png")
    for item in iterate(custom_patients(ward / "table.csv", reading)):
        assert item["inputs"].get("photo") is None
        assert f"{other}.png fits 'photos/{{visit}}.*' for 'v1' and for 'v1.2'" in item["error"]


def test_one_bad_file_or_cell_is_missing_and_the_rest_is_read(custom: Any, ward: Path) -> None:
    _, reading, _ = custom
    good = custom_patients(ward / "table.csv", reading)
    whole = [
        id
        for row, id in enumerate(good.ids)
        if all(
            value is not None and not value.isnan().any() for value in good[row]["inputs"].values()
        )
    ]
    photo, scan, gone, vector, two, cell, number = whole[:7]

    def change(table: Table) -> Table:
        table = table.set_index("visit", drop=False)
        table.loc[gone, "scan_file"] = "scans/nowhere.nii"
        table.loc[cell, "ward"] = "space"
        table.loc[number, ["age", "ward", "pressure"]] = ["old", "", ""]
        return table

    edited(ward / "table.csv", change)
    path = ward / "photos" / f"{photo}.png"
    path.write_bytes(path.read_bytes()[:200])
    path = ward / "scans" / f"{scan}.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    np.save(ward / "signals" / f"{vector}.npy", np.ones(7))
    shutil.copy(ward / "photos" / f"{two}.png", ward / "photos" / f"{two}.jpg")
    patients = custom_patients(ward / "table.csv", reading)
    told = {id: patients[row]["error"] for row, id in enumerate(patients.ids)}
    assert f"photos/{photo}.png cannot be decoded" in told[photo]
    assert f"{scan}.nii.gz cannot be read" in told[scan]
    assert told[scan].count("nii.gz cannot") == 1
    assert "nowhere.nii is not there" in told[gone]
    assert "has 7 numbers, and the first one 32" in told[vector]
    assert "all fit 'photos/{visit}.*'" in told[two]
    assert told[cell] == "clinic: ward='space' is not among acute, routine of the training rows"
    assert told[number] == "clinic: age='old' is not a finite number"
    assert {id for id, error in told.items() if error} == set(whole[:7])
    lost = {photo: "photo", scan: "scan", gone: "scan", vector: "signal", two: "photo"}
    for id, name in (lost | {cell: "clinic", number: "clinic"}).items():
        row = patients.ids.index(id)
        assert_alike(patients[row], good[row], but=name)
        value = patients[row]["inputs"][name]
        if id == cell:
            assert value.isnan().tolist() == [True, True, False, False]
        else:
            assert value is None or value.isnan().all()

    rows = predicted(patients, ward)
    assert rows["id"].tolist() == list(patients.ids)
    assert rows.set_index("id").loc[number, "synthesised"] == "clinic"
    assert rows["probability_ill"].astype(float).between(0, 1).all()


def predicted(patients: Patients, folder: Path) -> Table:
    """With any model of those modalities."""
    torch.manual_seed(0)
    modalities: dict[str, Any] = {
        name: (Flat(), torch.Size(shape).numel()) for name, shape in patients.shapes.items()
    }
    modalities["clinic"] = TableEncoder(("ward", "ward", "age", "pressure"), 8), 8
    model = mmfusion.CMML(modalities, num_classes=2, dim=8)
    how: dict[str, Any] = {"samples": 2, "progress": False}
    predict([Member(model, patients)], folder / "predictions.csv", **how)
    return pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)


class Flat(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_a_number_beyond_all_numbers_stops_nobody(custom: Any, ward: Path) -> None:
    def change(table: Table) -> None:
        table.loc[0, "age"] = "1e39"

    patients = custom_patients(edited(ward / "table.csv", change), custom[1])
    rows = predicted(patients, ward)
    assert rows["error"][0].startswith("clinic: the encoder of 'clinic' returned NaN or Inf")
    assert "clinic" in rows["synthesised"][0]
    assert not rows["error"][1:].any()


def test_wrong_tables_are_refused_before_anything_is_read(custom: Any, ward: Path) -> None:
    path, reading = ward / "table.csv", custom[1]
    with pytest.raises(ValueError, match=r"nobody.csv cannot be read"):
        custom_patients(ward / "nobody.csv", reading)
    edited(path, lambda table: pd.concat([table, table[:1]]))
    with pytest.raises(ValueError, match=r"ids of 61 patients, .*'v0000'.* join the rows"):
        custom_patients(path, reading)
    edited(path, lambda table: table[:0])
    with pytest.raises(ValueError, match=r"table.csv has no row: there is one for each"):
        custom_patients(path, reading)
    edited(path, lambda table: table.drop(columns=["age"]))
    with pytest.raises(ValueError, match=r"it must have age too"):
        custom_patients(path, reading)


@pytest.fixture(scope="module")
def men(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reading, Men]:
    folder = tmp_path_factory.mktemp("men")
    root = write_synthetic_men(folder / "cohort", num_patients=36, seed=1, shape=(20, 20, 14))
    kind: dict[str, Any] = {"size": (12, 12, 6), "clip": (0, 1500), "margin": 3.0}
    reading = saved(Men(root, "train", **kind).reading(), folder)
    return root, reading, Men(root, "test", **kind)


@pytest.fixture
def clinic(men: tuple[Path, Reading, Men], tmp_path: Path) -> Path:
    root = Path(shutil.copytree(men[0], tmp_path / "clinic"))
    shutil.rmtree(root / "splits")
    edited(root / "table.csv", lambda table: table.drop(columns=["label"]))
    return root


def test_new_patients_are_read_as_the_training_reads_them(
    men: Any, clinic: Path, tmp_path: Path
) -> None:
    _, reading, test = men
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        patients = men_patients(clinic / "table.csv", reading, cache)
        for row, id in enumerate(test.patient_ids):
            item = patients[patients.ids.index(id)]
            assert_alike(item, test[row])
            assert item["error"] == (MIDDLE if id in test.uncut else "")
    assert 0 < len(test.uncut) < len(test)
    assert patients.class_names == test.class_names
    assert list((tmp_path / "cache").glob("*.npy"))


def test_a_damaged_volume_map_or_cell_is_told(men: Any, clinic: Path) -> None:
    _, reading, test = men
    cut = [row for row, id in enumerate(test.patient_ids) if id not in test.uncut]
    whole = [test.patient_ids[row] for row in cut if test.present[row].all()]
    volume, label_map, without = whole[:3]

    def change(table: Table) -> Table:
        table = table.set_index("patient_id", drop=False)
        table.loc[volume, "location"] = "elsewhere"
        return table

    edited(clinic / "table.csv", change)
    for id, name in ((volume, "adc"), (label_map, "tumour")):
        [path] = (clinic / "volumes" / id).glob(f"{name}.nii*")
        path.write_bytes(path.read_bytes()[:90])
    for path in (clinic / "volumes" / without).glob("tumour.nii*"):
        path.unlink()
    patients = men_patients(clinic / "table.csv", reading)
    items = {id: patients[patients.ids.index(id)] for id in (volume, label_map, without)}
    assert items[volume]["inputs"]["adc"] is None
    assert "adc: " in items[volume]["error"]
    assert "table: location='elsewhere' is not among" in items[volume]["error"]
    assert_alike(
        {"inputs": items[volume]["inputs"] | {"table": None}},
        {"inputs": test[test.patient_ids.index(volume)]["inputs"] | {"table": None}},
        but="adc",
    )
    assert items[label_map]["error"].startswith("tumour: ")
    assert items[label_map]["error"].endswith(MIDDLE)
    assert items[without]["error"] == MIDDLE
    assert all(value is not None for value in items[without]["inputs"].values())


def test_a_volume_may_be_called_as_the_label_map_is(men: Any, clinic: Path) -> None:
    _, reading, _ = men
    volumes = reading.coding["layout"]["volumes"]
    names = {name: "tumour" if name == "adc" else name for name in volumes}
    layout = reading.coding["layout"] | {
        "volumes": {names[name]: place for name, place in volumes.items()}
    }
    renamed = dataclasses.replace(
        reading,
        names=tuple(names.get(name, name) for name in reading.names),
        shapes={names.get(name, name): shape for name, shape in reading.shapes.items()},
        coding=reading.coding | {"layout": layout},
    )
    found = men_patients(clinic / "table.csv", renamed)
    wanted = men_patients(clinic / "table.csv", reading)
    assert any(one["inputs"]["adc"] is not None for one in wanted)
    for one, other in zip(iterate(found), iterate(wanted), strict=True):
        assert (one["inputs"]["tumour"] is None) == (other["inputs"]["adc"] is None)
        if one["inputs"]["tumour"] is not None:
            assert torch.equal(one["inputs"]["tumour"], other["inputs"]["adc"])


def test_a_box_that_is_none_is_told(men: Any, clinic: Path) -> None:
    corners = ("x0", "y0", "z0", "x1", "y1", "z1")
    layout = dataclasses.replace(MEN_LAYOUT, tumour="", box=corners)
    coding = men[1].coding | {"layout": dataclasses.asdict(layout)}
    reading = dataclasses.replace(men[1], coding=coding)

    def change(table: Table) -> None:
        for column, mm in zip(corners, (-20, -20, -20, 20, 20, 20), strict=True):
            table[column] = str(mm)
        table.loc[0, "x1"] = "-30"
        table.loc[1, list(corners)] = ""

    patients = men_patients(edited(clinic / "table.csv", change), reading)
    assert "box: 0001: x0, y0, z0, x1, y1, z1 = -20" in patients[0]["error"]
    assert (
        patients[1]["error"] == "tumour: no box, so that the middle of the first volume was taken"
    )
    assert patients[2]["error"] == ""
