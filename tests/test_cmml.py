import pytest
import torch
from torch import nn

from mmfusion import CMML
from mmfusion.layers import (
    CRTA,
    ConcatPool,
    FusionOutput,
    MemoryBank,
    ModalityEvidence,
    PresencePool,
    PrototypeMemory,
    ReferenceAlignment,
)
from mmfusion.losses import (
    alignment_loss,
    class_contrastive_loss,
    reconstruction_loss,
    task_loss,
)
from mmfusion.missingness import hide

NAN = float("nan")
NAMES = ("clinic", "derm", "meta")
WIDTHS = {"clinic": 6, "derm": 5, "meta": 3}
SIZES = {"dim": 8, "num_tokens": 2, "num_heads": 2, "num_context": 3, "num_blocks": 2}
KINDS = {"multiclass": 4, "multilabel": 3, "binary": 1, "regression": 2}
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
VISIBLE = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
HIDDEN = PRESENT & ~VISIBLE
IDS = torch.arange(5)


def made(target="multiclass", **options):
    return CMML(WIDTHS, num_classes=KINDS[target], target=target, **{**SIZES, **options})


def inputs_of(batch_size=5):
    return {name: torch.randn(batch_size, width) for name, width in WIDTHS.items()}


def labels_of(target, missing=False):
    labels = {
        "multiclass": torch.tensor([0, 3, 1, 0, 3]),
        "multilabel": torch.tensor([[1.0, 0.0, 1.0]] * 2 + [[0.0, 1.0, 1.0]] * 3),
        "binary": torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0]]),
        "regression": torch.randn(5, 2),
    }[target]
    if missing and target == "multiclass":
        labels[[1, 2]] = -100
    elif missing:
        labels[1], labels[2, 0] = NAN, NAN
    return labels


def parameters_with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


# outputs


def test_the_output_has_the_documented_shapes():
    out = made()(inputs_of(), PRESENT)
    shapes = {
        "logits": (5, 4),
        "fused": (5, 8),
        "tokens": (5, 3, 2, 8),
        "synthesised": (5, 3, 2, 8),
        "completed": (5, 3, 2, 8),
        "context": (5, 3, 8),
        "reference": (5, 3, 8),
        "aligned": (5, 3, 2, 8),
        "present": (5, 3),
        "visible": (5, 3),
        "neighbour_weights": (5, 3, 2, 8),
        "neighbour_ids": (5, 3, 2, 8),
        "fused_logits": (5, 4),
    }
    for name, shape in shapes.items():
        assert getattr(out, name).shape == shape, name
    assert out.losses == {}
    assert out.loss is None
    assert out.evidence is None
    assert set(shapes) | {"losses", "loss", "evidence"} == set(FusionOutput._fields)


