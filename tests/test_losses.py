import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from sklearn.metrics import log_loss, mean_squared_error

from mmfusion.losses import (
    alignment_loss,
    check_labels,
    class_contrastive_loss,
    evidence_loss,
    is_known,
    reconstruction_loss,
    task_loss,
)

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def says(call, *parts):
    """The call is refused with value, rule and cure, in that order."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the parts are matched below
        call()
    message = str(caught.value)
    places = [message.find(part) for part in parts]
    assert -1 not in places, (message, parts)
    assert places == sorted(places), (message, parts)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **TOLERANCE)


# reconstruction


def test_reconstruction_by_hand():
    guess = torch.tensor([[[[1.0, 0.0]], [[5.0, 5.0]]], [[[3.0, 4.0]], [[0.0, 2.0]]]])
    truth = torch.tensor([[[[0.0, 1.0]], [[NAN, NAN]]], [[[3.0, 0.0]], [[0.0, 2.0]]]])
    hidden = torch.tensor([[True, False], [True, True]])
    first = (0.5 + 0.5) / 2 + 1 - 0.0  # both cells off by 1, at a right angle
    second = (0.0 + 3.5) / 2 + 1 - 0.6  # one cell off by 4: smooth L1 is 4 - 1/2
    close(reconstruction_loss(guess, truth, hidden), (first + second + 0.0) / 3)


def test_reconstruction_means_over_tokens_first():
    guess, truth = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    hidden = torch.tensor([[True, False], [True, True]])
    cells = [
        F.smooth_l1_loss(guess[b, m, t], truth[b, m, t])
        + 1
        - F.cosine_similarity(guess[b, m, t], truth[b, m, t], dim=0)
        for b, m in hidden.nonzero().tolist()
        for t in range(3)
    ]
    close(reconstruction_loss(guess, truth, hidden), sum(cells) / 9)


def test_reconstruction_gradient_reaches_hidden_guesses_alone():
    guess, truth = torch.randn(2, 2, 1, 3), torch.randn(2, 2, 1, 3)
    hidden = torch.tensor([[True, False], [False, True]])
    guess[0, 1], truth[1, 0] = NAN, math.inf
    guess.requires_grad_()
    truth.requires_grad_()
    reconstruction_loss(guess, truth, hidden).backward()
    assert truth.grad is None
    assert (guess.grad[~hidden] == 0).all()
    assert guess.grad[hidden].abs().sum(-1).all()


def test_nothing_hidden_gives_exactly_zero_and_zero_gradient():
    guess = torch.full((2, 2, 1, 3), NAN, requires_grad=True)
    loss = reconstruction_loss(guess, torch.randn(2, 2, 1, 3), torch.zeros(2, 2).bool())
    loss.backward()
    assert loss == 0
    assert (guess.grad == 0).all()


@pytest.mark.parametrize("loss", ["reconstruction", "alignment", "contrastive"])
def test_half_precision_is_summed_in_single(loss):
    x, y = torch.randn(4, 2, 3, 8).bfloat16(), torch.randn(4, 2, 3, 8).bfloat16()
    hidden, labels = torch.ones(4, 2).bool(), torch.tensor([0, 1, 0, 1])
    call = {
        "reconstruction": lambda a, b: reconstruction_loss(a, b, hidden),
        "alignment": lambda a, b: alignment_loss(a, b[:, 0]),
        "contrastive": lambda a, b: class_contrastive_loss(a[:, :, 0], labels),
    }[loss]
    assert call(x, y).dtype == torch.float32
    close(call(x, y), call(x.float(), y.float()))


@pytest.mark.parametrize(
    ("guess", "hidden"),
    [((2, 2, 1, 3), (2, 1)), ((2, 2, 1, 3), (2,)), ((2, 2, 4, 3), (2, 2)), ((1, 2, 1, 3), (2, 2))],
)
def test_reconstruction_broadcasts_nothing(guess, hidden):
    parts = (f"synthesised is {guess}", "(B, M, L, D)", "Reshape")
    if guess == (2, 2, 1, 3):
        parts = (f"hidden is {hidden}", "(B, M) = (2, 2)", "reshape")
    says(
        lambda: reconstruction_loss(
            torch.ones(guess), torch.ones(2, 2, 1, 3), torch.ones(hidden).bool()
        ),
        *parts,
    )


# alignment


def test_alignment_by_hand():
    aligned = torch.tensor(
        [[[[1.0, 0.0], [1.0, 2.0]], [[0.0, -1.0], [0.0, -3.0]]]]
    )  # means 1,1 0,-2
    reference = torch.tensor([[[0.0, 4.0], [0.0, 2.0], [0.0, 0.0]]])
    close(alignment_loss(aligned, reference), ((1 - 0.5**0.5) + 2) / 2)


def test_alignment_draws_aligned_to_the_reference_and_not_the_other_way():
    aligned = torch.randn(3, 2, 2, 4, requires_grad=True)
    reference = torch.randn(3, 5, 4, requires_grad=True)
    before = alignment_loss(aligned, reference)
    before.backward()
    assert reference.grad is None
    assert aligned.grad.flatten(1).any(1).all()
    assert alignment_loss(aligned - aligned.grad, reference) < before


# class contrastive


def pml(embeddings, labels, temperature):
    """SupCon over the flattened vectors: the mean over all anchors with a positive."""
    modalities = embeddings.shape[1]
    return SupConLoss(temperature=temperature)(
        embeddings.flatten(0, 1), labels.repeat_interleave(modalities)
    )


@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
def test_contrastive_is_supcon_for_class_numbers(modalities, temperature):
    for labels in (torch.arange(12) % 4, torch.tensor([0] * 5 + [1] * 6 + [2])):
        ours = torch.randn(12, modalities, 8, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        one = class_contrastive_loss(ours, labels, temperature=temperature)
        other = pml(theirs, labels, temperature)
        close(one, other.detach())
        one.backward()
        other.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


def loop_contrastive(embeddings, labels, present=None, temperature=0.1):
    """The documented sum, pair by pair, with sets."""
    batch_size, modalities = embeddings.shape[:2]
    one_number = labels.ndim == 1

    def cells(b):
        row = labels[b].tolist()
        known = {j for j, x in enumerate(row) if not (math.isnan(x) or x == -100)}
        return known, {j for j in known if row[j] == 1}

    def usable(b):
        return (labels[b] != -100) if one_number else bool(cells(b)[0])

    def weight(a, b):
        if a == b:
            return 1.0
        if one_number:
            return float(labels[a] == labels[b])
        (known_a, has_a), (known_b, has_b) = cells(a), cells(b)
        both = known_a & known_b
        union = (has_a | has_b) & both
        return len(has_a & has_b & both) / len(union) if union else 0.0

    vectors = F.normalize(embeddings.double(), dim=-1)
    use = [
        (b, m)
        for b in range(batch_size)
        for m in range(modalities)
        if usable(b) and (present is None or present[b, m])
    ]
    terms = []
    for anchor in use:
        others = [x for x in use if x != anchor]
        scores = {x: float(vectors[anchor] @ vectors[x]) / temperature for x in others}
        total = math.log(sum(math.exp(s) for s in scores.values())) if scores else 0.0
        weights = {x: weight(anchor[0], x[0]) for x in others}
        if sum(weights.values()) > 0:
            terms.append(
                -sum(w * (scores[x] - total) for x, w in weights.items()) / sum(weights.values())
            )
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("with_present", [False, True])
@pytest.mark.parametrize("kind", ["classes", "multi-hot", "cells missing", "integer cells missing"])
def test_contrastive_is_the_loop(modalities, with_present, kind):
    embeddings = torch.randn(9, modalities, 6)
    present = torch.rand(9, modalities) < 0.7 if with_present else None
    if kind == "classes":
        labels = torch.tensor([0, 1, 2, 0, -100, 1, 1, -100, 3])
    else:
        labels = (torch.rand(9, 4) < 0.4).float()
        if kind != "multi-hot":
            labels[torch.rand(9, 4) < 0.3] = NAN
            labels[2] = NAN
        if kind == "integer cells missing":
            labels = labels.nan_to_num(-100.0).long()
    close(
        class_contrastive_loss(embeddings, labels, present),
        loop_contrastive(embeddings, labels, present),
    )


def test_jaccard_by_hand():
    embeddings = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])
    labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, NAN, 1.0], [0.0, 0.0, 0.0]])
    # the pair shares one of two known labels (cell 1 is unknown): both anchors have one positive
    temperature = 1.0
    first = math.log(math.exp(0) + math.exp(-1)) - 0
    second = math.log(math.exp(0) + math.exp(0)) - 0
    close(class_contrastive_loss(embeddings, labels, temperature=temperature), (first + second) / 2)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 2]),
        torch.tensor([-100, -100, -100]),
        torch.tensor([0, -100, 1]),
        torch.zeros(3, 2),
        torch.full((3, 2), NAN),
        torch.eye(3),
    ],
    ids=str,
)
def test_no_positive_pair_gives_exactly_zero_and_zero_gradient(labels):
    embeddings = torch.randn(3, 1, 4, requires_grad=True)
    loss = class_contrastive_loss(embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("batch_size", [0, 1])
def test_contrastive_of_next_to_nothing(batch_size):
    embeddings = torch.randn(batch_size, 1, 4, requires_grad=True)
    loss = class_contrastive_loss(embeddings, torch.zeros(batch_size, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_modalities_of_one_sample_are_positives():
    embeddings = torch.randn(1, 3, 4)
    loss = class_contrastive_loss(embeddings, torch.tensor([5]))
    close(loss, loop_contrastive(embeddings, torch.tensor([5])))
    assert loss > 0


def test_minus_one_is_a_class_and_not_a_missing_label():
    embeddings = torch.randn(3, 1, 4)
    assert class_contrastive_loss(embeddings, torch.tensor([-1, -1, 0])) > 0
    says(
        lambda: task_loss(torch.zeros(3, 2), torch.tensor([-1, 0, 1])),
        "labels[0] is -1",
        "0 to 1",
        "Correct it",
    )


def test_what_takes_no_part_may_hold_anything():
    embeddings, labels = torch.randn(5, 2, 4), torch.tensor([0, 0, 1, 1, -100])
    present = torch.tensor([[True, False]] * 2 + [[True, True]] * 3)
    used = present & (labels != -100)[:, None]
    results = []
    for content in (0.0, NAN, math.inf):
        filled = embeddings.clone()
        filled[~used] = content
        filled.requires_grad_()
        loss = class_contrastive_loss(filled, labels, present)
        loss.backward()
        assert (filled.grad[~used] == 0).all()
        results.append((loss.detach(), filled.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_contrastive_ignores_length_and_order():
    embeddings, labels = torch.randn(6, 2, 4), torch.tensor([0, 1, 0, 1, 2, 2])
    loss = class_contrastive_loss(embeddings, labels)
    close(class_contrastive_loss(embeddings * torch.rand(6, 2, 1).add(0.1), labels), loss)
    order = torch.randperm(6)
    close(class_contrastive_loss(embeddings[order].flip(1), labels[order]), loss)


def test_a_low_temperature_stays_finite():
    embeddings = torch.randn(6, 2, 4, requires_grad=True)
    loss = class_contrastive_loss(embeddings, torch.tensor([0, 1, 0, 1, 2, 2]), temperature=1e-4)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"temperature": 0.0}, ("temperature=0.0", "divides", "above 0")),
        ({"embeddings": torch.ones(2, 3)}, ("embeddings is (2, 3)", "(B, M, D)", "Pool tokens")),
        ({"labels": torch.ones(3)}, ("labels (3,)", "(B,) or (B, Y)", "Pool tokens")),
        ({"labels": torch.ones(2, 1, 1)}, ("labels (2, 1, 1)", "(B,) or (B, Y)", "Pool tokens")),
        ({"present": torch.ones(2, 1).bool()}, ("present is (2, 1)", "(2, 3)", "one column")),
    ],
)
def test_contrastive_refuses(arguments, parts):
    right = {"embeddings": torch.ones(2, 3, 4), "labels": torch.tensor([0, 1])}
    says(lambda: class_contrastive_loss(**{**right, **arguments}), *parts)


# task


def test_multiclass_is_cross_entropy_over_known_labels():
    logits, labels = torch.randn(7, 4), torch.tensor([0, 3, -100, 1, -100, 2, 0])
    known = labels != -100
    loss = task_loss(logits, labels)
    close(loss, F.cross_entropy(logits, labels, ignore_index=-100))
    close(loss, log_loss(labels[known], logits[known].double().softmax(1), labels=range(4)))


@pytest.mark.parametrize("whole", [False, True])
def test_multilabel_is_binary_cross_entropy_over_known_cells(whole):
    logits, labels = torch.randn(6, 3), (torch.rand(6, 3) < 0.5).float()
    known = torch.rand(6, 3) < 0.7
    given = labels.masked_fill(~known, NAN)
    if whole:
        given = labels.long().masked_fill(~known, -100)
    plain = F.binary_cross_entropy_with_logits(logits[known], labels[known])
    close(task_loss(logits, given, "multilabel"), plain)
    close(plain, log_loss(labels[known], logits[known].double().sigmoid()))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_binary_takes_both_shapes_and_any_type(flat, dtype):
    logits, labels = torch.randn(5, 1), torch.tensor([1, 0, 1, 1, 0])
    given = labels.to(dtype) if flat else labels.to(dtype).unsqueeze(1)
    truth = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    close(task_loss(logits, given, "binary"), truth)


@pytest.mark.parametrize("width", [1, 3])
def test_regression_is_squared_error_over_known_cells(width):
    logits, labels = torch.randn(6, width), torch.randn(6, width) * 50
    labels[1, 0], labels[2, 0] = NAN, -100.0  # a value like any other
    known = ~labels.isnan()
    loss = task_loss(logits, labels, "regression")
    close(loss, mean_squared_error(labels[known], logits[known]))
    if width == 1:
        close(task_loss(logits, labels[:, 0], "regression"), loss)


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        ("multiclass", torch.full((3,), -100)),
        ("multilabel", torch.full((3, 2), NAN)),
        ("multilabel", torch.full((3, 2), -100)),
        ("regression", torch.full((3, 2), NAN)),
    ],
)
def test_no_label_at_all_gives_exactly_zero_and_zero_gradient(target, labels):
    logits = torch.randn(3, 2, requires_grad=True)
    loss = task_loss(logits, labels, target)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("target", "labels", "expected"),
    [
        ("multiclass", (3, 2), "(3,)"),
        ("multiclass", (4,), "(3,)"),
        ("multilabel", (3,), "(3, 2)"),
        ("multilabel", (2, 3), "(3, 2)"),
        ("regression", (3, 1), "(3, 2)"),
    ],
)
def test_task_loss_refuses_other_shapes(target, labels, expected):
    says(
        lambda: task_loss(torch.zeros(3, 2), torch.zeros(labels).long(), target),
        f"labels is {labels} with logits (3, 2)",
        f"{target} labels are {expected}",
        "Reshape them",
    )


def test_task_loss_refuses_other_targets():
    says(
        lambda: task_loss(torch.zeros(1, 2), torch.zeros(1), "ranking"),
        "target='ranking'",
        "one of ('multiclass'",
        "Choose one",
    )


# evidence

PRESENT = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
GIVEN = {
    "multiclass": torch.tensor([1, -100, 0]),
    "multilabel": torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, 0.0]]),
    "binary": torch.tensor([1.0, 0.0, NAN]),
    "regression": torch.tensor([[2.0, -3.0], [NAN, 0.5], [1.0, 1.0]]),
}


@pytest.mark.parametrize("target", GIVEN)
def test_evidence_loss_is_the_mean_over_all_that_was_said(target):
    labels = GIVEN[target]
    scores = torch.randn(3, 3, 1 if target == "binary" else 2)
    total, count = 0.0, 0
    for i, j in PRESENT.nonzero().tolist():
        known = is_known(labels[i]).sum()
        total += task_loss(scores[i : i + 1, j], labels[i : i + 1], target) * known
        count += known
    close(evidence_loss(scores, labels, PRESENT, target), total / count)


@pytest.mark.parametrize("target", GIVEN)
@pytest.mark.parametrize("content", [NAN, float("inf"), 1e4])
def test_evidence_loss_sends_nothing_to_what_is_absent(target, content):
    scores = torch.randn(3, 3, 1 if target == "binary" else 2)
    dirty = torch.where(PRESENT.unsqueeze(-1), scores, content).requires_grad_()
    loss = evidence_loss(dirty, GIVEN[target], PRESENT, target)
    loss.backward()
    assert torch.equal(loss, evidence_loss(scores, GIVEN[target], PRESENT, target))
    assert dirty.grad[~PRESENT].eq(0).all()
    assert dirty.grad[0, 0].ne(0).all()


def test_evidence_loss_of_nothing_is_exactly_zero():
    scores = torch.randn(3, 3, 2, requires_grad=True)
    loss = evidence_loss(scores, torch.tensor([0, 1, 0]), PRESENT & False, "multiclass")
    loss.backward()
    assert loss == 0
    assert scores.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_evidence_loss_takes_any_type_of_label(dtype):
    scores, labels = torch.randn(3, 3, 1), torch.tensor([1, 0, 1])
    loss = evidence_loss(scores, labels.to(dtype), PRESENT, "binary")
    close(loss, evidence_loss(scores, labels.float(), PRESENT, "binary"))


# types


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_a_class_number_of_any_width_is_known(dtype):
    """In uint8 -100 is 156, and class 156 counted as missing."""
    label = 156 if dtype != torch.int8 else 100
    labels = torch.tensor([label, 3]).to(dtype)
    logits = torch.randn(2, 300)
    assert is_known(labels).all()
    check_labels(labels, logits, "multiclass")
    close(task_loss(logits, labels), F.cross_entropy(logits, labels.long()))
    scores, present = logits.unsqueeze(1).repeat(1, 2, 1), torch.tensor([[True, False]] * 2)
    loss = evidence_loss(scores, labels, present, "multiclass")
    close(loss, F.cross_entropy(logits, labels.long()))


@pytest.mark.parametrize("target", ["multiclass", "multilabel", "binary", "regression"])
def test_double_precision_is_kept(target):
    """Logits were rounded to float32, and so were the targets of a regression."""
    width, labels = 1 if target == "binary" else 2, GIVEN[target]
    logits = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(3, 3, width, dtype=torch.float64, requires_grad=True)
    labels = labels.double() if labels.is_floating_point() else labels
    check = torch.autograd.gradcheck
    assert check(lambda x: task_loss(x, labels, target), logits)
    assert check(lambda x: evidence_loss(x, labels, PRESENT, target), scores)
    if target == "regression":
        exact = torch.tensor([[2**30 + 0.25, 0.0]], dtype=torch.float64)
        assert task_loss(exact + 1, exact, target) == 1


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 0, 1]), torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 0, 1]])]
)
def test_the_other_losses_keep_double_precision(labels):
    tokens = torch.randn(3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    other, hidden = torch.randn(3, 2, 1, 4, dtype=torch.float64), torch.ones(3, 2).bool()
    for call in (
        lambda x: reconstruction_loss(x, other, hidden),
        lambda x: alignment_loss(x, other[:, 0]),
        lambda x: class_contrastive_loss(x[:, :, 0], labels),
    ):
        assert torch.autograd.gradcheck(call, tokens)


def test_many_labels_overlap_under_autocast_as_without():
    """Counts above 256 were rounded to bfloat16."""
    labels, embeddings = (torch.rand(6, 2000) < 0.3).float(), torch.randn(6, 2, 4)
    plain = class_contrastive_loss(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        close(class_contrastive_loss(embeddings, labels), plain)


def test_whole_numbers_are_no_targets_of_a_regression():
    """-100 of them was dropped without a word."""
    for call in (
        lambda: task_loss(torch.zeros(2, 1), torch.tensor([-100, 5]), "regression"),
        lambda: evidence_loss(torch.zeros(2, 1, 1), torch.tensor([-100, 5]), ONE, "regression"),
    ):
        says(call, "labels is torch.int64", "regression labels are floating", "with .float()")


ONE = torch.ones(2, 1).bool()
