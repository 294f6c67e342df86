"""Prediction: the numbers are the model's, every patient gets a row, and a kill changes nothing."""

import csv
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import predictable
from recipes.predictable import HOW, IDS, NAMES, inputs_of, model, patients, reading

from mmfusion import CMML
from mmfusion.baselines import LateFusion, RetrieveAndFill
from mmfusion.layers import PrototypeMemory
from mmfusion.presence import collate
from mmfusion.recipes import checkpoint
from mmfusion.recipes.answers import answer
from mmfusion.recipes.patient_rows import read_each
from mmfusion.recipes.predict import Member, hash_weights, predict
from mmfusion.recipes.predicted_rows import NOBODY
from mmfusion.recipes.reading import Patients, Reading
from mmfusion.recipes.restoring import take_best

TARGETS: dict[str, tuple[str, int, Any, Any]] = {
    "multiclass": ("multiclass", 3, ("a", "b", "c"), lambda x: x.softmax(1)),
    "multilabel": ("multilabel", 3, ("a", "b", "c"), torch.sigmoid),
    "binary": ("binary", 1, ("no", "yes"), torch.sigmoid),
    "regression": ("regression", 2, ("size", "age"), lambda x: x),
    "tasks": (
        "multilabel",
        5,
        {"hand": ("left", "right"), "hair": ("red", "grey", "none")},
        lambda x: torch.cat([x[:, :2].softmax(1), x[:, 2:].softmax(1)], 1),
    ),
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, *members: Member, **how: Any) -> list[dict[str, str]]:
    predict(members or [Member(model(), patients())], path, **HOW | how)
    return rows(path)


