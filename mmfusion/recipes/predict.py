"""Predict new patients, whatever they lack, into a CSV: in chunks, resumable, none stops the rest.

``reading`` says how patients are read, ``answers`` what a model says, ``predicted_rows`` what is
written, ``appending`` how.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import nn

from mmfusion.recipes.answers import Answer, answer, varies
from mmfusion.recipes.appending import AppendedCsv
from mmfusion.recipes.launch import join_processes
from mmfusion.recipes.patient_rows import raise_if_of_machine
from mmfusion.recipes.predicted_rows import header, row_of, value_names
from mmfusion.recipes.reading import Patients

Item = dict[str, Any]


class Member(NamedTuple):
    """A trained model, and the patients as it reads them.

    Attributes:
        model: CMML or a baseline.
        patients: Those to predict; every member of an ensemble has the same ones in one order.
    """

    model: nn.Module
    patients: Patients


class Predicted(NamedTuple):
    """What became of the patients.

    Attributes:
        patients: How many there are.
        new: Rows written now; the others were there.
        errors: New rows that say what could not be read.
    """

    patients: int
    new: int
    errors: int


def predict(
    members: Sequence[Member],
    path: Path,
    *,
    samples: int = 20,
    neighbours: int = 3,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> Predicted:
    """Write a row per patient, and go on where a run that was killed stopped.

    A value is the mean over members of what each says without dropout. Its interval holds 95 % of
    what they say in ``samples`` passes each with dropout on, all passes together (percentiles 2.5
    and 97.5), and the value itself. It shows how far the models agree with themselves and each
    other; it is no promise about the truth. ``predicted_rows`` lists the columns.

    What cannot be read, or the model refuses, is absent, and ``error`` says so; the patient is
    predicted from what is left. Whole chunks are appended and flushed to the disk. A run with the
    same arguments goes on from there and ends with the same bytes; beside ``path``, in a JSON file,
    stands what the rows hang on. Of all patients only the table is held in memory.

    Args:
        members: One model, or an ensemble: models of several runs, with the patients as each reads
            them.
        path: The CSV, in a folder that exists.
        samples: Passes with dropout on; 0 leaves out the interval.
        neighbours: Remembered patients named in a row.
        seed: Of these passes.
        batch_size: Patients read and predicted together; values depend on it by rounding only.
        progress: Show a bar.

    Raises:
        ValueError: If members do not fit their patients or each other, no model has dropout to
            vary, or ``path`` holds rows of other models, patients or arguments, or of
            files that were other ones then, or have been repaired since.
        OSError: If a chunk cannot be written; those before stay.

    Example:
        >>> import mmfusion, tempfile, torch
        >>> from mmfusion.recipes.reading import Reading
        >>> model = mmfusion.CMML({"lab": 2, "mri": 3}, num_classes=2, dim=8)
        >>> reading = Reading(model.names, {"lab": (2,), "mri": (3,)}, ("no", "yes"))
        >>> patients = Patients(reading, ["Bea"], lambda row: ({"lab": torch.ones(2)}, []))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "predictions.csv")
        ...     done = predict([Member(model, patients)], path, progress=False)
        ...     path.read_text().splitlines()[0].split(",")[:4]
        ['id', 'predicted', 'probability_no', 'low_no']
        >>> done
        Predicted(patients=1, new=1, errors=0)
    """
    device = join_processes().device
    for member in members:
        member.model.to(device).eval()
    target, first = _check(members, samples), members[0].patients
    kind: dict[str, Any] = {"classes": first.reading.classes, "target": target}
    columns = header(**kind, interval=samples > 0)
    weights = [hash_weights(member.model) for member in members]
    about = {
        "weights": weights,
        "tables": [member.patients.sha256 for member in members],
        "state of files": [member.patients.state for member in members],
        "patients": hashlib.sha256("\n".join(first.ids).encode()).hexdigest(),
        "rows": len(first),
        "columns": columns,
        "samples": samples,
        "neighbours": neighbours,
        "seed": seed,
    }
    synthetic = any(member.patients.reading.is_synthetic for member in members)
    mark = "SYNTHETIC " * synthetic + "+".join(sha256[:8] for sha256 in weights)
    kind |= {"neighbours": neighbours, "model": mark}
    rows, errors = AppendedCsv(path, columns, about, batch_size), 0
    before = rows.done
    starts = range(before, len(first), batch_size)
    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        for start in track(starts, "predicting", disable=not progress, transient=True):
            ids = first.ids[start : start + batch_size]
            items = list(pool.map(lambda row: _read(members, row), range(start, start + len(ids))))
            said = [
                _ask(member, [item[number] for item in items], ids, samples, seed)
                for number, member in enumerate(members)
            ]
            chunk = []
            for id, found in zip(ids, zip(*said, strict=True), strict=True):
                answers, problems = zip(*found, strict=True)
                chunk.append(row_of(id, answers, problems, **kind))
            rows.add(chunk)
            errors += sum(1 for row in chunk if row[-2])
    return Predicted(len(first), rows.done - before, errors)


def hash_weights(model: nn.Module) -> str:
    """The sha256 of all parameters and buffers, what is remembered included.

    Example:
        >>> hash_weights(nn.LayerNorm(1)) == hash_weights(nn.LayerNorm(1))
        True
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(members: Sequence[Member], samples: int) -> str:
    """The target, if all members fit their patients and each other."""
    if not members or join_processes().num_processes > 1:
        raise ValueError(
            f"{len(members)} members on {join_processes().num_processes} processes: one process "
            "asks one model or more. Pass a member, and start without torchrun."
        )
    first: Any = members[0]
    target = first.model.target
    for number, member in enumerate(members):
        model: Any = member.model
        patients, reading = member.patients, member.patients.reading
        shared: dict[str, Any] = {
            "ids": (patients.ids, first.patients.ids),
            "classes": (reading.classes, first.patients.reading.classes),
            "target": (model.target, target),
            "names": (tuple(model.names), reading.names),
        }
        for what, (ours, theirs) in shared.items():
            if ours != theirs:
                raise ValueError(
                    f"member {number} has other {what} ({str(ours)[:80]} for {str(theirs)[:80]}): "
                    "members predict the same patients, classes and target, each with its own "
                    "modalities. Pass members of one data set."
                )
        [nobody] = answer(model, [{}], [""], reading, samples=0)
        if len(nobody.values) != len(names := value_names(reading.classes, target)):
            raise ValueError(
                f"member {number} has {len(nobody.values)} logits for {names}: each has a name. "
                "Pass the reading of the run that the model is of."
            )
    if samples and not any(varies(member.model) for member in members):
        raise ValueError(
            f"samples={samples} of models without dropout: their passes would all be the same. "
            "Pass samples=0 for no interval, or train with dropout."
        )
    return target


