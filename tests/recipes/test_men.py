"""The reader, on a synthetic cohort and on its like with faults."""

import dataclasses
import functools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmfusion.presence import collate
from mmfusion.recipes.men import Men
from mmfusion.recipes.men_layout import BRATS_LAYOUT, MEN_LAYOUT
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.men_table import read_patients
from mmfusion.recipes.splits import folds, split_patients
from mmfusion.recipes.synthetic import MARKER
from mmfusion.recipes.volume_inputs import prepare
from mmfusion.recipes.volumes import centre_box, read_volume, tumour_box

SPLITS = ("train", "valid", "test")
SIZE = (12, 12, 6)
read = functools.partial(Men, size=SIZE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("men") / "cohort"
    return write_synthetic_men(root, num_patients=36, seed=1, shape=(20, 20, 14))


@pytest.fixture
def cohort(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "cohort"))


def table_of(root: Path) -> pd.DataFrame:
    table = pd.read_csv(root / "table.csv", dtype=str, keep_default_na=False)
    return table.set_index("patient_id", drop=False)


def put(root: Path, patient: str, column: str, cell: str) -> None:
    table = table_of(root)
    table.loc[patient, column] = cell
    table.to_csv(root / "table.csv", index=False)


def whole_patient(root: Path, split: str = "test") -> tuple[int, str]:
    """Position and id of the first patient of a split that has everything."""
    cases = read(root, split)
    found = [
        i for i in range(len(cases)) if cases.present[i].all() and not cases.table[i].isnan().any()
    ]
    found = [i for i in found if cases.patient_ids[i] not in cases.uncut]
    return found[0], cases.patient_ids[found[0]]


def file_of(root: Path, patient: str, name: str) -> Path:
    return next((root / "volumes" / patient).glob(f"{name}.nii*"))


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_an_item_has_the_shapes_of_the_docstring(written: Path) -> None:
    cases = read(written, "train")
    item = cases[int(cases.present.all(1).nonzero()[0])]
    assert sorted(item) == ["inputs", "labels", "sample_ids"]
    assert list(item["inputs"]) == list(cases.names)
    for name, value in item["inputs"].items():
        assert (value.shape, value.dtype) == (cases.shapes[name], torch.float32)
        if name != "table":
            assert value[value != 0].mean().abs() < 1e-3
            assert value[value != 0].std() == pytest.approx(1, abs=0.01)
    assert type(item["labels"]) is type(item["sample_ids"]) is int


def test_labels_ids_and_gaps_are_those_of_the_release(written: Path) -> None:
    table, seen = table_of(written), []
    for split in SPLITS:
        cases = read(written, split)
        for i, patient in enumerate(cases.patient_ids):
            item = cases[i]
            assert table.index[item["sample_ids"]] == patient
            assert cases.class_names[item["labels"]] == table.label[patient]
            files = {p.name.split(".")[0] for p in (written / "volumes" / patient).iterdir()}
            here = [name in files for name in cases.names[:3]]
            assert cases.present[i].tolist() == [*here, True]
            assert [item["inputs"][name] is not None for name in cases.names[:3]] == here
            assert (patient in cases.uncut) == ("tumour" not in files)
        assert cases.class_counts.tolist() == [int((cases.labels == c).sum()) for c in range(3)]
        assert cases.broken == ()
        seen += cases.patient_ids
    assert sorted(seen) == sorted(table.index)


def test_a_loader_gives_batches_for_a_model(written: Path) -> None:
    cases = read(written, "train")
    join = functools.partial(collate, names=cases.names, shapes=cases.shapes)
    batches = list(DataLoader(cases, batch_size=8, collate_fn=join))
    for key, expected in (("present", cases.present), ("labels", cases.labels)):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


def test_two_classes_join_both_kinds_of_grade_two(written: Path) -> None:
    three, two = read(written, "test"), read(written, "test", target="grade")
    assert two.class_names == ("grade1", "grade2")
    assert two.tasks == {"label": two.class_names}
    assert torch.equal(two.labels, three.labels.clamp(max=1))
    assert two.num_classes == len(two.class_counts) == 2


