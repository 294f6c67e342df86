"""The training loop: exact resume, selection on validation, and files that are whole."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from mmfusion.recipes import checkpoint, training
from mmfusion.recipes.batches import EpochBatches
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.training import fit

sys.path.insert(0, str(Path(__file__).parent))
import resumable  # beside this file, where its subprocess finds it too

SCRIPT = Path(__file__).with_name("resumable.py")
QUIET: dict[str, Any] = {"collate": resumable.collate, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run."""
    return resumable.run(tmp_path_factory.mktemp("whole"))


def script(*arguments: Any, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    kind: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **kind)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> None:
    try:
        errors = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode == code, errors


def test_training_lowers_the_loss_and_says_what_it_did(whole: dict[str, Any]) -> None:
    losses = [row["loss"] for row in whole["history"]]
    assert [row["epoch"] for row in whole["history"]] == [0, 1, 2, 3]
    assert losses[-1] < losses[0]
    assert {"score", "task", "reconstruction", "alignment", "contrastive"} < set(
        whole["history"][0]
    )
    assert whole["final"] == pytest.approx(max(row["score"] for row in whole["history"]), abs=1e-6)


def test_killed_at_a_random_step_and_resumed_it_ends_where_the_whole_run_ends(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    step = int(torch.randint(7, 23, (), generator=torch.Generator().manual_seed(0)))
    ended(script(tmp_path, step), -signal.SIGKILL)
    assert len(checkpoint.load(tmp_path / "last.safetensors")[1]["history"]) == step // 6
    ended(script(tmp_path))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["final"] == pytest.approx(whole["final"], abs=1e-6)
    for ours, theirs in zip(found["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.json",
    ]


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_joint_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    where |= {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    both = [script(tmp_path, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    for process in both:
        ended(process)
    found = json.loads((tmp_path / "metrics.json").read_text())
    one = resumable.run(tmp_path / "one", net=resumable.model(0.0))
    for ours, theirs in zip(found["history"], one["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    net = resumable.model()
    before = torch.get_rng_state()
    fit(net, resumable.samples(), resumable.loss_on_all, Plan(epochs=1), tmp_path, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_is_resumed_without_a_step(whole: dict[str, Any], tmp_path: Path) -> None:
    resumable.run(tmp_path)
    again = resumable.run(tmp_path, data=resumable.Fatal(resumable.samples(), 0), resume=True)
    assert again == whole


def test_without_resume_an_old_run_is_not_continued(whole: dict[str, Any], tmp_path: Path) -> None:
    resumable.run(tmp_path)
    assert resumable.run(tmp_path) == whole


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    net, scores = resumable.model(), iter([0.2, 0.9, 0.5, 0.4])
    weights: list[torch.Tensor] = []

    def score(model: nn.Module) -> float:
        weights.append(next(model.parameters()).clone())
        return next(scores)

    plan = Plan(epochs=9, patience=2)
    history = fit(net, resumable.samples(), score, plan, tmp_path, **QUIET)
    assert [row["score"] for row in history] == [0.2, 0.9, 0.5, 0.4]
    assert torch.equal(next(net.parameters()), weights[1])
    assert not net.training


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    resumable.run(tmp_path)
    plan = replace(resumable.PLAN, hide_rate=0.1)
    with pytest.raises(ValueError, match=r"(?s)another hide_rate \(0.5\).*same.*without resume"):
        resumable.run(tmp_path, plan=plan, resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"last.safetensors cannot be read.*Remove it"):
        resumable.run(tmp_path, resume=True)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, {"weight": torch.ones(2)}, {})

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(path, fail)
    assert checkpoint.load(path)[0]["weight"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_a_nan_loss_stops_and_names_the_sample(tmp_path: Path) -> None:
    """Sample 7 breaks in the second epoch; what the first one wrote stays."""
    rows = resumable.samples()

    class Breaking(list[dict[str, Any]]):
        asked = 0

        def __getitem__(self, index: Any) -> Any:
            self.asked += 1
            broken = index == 7 and self.asked > resumable.NUM_SAMPLES
            vector = torch.full((4,), torch.inf)
            found = rows[index]
            return found | {"inputs": {"a": vector, "b": vector}} if broken else found

    net = resumable.model(check_values=False)
    with pytest.raises(FloatingPointError, match=r"(?s)epoch 1.*sample_ids \[7\].*Look at"):
        resumable.run(tmp_path, Breaking(rows), net=net)
    assert len(checkpoint.load(tmp_path / "last.safetensors")[1]["history"]) == 1
    assert net.state_dict()["head.classify.weight"].isfinite().all()


def test_a_nan_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation score is NaN.*each class"):
        fit(
            resumable.model(),
            resumable.samples(),
            lambda _: float("nan"),
            Plan(),
            tmp_path,
            **QUIET,
        )


def test_bf16_trains(tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    try:
        plan = Plan(epochs=2, mixed_precision="bf16", learning_rate=1e-2)
        net = resumable.model()
        history = fit(net, resumable.samples(), resumable.loss_on_all, plan, tmp_path, **QUIET)
        assert history[1]["loss"] < history[0]["loss"]
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    finally:
        AcceleratorState._reset_state(True)


def test_fp16_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"mixed_precision='fp16' without a GPU.*Pass 'bf16'"):
        fit(nn.Linear(1, 1), [], lambda model: 0.0, Plan(mixed_precision="fp16"), tmp_path, **QUIET)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"epochs": 0}, "epochs=0: it is a count.*Raise"),
        ({"hide_rate": 2.0}, "hide_rate=2.0.*0 to"),
    ],
)
def test_a_plan_refuses_what_is_no_plan(argument: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan(**argument)


def test_an_epoch_takes_every_sample_once_and_fills_the_last_batch() -> None:
    batches = EpochBatches(10, batch_size=4, seed=0)
    first = list(batches)
    assert [len(rows) for rows in first] == [4, 4, 4]
    assert set(itertools.chain(*first)) == set(range(10))
    assert first == list(batches)
    batches.epoch = 1
    assert first != list(batches)


def test_balanced_batches_draw_every_class_alike() -> None:
    classes = torch.tensor([0] * 20 + [1] * 3 + [2] * 7)
    drawn = torch.tensor(
        [*itertools.chain(*EpochBatches(30, batch_size=5, seed=0, classes=classes))]
    )
    assert classes[drawn].bincount().tolist() == [10, 10, 10]
    assert drawn.bincount(minlength=30)[:20].max() == 1
    assert drawn.bincount(minlength=30)[20:23].min() == 3


def test_the_parts_of_the_ranks_make_up_the_batch() -> None:
    kind: dict[str, Any] = {"batch_size": 6, "seed": 0}
    parts = [list(EpochBatches(12, rank=rank, ranks=3, **kind)) for rank in range(3)]
    joint = [[*itertools.chain(*rows)] for rows in zip(*parts, strict=True)]
    assert joint == list(EpochBatches(12, **kind))


def test_a_batch_that_does_not_divide_over_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"batch_size=5 on 2 ranks.*evenly.*another batch_size"):
        EpochBatches(10, batch_size=5, seed=0, ranks=2)


def test_hiding_is_drawn_for_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        training, "hide", lambda present, *rest: seen.append(present.shape) or present
    )
    run = object.__new__(training._Run)
    run.plan = Plan()
    run.accelerator = type("Two", (), {"process_index": 1, "num_processes": 2})()
    present = torch.ones(3, 2, dtype=torch.bool)
    assert run._hide(present, torch.Generator()).shape == (3, 2)
    assert seen == [(6, 2)]