def _read(members: Sequence[Member], row: int) -> list[Item]:
    """A patient as each member reads it; members that share patients read it once."""
    found: dict[int, Item] = {}
    for _, patients in members:
        if id(patients) not in found:
            try:
                found[id(patients)] = patients[row]
            except Exception as error:  # a patient that cannot be read at all stops no other
                raise_if_of_machine(error)
                found[id(patients)] = {"inputs": {}, "error": f"{type(error).__name__}: {error}"}
    return [found[id(patients)] for _, patients in members]


def _ask(
    member: Member, items: Sequence[Item], ids: Sequence[str], samples: int, seed: int
) -> list[tuple[Answer, str]]:
    """Answers and errors; what the model refuses of a patient counts as absent."""
    how: dict[str, Any] = {"reading": member.patients.reading, "samples": samples, "seed": seed}
    inputs = [item["inputs"] for item in items]
    try:
        answers = answer(member.model, inputs, ids, **how)
        return [(one, item["error"]) for one, item in zip(answers, items, strict=True)]
    except Exception as error:  # whatever odd values upset in an encoder
        raise_if_of_machine(error)
        if len(items) > 1:
            each = zip(items, ids, strict=True)
            return [one for item, id in each for one in _ask(member, [item], [id], samples, seed)]
    left, problems = {}, [items[0]["error"]]
    for name, value in inputs[0].items():
        try:
            answer(member.model, [{name: value}], ids, how["reading"], samples=0)
            left[name] = value
        except Exception as error:
            raise_if_of_machine(error)
            problems.append(f"{name}: {error}")
    try:
        [one] = answer(member.model, [left], ids, **how)
    except Exception as error:
        raise_if_of_machine(error)
        problems.append(f"{', '.join(left)}: {error}")
        [one] = answer(member.model, [{}], ids, **how)
    return [(one, "; ".join(filter(None, problems)))]