def test_numbers_are_standardised_by_the_training_rows_alone(written: Path) -> None:
    cases = read(written, "train")
    column = cases.feature_names.index("age")
    ages = cases.table[:, column]
    assert ages[~ages.isnan()].mean().abs() < 1e-5
    assert ages[~ages.isnan()].std(correction=0) == pytest.approx(1, abs=1e-4)
    numbers = pd.to_numeric(table_of(written).age)
    train = numbers[list(cases.patient_ids)]
    test = read(written, "test")
    expected = (numbers[list(test.patient_ids)] - train.mean()) / train.std(ddof=0)
    np.testing.assert_allclose(test.table[:, column], expected, rtol=1e-4, atol=1e-5)


def test_blank_cells_are_nan_and_a_blank_row_is_absent(cohort: Path) -> None:
    position, patient = whole_patient(cohort)
    put(cohort, patient, "sex", "")
    cases = read(cohort, "test")
    blank = [name.startswith("sex=") for name in cases.feature_names]
    assert cases[position]["inputs"]["table"].isnan().tolist() == blank
    assert cases.present[position].all()
    for column in ("location", "age", "adc_value", "tumour_area", "oedema_area"):
        put(cohort, patient, column, "")
    assert read(cohort, "test").present[position].tolist() == [True, True, True, False]


def test_all_volumes_of_a_patient_show_one_box(cohort: Path) -> None:
    """ADC has half the resolution and another orientation."""
    position, patient = whole_patient(cohort)
    for name in ("ce_t1", "adc"):
        path = file_of(cohort, patient, name)
        volume = read_volume(path)
        index = np.indices(volume.data.shape[1:]).reshape(3, -1)
        mm = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
        ramp = (1000 + mm[0] + 3 * mm[2]).reshape(volume.data.shape[1:])
        nib.save(nib.Nifti1Image(ramp, volume.affine), path)
    inputs = read(cohort, "test")[position]["inputs"]
    assert inputs["adc"].std() > 0.5
    inner = (0, slice(2, -2), slice(2, -2), slice(1, -1))
    torch.testing.assert_close(inputs["adc"][inner], inputs["ce_t1"][inner], atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), ("cannot be read",)),
        (
            lambda path: nib.save(nib.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)), path),
            ("NaN",),
        ),
        (
            lambda path: nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 3)), np.eye(4)), path),
            ("3 volumes",),
        ),
        (lambda path: nib.save(nib.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4)), path), ("zero",)),
    ],
    ids=["truncated", "nan", "4-D", "zero"],
)
def test_a_broken_volume_is_named_or_absent(cohort: Path, fault: Any, parts: Any) -> None:
    position, patient = whole_patient(cohort)
    old = file_of(cohort, patient, "adc")
    path = old.rename(old.with_name("adc.nii.gz"))
    fault(path)
    with raises(f"patient {patient}, adc='{path}'", *parts, "in this split: 1", "on_broken"):
        read(cohort, "test")
    cases = read(cohort, "test", on_broken="missing")
    assert [(b.patient_id, b.column, b.value) for b in cases.broken] == [
        (patient, "adc", str(path))
    ]
    assert cases.present[position].tolist() == [True, True, False, True]
    assert cases[position]["inputs"]["adc"] is None
    read(cohort, "train")


def test_a_broken_label_map_is_named_or_the_middle_is_taken(cohort: Path) -> None:
    position, patient = whole_patient(cohort)
    file_of(cohort, patient, "tumour").write_bytes(b"no map")
    with raises(f"patient {patient}, tumour=", "cannot be read", "on_broken"):
        read(cohort, "test")
    cases = read(cohort, "test", on_broken="missing")
    assert [b.column for b in cases.broken] == ["tumour"]
    assert patient in cases.uncut
    assert cases.present[position].all()


