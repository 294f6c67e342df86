"""Batches in order, a metric over all conditions, scores by task, and what is written."""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from mmfusion.evaluation import MissingnessReport, evaluate
from mmfusion.missingness import PatternSet
from mmfusion.presence import collate
from mmfusion.recipes import reporting

TASKS = {"diagnosis": ("A", "B"), "veil": ("absent", "present")}


class Data(list[dict[str, Any]]):
    """Forty cases of two modalities; the first lacks ``a`` by nature, the second both."""

    names = ("a", "b")

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        labels = torch.stack([torch.arange(40) % 2, torch.arange(40) // 2 % 2], dim=1)
        present = torch.ones(40, 2, dtype=torch.bool)
        present[0, 0], present[1] = False, False
        signal = torch.cat([torch.eye(2)[column] for column in labels.unbind(1)], dim=1)
        vectors = signal + torch.randn(2, 40, 4, generator=draw)
        super().__init__(
            {
                "inputs": {
                    name: vectors[m, i] if present[i, m] else None
                    for m, name in enumerate(self.names)
                },
                "labels": labels[i],
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


JOIN = functools.partial(collate, names=Data.names, shapes={"a": (4,), "b": (4,)})


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture
def report(data: Data) -> MissingnessReport:
    loader = reporting.in_order(data, JOIN, batch_size=7)
    return evaluate(Sum(), loader, target="multiclass", classes=TASKS, num_bootstrap=0)


def test_batches_come_in_order_and_leave_the_callers_generator_alone(data: Data) -> None:
    before = torch.get_rng_state()
    found = torch.cat([batch["labels"] for batch in reporting.in_order(data, JOIN, 7)])
    assert torch.equal(found, torch.stack([item["labels"] for item in data]))
    assert torch.equal(torch.get_rng_state(), before)


def test_cases_are_those_that_have_something(report: MissingnessReport) -> None:
    assert [one.cases for one in report.scores] == [38, 39, 38, 39, 39, 39, 39]


def test_a_pooled_metric_ranks_the_cases_of_all_conditions_together(
    report: MissingnessReport,
) -> None:
    chances = np.concatenate([one.probabilities for one in report.scores])
    labels = np.concatenate([one.labels for one in report.scores])
    each = [roc_auc_score(labels[:, t], chances[:, 2 * t + 1]) for t in (0, 1)]
    assert reporting.pooled(report) == pytest.approx(np.mean(each))


def test_tasks_are_scored_as_if_each_were_alone(report: MissingnessReport) -> None:
    whole = report.scores[2]
    found = reporting.by_task(report)
    assert list(found) == list(TASKS)
    veil = roc_auc_score(whole.labels[:, 1], whole.probabilities[:, 3])
    assert found["veil"]["auc_macro"] == pytest.approx(veil)
    for metric in report.metrics:
        mean = np.mean([values[metric] for values in found.values()])
        assert whole.values[metric] == pytest.approx(mean)


def test_a_sole_task_has_no_tasks(data: Data) -> None:
    for item in data:
        item["labels"] = item["labels"][0]
    found = evaluate(Sum(), reporting.in_order(data, JOIN), target="multiclass", num_bootstrap=0)
    assert reporting.by_task(found) == {}


def test_patterns_are_written_as_they_were_scored(
    report: MissingnessReport, tmp_path: Path
) -> None:
    reporting.write_patterns(report, 40, tmp_path)
    names = {f"patterns-{rate}-0.json" for rate in (0.3, 0.5, 0.7)}
    assert {path.name for path in tmp_path.iterdir()} == names
    saved = PatternSet.load(tmp_path / "patterns-0.5-0.json")
    assert saved.hash == report.scores[5].sha256
    assert len(saved) == 40


def test_reports_are_written_and_read_back(report: MissingnessReport, tmp_path: Path) -> None:
    other = MissingnessReport(**{**vars(report), "method": "no CRTA, no memory"})
    reporting.write_reports([report, other], tmp_path)
    files = {"metrics.json", "metrics-no-CRTA-no-memory.json", "report.html", "report.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    again = MissingnessReport.from_json(tmp_path / "metrics-no-CRTA-no-memory.json")
    assert again.table() == other.table()
    assert other.method in (tmp_path / "report.html").read_text()


def test_methods_that_differ_by_signs_have_files_of_their_own(
    report: MissingnessReport, tmp_path: Path
) -> None:
    names = ("CMML", "CMML+", "CMML-", "CMML (no memory)")
    reports = [MissingnessReport(**{**vars(report), "method": name}) for name in names]
    reporting.write_reports(reports, tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    assert sorted(MissingnessReport.from_json(path).method for path in files) == sorted(names)


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    reporting.write_json(path, {"auc": math.nan, "path": Path("x"), "rows": [(1, 0.5)]})
    assert json.loads(path.read_text()) == {"auc": None, "path": "x", "rows": [[1, 0.5]]}
    with pytest.raises(TypeError):
        reporting.write_json(path, {"bad": object()})
    assert json.loads(path.read_text())["path"] == "x"
