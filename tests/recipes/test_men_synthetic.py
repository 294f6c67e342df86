"""The synthetic cohort: the true layout, all encodings, shared causes, nothing half-written."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from mmfusion.recipes import men_synthetic
from mmfusion.recipes.men import Men
from mmfusion.recipes.men_synthetic import CLASSES, COLUMNS, write_synthetic_men
from mmfusion.recipes.men_tumours import CAUSES, PLACES, draw_volumes
from mmfusion.recipes.volumes import read_volume

TINY = (12, 12, 8)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_men(tmp_path_factory.mktemp("men") / "a", num_patients=160, shape=TINY)


def table_of(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "table.csv", dtype={"patient_id": str})


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        digests(write_synthetic_men(tmp_path / name, num_patients=30, seed=seed, shape=TINY))
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert one == two
    assert one["table.csv"] != other["table.csv"]
    volumes = {name for name in set(one) & set(other) if name.startswith("volumes")}
    assert not any(one[name] == other[name] for name in volumes)


def test_the_table_is_that_of_the_layout(cohort: Path) -> None:
    table = table_of(cohort)
    assert list(table.columns) == COLUMNS
    assert table.patient_id.is_unique
    assert table.patient_id.str.fullmatch(r"\d{4}").all()
    assert table.patient_id.iloc[-1] != "0160"  # ids have gaps
    assert set(table.location) == set(PLACES)
    assert set(table.sex.dropna()) == {"female", "male"}
    blank = table[COLUMNS[2:-1]].isna().mean().mean()
    assert 0.02 < blank < 0.08


@pytest.mark.parametrize("num_patients", [30, 97, 160])
def test_classes_are_as_frequent_as_in_the_cohort_and_in_every_split(
    tmp_path: Path, num_patients: int
) -> None:
    root = write_synthetic_men(tmp_path / "a", num_patients=num_patients, shape=(8, 8, 8))
    counts = table_of(root).label.value_counts()
    assert counts.sum() == num_patients
    for label in ("grade2_invasive", "grade2_noninvasive"):
        assert counts[label] == max(8, round(CLASSES[label] * num_patients / 800))
    for number in range(3):
        split = pd.read_csv(root / "splits" / f"{number}.csv", dtype=str)
        merged = table_of(root).merge(split, on="patient_id", validate="one_to_one")
        assert len(merged) == num_patients
        assert (merged.groupby("split").label.nunique() == 3).all()
        assert set(merged.split) == set(SPLITS)


def test_files_have_every_encoding_and_gaps(cohort: Path) -> None:
    kinds: Counter[str] = Counter()
    for path in (cohort / "volumes").glob("*/*"):
        image = nib.load(path)
        kinds["nifti2" if isinstance(image, nib.Nifti2Image) else "nifti1"] += 1
        kinds[image.get_data_dtype().str] += 1
        assert image.header["sform_code"] == 1
        kinds["".join(nib.aff2axcodes(image.affine))] += 1
        kinds[f"{image.ndim} axes"] += 1
        kinds[path.suffix] += 1
        if image.dataobj.slope != 1:
            kinds["scaled"] += 1
            assert np.asarray(image.dataobj.get_unscaled()).min() < 0
        kinds[path.name.split(".")[0]] += 1
    encodings = ("nifti1", "nifti2", "<i2", ">i2", "<f8", "<f4", "scaled", "3 axes", "4 axes")
    for kind in (*encodings, "RAS", "LPS", "LAS", "LIA", ".gz", ".nii"):
        assert kinds[kind] >= 10, kind
    for name in ("ce_t1", "ce_t2_flair", "adc"):
        assert 0.8 * 160 < kinds[name] < 0.95 * 160
    assert kinds["tumour"] == 160 - 9


def test_background_is_zero_and_grids_differ(cohort: Path) -> None:
    for folder in list((cohort / "volumes").iterdir())[:12]:
        for path in folder.iterdir():
            volume = read_volume(path)
            name = path.name.split(".")[0]
            assert volume.data.shape[1:] == ((6, 6, 8) if name == "adc" else TINY)
            assert (volume.data == 0).float().mean() > 0.5
            assert volume.data.min() == 0
            spacing = volume.affine.diagonal()[:3] * volume.data.shape[1:]
            np.testing.assert_allclose(spacing, (240, 240, 155), rtol=1e-5)


def shown(name: str, **causes: float) -> float:
    """How bright the tumour is against the rest of the brain, or how large it is."""
    vector = np.array([causes.get(cause, 0.0) for cause in CAUSES])
    drawn = draw_volumes(vector, "convexity", (40, 40, 30), np.random.default_rng(5))
    labels, _ = drawn["tumour"]
    if name in ("tumour", "oedema"):
        return float((labels == (1 if name == "tumour" else 2)).sum())
    data, _ = drawn[name]
    if name == "adc":
        labels = labels[::2, ::2]
    return float(data[(labels == 1) & (data > 0)].mean() / data[(labels == 0) & (data > 0)].mean())


def test_volumes_show_the_causes() -> None:
    assert shown("tumour", size=2) > 1.5 * shown("tumour", size=-1)
    assert shown("oedema", oedema=2) > 1.5 * shown("oedema", oedema=-2)
    assert shown("adc", cellularity=2) < shown("adc", cellularity=-1) - 0.2
    assert shown("ce_t1", cellularity=2) > shown("ce_t1", cellularity=-1) + 0.1
    assert shown("ce_t2_flair", cellularity=2) < shown("ce_t2_flair", cellularity=-1) - 0.1


def test_the_rim_is_brighter_than_the_core() -> None:
    def contrast(rim: float) -> float:
        causes = np.array([1.5, 0, 0, rim])
        drawn = draw_volumes(causes, "convexity", (120, 120, 80), np.random.default_rng(5))
        labels, data = drawn["tumour"][0], drawn["ce_t1"][0]
        inside = np.argwhere(labels == 1)
        away = np.linalg.norm((inside - inside.mean(0)) / inside.std(0), axis=1)
        values = data[labels == 1]
        return float(values[away > np.quantile(away, 0.8)].mean() / values[away < 0.8].mean())

    assert contrast(2.0) > contrast(-2.0) + 0.3


def test_one_modality_tells_about_another_beyond_the_class(tmp_path: Path) -> None:
    """Within a class the darkness of ADC volumes follows the ADC value of the table."""
    cohort = write_synthetic_men(tmp_path / "a", num_patients=120, shape=(40, 40, 26))
    table = table_of(cohort).set_index("patient_id")
    rows = []
    for patient in table.index:
        found = {p.name.split(".")[0]: p for p in (cohort / "volumes" / patient).iterdir()}
        if {"adc", "tumour"} <= set(found):
            labels = read_volume(found["tumour"]).data[0, ::2, ::2]
            data = read_volume(found["adc"]).data[0]
            inside = (labels == 1) & (data > 0)
            if inside.any():
                rows.append((table.label[patient], table.adc_value[patient], data[inside].mean()))
    frame = pd.DataFrame(rows, columns=["label", "cell", "volume"]).dropna()
    frame["volume"] = frame.volume.astype(float)
    within = frame[["cell", "volume"]] - frame.groupby("label")[["cell", "volume"]].transform(
        "mean"
    )
    assert within.cell.corr(within.volume) > 0.25


def test_grades_differ_in_the_table(cohort: Path) -> None:
    table = table_of(cohort)
    high = table.label != "grade1"
    assert table.tumour_area[high].median() > table.tumour_area[~high].median()
    assert table.adc_value[high].median() < table.adc_value[~high].median()
    invasive = table.label == "grade2_invasive"
    assert table.oedema_area[invasive].median() > 1.5 * table.oedema_area[~high].median()


def test_an_existing_twin_is_reused_and_another_cohort_is_not_overwritten(tmp_path: Path) -> None:
    root = write_synthetic_men(tmp_path / "deep" / "er", num_patients=30, shape=TINY)
    (root / "mine.txt").write_text("kept", encoding="utf-8")
    before = digests(root)
    assert write_synthetic_men(root, num_patients=30, shape=TINY) == root
    with pytest.raises(ValueError, match=r"(?s)seed=0.*reused only.*seed=1.*Pass another root"):
        write_synthetic_men(root, num_patients=30, seed=1, shape=TINY)
    assert digests(root) == before


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(men_synthetic, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_men(tmp_path / "a", num_patients=30, shape=TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"num_patients": 29}, {"seed": -1}, {"shape": (8, 7, 8)}], ids=str
)
def test_sizes_too_small(tmp_path: Path, arguments: dict[str, object]) -> None:
    name, value = next(iter(arguments.items()))
    rule = rf"{name}={re.escape(str(value))}.*at least 30 patients.*Raise what is too small"
    with pytest.raises(ValueError, match=rule):
        write_synthetic_men(tmp_path / "a", **arguments)  # type: ignore[arg-type]


def test_it_is_read_whole(cohort: Path) -> None:
    cases = [Men(cohort, split, size=(8, 8, 4)) for split in SPLITS]
    assert sum(map(len, cases)) == 160
    assert all(case.is_synthetic and not case.broken for case in cases)
    assert torch.cat([case.present.any(1) for case in cases]).all()
