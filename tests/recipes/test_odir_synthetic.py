"""The synthetic release: both true formats, shared causes, and nothing half-written."""

import json
import re
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

from mmfusion.recipes import odir_synthetic
from mmfusion.recipes.odir import Odir
from mmfusion.recipes.odir_format import COLUMNS, COUNTS, CSV, CSV_COLUMNS, LABELS, XLSX
from mmfusion.recipes.odir_synthetic import write_synthetic_odir


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Both tables with as many patients as the true release; the photos are not looked at."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(odir_synthetic, "draw_eyes", lambda *_: {"left": Dot(), "right": Dot()})
        for layout in ("kaggle", "xlsx"):
            write_synthetic_odir(folder / layout, num_patients=3500, layout=layout)
    return {
        "kaggle": pd.read_csv(folder / "kaggle" / CSV),
        "xlsx": pd.read_excel(folder / "xlsx" / XLSX),
    }


class Dot:
    """Stands for a photo that nobody reads."""

    def save(self, path: Path, **_: object) -> None:
        path.touch()


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Odir:
    root = tmp_path_factory.mktemp("some") / "odir"
    return Odir(write_synthetic_odir(root, num_patients=400, image_size=48), image_size=24)


def files_of(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        files_of(write_synthetic_odir(tmp_path / name, num_patients=30, seed=seed, image_size=16))
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert one == two
    assert one[CSV] != other[CSV]
    assert len(one) == len(pd.read_csv(tmp_path / "one" / CSV)) + 2


def test_labels_of_the_full_size_are_as_frequent_as_in_the_release(
    full: dict[str, pd.DataFrame],
) -> None:
    table = full["xlsx"]
    assert list(table.columns) == list(COLUMNS)
    assert table[[*LABELS]].sum().to_dict() == COUNTS
    assert (table[[*LABELS]].sum(axis=1) > 0).all()
    assert ((table["N"] == 1) == (table[[*LABELS]].sum(axis=1) == table["N"])).all()
    assert table["Patient Age"].mean() == pytest.approx(58, abs=2)
    assert set(table["Patient Sex"]) == {"Male", "Female"}


def test_numbers_have_gaps(full: dict[str, pd.DataFrame]) -> None:
    ids = full["xlsx"]["ID"]
    assert (len(ids), ids.min(), ids.max()) == (3500, 0, 4784)
    assert ids.is_monotonic_increasing
    assert ids.is_unique


def test_photos_of_the_full_size_are_missing_as_in_the_release(
    full: dict[str, pd.DataFrame],
) -> None:
    rows = full["kaggle"]
    assert list(rows.columns) == list(CSV_COLUMNS)
    assert len(rows) == 6392
    eyes = rows.groupby("ID")["filename"].agg(lambda names: "".join(sorted(names)))
    eyes = eyes.str.replace(r"\d+_|\.jpg", "", regex=True).value_counts()
    assert eyes.to_dict() == {"leftright": 3034, "left": 164, "right": 160}


def test_the_tables_agree(full: dict[str, pd.DataFrame]) -> None:
    rows = full["kaggle"][[*COLUMNS]].drop_duplicates().set_index("ID").sort_index()
    assert len(rows) == 3358
    pd.testing.assert_frame_equal(rows, full["xlsx"].set_index("ID").loc[rows.index])


def test_the_csv_has_the_habits_of_the_release(full: dict[str, pd.DataFrame]) -> None:
    rows = full["kaggle"]
    assert (rows["Patient Age"] == 1).sum() == pytest.approx(28, abs=4)
    assert not any(Path(path).exists() for path in rows["filepath"])
    assert [Path(path).name for path in rows["filepath"]] == rows["filename"].tolist()
    for column in ("Left-Diagnostic Keywords", "Right-Diagnostic Keywords"):
        assert 300 < rows[column].str.contains("\uff0c").sum() < 900
        assert not rows[column].str.contains(",").any()


def test_labels_of_single_eyes_contradict_those_of_the_patient(
    full: dict[str, pd.DataFrame],
) -> None:
    rows = full["kaggle"]
    targets = np.array([json.loads(target) for target in rows["target"]])
    labels = rows[[*LABELS]].to_numpy()
    assert (targets.sum(axis=1) == 1).all()
    assert [f"['{[*LABELS][i]}']" for i in targets.argmax(axis=1)] == rows["labels"].tolist()
    assert 1000 < (targets != labels).any(axis=1).sum() < 2500  # 1725 in truth
    assert 400 < ((targets * labels).sum(axis=1) == 0).sum() < 1500  # 775 in truth


def test_keywords_tell_the_diagnosis(full: dict[str, pd.DataFrame]) -> None:
    table = full["xlsx"]
    words = table["Left-Diagnostic Keywords"] + table["Right-Diagnostic Keywords"]
    for label, word in (("G", "glaucoma"), ("C", "cataract"), ("M", "myopia")):
        assert (words.str.contains(word) == (table[label] == 1)).all()


def test_photos_are_rgb_squares_of_the_size_asked_for(tmp_path: Path) -> None:
    write_synthetic_odir(tmp_path, num_patients=30, image_size=20)
    names = list((tmp_path / "preprocessed_images").iterdir())
    assert all(re.fullmatch(r"\d+_(left|right)\.jpg", path.name) for path in names)
    for path in names:
        with Image.open(path) as photo:
            assert (photo.size, photo.mode, photo.format) == ((20, 20), "RGB", "JPEG")


def test_photos_and_age_show_the_labels(patients: Odir) -> None:
    pixels = patients.photos[:, 0].flatten(1).float().numpy() / 255
    known = patients.present.all(1) & ~patients.table.isnan().any(1)
    age = patients.table[:, :1].numpy()
    ill = patients.labels[:, 0] == 0
    train = known & (torch.arange(len(patients)) % 2 == 0)
    test = known & ~train
    scores = {}
    for name, features in (("photo", pixels), ("age", age)):
        width = min(40, features.shape[1])
        model = make_pipeline(StandardScaler(), PCA(width), LogisticRegression(C=0.1))
        model.fit(features[train], ill[train])
        scores[name] = roc_auc_score(ill[test], model.predict_proba(features[test])[:, 1])
    assert scores["photo"] > scores["age"] > 0.55
    assert scores["photo"] > 0.7


def test_eyes_and_age_tell_about_each_other_beyond_the_labels(patients: Odir) -> None:
    known = patients.present.all(1) & ~patients.table.isnan().any(1)
    green, blue = (patients.photos[known][:, :, c, 8:16, 8:16].float() for c in (1, 2))
    seen = torch.cat([green.mean((2, 3)), blue.mean((2, 3)), patients.table[known][:, :1]], dim=1)
    labels = torch.cat([patients.labels[known], torch.ones(int(known.sum()), 1)], dim=1)
    rest = seen - labels @ torch.linalg.lstsq(labels, seen).solution
    left_green, right_green, left_blue, right_blue, age = range(5)
    related = torch.corrcoef(rest.T)
    assert related[left_green, right_green] > 0.5
    assert related[left_blue, right_blue] > 0.5
    assert related[left_blue, age] > 0.2


def test_an_existing_twin_is_reused_and_another_layout_is_refused(tmp_path: Path) -> None:
    root = write_synthetic_odir(tmp_path / "a", num_patients=30, image_size=16)
    before = files_of(root)
    assert write_synthetic_odir(root, num_patients=30, image_size=16) == root
    with pytest.raises(ValueError, match=r"(?s)layout=kaggle.*same release.*layout=xlsx.*Pass"):
        write_synthetic_odir(root, num_patients=30, image_size=16, layout="xlsx")
    assert files_of(root) == before


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(odir_synthetic, "draw_eyes", stop)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_odir(tmp_path / "a", num_patients=30, image_size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"num_patients": 29}, {"seed": -1}, {"image_size": 15}], ids=str
)
def test_sizes_too_small(tmp_path: Path, arguments: dict[str, int]) -> None:
    name, value = next(iter(arguments.items()))
    rule = rf"{name}={value}.*at least 30 patients.*Raise what is too small"
    with pytest.raises(ValueError, match=rule):
        write_synthetic_odir(tmp_path / "a", **arguments)


def test_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout='csv'.*Pass one of kaggle, xlsx"):
        write_synthetic_odir(tmp_path / "a", layout="csv")  # type: ignore[arg-type]