def batch() -> dict[str, Any]:
    samples = [{"inputs": inputs_of(row)} for row in range(len(IDS))]
    return collate(samples, NAMES, predictable.SHAPES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "predictions.csv"


@pytest.mark.parametrize("kind", TARGETS)
def test_values_are_those_of_a_forward_pass(kind: str, path: Path) -> None:
    target, outputs, classes, chances = TARGETS[kind]
    net = model(target, outputs)
    found = write(path, Member(net, patients(classes)))
    assert [row["id"] for row in found] == list(IDS)
    wanted = chances(net(**batch()).logits)
    word = "prediction" if kind == "regression" else "probability"
    columns = [name for name in found[0] if name.startswith(word)]
    assert len(columns) == outputs
    for row, values in zip(found, wanted.tolist(), strict=True):
        assert [float(row[name]) for name in columns] == pytest.approx(values, abs=2e-6, rel=1e-5)
        for name, value in zip(columns, values, strict=True):
            low, high = (row[name.replace(word, side)] for side in ("low", "high"))
            assert float(low) - 2e-6 <= value <= float(high) + 2e-6
            assert float(low) < float(high)
    likeliest = wanted.argmax(1).tolist()
    if kind == "multiclass":
        assert [row["predicted"] for row in found] == [classes[i] for i in likeliest]
    elif kind == "multilabel":
        likely = [[c for c, yes in zip("abc", v, strict=True) if yes] for v in wanted > 0.5]
        said = ["; ".join(names) or "none" for names in likely]
        assert [row["predicted"] for row in found] == said
    elif kind == "binary":
        assert [row["predicted"] for row in found] == [classes[v] for v in wanted[:, 0] > 0.5]
    elif kind == "tasks":
        hand = wanted[:, :2].argmax(1).tolist()
        assert [row["predicted"].split(";")[0] for row in found] == [
            f"hand={classes['hand'][i]}" for i in hand
        ]
    else:
        assert "predicted" not in found[0]


def test_every_pattern_says_what_was_used_and_what_was_guessed(path: Path) -> None:
    found = write(path)
    for number, row in enumerate(found[:8]):
        used = [name for m, name in enumerate(NAMES) if not number >> m & 1]
        assert row["used"] == "; ".join(used)
        assert row["synthesised"] == "; ".join(name for name in NAMES if name not in used)
        assert row["error"] == ("" if used else NOBODY)


def test_the_interval_holds_the_passes_with_dropout_of_all_members(path: Path) -> None:
    nets = [model(seed=0), model(seed=1)]
    found = write(path, *(Member(net, patients()) for net in nets), samples=30)
    each = [answer(net, [inputs_of(2)], ["new2"], reading(), samples=30)[0] for net in nets]
    draws = torch.cat([one.draws for one in each])
    assert draws.shape == (60, 3)
    value = torch.stack([one.values for one in each]).mean(0)
    low, high = draws.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    wanted = {"probability": value, "low": low.minimum(value), "high": high.maximum(value)}
    for word, numbers in wanted.items():
        said = [float(found[2][f"{word}_{name}"]) for name in "abc"]
        assert said == pytest.approx(numbers.tolist(), abs=2e-6)
    assert found[0]["model"] == "+".join(hash_weights(net)[:8] for net in nets)


def test_passes_depend_on_seed_and_id_alone_and_leave_no_trace() -> None:
    net = model()
    before, generator = hash_weights(net), torch.get_rng_state()
    several = answer(net, [inputs_of(row) for row in range(4)], IDS[:4], reading(), samples=5)
    [alone] = answer(net, [inputs_of(2)], IDS[2:3], reading(), samples=5)
    assert torch.allclose(several[2].draws, alone.draws, atol=1e-6)
    assert alone.draws.std(0).min() > 1e-4
    for seed, id in ((1, IDS[2]), (0, "another")):
        [other] = answer(net, [inputs_of(2)], [id], reading(), samples=5, seed=seed)
        assert not torch.allclose(other.draws, alone.draws, atol=1e-4)
    assert hash_weights(net) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(part.training for part in net.modules())


def test_dropout_is_all_that_is_on_in_a_pass() -> None:
    net = model(dropout=0.0)
    net.pool.dropout.p = 0.9
    [one] = answer(net, [inputs_of(0)], ["x"], reading(), samples=4)
    assert one.draws.std(0).min() > 0
    net.pool.dropout.p = 0.0  # cells of the table would still be dropped in training
    [one] = answer(net, [inputs_of(0)], ["x"], reading(), samples=4)
    assert torch.allclose(one.draws, one.values.expand(4, -1), atol=1e-6)


def test_neighbours_are_training_patients_and_never_oneself(path: Path) -> None:
    net = model()
    out = net(**batch())
    found = write(path, Member(net, patients()), neighbours=12)
    for row, number in ((found[1], 1), (found[6], 6)):
        share: dict[str, float] = {}
        pairs = zip(
            out.neighbour_ids[number].flatten(),
            out.neighbour_weights[number].flatten(),
            strict=True,
        )
        for id, weight in pairs:
            if id >= 0:
                name = f"old{int(id) - 100}"
                share[name] = share.get(name, 0) + float(weight)
        whole = sum(share.values())
        said = dict(one.removesuffix(")").split(" (") for one in row["lent_by"].split("; "))
        assert {name: float(value) for name, value in said.items()} == pytest.approx(
            {name: value / whole for name, value in share.items()}, abs=0.006
        )
    query = out.tokens.mean(2)[6, 0]  # the photo is all that row 6 has
    near = torch.cosine_similarity(query, net.memory.slots[0, :12], dim=-1).argmax()
    assert found[6]["similar_to"].startswith(f"old{int(near)} (")
    assert (found[0]["lent_by"], found[7]["similar_to"]) == ("", "")

    name = f"old{int(near)}"
    [own] = answer(net, [inputs_of(6)], [name], reading(), samples=0)
    assert name not in {**own.similar, **own.lent}


@pytest.mark.parametrize("memory", ["none", "prototypes"])
def test_who_remembers_nobody_names_nobody(memory: str, path: Path) -> None:
    net = model(memory=None if memory == "none" else PrototypeMemory(3, 4, 8))
    assert {row["lent_by"] + row["similar_to"] for row in write(path, Member(net, patients()))} == {
        ""
    }


@pytest.mark.parametrize("method", [LateFusion, RetrieveAndFill])
def test_baselines_predict_too(method: Any, path: Path) -> None:
    net = method(dict(zip(NAMES, (3, 4, 3), strict=True)), num_classes=3, dim=8, dropout=0.3)
    data = batch()
    net.train()(data["inputs"], present=data["present"], sample_ids=torch.arange(100, 110))
    found = write(path, Member(net, patients()))
    wanted = net.eval()(**data).logits.softmax(1)
    assert float(found[0]["probability_a"]) == pytest.approx(wanted[0, 0].item(), abs=2e-6)
    assert found[1]["synthesised"] == ("photo" if method is RetrieveAndFill else "")


def test_a_memory_of_whole_patients_with_one_modality_names_nobody_alike() -> None:
    net = RetrieveAndFill({"lab": 2}, num_classes=2, dim=8)
    net.train()({"lab": torch.randn(5, 2)}, sample_ids=torch.arange(5))
    about = Reading(net.names, {"lab": (2,)}, ("no", "yes"))
    [one] = answer(net, [{"lab": torch.ones(2)}], ["x"], about, samples=0)
    assert (one.used, one.similar) == (("lab",), {})


def test_what_cannot_be_read_or_is_refused_stops_nobody(path: Path) -> None:
    infinite = torch.tensor([1.0, torch.inf, 0.0, 0.0])

    def read(row: int) -> Any:
        if row == 3:
            raise RuntimeError("the disk\nis gone")
        values = inputs_of(0)
        if row == 5:
            return values | {"scan": infinite}, ["lab: sex='?' is unknown"]
        if row == 6:
            return values | {"photo": torch.ones(2)}, []
        return values, []

    found = write(path, Member(model(), patients(read=read)))
    assert len(found) == 10
    assert found[3]["error"] == f"RuntimeError: the disk is gone; {NOBODY}"
    assert found[5]["error"].startswith("lab: sex='?' is unknown; scan: inputs['scan'] row 0 is")
    assert (found[5]["used"], found[5]["synthesised"]) == ("photo; lab", "scan")
    assert found[6]["error"].startswith("photo: ")
    assert found[6]["used"] == "scan; lab"
    whole = [row for row in found if not row["error"]]
    sure = [float(row["probability_a"]) for row in whole]
    assert sure == pytest.approx([sure[0]] * 7, abs=2e-6)
    wanted = model()(collate([{"inputs": inputs_of(0) | {"scan": None}}], NAMES)["inputs"])
    value = wanted.logits.softmax(1)[0, 0].item()
    assert float(found[5]["probability_a"]) == pytest.approx(value, abs=2e-6)


def test_numbers_that_overflow_in_the_model_are_told_and_never_a_class(path: Path) -> None:
    def read(row: int) -> Any:
        huge = torch.tensor([1e30, -1e30, 0.0, 0.0])  # finite, unlike its square
        return inputs_of(0) | ({"scan": huge} if row == 3 else {}), []

    found = write(path, Member(model(), patients(read=read)))
    assert found[3]["error"].startswith("scan: patient 'new3' gets [nan, nan, nan]: ")
    assert (found[3]["used"], found[3]["synthesised"]) == ("photo; lab", "scan")
    assert 0 < float(found[3]["probability_a"]) < 1
    assert not any(row["error"] for row in found[:3] + found[4:])


class Codes(torch.nn.Module):
    in_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 4)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.table(codes[:, 0].long())


