"""The columns of a CSV of predictions, for people and programs.

=====================  =============================================================================
column                 what it says
=====================  =============================================================================
``id``                 the patient, as the table spells it
``predicted``          the likeliest class; of labels, those above 0.5 or none; of tasks, each one's
``probability_X``      of class X (of a regression, ``prediction_X``)
``low_X``, ``high_X``  its interval
``used``               modalities that were observed
``synthesised``        modalities that the model had to guess
``lent_by``            remembered patients that the guesses were made from, with their share
``similar_to``         remembered patients nearest in what was observed, with their share
``error``              what could not be read and was taken as missing; blank if nothing
``model``              first digits of its weights' sha256; SYNTHETIC if drawn data trained it
=====================  =============================================================================
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from mmfusion.evaluation.scores import Classes, flat
from mmfusion.recipes.answers import Answer, Shares

LEVELS = (0.025, 0.975)
NOBODY = "nothing of this patient could be used: the values are those of no patient in particular"


def value_names(classes: Classes, target: str) -> tuple[str, ...]:
    """A name for each value of an answer.

    Example:
        >>> value_names(("no", "yes"), "binary")
        ('yes',)
    """
    return flat(classes)[1:] if target == "binary" else flat(classes)


def header(classes: Classes, target: str, interval: bool) -> list[str]:
    """The columns.

    Args:
        classes: As ``evaluate`` takes them.
        target: As for ``CMML``.
        interval: Whether there is one.

    Example:
        >>> header(("no", "yes"), "binary", interval=True)[:5]
        ['id', 'predicted', 'probability_yes', 'low_yes', 'high_yes']
    """
    kinds = ["prediction" if target == "regression" else "probability"]
    kinds += ["low", "high"] if interval else []
    values = [f"{kind}_{name}" for name in value_names(classes, target) for kind in kinds]
    first = ["id"] if target == "regression" else ["id", "predicted"]
    return [*first, *values, "used", "synthesised", "lent_by", "similar_to", "error", "model"]


def row_of(
    id: str,
    answers: Sequence[Answer],
    errors: Iterable[str],
    *,
    classes: Classes,
    target: str,
    neighbours: int,
    model: str,
) -> list[str]:
    """The cells of a patient.

    Args:
        id: Of the patient.
        answers: Of every member of the ensemble.
        errors: What each could not read.
        classes: As ``evaluate`` takes them.
        target: As for ``CMML``.
        neighbours: Remembered patients named.
        model: What the last column says.

    Example:
        >>> sure = torch.tensor([0.25, 0.75])
        >>> one = Answer(sure, torch.stack([sure, 1 - sure]), ("lab",), ("mri",), {"Bo": 1.0}, {})
        >>> how = {"classes": ("no", "yes"), "target": "multiclass", "neighbours": 1, "model": "f"}
        >>> row_of("Bea", [one], [""], **how)[1:5]
        ['yes', '0.250000', '0.250000', '0.737500']
    """
    values = torch.stack([one.values for one in answers]).mean(0)
    columns = [values]
    draws = torch.cat([one.draws for one in answers])
    if len(draws):  # the value belongs to the interval, though it is none of the draws
        low, high = draws.quantile(torch.tensor(LEVELS, dtype=draws.dtype), dim=0)
        columns += [low.minimum(values), high.maximum(values)]
    numbers = torch.stack(columns, dim=1).flatten().tolist()
    digits = ".6g" if target == "regression" else ".6f"
    first = [id] if target == "regression" else [id, _predicted(values, classes, target)]
    used = dict.fromkeys(name for one in answers for name in one.used)
    guessed = dict.fromkeys(name for one in answers for name in one.synthesised)
    problems = dict.fromkeys([*filter(None, errors), *([] if used else [NOBODY])])
    return [
        *first,
        *(f"{number:{digits}}" for number in numbers),
        "; ".join(used),
        "; ".join(guessed),
        _named([one.lent for one in answers], neighbours),
        _named([one.similar for one in answers], neighbours),
        " ".join("; ".join(problems).split()),  # a row is a line
        model,
    ]


def _predicted(values: torch.Tensor, classes: Classes, target: str) -> str:
    if isinstance(classes, Mapping):
        blocks = values.split([len(of) for of in classes.values()])
        each = zip(classes.items(), blocks, strict=True)
        return "; ".join(f"{task}={of[int(block.argmax())]}" for (task, of), block in each)
    if target == "multiclass":
        return classes[int(values.argmax())]
    if target == "binary":
        return classes[int(values[0] > 0.5)]
    likely = [name for name, p in zip(classes, values.tolist(), strict=True) if p > 0.5]
    return "; ".join(likely) or "none"


def _named(shares: Sequence[Shares], count: int) -> str:
    """The first patients, with their mean share over members."""
    total: Counter[str] = Counter()
    for one in shares:
        total.update({id: share / len(shares) for id, share in one.items()})
    return "; ".join(f"{id} ({share:.2f})" for id, share in total.most_common(count))