def test_a_box_in_the_table_cuts_as_the_label_map_does(cohort: Path) -> None:
    position, patient = whole_patient(cohort)
    expected = read(cohort, "test", margin=5.0)[position]["inputs"]["ce_t1"]
    box = tumour_box(file_of(cohort, patient, "tumour"), margin=3.0).flatten().tolist()
    table, columns = table_of(cohort), ["x0", "y0", "z0", "x1", "y1", "z1"]
    for column, number in zip(columns, box, strict=True):
        table[column] = ""
        table.loc[patient, column] = repr(number)
    table.to_csv(cohort / "table.csv", index=False)
    file_of(cohort, patient, "tumour").unlink()
    cases = read(cohort, "test", margin=2.0, layout=dataclasses.replace(MEN_LAYOUT, box=columns))
    assert patient not in cases.uncut
    found = cases[position]["inputs"]["ce_t1"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_without_a_box_the_middle_of_the_first_readable_volume_is_cut(cohort: Path) -> None:
    position, patient = whole_patient(cohort)
    file_of(cohort, patient, "tumour").unlink()
    file_of(cohort, patient, "ce_t1").write_bytes(b"broken")
    cases = read(cohort, "test", on_broken="missing")
    assert cases.present[position].tolist() == [False, True, True, True]
    assert patient in cases.uncut
    path = file_of(cohort, patient, "adc")
    box = centre_box(read_volume(file_of(cohort, patient, "ce_t2_flair")))
    expected = prepare(path, box, SIZE, None)
    assert torch.equal(cases[position]["inputs"]["adc"], expected)


def test_an_unknown_category_at_test_time_is_named_or_absent(cohort: Path) -> None:
    position, patient = whole_patient(cohort)
    put(cohort, patient, "location", "orbit")
    with raises(f"patient {patient}, location='orbit'", "of the training rows", "on_broken"):
        read(cohort, "test")
    cases = read(cohort, "test", on_broken="missing")
    assert [b[:3] for b in cases.broken] == [(patient, "location", "orbit")]
    lost = [name.startswith("location=") for name in cases.feature_names]
    assert cases.table[position].isnan().tolist() == lost


def test_a_path_in_the_table_that_is_not_there(cohort: Path, tmp_path: Path) -> None:
    table = table_of(cohort)
    files = {p: [f for f in (cohort / "volumes" / p).glob("ce_t1*")] for p in table.index}
    table["path"] = [str(f[0].relative_to(cohort)) if f else "" for f in files.values()]
    _, patient = whole_patient(cohort)
    table.loc[patient, "path"] = "volumes/nowhere.nii"
    table.to_csv(cohort / "table.csv", index=False)
    toml = tmp_path / "cohort.toml"
    toml.write_text(
        'numeric = ["age"]\n[volumes]\nt1 = "path"\n[classes]\n'
        'grade1 = "low"\ngrade2_invasive = "high"\ngrade2_noninvasive = "high"\n'
    )
    with raises(f"patient {patient}, t1=", "nowhere.nii is not there", "on_broken='missing'"):
        read(cohort, "test", layout=toml)
    cases = read(cohort, "test", layout=toml, on_broken="missing")
    assert cases.names == ("t1", "table")
    assert cases.class_names == ("low", "high")
    expected = [bool(table.path[p]) and p != patient for p in cases.patient_ids]
    assert cases.present[:, 0].tolist() == expected
    assert cases.feature_names == ("age",)


def test_folds_and_repeated_splits(written: Path) -> None:
    patients = read_patients(written)
    ids, labels = zip(*((p.patient_id, p.label) for p in patients), strict=True)
    tested = []
    for fold in folds(ids, 3, valid=0.34, labels=labels):
        cases = read(written, "test", splits=fold)
        assert set(cases.patient_ids) == set(fold["test"])
        tested += cases.patient_ids
    assert sorted(tested) == sorted(ids)
    assert read(written, "test", splits=1).patient_ids != read(written, "test").patient_ids
    alone = split_patients(ids, {"train": 0.6, "valid": 0.2, "test": 0.2}, labels=labels)
    assert len(read(written, "valid", splits=alone)) == len(alone["valid"])


def test_a_cache_gives_the_same_and_is_not_made_twice(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read(written, "valid")
    cached = read(written, "valid", cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    maps = len(cached) - len(cached.uncut)
    assert len(files) == int(cached.present[:, :3].sum()) + maps
    for name in ("prepare", "tumour_box"):
        made = f"mmfusion.recipes.men_volumes.{name}"
        monkeypatch.setattr(made, lambda *_: pytest.fail("made again"))
    again = read(written, "valid", cache=tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == files
    for i in range(len(plain)):
        for name in plain.names:
            one, two, three = (cases[i]["inputs"][name] for cases in (plain, cached, again))
            if one is None:
                assert two is three is None
            else:
                assert one.equal(two) or name == "table"
                assert two.equal(three) or name == "table"


def test_settings_make_a_cache_of_their_own(written: Path, tmp_path: Path) -> None:
    counts = []
    for settings in ({}, {"clip": (0.0, 1200.0)}, {"margin": 9.0}, {"size": (8, 8, 4)}):
        read(written, "valid", cache=tmp_path, **settings)
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == sorted(set(counts))


def test_a_transform_sees_the_volumes_present_and_not_the_table(written: Path) -> None:
    seen: list[list[str]] = []

    def note(volumes: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sorted(volumes))
        return {name: -volume for name, volume in volumes.items()}

    cases = read(written, "train")
    lacking = int((~cases.present[:, 2]).nonzero()[0])
    before = cases[lacking]["inputs"]
    cases.transform = note
    after = cases[lacking]["inputs"]
    assert seen == [sorted(name for name in cases.names[:3] if before[name] is not None)]
    assert after["adc"] is None
    assert all(torch.equal(after[name], -before[name]) for name in seen[0])


def test_only_the_marker_makes_a_cohort_synthetic(cohort: Path) -> None:
    assert read(cohort, "test").is_synthetic
    (cohort / MARKER).unlink()
    assert not read(cohort, "test").is_synthetic


def test_the_layout_of_brats_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, splits = [], {split: [] for split in SPLITS}
    for number in range(9):
        name = f"BraTS-MEN-0000{number}-000"
        (tmp_path / name).mkdir()
        labels = np.zeros((12, 12, 10), dtype=np.uint8)
        labels[3:6, 4:7, 4:6] = (1, 3)[number % 2]
        labels[1, 1, 1] = 2  # oedema: not part of the box
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        for kind in ("t1n", "t1c", "t2w", "t2f"):
            data = (labels > 0) * 500.0 + rng.uniform(10, 20, size=labels.shape)
            nib.save(nib.Nifti1Image(data, affine), tmp_path / name / f"{name}-{kind}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), tmp_path / name / f"{name}-seg.nii.gz")
        rows.append((name, 1 + number // 3))
        splits[SPLITS[number % 3]].append(name)
    pd.DataFrame(rows, columns=["patient_id", "grade"]).to_csv(tmp_path / "table.csv", index=False)
    cases = Men(tmp_path, "test", layout=BRATS_LAYOUT, splits=splits, size=(3, 3, 2), margin=0)
    assert cases.names == ("t1n", "t1c", "t2w", "t2f")
    assert "table" not in cases.shapes
    assert cases.labels.tolist() == [0, 1, 2]
    assert cases.present.shape == (3, 4)
    assert cases.present.all()
    assert list(cases[0]["inputs"]) == list(cases.names)
    assert cases.uncut == ()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"split": "val"}, ("split='val'", "Pass one of train, valid, test")),
        ({"target": "who"}, ("target='who'", "Pass one of subtype, grade")),
        ({"on_broken": "skip"}, ("on_broken='skip'", "Pass one of raise, missing")),
        ({"splits": 9}, ("splits/9.csv cannot be read", "pass splits=")),
        ({"splits": {"train": ["0001"], "valid": [], "test": []}}, ("patients in no split",)),
        ({"size": (8, 8)}, ("size=(8, 8)", "counts voxels along", "Pass")),
        ({"clip": (5, 1)}, ("clip=(5, 1)", "lowest and the highest")),
        ({"layout": "nowhere.toml"}, ("nowhere.toml", "a TOML file")),
    ],
)
def test_wrong_arguments(written: Path, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(*parts):
        Men(written, **{"split": "test", **arguments})


def test_a_root_without_a_table(tmp_path: Path) -> None:
    with raises("table.csv cannot be read", "Correct the table, or the layout"):
        Men(tmp_path, "train")


def test_what_a_killed_process_left_in_a_cache_is_swept(written: Path, tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        part = tmp_path / f".part-{name}"
        part.mkdir()
        (part / "tensor.npy").touch()
        os.utime(part, (time.time() - age,) * 2)
    Men(written, "valid", size=(8, 8, 4), cache=tmp_path)
    assert [part.name for part in tmp_path.glob(".part-*")] == [".part-new"]