def test_a_code_that_an_encoder_does_not_know_stops_nobody(path: Path) -> None:
    net = CMML({"lab": 2, "code": (Codes(), 4)}, num_classes=2, dim=8)
    about = Reading(net.names, {"lab": (2,), "code": (1,)}, ("no", "yes"))

    def read(row: int) -> Any:
        return {"lab": torch.ones(2), "code": torch.tensor([float(row)])}, []

    found = write(path, Member(net, Patients(about, [f"p{row}" for row in range(7)], read)))
    assert [row["used"] for row in found] == ["lab; code"] * 5 + ["lab"] * 2
    assert all(row["error"].startswith("code: index out of range") for row in found[5:])


def test_chunks_are_on_the_disk_before_the_next_is_read(path: Path) -> None:
    def read(row: int) -> Any:
        assert len(path.read_text().splitlines()) == 1 + row // 4 * 4
        return inputs_of(row), []

    assert {row["error"] for row in write(path, Member(model(), patients(read=read)))} == {
        "",
        NOBODY,
    }


def test_killed_and_run_again_it_ends_with_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole.csv")
    command = [sys.executable, predictable.__file__, str(path), "9"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(rows(path)) == 8  # two whole chunks
    with path.open("ab") as file:  # and a third that was cut off
        file.write(b'new8,a,0.3\nnew9,"')
    asked = []

    def read(row: int) -> Any:
        asked.append(row)
        return inputs_of(row), []

    done = predict([Member(model(), patients(read=read))], path, **HOW)
    assert (done.patients, done.new, sorted(asked)) == (10, 2, [8, 9])
    for suffix in (".csv", ".json"):
        again = path.with_suffix(suffix).read_bytes()
        assert again == (tmp_path / "whole.csv").with_suffix(suffix).read_bytes()
    assert predict([Member(model(), patients(read=read))], path, **HOW).new == 0


def test_an_id_of_two_lines_does_not_upset_what_a_later_run_counts(
    path: Path, tmp_path: Path
) -> None:
    ids = ("new\n0", "new\r\n1", *IDS[2:])
    write(tmp_path / "whole.csv", Member(model(), patients(ids=ids)))
    whole = (tmp_path / "whole.csv").read_bytes()
    assert [row["id"] for row in rows(tmp_path / "whole.csv")] == ["new 0", "new 1", *IDS[2:]]
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:6]))  # a chunk, and a row of another
    shutil.copy(tmp_path / "whole.json", path.with_suffix(".json"))
    assert predict([Member(model(), patients(ids=ids))], path, **HOW).new == 6
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 5])
def test_a_header_that_was_cut_off_is_written_anew(kept: int, path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    write(path, batch_size=3)
    assert [row["id"] for row in rows(path)] == list(IDS)
    assert path.read_bytes().splitlines()[0] == whole.splitlines()[0]


def test_a_full_disk_leaves_whole_rows_and_can_be_gone_on_from(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole.csv")
    with monkeypatch.context() as patch:
        calls = iter(range(9))

        def fsync(number: int) -> None:
            if next(calls) == 3:  # after the JSON file, the header and a chunk
                raise OSError(28, "No space left on device")

        patch.setattr("mmfusion.recipes.appending.os.fsync", fsync)
        message = r"csv could not be written \(No space.*4 rows are there and whole.*run the same"
        with pytest.raises(OSError, match=message):
            write(path)
    write(path)
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


OTHERS: dict[str, Any] = {
    "weights": {"net": 1},
    "patients": {"ids": tuple(f"x{row}" for row in range(10))},
    "rows": {"ids": IDS[:9]},
    "seed": {"seed": 1},
    "samples": {"samples": 5},
    "neighbours": {"neighbours": 1},
    "columns": {"samples": 0},
    "tables": {"sha256": "another"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_rows_of_two_kinds_are_never_mixed(what: str, path: Path) -> None:
    write(path)
    before, how = path.read_bytes(), dict(OTHERS[what])
    people = patients(ids=how.pop("ids", IDS))
    people.sha256 = how.pop("sha256", "")
    with pytest.raises(ValueError, match=f"is there, and made with another .*{what}.*Move it away"):
        write(path, Member(model(seed=how.pop("net", 0)), people), **how)
    assert path.read_bytes() == before


def test_a_file_of_somebody_else_is_left_alone(path: Path) -> None:
    path.write_text("my,notes\n")
    with pytest.raises(ValueError, match=r"unknown origin, predictions.json being lost"):
        write(path)
    assert path.read_text() == "my,notes\n"


def test_rows_and_what_they_hang_on_are_two_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.json: rows are a CSV.*Pass .*rows\.csv"):
        write(tmp_path / "rows.json")
    assert list(tmp_path.iterdir()) == []


def test_the_scores_of_a_run_are_not_written_over(path: Path) -> None:
    beside = path.with_suffix(".json")
    for content in ('{"auc": 0.9}', "[1]", "3", "nothing"):
        beside.write_text(content)
        with pytest.raises(ValueError, match=r"json is there, and of something else.*Move it"):
            write(path)
        assert beside.read_text() == content
    assert not path.exists()
    beside.unlink()
    write(path)
    path.unlink()
    assert write(path, samples=0)  # the rows of before were moved away


def test_members_have_to_fit_their_patients_and_each_other(path: Path) -> None:
    net = model()
    with pytest.raises(ValueError, match="0 members on 1 processes"):
        predict([], path, **HOW)
    with pytest.raises(ValueError, match=r"member 1 has other ids .* Pass members of one data"):
        write(path, Member(net, patients()), Member(net, patients(ids=IDS[:9])))
    with pytest.raises(ValueError, match=r"member 1 has other classes"):
        write(path, Member(net, patients()), Member(net, patients("abd")))
    with pytest.raises(ValueError, match=r"member 0 has 3 logits for \('a', 'b'\)"):
        write(path, Member(net, patients(("a", "b"))))
    other = Reading(("photo",), {"photo": (3,)}, ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"member 0 has other names"):
        write(path, Member(net, Patients(other, IDS, lambda row: ({}, []))))
    with pytest.raises(ValueError, match=r"models without dropout.*Pass samples=0"):
        write(path, Member(model(dropout=0.0), patients()))
    assert not path.exists()
    found = write(path, Member(model(dropout=0.0), patients()), samples=0)
    assert list(found[0])[:5] == ["id", "predicted", *(f"probability_{c}" for c in "abc")]


@pytest.mark.parametrize("ids", [("a", "b", "a"), ("a", ""), ()])
def test_ids_are_there_once(ids: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="each patient has a row and an id of its own"):
        patients(ids=ids)


def test_an_ensemble_comes_from_the_folders_of_two_runs(path: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        kept = tmp_path / str(seed) / "best.safetensors"
        checkpoint.save(kept, model(seed=seed).state_dict(), {})
    nets = [take_best(model(seed=2), tmp_path / str(seed)) for seed in (0, 1)]
    reads = []

    def read(row: int) -> Any:
        reads.append(row)
        return inputs_of(row), []

    people = patients(read=read)
    found = write(path, *(Member(net, people) for net in nets))
    assert sorted(reads) == list(range(10))  # once, for both
    each = [model(seed=seed)(**batch()).logits.softmax(1) for seed in (0, 1)]
    wanted = torch.stack(each).mean(0)
    got = torch.tensor([[float(row[f"probability_{c}"]) for c in "abc"] for row in found])
    assert torch.allclose(got, wanted, atol=2e-6)


def test_folders_of_no_or_another_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best.safetensors is not there: .* finished an epoch"):
        take_best(model(), tmp_path)
    checkpoint.save(tmp_path / "best.safetensors", model(dim=16).state_dict(), {})
    with pytest.raises(ValueError, match=r"does not fit this CMML .*size mismatch.*as it was"):
        take_best(model(), tmp_path)
    with pytest.raises(ValueError, match=r"reading.json cannot be read .*Pass the folder"):
        Reading.load(tmp_path)
    (tmp_path / "reading.json").write_text(json.dumps({"colour": "red"}))
    with pytest.raises(ValueError, match=r"reading.json cannot be read .*colour"):
        Reading.load(tmp_path)


def test_synthetic_training_is_told_in_every_row(path: Path) -> None:
    about = Reading(NAMES, predictable.SHAPES, ("a", "b", "c"), is_synthetic=True)
    people = Patients(about, IDS, lambda row: (inputs_of(row), []))
    assert {row["model"][:10] for row in write(path, Member(model(), people))} == {"SYNTHETIC "}


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left")])
def test_what_the_machine_lacks_is_not_the_patient_s_fault(error: Exception, path: Path) -> None:
    def read(row: int) -> Any:
        def scan() -> None:
            raise error

        return read_each({"scan": scan}) if row == 5 else (inputs_of(row), [])

    with pytest.raises(type(error)):
        predict([Member(model(), patients(read=read))], path, **HOW)
    assert len(path.read_text().splitlines()) == 5  # the header and the first chunk


class Jealous(torch.nn.Module):
    """Refuses two modalities together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.names, self.target, self.edge = NAMES, "multiclass", self.inner.edge
        self.memory = None

    def forward(self, inputs: Any, present: torch.Tensor, **about: Any) -> Any:
        if present.sum(1).max() > 1:
            raise ValueError("one at a time")
        return self.inner(inputs, present=present, **about)


def test_what_fails_together_alone_stops_nobody(path: Path) -> None:
    found = write(path, Member(Jealous(), patients()), samples=0)
    assert len(found) == 10
    assert found[0]["error"] == f"photo, scan, lab: one at a time; {NOBODY}"
    assert found[0]["used"] == ""
    assert [row["used"] for row in found if not row["error"]] == ["lab", "scan", "photo"]
