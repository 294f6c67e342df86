"""Splits by patient: each patient on one side, the same on every machine, checked when loaded."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmfusion.recipes.splits import folds, hash_split, load_split, save_split, split_patients


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_every_patient_is_in_one_split_and_shares_are_kept() -> None:
    split = split_patients(range(1003), seed=4)
    assert sorted(chain(*split.values())) == list(range(1003))
    assert {name: len(ids) for name, ids in split.items()} == {
        "train": 702,
        "valid": 100,
        "test": 201,
    }


def test_the_order_of_the_ids_does_not_matter_but_the_seed_does() -> None:
    ids = [f"p{i}" for i in range(50)]
    assert split_patients(ids, seed=1) == split_patients(ids[::-1], seed=1)
    assert split_patients(ids, seed=1) != split_patients(ids, seed=2)


def test_the_draw_is_pinned() -> None:
    """Published results refer to this hash: no platform and no version may change it."""
    assert hash_split(split_patients(range(100), seed=0))[:16] == "b7652e8acd0d3618"
    assert (
        hash_split(split_patients(range(100), labels=[i % 3 for i in range(100)]))[:16]
        == "2ceb1f654f3392d7"
    )
    assert hash_split(folds(range(100), 5, seed=0)[1])[:16] == "cbaf6aec375e5a30"


def test_labels_are_spread_over_the_splits_in_any_order_of_the_patients() -> None:
    labels = ["rare"] * 20 + ["common"] * 180
    split = split_patients(range(200), labels=labels)
    counts = {name: Counter(labels[i] for i in ids) for name, ids in split.items()}
    assert counts == {
        "train": {"common": 126, "rare": 14},
        "valid": {"common": 18, "rare": 2},
        "test": {"common": 36, "rare": 4},
    }
    assert split == split_patients(range(199, -1, -1), labels=labels[::-1])


@pytest.mark.parametrize("kind", [np.array, pd.Series, torch.tensor])
def test_columns_arrays_and_tensors_are_taken(kind: Any, tmp_path: Path) -> None:
    ids, labels = list(range(30)), [i % 2 for i in range(30)]
    split = split_patients(kind(ids), labels=kind(labels))
    assert split == split_patients(ids, labels=labels)
    save_split(tmp_path / "split.json", split)
    assert load_split(tmp_path / "split.json", kind(ids)) == split


def test_folds_test_every_patient_once_and_never_where_they_train() -> None:
    labels = [i % 2 for i in range(40)]
    found = folds(range(40), 5, labels=labels, valid=0.25)
    assert sorted(chain(*(fold["test"] for fold in found))) == list(range(40))
    for fold in found:
        assert list(fold) == ["train", "valid", "test"]
        assert sorted(chain(*fold.values())) == list(range(40))
        assert [len(part) for part in fold.values()] == [24, 8, 8]
        assert [sum(i % 2 for i in part) for part in fold.values()] == [12, 4, 4]
    assert found == folds(range(39, -1, -1), 5, labels=labels[::-1], valid=0.25)
    assert found != folds(range(40), 5, seed=1, labels=labels, valid=0.25)


def test_the_hash_tells_who_is_where_and_not_in_which_order() -> None:
    one = {"train": [1, 2], "test": [3]}
    assert hash_split(one) == hash_split({"test": [3], "train": [2, 1]})
    assert hash_split(one) != hash_split({"train": [1, 3], "test": [2]})
    assert hash_split(one) != hash_split({"train": ["1", "2"], "test": ["3"]})


@pytest.mark.parametrize("ids", [[3, 1, 2, 4], ["ü", "a", "0010", "10"]])
def test_a_split_survives_the_file(ids: list[Any], tmp_path: Path) -> None:
    split = {"train": sorted(ids[:3]), "test": ids[3:]}
    assert save_split(tmp_path / "split.json", split) == hash_split(split)
    assert load_split(tmp_path / "split.json", ids) == split
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("train", "test", "place"),
    [
        ([1, 2, 9], [3, 4], "the splits have patients that ids lacks: [9] (1 in all)"),
        ([1, 2], [3], "the splits lack patients of ids: [4] (1 in all)"),
        ([1, 2, 3], [3, 4], "the splits share patients: [3] (1 in all)"),
        (["1", "2", "3"], ["4"], "patients that ids lacks: ['1', '2', '3', '4'] (4 in all)"),
    ],
)
def test_a_split_of_other_patients(
    train: list[Any], test: list[Any], place: str, tmp_path: Path
) -> None:
    path = tmp_path / "split.json"
    content = {"sha256": "", "split": {"train": train, "test": test}}
    path.write_text(json.dumps(content), encoding="utf-8")
    with raises(str(path), place, "deals each patient of one data set out once", "Pass the ids"):
        load_split(path, [1, 2, 3, 4])


def test_a_split_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    save_split(path, {"train": [1, 2], "test": [3]})
    content = json.loads(path.read_text())
    content["split"] = {"train": [1, 3], "test": [2]}
    path.write_text(json.dumps(content), encoding="utf-8")
    with raises(str(path), "sha256 is not that of its patients", "Restore the file"):
        load_split(path, [1, 2, 3])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"split": [1], "sha256": ""}', None])
def test_a_file_that_is_no_split(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with raises(str(path), "cannot be read", "written by save_split", "Save it again"):
        load_split(path, [1])


def test_a_patient_listed_twice() -> None:
    with raises("ids has 4 entries (repeated: [2])", "stands there once", "Pass sorted(set(ids))"):
        split_patients([1, 2, 2, 3])


def test_labels_of_another_length() -> None:
    with raises("ids has 3 entries", "labels 2", "with one class or none", "a label for each"):
        split_patients([1, 2, 3], labels=[0, 1])


@pytest.mark.parametrize(
    "fractions",
    [{"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}, {"train": 0.99, "test": 0.01}, {}],
)
def test_shares_that_are_none(fractions: dict[str, float]) -> None:
    with raises(f"fractions={fractions} of 10 patients", "add up to 1", "Pass shares such as"):
        split_patients(range(10), fractions)


def test_a_class_with_too_few_patients() -> None:
    with raises("labels", "went to 'train'", "a patient for every split", "Merge rare classes"):
        split_patients(range(10), labels=[0] * 9 + [1])


@pytest.mark.parametrize("num_folds", [1, 4])
def test_folds_that_cannot_be(num_folds: int) -> None:
    with raises(f"num_folds={num_folds} with 9 patients (of the rarest class: 3)", "Pass fewer"):
        folds(range(9), num_folds, labels=[0] * 6 + [1] * 3)
