"""The synthetic release: the true format, shared causes, and nothing half-written."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmfusion.recipes import derm7pt_synthetic
from mmfusion.recipes.derm7pt import Derm7pt
from mmfusion.recipes.derm7pt_format import COLUMNS, VALUES
from mmfusion.recipes.derm7pt_synthetic import CLASS_SPLITS, write_synthetic_release

SPLITS = ("train", "valid", "test")
TINY = (16, 24)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_release(tmp_path_factory.mktemp("some") / "release_v0", num_cases=400)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many cases as the true release."""
    root = tmp_path_factory.mktemp("full") / "release_v0"
    return write_synthetic_release(root, num_cases=1011, image_size=(16, 16))


@pytest.fixture(scope="module")
def cases(release: Path) -> dict[str, Derm7pt]:
    return {split: Derm7pt(release, split, image_size=(16, 24)) for split in SPLITS}


def table_of(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "meta" / "meta.csv")


def files_of(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        files_of(write_synthetic_release(tmp_path / name, num_cases=30, seed=seed, image_size=TINY))
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert one == two
    assert one["images/NEL/NEL025.JPG"] != other["images/NEL/NEL025.JPG"]
    assert one["meta/meta.csv"] != other["meta/meta.csv"]


def test_counts_of_the_full_size_are_those_of_the_release(full: Path) -> None:
    counts = [Derm7pt(full, split, image_size=1).class_counts.tolist() for split in SPLITS]
    assert [sum(row) for row in counts] == [413, 203, 395]
    assert dict(zip(CLASS_SPLITS, zip(*counts, strict=True), strict=True)) == CLASS_SPLITS
    table = table_of(full)
    for column in set(VALUES) - {"location"}:
        assert table[column].value_counts().to_dict() == VALUES[column], column


def test_places_are_roughly_as_frequent_as_in_the_release(full: Path) -> None:
    counts = table_of(full)["location"].value_counts()
    assert counts.to_dict() == pytest.approx(VALUES["location"], rel=0.35, abs=15)


def test_upstream_reads_the_same_cases(full: Path) -> None:
    table = table_of(full)
    assert list(table.columns) == COLUMNS
    for split in SPLITS:
        indexes = list(pd.read_csv(full / "meta" / f"{split}_indexes.csv")["indexes"])
        rows = table.iloc[indexes]
        assert all((full / "images" / name).is_file() for name in [*rows.clinic, *rows.derm])
        ours = Derm7pt(full, split, image_size=1, target="diagnosis2")
        melanoma = rows.diagnosis.str.contains("melanoma")
        nevus = rows.diagnosis.str.contains("nevus")
        assert ours.class_counts.tolist() == [nevus.sum(), melanoma.sum()]
        assert (rows.case_num - 1).tolist() == indexes


def test_table_has_the_habits_of_the_release(full: Path) -> None:
    table = table_of(full)
    assert table.case_num.tolist() == list(range(1, 1012))
    repeats = table.clinic == table.derm
    assert repeats.sum() == 9
    assert (table.notes.notna() == repeats).all()
    assert 0 < table.case_id.notna().sum() < 40
    assert table.drop(columns=["case_id", "notes"]).notna().all(axis=None)
    assert (table.management[table.diagnosis.str.contains("melanoma")] == "excision").all()
    raw = (full / "meta" / "meta.csv").read_bytes()
    assert raw.startswith(b"case_num,")
    assert b"\r" not in raw


def test_photo_names_have_the_habits_of_the_release(full: Path) -> None:
    table = table_of(full)
    names = set(table.clinic) | set(table.derm)
    found = {p.relative_to(full / "images").as_posix() for p in (full / "images").glob("*/*")}
    assert found == names
    assert len(names) == 2013 == len({name.lower() for name in names})
    assert all(re.fullmatch(r"\w{3}/[A-Za-z]\w+\d{2,3}(xyz)?\.(jpg|JPG)", name) for name in names)
    assert {"NEL", "Fhl", "A1l"} <= {name.split("/")[0] for name in names}
    assert sum(name.endswith(".JPG") for name in names) == pytest.approx(126, abs=10)
    assert 5 <= sum("xyz" in name for name in names) <= 40
    assert (table.clinic.str.split("/").str[0] == table.derm.str.split("/").str[0]).all()


def test_most_photos_have_one_size_and_some_another(release: Path) -> None:
    sizes = []
    for name in table_of(release).derm:
        with Image.open(release / "images" / name) as photo:
            sizes.append(photo.size)
    assert sizes.count((96, 64)) > 0.9 * len(sizes)
    assert sizes.count((84, 56)) == len(sizes) - sizes.count((96, 64)) > 0


@pytest.mark.parametrize("num_cases", [30, 77])
def test_every_class_is_in_every_split(tmp_path: Path, num_cases: int) -> None:
    write_synthetic_release(tmp_path, num_cases=num_cases, image_size=TINY)
    for split in SPLITS:
        assert Derm7pt(tmp_path, split, image_size=8).class_counts.min() >= 1


def auc(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> float:
    """Nevus against melanoma by a linear model, on the test split."""
    width = min(30, features["train"].shape[1])
    model = make_pipeline(StandardScaler(), PCA(width), LogisticRegression(C=0.05, max_iter=2000))
    kept = {s: np.isin(labels[s], (1, 2)) for s in SPLITS}
    model.fit(
        np.concatenate([features[s][kept[s]] for s in ("train", "valid")]),
        np.concatenate([labels[s][kept[s]] for s in ("train", "valid")]),
    )
    scores = model.predict_proba(features["test"][kept["test"]])[:, 1]
    return float(roc_auc_score(labels["test"][kept["test"]] == 2, scores))


def test_dermoscopy_tells_most_then_the_clinical_photo_then_the_table(
    release: Path, cases: dict[str, Derm7pt]
) -> None:
    labels = {s: c.labels.numpy() for s, c in cases.items()}
    pixels = {s: c.photos.flatten(2).numpy() / 255 for s, c in cases.items()}
    clinic = auc({s: p[:, 0] for s, p in pixels.items()}, labels)
    derm = auc({s: p[:, 1] for s, p in pixels.items()}, labels)
    safe = auc({s: c.meta.numpy() for s, c in cases.items()}, labels)
    leaking = {s: Derm7pt(release, s, columns="paper", image_size=1).meta for s in SPLITS}
    assert derm > clinic + 0.04
    assert clinic > safe + 0.04
    assert safe > 0.55
    assert auc({s: m.numpy() for s, m in leaking.items()}, labels) > safe + 0.1


def test_one_photo_tells_about_the_other_beyond_the_diagnosis(cases: dict[str, Derm7pt]) -> None:
    train = cases["train"]
    complete = train.present.all(dim=1)
    middle = train.photos[complete, :, :, 7:9, 11:13].float().mean(dim=(3, 4))
    rim = train.photos[complete, :, :, 0, 0].float()
    redness = (middle - rim)[:, :, 0] - (middle - rim)[:, :, 1]  # (N, 2)
    labels = train.labels[complete]
    for kind in labels.unique():
        redness[labels == kind] -= redness[labels == kind].mean(dim=0)
    assert torch.corrcoef(redness.T)[0, 1] > 0.3


def test_elevation_in_the_table_follows_the_cause_that_raises_the_criteria(full: Path) -> None:
    table = table_of(full)
    score = table.groupby("level_of_diagnostic_difficulty").seven_point_score.mean()
    assert score["low"] < score["medium"] < score["high"]
    raised = table.assign(veil=table.blue_whitish_veil == "present").groupby("elevation").veil
    assert raised.mean()["flat"] < raised.mean()["nodular"]


def test_an_existing_twin_is_reused(tmp_path: Path) -> None:
    root = write_synthetic_release(tmp_path / "deep" / "er", num_cases=30, image_size=TINY)
    (root / "meta" / "mine.txt").write_text("kept", encoding="utf-8")
    before = (root / "meta" / "meta.csv").stat().st_mtime_ns
    assert write_synthetic_release(root, num_cases=30, image_size=TINY) == root
    assert (root / "meta" / "mine.txt").exists()
    assert (root / "meta" / "meta.csv").stat().st_mtime_ns == before
    assert [path.name for path in root.parent.iterdir()] == ["er"]


def test_a_folder_of_other_arguments_is_not_overwritten(tmp_path: Path) -> None:
    root = write_synthetic_release(tmp_path / "a", num_cases=30, image_size=TINY)
    before = files_of(root)
    rule = r"(?s)seed=0.*reused only if it is the same release.*seed=1.*Pass another root"
    with pytest.raises(ValueError, match=rule):
        write_synthetic_release(root, num_cases=30, seed=1, image_size=TINY)
    assert files_of(root) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_synthetic_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "release_v0"
    precious = root if kind == "file" else root / "meta.csv"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("true data", encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)holds 'no SYNTHETIC.txt'.*never overwritten.*Pass"):
        write_synthetic_release(root, num_cases=30)
    assert precious.read_text(encoding="utf-8") == "true data"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(derm7pt_synthetic, "_write_csv", stop)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_release(tmp_path / "a", num_cases=30, image_size=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_comes_second_takes_the_release_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_rename = os.rename

    def late(source: Path, root: Path) -> None:
        shutil.copytree(source, root)
        real_rename(source, root)  # fails: the folder is there, and full

    monkeypatch.setattr(os, "rename", late)
    root = write_synthetic_release(tmp_path / "a", num_cases=30, image_size=TINY)
    assert len(Derm7pt(root, "train", image_size=8)) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "arguments", [{"num_cases": 29}, {"seed": -1}, {"image_size": (15, 24)}], ids=str
)
def test_sizes_too_small(tmp_path: Path, arguments: dict[str, object]) -> None:
    name, value = next(iter(arguments.items()))
    rule = rf"{name}={re.escape(str(value))}.*at least 30 cases.*Raise what is too small"
    with pytest.raises(ValueError, match=rule):
        write_synthetic_release(tmp_path / "a", **arguments)  # type: ignore[arg-type]
