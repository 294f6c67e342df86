"""The training loop: exact resume, selection on validation, and files that are whole."""

import errno
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mmfusion.recipes import checkpoint
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.state import facts_of
from mmfusion.recipes.training import fit

sys.path.insert(0, str(Path(__file__).parent))
import resumable  # beside this file, where its subprocess finds it too

SCRIPT = Path(__file__).with_name("resumable.py")
QUIET: dict[str, Any] = {"collate": resumable.collate, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return resumable.run(folder) | {"folder": folder}


def script(*arguments: Any, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    kind: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
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


def same_files(ours: Path, theirs: Path) -> None:
    """Weights, memory, average and optimiser, bit by bit."""
    for name in ("best.safetensors", "last.safetensors"):
        found, about = checkpoint.load(ours / name)
        wanted, about_theirs = checkpoint.load(theirs / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():  # bytes, because an empty slot has NaN labels
            assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key
        assert [row["loss"] for row in about["history"]] == [
            row["loss"] for row in about_theirs["history"]
        ]


@pytest.mark.parametrize(
    ("number", "code", "kept"),
    [(signal.SIGKILL, -signal.SIGKILL, "epochs"), (signal.SIGTERM, 143, "steps")],
)
def test_stopped_at_a_random_step_and_resumed_it_ends_where_the_whole_run_ends(
    whole: dict[str, Any], tmp_path: Path, number: int, code: int, kept: str
) -> None:
    step = int(torch.randint(7, 23, (), generator=torch.Generator().manual_seed(number)))
    ended(script(tmp_path, step, int(number)), code)
    about = checkpoint.load(tmp_path / "last.safetensors")[1]
    done = len(about["history"]) * 6 + about["step"]
    assert done == (step // 6 * 6 if kept == "epochs" else step + 1)
    ended(script(tmp_path))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["final"] == whole["final"]
    assert found["history"] == whole["history"]
    same_files(tmp_path, whole["folder"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.json",
    ]


def test_sigterm_to_all_processes_of_a_job_with_workers_saves_too(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    """The signal comes from a worker, at its third batch of the first epoch."""
    process = script(tmp_path, 2, int(signal.SIGTERM), WORKERS="2")
    ended(process, 143)
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    assert checkpoint.load(tmp_path / "last.safetensors")[1]["history"] == []
    ended(script(tmp_path, WORKERS="2"))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["history"] == whole["history"]


def ranks(*arguments: Any, **environment: str) -> "list[subprocess.Popen[str]]":
    """The script on two gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment["WORLD_SIZE"] = "2"
    return [script(*arguments, RANK=rank, LOCAL_RANK=rank, **environment) for rank in "01"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "ema"),
    [({}, resumable.PLAN.ema), ({"SHARDED": "1"}, 0.0)],
    ids=["DDP", "FSDP2"],
)
def test_two_processes_train_like_one_with_the_joint_batch(
    tmp_path: Path, environment: dict[str, str], ema: float
) -> None:
    """Stopped in the midst of an epoch, and resumed."""
    for code, arguments in ((143, (9, int(signal.SIGTERM))), (0, ())):
        for process in ranks(tmp_path, *arguments, **environment):
            ended(process, code)
    found = json.loads((tmp_path / "metrics.json").read_text())
    plan = replace(resumable.PLAN, accumulate=1, ema=ema)
    one = resumable.run(tmp_path / "one", plan=plan, net=resumable.model(0.0))
    for ours, theirs in zip(found["history"], one["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    net = resumable.model()
    before = torch.get_rng_state()
    fit(net, resumable.samples(), resumable.loss_on_all, Plan(epochs=1), tmp_path, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_is_resumed_without_a_step(whole: dict[str, Any], tmp_path: Path) -> None:
    resumable.run(tmp_path)
    again = resumable.run(
        tmp_path, data=resumable.Fatal(resumable.samples(), 0, signal.SIGKILL), resume=True
    )
    assert again == {key: whole[key] for key in again}


def test_without_resume_an_old_run_is_not_continued(whole: dict[str, Any], tmp_path: Path) -> None:
    resumable.run(tmp_path)
    again = resumable.run(tmp_path)
    assert again == {key: whole[key] for key in again}


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


def test_resuming_with_other_samples_is_refused(tmp_path: Path) -> None:
    """As many, but others: patients of the test split would be trained on."""
    resumable.run(tmp_path)
    others = [row | {"sample_ids": row["sample_ids"] + 1} for row in resumable.samples()]
    with pytest.raises(ValueError, match=r"(?s)another set of samples .*same.*without resume"):
        resumable.run(tmp_path, resumable.Noisy(others), resume=True)


def test_the_ids_of_a_data_set_are_taken_from_its_attribute() -> None:
    class Cases(list[Any]):
        sample_ids = torch.tensor([3, 4])

    assert facts_of(Cases([{}, {}])) == facts_of([{"sample_ids": 3}, {"sample_ids": 4}])
    assert facts_of(range(3)) == {"number of samples": 3}


def test_resuming_with_encoders_frozen_meanwhile_is_refused(tmp_path: Path) -> None:
    resumable.run(tmp_path)
    net = resumable.model()
    next(net.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"another choice of frozen parameters .*without resume"):
        resumable.run(tmp_path, net=net, resume=True)


def test_a_new_run_that_dies_at_once_leaves_no_weights_of_an_old_one(tmp_path: Path) -> None:
    resumable.run(tmp_path)

    class Broken(resumable.Noisy):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        resumable.run(tmp_path, Broken(resumable.samples()))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"last.safetensors cannot be read.*or remove it"):
        resumable.run(tmp_path, resume=True)


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
    with pytest.raises(
        FloatingPointError, match=r"(?s)epoch 1, step \d.*sample_ids \[7\].*Look at"
    ):
        resumable.run(tmp_path, Breaking(rows), net=net)
    assert len(checkpoint.load(tmp_path / "last.safetensors")[1]["history"]) == 1
    assert net.state_dict()["head.classify.weight"].isfinite().all()


def test_a_folder_that_takes_no_files_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = resumable.Fatal(resumable.samples(), 0, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"folder=.*takes no files.*Pass another"):
        resumable.run(tmp_path / "file" / "run", data)


def test_a_write_that_fails_leaves_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full_later(*arguments: Any, **kind: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments, **kind)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full_later)
    with pytest.raises(OSError, match=r"could not be written.*No space left.*go on with resume"):
        resumable.run(tmp_path)
    kept = len(checkpoint.load(tmp_path / "last.safetensors")[1]["history"])
    assert kept in (1, 2)
    monkeypatch.undo()
    assert len(resumable.run(tmp_path, resume=True)["history"]) == resumable.PLAN.epochs


def test_what_tensorboard_is_told(tmp_path: Path) -> None:
    plan = replace(resumable.PLAN, epochs=2)
    resumable.run(tmp_path, plan=plan, track=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "task", "learning_rate", "score", "samples_per_second", "peak_memory_mb"} < set(
        events.Tags()["scalars"]
    )
    rates = events.Scalars("learning_rate")
    assert [point.step for point in rates] == list(range(12))
    assert rates[3].value == pytest.approx(plan.pace(3, 12))
    assert [point.step for point in events.Scalars("score")] == [5, 11]


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