@pytest.mark.parametrize("target", KINDS)
def test_evidence_and_the_fused_vector_meet_in_the_middle_and_learn_apart(target):
    num_classes = made(target).head.classify.out_features
    evidence = ModalityEvidence(3, 8, num_classes, target)
    model, labels = made(target, evidence=evidence), labels_of(target)
    out = model(inputs_of(), PRESENT, VISIBLE, labels)
    said = model.eval().evidence(out.tokens, VISIBLE)
    first = model(inputs_of(), PRESENT, VISIBLE)
    mean = (first.fused_logits + model.evidence(first.tokens, VISIBLE).logits) / 2
    norm = torch.Tensor.softmax if target == "multiclass" else (lambda logits, _: logits)
    torch.testing.assert_close(norm(first.logits, 1), norm(mean, 1), atol=1e-5, rtol=1e-5)
    assert said.evidence[~VISIBLE].eq(0).all()
    assert out.losses["evidence"] > 0
    grads = torch.autograd.grad(out.losses["task"], list(evidence.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)
    assert evidence.tally[1].eq((labels == labels).sum(0)).all()  # counted once, in training


@pytest.mark.parametrize("given", [True, False])
def test_the_pool_reads_every_modality_synthesised_ones_too(given):
    pool = PresencePool(8) if given else None
    model = made(pool=pool).eval()
    out = model(inputs_of(), PRESENT, VISIBLE)
    assert isinstance(model.pool, PresencePool if given else ConcatPool)
    assert torch.equal(out.fused, model.pool(out.aligned, torch.ones_like(PRESENT)))
    assert torch.equal(out.logits, model.head(out.fused))


def test_completed_is_what_is_visible_and_else_the_guess():
    out = made()(inputs_of(), PRESENT, VISIBLE)
    assert torch.equal(out.completed[VISIBLE], out.tokens[VISIBLE])
    assert torch.equal(out.completed[~VISIBLE], out.synthesised[~VISIBLE])
    assert (out.tokens[~PRESENT] == 0).all()
    assert torch.equal(out.present, PRESENT)
    assert torch.equal(out.visible, VISIBLE)


def test_present_is_inferred_where_it_is_not_given():
    inputs = inputs_of()
    inputs["derm"][1] = NAN
    inputs["meta"] = None
    out = made()(inputs)
    assert (
        out.present.tolist()
        == [[True, True, False], [True, False, False]] + [[True, True, False]] * 3
    )
    assert torch.equal(out.visible, out.present)


# visible


def test_what_is_hidden_does_not_reach_the_output():
    evidence = ModalityEvidence(3, 8, 4, "multiclass")
    model, inputs = made(evidence=evidence).eval(), inputs_of()
    moved = {name: value.clone() for name, value in inputs.items()}
    for column, name in enumerate(NAMES):
        moved[name][HIDDEN[:, column]] += 3.0
    one, other = model(inputs, PRESENT, VISIBLE), model(moved, PRESENT, VISIBLE)
    assert not torch.equal(one.tokens, other.tokens)
    for name in FusionOutput._fields:
        if name not in ("tokens", "present", "losses", "loss"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_hidden_is_like_absent():
    model, inputs = made().eval(), inputs_of()
    hidden, absent = model(inputs, PRESENT, VISIBLE), model(inputs, VISIBLE)
    assert torch.equal(hidden.logits, absent.logits)
    assert torch.equal(hidden.completed, absent.completed)


def test_reconstruction_lives_on_what_is_present_and_hidden():
    model, inputs, labels = made(), inputs_of(), labels_of("multiclass")
    for block in model.crta.blocks:
        nn.init.normal_(block.residual_weight, std=0.1)
    model(inputs, PRESENT, None, labels, IDS)  # fills the memory, so that it adds to the guess
    model.eval()
    out = model(inputs, PRESENT, VISIBLE, labels)
    assert out.losses["reconstruction"] > 0
    assert model(inputs, PRESENT, None, labels).losses["reconstruction"] == 0
    assert model(inputs, VISIBLE, VISIBLE, labels).losses["reconstruction"] == 0
    stages = model.crta(out.tokens, model.context(5), VISIBLE).stages
    assert not torch.allclose(stages[-1][HIDDEN], out.synthesised[HIDDEN])
    parts = [reconstruction_loss(x, out.tokens, HIDDEN) for x in (*stages, out.synthesised)]
    torch.testing.assert_close(
        out.losses["reconstruction"], torch.stack(parts).mean(), atol=1e-6, rtol=1e-5
    )


def test_the_truth_of_the_reconstruction_gets_no_gradient():
    model, inputs = made(), inputs_of(1)
    present = torch.tensor([[True, True, True]])
    visible = torch.tensor([[False, True, True]])
    out = model(inputs, present, visible, torch.tensor([1]))
    out.losses["reconstruction"].backward()
    hidden = model.edge.tokens.modalities["clinic"].parameters()
    assert all(p.grad is None or not p.grad.any() for p in hidden)
    assert parameters_with_gradient(model) & {"crta.absent.tokens"}


@pytest.mark.parametrize(
    ("visible", "pattern"),
    [
        (~PRESENT, r"visible\[1, 'derm'\] is True.*subset.*present & visible"),
        (VISIBLE.float(), r"visible is \(5, 3\) torch\.float32.*bool.*hide"),
        (VISIBLE[:, :2], r"visible is \(5, 2\).*\(5, 3\).*hide"),
    ],
)
def test_visible_is_a_subset_of_present(visible, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        made()(inputs_of(), PRESENT, visible)


# targets and losses


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("target", KINDS)
def test_losses_are_the_pure_functions_and_loss_their_weighted_sum(target, missing):
    weights = {"reconstruction": 0.5, "alignment": 2.0, "contrastive": 0.25}
    model = made(target, **{f"{name}_weight": value for name, value in weights.items()}).eval()
    labels = labels_of(target, missing)
    out = model(inputs_of(), PRESENT, VISIBLE, labels)
    assert set(out.losses) == {"task", *weights}
    close = {"atol": 1e-6, "rtol": 1e-5}
    task = task_loss(out.logits, labels, target)
    torch.testing.assert_close(out.losses["task"], task, **close)
    angle = alignment_loss(out.aligned, out.reference)
    torch.testing.assert_close(out.losses["alignment"], angle, **close)
    if target == "regression":
        assert out.losses["contrastive"] == 0
    else:
        classes = labels.flatten() if target == "binary" else labels
        contrast = class_contrastive_loss(out.aligned.mean(2), classes)
        torch.testing.assert_close(out.losses["contrastive"], contrast, **close)
        assert contrast > 0
    total = out.losses["task"] + sum(w * out.losses[name] for name, w in weights.items())
    torch.testing.assert_close(out.loss, total, **close)
    assert all(value.shape == () for value in (*out.losses.values(), out.loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_binary_labels_of_any_type_and_shape_mean_the_same(dtype):
    model, inputs = made("binary").eval(), inputs_of()
    labels = labels_of("binary")
    truth = model(inputs, PRESENT, VISIBLE, labels).losses
    for given in (labels.to(dtype), labels.to(dtype).flatten()):
        losses = model(inputs, PRESENT, VISIBLE, given).losses
        for name, value in truth.items():
            assert torch.equal(losses[name], value)


@pytest.mark.parametrize("target", KINDS)
def test_without_any_label_task_and_contrastive_are_zero_and_the_rest_still_trains(target):
    labels = labels_of(target)
    labels.fill_(-100 if target == "multiclass" else NAN)
    model = made(target)
    out = model(inputs_of(), PRESENT, VISIBLE, labels)
    assert out.losses["task"] == 0
    assert out.losses["contrastive"] == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert "crta.absent.tokens" in parameters_with_gradient(model)


WRONG_LABELS = [
    ("multiclass", torch.tensor([0, 1, 4, 0, 0]), r"labels\[2\] is 4.*0 to 3.*-100.*Correct"),
    ("multiclass", torch.tensor([0, -1, 2, 0, 0]), r"labels\[1\] is -1.*0 to 3.*-100.*Correct"),
    ("multiclass", torch.zeros(5), r"labels is torch\.float32.*whole numbers.*Convert"),
    ("multiclass", torch.zeros(4).long(), r"labels is \(4,\).*\(5,\).*Reshape"),
    ("multiclass", torch.zeros(5, 4).long(), r"labels is \(5, 4\).*\(5,\).*Reshape"),
    ("multilabel", torch.full((5, 3), 0.5), r"labels\[0, 0\] is 0\.5.*0 or 1.*NaN.*Correct"),
    ("multilabel", torch.full((5, 3), -100.0), r"labels\[0, 0\] is -100\.0.*NaN.*Correct"),
    ("multilabel", torch.full((5, 3), 2), r"labels\[0, 0\] is 2.*0 or 1.*-100.*Correct"),
    ("multilabel", torch.zeros(5), r"labels is \(5,\).*\(5, 3\).*Reshape"),
    ("binary", torch.full((5,), 2.0), r"labels\[0\] is 2\.0.*0 or 1.*NaN.*Correct"),
    ("binary", torch.zeros(5, 2), r"labels is \(5, 2\).*\(5, 1\).*Reshape"),
    ("regression", torch.zeros(5, 2).long(), r"labels is torch\.int64.*floating.*Convert"),
    ("regression", torch.full((5, 2), float("inf")), r"labels\[0, 0\] is inf.*finite.*Correct"),
]


@pytest.mark.parametrize(("target", "labels", "pattern"), WRONG_LABELS)
def test_wrong_labels_are_refused_and_leave_no_trace_in_memory(target, labels, pattern):
    model = made(target)
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        model(inputs_of(), PRESENT, VISIBLE, labels, IDS)
    assert not model.memory.held.any()


def test_label_values_are_only_looked_at_if_asked():
    model = made("multilabel", check_values=False)
    assert model(inputs_of(), PRESENT, None, torch.full((5, 3), 0.5)).loss.isfinite()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"target": "ranking", "num_classes": 2}, "target='ranking'.*one of.*Choose"),
        ({"num_classes": 1}, "num_classes=1 with target='multiclass'.*two.*target='binary'"),
        ({"target": "binary", "num_classes": 2}, "num_classes=2.*one logit.*num_classes=1"),
        ({"target": "multilabel", "num_classes": 0}, "num_classes=0.*logit.*count"),
        ({"num_classes": 2, "num_heads": 3}, "num_heads=3 with dim=128.*evenly.*divisor"),
        ({"num_classes": 2, "num_blocks": 0}, "num_blocks=0.*at least one.*leave CRTA out"),
        ({"num_classes": 2, "num_tokens": 0}, "num_tokens=0.*at least one.*1 or more"),
        ({"num_classes": 2, "num_context": 0}, "num_context=0.*at least one.*1 or more"),
    ],
)
def test_wrong_sizes_are_refused(arguments, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        CMML(WIDTHS, **arguments)


# memory


def test_a_training_step_with_ids_writes_what_was_observed_once():
    model, inputs, labels = made(), inputs_of(), labels_of("multiclass", missing=True)
    out = model(inputs, PRESENT, VISIBLE, labels, IDS)
    assert model.memory.held.tolist() == PRESENT.sum(0).tolist(), "hidden ones were observed too"
    for m in range(3):
        rows = PRESENT[:, m].nonzero().flatten()
        count = len(rows)
        assert model.memory.ids[m, :count].tolist() == rows.tolist()
        assert torch.equal(model.memory.slots[m, :count], out.tokens[rows, m].mean(1).detach())
        assert model.memory.labels[m, :count].flatten().tolist() == labels[rows].tolist()
    out.loss.backward()


@pytest.mark.parametrize(
    ("training", "ids", "labels"), [(True, None, True), (False, IDS, True), (True, IDS, False)]
)
def test_memory_is_written_only_in_training_and_with_ids(training, ids, labels):
    model = made().train(training)
    given = labels_of("multiclass") if labels else None
    model(inputs_of(), PRESENT, VISIBLE, given, ids)
    assert bool(model.memory.held.any()) is (training and ids is not None)


def test_the_read_comes_before_the_write():
    model, inputs = made(dropout=0.0), inputs_of()
    first = model(inputs, PRESENT, None, None, IDS)
    assert (first.neighbour_ids == -1).all(), "the memory was empty when it was read"
    assert not first.neighbour_weights.any()
    second = model(inputs, PRESENT, None, None, IDS + 100)
    absent = ~PRESENT
    assert (second.neighbour_ids[absent][..., 0] >= 0).all()
    assert (second.neighbour_ids[PRESENT] == -1).all()
    assert (second.neighbour_ids < 100).all()


def test_a_sample_does_not_read_itself_in_the_next_epoch():
    model, inputs = made(dropout=0.0), inputs_of()
    model(inputs, PRESENT, None, None, IDS)
    model(inputs, PRESENT, None, None, IDS)
    hidden = torch.zeros_like(PRESENT)
    out = model.eval()(inputs, PRESENT, hidden, None, IDS)
    assert (out.neighbour_ids != IDS[:, None, None, None]).all()
    assert (out.neighbour_ids >= 0).any()


@pytest.mark.parametrize("target", KINDS)
def test_the_default_memory_has_room_for_the_labels(target):
    model, labels = made(target), labels_of(target, missing=True)
    model(inputs_of(), PRESENT, VISIBLE, labels, IDS).loss.backward()
    rows = PRESENT[:, 0].nonzero().flatten()
    stored = model.memory.labels[0, : len(rows)]
    expected = labels[rows].reshape(len(rows), -1).float()
    torch.testing.assert_close(stored, expected, equal_nan=True, atol=0, rtol=0)


# stages passed in or left out


@pytest.mark.parametrize("crta", ["default", None])
@pytest.mark.parametrize("memory", ["default", "prototypes", None])
@pytest.mark.parametrize("alignment", ["default", None])
def test_every_combination_of_stages_trains(crta, memory, alignment):
    given = PrototypeMemory(3, 4, 8) if memory == "prototypes" else memory
    model = made(crta=crta, memory=given, alignment=alignment)
    out = model(inputs_of(), PRESENT, VISIBLE, labels_of("multiclass"), IDS)
    out = model(inputs_of(), PRESENT, VISIBLE, labels_of("multiclass"), IDS + 50)
    assert out.logits.isfinite().all()
    assert torch.equal(out.completed[VISIBLE], out.tokens[VISIBLE])
    assert (out.synthesised is None) is (crta is None)
    assert (out.reference is None) is (alignment is None)
    assert (out.neighbour_ids is None) is (memory is None)
    assert (out.neighbour_weights is None) is (memory is None)
    assert bool(out.losses["reconstruction"] > 0) is (crta is not None)
    assert bool(out.losses["alignment"] > 0) is (alignment is not None)
    if alignment is None:
        assert torch.equal(out.aligned, out.completed)
    if crta is None and memory is None:
        expected = model.absent.tokens.expand(5, -1, -1, -1)
        assert torch.equal(out.completed[~VISIBLE], expected[~VISIBLE])
        assert torch.equal(out.context, model.context(5))
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    learning = parameters_with_gradient(model)
    assert {"head.classify.weight"} <= learning
    assert any(name.startswith("edge.") for name in learning)
    assert any(name.startswith(("crta.absent", "absent")) for name in learning)
    explained = model.explain(out)
    assert torch.equal(explained.synthesised, ~VISIBLE)
    assert (explained.neighbour_ids is None) is (memory is None)
    assert (explained.reference_weights is None) is (alignment is None)


class Constant(nn.Module):
    """A head of one's own."""

    def forward(self, fused):
        return fused[:, :4] * 0 + torch.arange(4.0)


def test_stages_passed_in_are_used():
    parts = {
        "crta": CRTA(3, 2, 8, num_heads=1, num_blocks=1),
        "memory": MemoryBank(3, 7, 8, num_neighbours=2),
        "alignment": ReferenceAlignment(8, num_heads=4),
        "head": Constant(),
    }
    model = made(**parts)
    for name, part in parts.items():
        assert getattr(model, name) is part
    out = model(inputs_of(), PRESENT, VISIBLE, None, IDS)
    assert out.neighbour_ids.shape[-1] == 2
    assert parts["memory"].held.any()
    assert torch.equal(out.logits, torch.arange(4.0).expand(5, -1))


def test_explain_says_what_was_guessed_and_from_what():
    model, inputs = made(dropout=0.0), inputs_of()
    model(inputs, PRESENT, None, None, IDS + 100)
    out = model.eval()(inputs, PRESENT, VISIBLE)
    explained = model.explain(out)
    assert torch.equal(explained.synthesised, ~VISIBLE)
    assert torch.equal(explained.neighbour_ids, out.neighbour_ids)
    assert torch.equal(explained.neighbour_weights, out.neighbour_weights)
    guessed = explained.neighbour_weights[~VISIBLE]
    torch.testing.assert_close(guessed.sum(-1), torch.ones(guessed.shape[:-1]))
    assert ((explained.neighbour_ids >= 100) | (explained.neighbour_ids == -1)).all()
    shares = explained.reference_weights
    assert shares.shape == (5, 3, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(5, 3))


def test_encoders_train_and_are_reset_with_the_model():
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
    model = CMML({"photo": (encoder, 6), "table": 3}, num_classes=2, **SIZES)
    inputs = {"photo": torch.randn(4, 1, 6, 6), "table": torch.randn(4, 3)}
    out = model(inputs, labels=torch.tensor([0, 1, 0, 1]), sample_ids=torch.arange(4))
    out.loss.backward()
    assert encoder[0].weight.grad.any()
    before = encoder[0].weight.clone()
    model.reset_parameters()
    assert not torch.equal(encoder[0].weight, before)
    assert not model.memory.held.any()


def test_a_model_in_double_precision_takes_a_batch_without_a_modality():
    model = made(dtype=torch.float64).eval()
    inputs = {"clinic": torch.randn(2, 6, dtype=torch.float64), "derm": None}
    assert model(inputs).logits.dtype == torch.float64


def test_a_step_that_the_memory_refuses_is_not_counted():
    evidence = ModalityEvidence(3, 8, 4, "multiclass")
    model = made(evidence=evidence, memory=MemoryBank(3, 6, 8, 2, num_labels=4))
    with pytest.raises(ValueError, match=r"(?s)labels is \(5,\).*num_labels=4"):
        model(inputs_of(), PRESENT, VISIBLE, labels_of("multiclass"), IDS)
    assert not evidence.tally.any()


def test_one_label_of_several_means_the_same_in_both_shapes():
    """(B,) were class numbers in the contrastive loss: two samples without it were alike."""
    model = CMML(WIDTHS, num_classes=1, target="multilabel", **SIZES).eval()
    labels, inputs = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), inputs_of()
    flat, column = (model(inputs, labels=x).losses for x in (labels, labels[:, None]))
    assert all(torch.equal(value, column[name]) for name, value in flat.items())


@pytest.mark.parametrize("options", [{}, {"memory": None}])
def test_ids_and_visible_are_looked_at_whatever_the_stages(options):
    model = made(**options)
    with pytest.raises(ValueError, match=r"(?s)sample_ids is \(4,\).*\(5,\).*Number"):
        model(inputs_of(), sample_ids=IDS[:4])
    with pytest.raises(ValueError, match=r"(?s)visible is a list.*bool tensor.*as_tensor"):
        model(inputs_of(), visible=VISIBLE.tolist())
    with pytest.raises(ValueError, match=r"(?s)modality name 1: .*a string"):
        CMML({1: 3}, num_classes=2)


@pytest.mark.parametrize("rate", [1, 2])
def test_every_parameter_takes_part(rate):
    """No parameter is left without a gradient, whatever the pattern: DDP would wait for it."""
    model = made()
    for present in (PRESENT, torch.ones(5, 3).bool(), torch.zeros(5, 3).bool()):
        inputs = inputs_of()
        if rate == 2:
            inputs["meta"], present = None, present & torch.tensor([True, True, False])
        model.zero_grad()
        model(inputs, present, None, labels_of("multiclass"), IDS).loss.backward()
        lacking = [name for name, p in model.named_parameters() if p.grad is None]
        assert lacking == []


# learning


def cause_and_views(count, generator):
    """One latent cause seen by two modalities: the class follows from it."""
    cause = torch.randn(count, 4, generator=generator)
    labels = (cause[:, 0] > 0).long() + 2 * (cause[:, 1] > 0).long()
    mixing = torch.Generator().manual_seed(7)
    first, second = (torch.randn(4, 6, generator=mixing) for _ in range(2))
    noise = torch.randn(count, 6, generator=generator)
    return {"one": cause @ first, "other": cause @ second + 0.1 * noise}, labels


@pytest.fixture(scope="module")
def learnt():
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model = CMML({"one": 6, "other": 6}, num_classes=4, **{**SIZES, "dim": 16, "dropout": 0.0})
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for step in range(120):
        inputs, labels = cause_and_views(64, draw)
        present = torch.ones(64, 2, dtype=torch.bool)
        visible = hide(present, 0.4, draw)
        ids = torch.arange(64) + 64 * step
        out = model(inputs, present, visible, labels, ids)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        history.append({name: value.item() for name, value in out.losses.items()})
    return model.eval(), history


def test_training_lowers_every_loss(learnt):
    _, history = learnt
    for name in ("task", "reconstruction", "alignment", "contrastive"):
        start = sum(h[name] for h in history[:5])
        end = sum(h[name] for h in history[-5:])
        assert end < 0.85 * start, name


@pytest.mark.parametrize("shown", [0, 1])
def test_synthesis_helps_where_modalities_share_a_cause(learnt, shown):
    model, _ = learnt
    inputs, labels = cause_and_views(400, torch.Generator().manual_seed(99))
    present = torch.ones(400, 2, dtype=torch.bool)
    visible = torch.zeros(400, 2, dtype=torch.bool)
    visible[:, shown] = True
    with torch.no_grad():
        out = model(inputs, present, visible)
        both = model(inputs, present)
    assert (both.logits.argmax(1) == labels).float().mean() > 0.8
    assert (out.logits.argmax(1) == labels).float().mean() > 0.7
    guess, truth = (x[:, 1 - shown].flatten(1) for x in (out.synthesised, out.tokens))
    mean = truth.mean(0, keepdim=True)
    explained = 1 - (guess - truth).square().sum() / (mean - truth).square().sum()
    assert explained > 0.4, "the guess is closer to the truth than the mean is"
