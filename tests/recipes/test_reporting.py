"""Scores against scikit-learn's own, fixed patterns, and what is written."""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor, nn

from mmfusion.missingness import PatternSet
from mmfusion.presence import collate
from mmfusion.recipes import reporting

TASKS = {"diagnosis": ("A", "B", "C")}


class Data(list[dict[str, Any]]):
    """Forty cases of two modalities; the first lacks ``a`` by nature, the second both."""

    names = ("a", "b")
    tasks = TASKS

    def __init__(self) -> None:
        self.labels = torch.arange(40) % 3
        self.present = torch.ones(40, 2, dtype=torch.bool)
        self.present[0, 0] = False
        self.present[1] = False
        vectors = torch.eye(3)[self.labels] + torch.randn(2, 40, 3)
        super().__init__(
            {
                "inputs": {
                    name: vectors[m, i] if self.present[i, m] else None
                    for m, name in enumerate(self.names)
                }
            }
            for i in range(40)
        )


class Output(NamedTuple):
    logits: Tensor


class Sum(nn.Module):
    """Adds up what is present."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: dict[str, Tensor], present: Tensor) -> Output:
        parts = [value * present[:, i, None] for i, value in enumerate(inputs.values())]
        return Output(self.weight * torch.stack(parts).sum(0))


@pytest.fixture
def data() -> Data:
    return Data()


join = functools.partial(collate, names=Data.names, shapes={"a": (3,), "b": (3,)})


def test_scores_are_those_of_scikit_learn() -> None:
    labels, logits = torch.arange(60) % 3, torch.randn(60, 3)
    found = reporting.score(logits, labels, TASKS)
    probabilities = logits.softmax(1).double().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)
    auc = roc_auc_score(labels, probabilities, multi_class="ovr")
    assert found["auc"] == pytest.approx(auc, abs=1e-6)
    assert found["balanced_accuracy"] == balanced_accuracy_score(labels, logits.argmax(1))


def test_two_classes_have_one_auc() -> None:
    labels, logits = torch.arange(20) % 2, torch.randn(20, 2)
    found = reporting.score(logits, labels, {"diagnosis": ("NEV", "MEL")})
    assert found["auc"] == roc_auc_score(labels, logits.softmax(1)[:, 1])


def test_tasks_side_by_side_are_scored_one_by_one() -> None:
    labels, logits = (
        torch.stack([torch.arange(30) % 3, torch.arange(30) % 2], 1),
        torch.randn(30, 5),
    )
    found = reporting.score(logits, labels, {**TASKS, "veil": ("absent", "present")})
    alone = reporting.score(logits[:, :3], labels[:, 0], TASKS)
    assert found["tasks"]["diagnosis"] == alone
    both = [one["auc"] for one in found["tasks"].values()]
    assert found["auc"] == pytest.approx(np.mean(both))


def test_an_undefined_score_is_nan_with_its_reason() -> None:
    found = reporting.score(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), TASKS)
    assert math.isnan(found["auc"])
    assert found["undefined"] == ["diagnosis: none of 4 cases is C"]
    assert math.isnan(reporting.score(torch.zeros(0, 3), torch.zeros(0).long(), TASKS)["auc"])


def test_predict_keeps_order_and_lays_patterns_over_what_is_there(data: Data) -> None:
    present = torch.tensor([True, False]).expand(40, -1)
    logits = reporting.predict(Sum(), data, join, present, batch_size=7)
    for i, item in enumerate(data):
        seen = item["inputs"]["a"]
        assert torch.equal(logits[i], torch.zeros(3) if seen is None else seen)


def test_subsets_are_scored_on_cases_that_have_them(data: Data, tmp_path: Path) -> None:
    report = reporting.evaluate(Sum(), data, join, tmp_path, seed=0)
    cases = {row["name"]: row["cases"] for row in report["subsets"]}
    assert cases == {"b": 39, "a": 38, "a + b": 38}
    assert [row["rate"] for row in report["rates"]] == [0.3, 0.5, 0.7]


def test_patterns_are_saved_and_the_same_again(data: Data, tmp_path: Path) -> None:
    first, again = (reporting.evaluate(Sum(), data, join, tmp_path, seed=5) for _ in range(2))
    other = reporting.evaluate(Sum(), data, join, tmp_path, seed=6)
    assert first == again
    assert first["rates"][0]["sha256"] != other["rates"][0]["sha256"]
    saved = PatternSet.load(tmp_path / "patterns-test-0.3.json")
    assert saved.hash == other["rates"][0]["sha256"]
    assert saved.realised() == other["rates"][0]["realised"]


def test_the_table_has_every_row_and_both_kinds_of_rates(data: Data, tmp_path: Path) -> None:
    report = reporting.evaluate(Sum(), data, join, tmp_path, seed=0)
    text = reporting.table({"CMML": report, "a rather long name": report})
    lines = text.splitlines()
    assert len(lines) == 1 + 3 + 3 + 3
    assert len({len(line) for line in lines[:7]}) == 1
    assert f"{report['subsets'][2]['auc']:.3f}" in lines[3]
    assert "nominal): realised sample_rate 0." in lines[-1]


def test_the_plot_is_a_picture_with_its_title(data: Data, tmp_path: Path) -> None:
    report = reporting.evaluate(Sum(), data, join, tmp_path, seed=0)
    pixels = []
    for title in ("SYNTHETIC", "REAL"):
        reporting.plot({"CMML": report}, tmp_path / "auc.png", title)
        with Image.open(tmp_path / "auc.png") as picture:
            pixels.append(np.asarray(picture.convert("L")))
    differs = (pixels[0] != pixels[1]).any(1)
    assert differs.any()
    assert not differs[60:].any()  # the title, and nothing else


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    reporting.write_json(path, {"auc": math.nan, "path": Path("x"), "rows": [(1, 0.5)]})
    assert json.loads(path.read_text()) == {"auc": None, "path": "x", "rows": [[1, 0.5]]}
    with pytest.raises(TypeError):
        reporting.write_json(path, {"bad": object()})
    assert json.loads(path.read_text())["path"] == "x"
