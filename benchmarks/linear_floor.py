"""The honest floor of ``accuracy.py``: logistic regression, late fusion and mean imputation."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from feature_sets import Job
from torch import Tensor

from mmfusion.losses import task_loss
from mmfusion.presence import normalise
from mmfusion.recipes.crossfit import folds
from mmfusion.recipes.evidence import LinearEvidence
from mmfusion.recipes.features import FeatureScaler
from mmfusion.recipes.members import Features, Rows

FLOORS = ("late fusion (LR)", "mean fill (LR)")


def fit_floor(
    job: Job, inputs: Mapping[str, np.ndarray], present: np.ndarray, labels: Tensor, num_folds: int
) -> tuple[Callable[[Mapping[str, Tensor], Tensor], Tensor], dict]:
    """A model from tensors and what is present to log-probabilities, and its chosen strength.

    One per modality, log-probabilities over the prior summed over what is observed; or one on
    everything, means filled in. The strength has the least loss on folds left out.
    """
    names, num_classes = tuple(inputs), int(labels.max()) + 1
    tensors, seen = normalise(
        {name: torch.from_numpy(x) for name, x in inputs.items()}, names, torch.from_numpy(present)
    )
    scaler = FeatureScaler({name: x.shape[1] for name, x in tensors.items()}, 64).fit(tensors, seen)

    def prepared(inputs: Mapping[str, Tensor], seen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scaled = scaler(inputs)
        if job.method == FLOORS[0]:
            return scaled, seen
        filled = [torch.where(seen[:, m, None], x, 0) for m, x in enumerate(scaled.values())]
        return {"all": torch.cat(filled, dim=1)}, torch.ones(len(seen), 1, dtype=torch.bool)

    scaled, seen = prepared(tensors, seen)
    rows = Rows(Features(scaled, scaled), seen, labels)
    made = LinearEvidence({n: x.shape[1] for n, x in scaled.items()}, num_classes, "multiclass")
    losses = dict.fromkeys(made.SETTINGS, 0.0)
    for kept, held in folds(rows, num_folds, "multiclass", job.seed):
        for strength in made.SETTINGS:
            part, left = rows[kept], rows[held]
            found = made.fit(part.inputs.scaled, part.present, part.labels, strength)
            loss = task_loss(found(left.inputs.scaled, left.present), left.labels, "multiclass")
            losses[strength] += float(loss) * len(held)
    best = min(losses, key=losses.__getitem__)
    made.fit(scaled, rows.present, rows.labels, best)
    return lambda inputs, present: made(*prepared(inputs, present)), {"linear_strength": best}
