"""The losses of CMML as pure functions.

Every mean is over the joint batch of all ranks by default: each rank returns its share times the
number of ranks, so that DDP's averaged gradient is that of one process with the joint batch, with
uneven batches too. ``gather=False`` stays on this rank (in validation on one rank, say).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfusion.functional import check_temperature, class_contrastive
from mmfusion.layers.evidence import TARGETS
from mmfusion.presence import check_table, may_look
from mmfusion.ranks import first_row, gather_rows, joint_mean
from mmfusion.reference import full_precision, unit, wide_type

__all__ = [
    "alignment_loss",
    "class_contrastive_loss",
    "evidence_loss",
    "reconstruction_loss",
    "task_loss",
]

IGNORE = -100


def reconstruction_loss(
    synthesised: Tensor, tokens: Tensor, hidden: Tensor, *, gather: bool = True
) -> Tensor:
    """How far synthesised tokens are from the truth, where truth exists: cosine plus smooth L1.

    Gradients flow to ``synthesised`` alone; the truth is detached. Nothing hidden gives exactly 0.

    Args:
        synthesised: The guess for every modality.
        tokens: The truth; it may hold anything where not ``hidden``.
        hidden: Where the truth is known and was hidden from the model: ``present & ~visible``.
        gather: Mean over the joint batch of all ranks.

    Shape:
        - ``synthesised``, ``tokens``: ``(B, M, L, D)``; ``hidden``: ``(B, M)``; result: scalar

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> guess, truth = torch.ones(1, 2, 1, 4), torch.full((1, 2, 1, 4), 3.0)
        >>> reconstruction_loss(guess, truth, torch.tensor([[True, False]])).item()
        1.5

    References:
        Our design; smooth L1: Girshick, "Fast R-CNN", ICCV 2015, equation 3.
    """
    if synthesised.shape != tokens.shape or tokens.ndim != 4:
        raise ValueError(
            f"synthesised is {tuple(synthesised.shape)} and tokens {tuple(tokens.shape)}: they are "
            "(B, M, L, D) twice. Reshape them."
        )
    check_table("hidden", hidden, tokens.shape[:2])
    rows = hidden[:, :, None, None]
    guess = torch.where(rows, synthesised, 0).to(wide_type(synthesised))
    truth = torch.where(rows, tokens.detach(), 0).to(guess.dtype)
    distance = F.smooth_l1_loss(guess, truth, reduction="none").mean((2, 3))
    angle = 1 - (unit(guess) * unit(truth)).sum(-1).mean(2)
    return joint_mean(distance + angle, hidden, gather)


def alignment_loss(aligned: Tensor, reference: Tensor, *, gather: bool = True) -> Tensor:
    """Angle between each modality's pooled aligned tokens and the sample's pooled reference.

    Observed and synthesised modalities count alike. Gradients flow to ``aligned`` alone.

    Args:
        aligned: Tokens after alignment.
        reference: The sample's semantic reference; detached.
        gather: Mean over the joint batch of all ranks.

    Shape:
        - ``aligned``: ``(B, M, L, D)``; ``reference``: ``(B, C, D)``; result: scalar, 0 to 2

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> aligned = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])
        >>> alignment_loss(aligned, torch.tensor([[[2.0, 0.0]]])).item()
        1.0

    References:
        Our design.
    """
    if aligned.ndim != 4 or reference.ndim != 3 or aligned.shape[::3] != reference.shape[::2]:
        raise ValueError(
            f"aligned is {tuple(aligned.shape)} and reference {tuple(reference.shape)}: they are "
            "(B, M, L, D) and (B, C, D). Reshape them."
        )
    pooled = aligned.to(wide_type(aligned)).mean(2)  # (B, M, D)
    towards = reference.detach().to(pooled.dtype).mean(1, keepdim=True)  # (B, 1, D)
    angle = 1 - (unit(pooled) * unit(towards)).sum(-1)  # (B, M)
    return joint_mean(angle, torch.ones_like(angle, dtype=torch.bool), gather)


def class_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    present: Tensor | None = None,
    temperature: float = 0.1,
    *,
    gather: bool = True,
    check_values: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Draw together what shares a label, across samples *and* modalities; push the rest apart.

    Anchors are all modality vectors. A positive is another vector of the same class; for several
    labels a pair weighs by their Jaccard overlap, and vectors of one sample always by 1. Anchors
    without a positive do not count, and a batch without any gives exactly 0. Samples without a
    label (-100, or NaN throughout) are left out; NaN cells of a label row are left out of the
    overlap.

    Args:
        embeddings: One vector per modality; normalised here.
        labels: Class numbers, or multi-hot rows.
        present: Modalities that take part; None is all. Others may hold anything.
        temperature: Divides the cosine similarities.
        gather: Contrast with the vectors of all ranks, and mean over all their anchors.
        check_values: As for ``task_loss``, of multi-hot rows.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``. The fused kernel serves class numbers and
            keeps no matrix of pairs; several labels per sample always take PyTorch.

    Shape:
        - ``embeddings``: ``(B, M, D)``; ``labels``: ``(B,)`` or ``(B, Y)``; ``present``: ``(B, M)``
        - result: scalar

    Raises:
        ValueError: If ``temperature`` is not above 0, shapes do not fit, or rows are not multi-hot.

    Example:
        >>> embeddings = torch.tensor([[[1.0, 0.0]], [[1.0, 0.1]], [[-1.0, 0.0]]])
        >>> loss = class_contrastive_loss(embeddings, torch.tensor([0, 0, 1]))
        >>> bool(loss < 0.01), class_contrastive_loss(embeddings[1:], torch.tensor([0, 1])).item()
        (True, 0.0)

    References:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out), to which
        it is equal for class numbers. Jaccard weights over modalities: our design.
    """
    check_temperature(temperature)
    if embeddings.ndim != 3 or labels.ndim not in (1, 2) or len(labels) != len(embeddings):
        raise ValueError(
            f"embeddings is {tuple(embeddings.shape)} and labels {tuple(labels.shape)}: they are "
            "(B, M, D), and (B,) or (B, Y). Pool tokens to one vector per modality first."
        )
    if labels.ndim == 2 and _on_cpu(labels, check_values) and may_look(labels):
        bad = is_known(labels) & (labels != 0) & (labels != 1)
        if bool(bad.any()):
            raise ValueError(
                f"labels {tuple(labels.shape)} hold {labels[bad][0].item()}: rows are multi-hot, 0 "
                "or 1. Pass class numbers as (B,), with labels.squeeze(1)."
            )
    batch_size, modalities = embeddings.shape[:2]
    if present is not None:
        check_table("present", present, (batch_size, modalities))
    known = _labelled(labels)
    used = (
        known.unsqueeze(1).expand(-1, modalities) if present is None else present & known[:, None]
    )
    vectors = unit(torch.where(used.unsqueeze(-1), embeddings, 0).to(wide_type(embeddings)))
    anchors, used = vectors.flatten(0, 1), used.flatten()  # (B*M, D), (B*M,)
    columns, real, column_labels, start = anchors, used, labels, 0
    if gather:
        table = used.reshape(batch_size, modalities)
        columns, real, column_labels, start = _gather(vectors, table, labels)
    if labels.ndim == 1:  # vectors of one sample share its class
        loss, number = class_contrastive(
            anchors,
            columns,
            labels.repeat_interleave(modalities),
            column_labels.repeat_interleave(modalities),
            used,
            real,
            start=start,
            temperature=temperature,
            backend=backend,
        )
        return joint_mean(loss, number > 0, gather)
    with full_precision(anchors.device):
        scores = anchors @ columns.mT / temperature  # (B*M, R*M)
        overlap = _overlap(labels, column_labels, scores.dtype)  # (B, R)
    row = torch.arange(len(anchors), device=scores.device) + start
    column = torch.arange(len(columns), device=scores.device)
    countable = real & (row.unsqueeze(1) != column)
    positive = overlap.repeat_interleave(modalities, 0).repeat_interleave(modalities, 1)
    positive = torch.where((row // modalities).unsqueeze(1) == column // modalities, 1.0, positive)
    positive = torch.where(countable & used.unsqueeze(1), positive, 0.0)
    # log softmax over all other vectors; a row with no other stays finite and has no positive
    scores = scores.masked_fill(~countable, torch.finfo(scores.dtype).min)
    log_probability = scores.log_softmax(-1)
    weight = positive.sum(-1)
    loss = -torch.where(positive > 0, positive * log_probability, 0).sum(-1)
    return joint_mean(loss / weight.clamp(min=torch.finfo(weight.dtype).tiny), weight > 0, gather)


def task_loss(
    logits: Tensor,
    labels: Tensor,
    target: str = "multiclass",
    *,
    gather: bool = True,
    check_values: bool = True,
) -> Tensor:
    """Cross-entropy, binary cross-entropy or squared error over the labels that are known.

    A missing label is -100 (integers) or NaN (floats), per sample or per cell; without any known
    label the loss is exactly 0.

    Args:
        logits: What the model predicts.
        labels: Class numbers for ``"multiclass"``; 0/1 for ``"multilabel"`` and ``"binary"``;
            values for ``"regression"``.
        target: One of the four kinds.
        gather: Mean over the joint batch of all ranks.
        check_values: Refuse labels out of range, where looking costs nothing: on the CPU. A GPU
            would have to wait; ``check_labels`` makes it.

    Shape:
        - ``logits``: ``(B, Y)``; ``labels``: ``(B,)`` for ``"multiclass"``, else ``(B, Y)``, or
          ``(B,)`` with ``Y = 1``; result: scalar

    Raises:
        ValueError: If ``target`` is unknown, or labels have another shape, type or range.

    Example:
        >>> task_loss(torch.zeros(2, 3), torch.tensor([1, -100])).exp().round().item()
        3.0
    """
    check_labels(labels, logits, target, check_values=_on_cpu(labels, check_values))
    return _mean_loss(logits, labels, target, gather)


def _on_cpu(labels: Tensor, check_values: bool) -> bool:
    return check_values and labels.device.type == "cpu"


def _mean_loss(logits: Tensor, labels: Tensor, target: str, gather: bool) -> Tensor:
    known = is_known(labels)
    logits = logits.to(wide_type(logits))
    if target == "multiclass":
        cells = F.cross_entropy(logits, torch.where(known, labels, 0).long(), reduction="none")
        return joint_mean(cells, known, gather)
    known = known.reshape(logits.shape)
    truth = torch.where(known, labels.reshape(logits.shape), 0).to(logits.dtype)
    measure = F.mse_loss if target == "regression" else F.binary_cross_entropy_with_logits
    return joint_mean(measure(logits, truth, reduction="none"), known, gather)


def evidence_loss(
    scores: Tensor,
    labels: Tensor,
    present: Tensor,
    target: str,
    *,
    gather: bool = True,
    check_values: bool = True,
) -> Tensor:
    """The task's loss of every present modality's own scores, as if each were a sample.

    Args:
        scores: Logits or predictions of each modality.
        labels: As for ``task_loss``.
        present: True where the modality was looked at; others may hold anything, and get exactly
            zero gradient.
        target: As for ``task_loss``.
        gather: Mean over the joint batch of all ranks.
        check_values: As for ``task_loss``.

    Shape:
        - ``scores``: ``(B, M, Y)``; ``present``: ``(B, M)``; ``labels``: ``(B,)`` or ``(B, Y)``
        - result: scalar

    Raises:
        ValueError: If ``scores`` or ``present`` has another shape, or on what ``task_loss``
            refuses.

    Example:
        >>> scores = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])
        >>> present = torch.tensor([[True, False]])
        >>> evidence_loss(scores, torch.tensor([0]), present, "multiclass").round().item()
        0.0
    """
    if scores.ndim != 3:
        raise ValueError(
            f"scores is {tuple(scores.shape)}: each modality has its own, (B, M, Y). Stack them "
            "along axis 1."
        )
    check_table("present", present, scores.shape[:2])
    check_labels(labels, scores[:, 0], target, check_values=_on_cpu(labels, check_values))
    missing = torch.nan if labels.is_floating_point() else IGNORE
    rows, width = present.unsqueeze(-1), 1 if target == "multiclass" else scores.shape[2]
    each = _whole(labels).reshape(labels.shape[0], 1, width)
    truth = torch.where(rows, each, missing)  # (B, M, Y or 1)
    truth = truth.flatten() if target == "multiclass" else truth.flatten(0, 1)
    return _mean_loss(torch.where(rows, scores, 0).flatten(0, 1), truth, target, gather)


def check_target(target: str, num_classes: int) -> None:
    """Refuse an unknown target, or a number of classes that it cannot have.

    Raises:
        ValueError: If ``target`` is none of the four, or ``num_classes`` does not fit it.

    Example:
        >>> check_target("binary", num_classes=1)
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: it is one of {TARGETS}. Choose one.")
    least = 2 if target == "multiclass" else 1
    if num_classes < least or (target == "binary" and num_classes != 1):
        raise ValueError(
            f"num_classes={num_classes} with target={target!r}: a binary target has one logit, a "
            "multiclass one at least two. Use target='binary' with num_classes=1, or count the "
            "classes."
        )


def check_labels(labels: Tensor, logits: Tensor, target: str, *, check_values: bool = True) -> None:
    """Refuse labels that do not fit: shape and type always, values where they may be looked at.

    Raises:
        ValueError: If labels have the wrong shape or type, or are out of range.

    Example:
        >>> check_labels(torch.tensor([1, -100]), torch.zeros(2, 3), "multiclass")
    """
    _check_kind(labels, logits, target)
    if not (check_values and may_look(labels)):
        return
    whole, labels = not labels.is_floating_point(), _whole(labels)
    top = logits.shape[1] - 1 if target == "multiclass" else 1
    allowed = {"multiclass": f"0 to {top}", "regression": "finite"}.get(target, "0 or 1")
    missing = ~is_known(labels)
    if target == "regression":
        bad = labels.isinf()
    elif whole:
        bad = ~missing & ((labels < 0) | (labels > top))
    else:
        bad = ~missing & (labels != 0) & (labels != 1)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels{place} is {labels[tuple(place)].item()}: {target} labels are "
            f"{allowed}, and a missing one is {IGNORE if whole else 'NaN'}. Correct it."
        )


def _check_kind(labels: Tensor, logits: Tensor, target: str) -> None:
    """Target, shape and type."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: it is one of {TARGETS}. Choose one.")
    if logits.ndim != 2:
        raise ValueError(
            f"logits is {tuple(logits.shape)}: they are (B, Y), with Y = 1 for one. Use "
            "logits.unsqueeze(1) for (B,)."
        )
    expected = logits.shape[:1] if target == "multiclass" else logits.shape
    if labels.shape not in (expected, logits[:, 0].shape) or labels.numel() != expected.numel():
        raise ValueError(
            f"labels is {tuple(labels.shape)} with logits {tuple(logits.shape)}: {target} labels "
            f"are {tuple(expected)}. Reshape them, or choose another target."
        )
    whole = not labels.is_floating_point()
    if target == ("regression" if whole else "multiclass"):
        rule, cure = ("floating", ".float()") if whole else ("whole numbers", ".long()")
        raise ValueError(
            f"labels is {labels.dtype}: {target} labels are {rule}. Convert them with {cure}."
        )


def is_known(labels: Tensor) -> Tensor:
    """True where a label is given. -100 marks a missing one only where it cannot be a value."""
    return ~labels.isnan() if labels.is_floating_point() else _whole(labels) != IGNORE


def _whole(labels: Tensor) -> Tensor:
    """Whole numbers as int64: in a narrow type -100 is another number (156 in uint8)."""
    return labels if labels.is_floating_point() else labels.long()


def _labelled(labels: Tensor) -> Tensor:
    known = is_known(labels)
    return known if labels.ndim == 1 else known.any(1)


def _overlap(labels: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, R) weight of a pair: Jaccard overlap of known label cells; 0 for none."""
    known, known_too = is_known(labels).to(dtype), is_known(others).to(dtype)
    has, has_too = (labels == 1).to(dtype), (others == 1).to(dtype)
    both = has @ has_too.mT
    union = has @ known_too.mT + known @ has_too.mT - both
    return both / union.clamp(min=1)


def _gather(vectors: Tensor, used: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Vectors, use and labels of all ranks, and where this rank's vectors start."""
    start = vectors.shape[1]
    (vectors, used, labels), real = gather_rows(vectors, used, labels)
    used = used & real.unsqueeze(1)
    return vectors.flatten(0, 1), used.flatten(), labels, start * first_row(len(real))
