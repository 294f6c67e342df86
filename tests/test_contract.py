"""What DESIGN.md 4.3 guarantees, checked over every row of the list: G1 to G6, G9 and the rest."""

import ast
import copy
import io
import pickle
import traceback
from pathlib import Path

import contract_errors
import contract_golden
import pytest
import torch
from contract_builders import BY_NAME, CASES
from contract_case import (
    CLASSES,
    DIM,
    HELD,
    LENGTH,
    NEIGHBOURS,
    SLOTS,
    at,
    cast,
    finite,
    poison,
    require_grad,
    rows,
)
from torch import Generator, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import mmfusion
from mmfusion import baselines, functional, layers, losses, missingness

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MODELS = [case for case in CASES if case.loss]
FLOAT = {"rtol": 1e-4, "atol": 2e-6}  # another order of float32 additions, nothing else

# These have no absent part that could be cut out: nothing is absent, each entry stands alone, or
# the absent part is read on purpose, because it has been synthesised.
NO_CUT = {"ContextTokens", "AbsentTokens", "PrototypeMemory", "ReadoutGate", "Head"}


def generator(seed=0):
    return Generator().manual_seed(seed)


def assert_identical(outputs, others):
    """Bit by bit; both have the same names."""
    assert outputs.keys() == others.keys()
    for name, value in outputs.items():
        assert torch.equal(value, others[name]), name


def test_every_public_layer_and_op_has_a_row():
    public = [getattr(layers, name) for name in layers.__all__]
    modules = {
        thing for thing in public if isinstance(thing, type) and issubclass(thing, nn.Module)
    }
    ops = {functional.retrieve, functional.presence_attention}
    assert set(functional.__all__) == {op.__name__ for op in ops} | {
        "why_not_triton",
        "class_contrastive",  # its rows are those of losses.class_contrastive_loss
    }
    models = {mmfusion.CMML, *(getattr(baselines, name) for name in baselines.__all__)}
    assert {case.covers for case in CASES} == modules | models | ops
    assert len(BY_NAME) == len(CASES)


# G1 ----------------------------------------------------------------------------------------------

CONTENT = [
    (case, filler)
    for case in CASES
    if case.ignored(case.batch(2, 2, generator()))
    for filler in case.fillers
]


@pytest.mark.parametrize(("case", "filler"), CONTENT, ids=lambda x: getattr(x, "name", x))
def test_content_under_absent_never_matters(case, filler):
    module = case.ready()
    batch = case.batch(6, 3, generator())
    dirty = require_grad(poison(batch, case.ignored(batch), filler))
    outputs = case.own_rows(case.call(module, dirty), dirty)
    assert_identical(outputs, case.own_rows(case.call(module, batch), batch))
    assert_identical(outputs, case.own_rows(case.call(module, dirty), dirty))
    case.objective(module, dirty).backward()
    read = 0
    for path, where in case.ignored(batch):
        for leaf in tree_leaves(at(dirty, path)):
            if leaf.grad is not None:
                assert leaf.grad[where].eq(0).all(), path
                assert finite(leaf.grad)
                read += int(leaf.grad[~where].count_nonzero())
    assert read, "the content that is present has to matter"
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or finite(parameter.grad), name


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
@pytest.mark.parametrize("filler", ["nan", "inf", "noise"])
def test_content_under_absent_never_reaches_a_loss_while_training(case, filler):
    batch = case.batch(6, 3, generator())
    dirty = poison(batch, case.ignored(batch), filler)
    results = []
    for inputs in (batch, dirty):
        model = case.ready().train()
        model(**inputs).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()} | model.state_dict())
    for name, value in results[0].items():
        if value is None or not value.is_floating_point():
            assert (value is None) == (results[1][name] is None)
            continue
        assert torch.equal(value.nan_to_num(7.0), results[1][name].nan_to_num(7.0)), name


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_absence_by_nan_row_none_or_present_is_one_thing(case):
    model = case.ready()
    batch = case.batch(6, 3, generator())
    del batch["labels"]
    batch["present"][:, -1] = False
    if "text" in batch["inputs"]:  # its leaves are whole numbers, which hold no NaN
        batch["present"][:, 1] = True
    batch["visible"] &= batch["present"]
    inferred = poison(batch, case.ignored(batch), "nan")
    inferred["inputs"][list(batch["inputs"])[-1]] = None
    del inferred["present"]
    expected, outputs = model(**batch), model(**inferred)
    for field in ("logits", "tokens", "present", "aligned"):
        assert_close(getattr(outputs, field), getattr(expected, field), **FLOAT)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_what_is_hidden_while_training_reaches_no_output(case):
    batch = case.batch(6, 3, generator())
    batch["present"][:] = True
    hidden = batch["present"] & ~batch["visible"]
    where = [(("inputs", name), hidden[:, m]) for m, name in enumerate(batch["inputs"])]
    changed = require_grad(poison(batch, where, "noise"))
    if "text" in changed["inputs"]:
        changed["inputs"]["text"] = batch["inputs"]["text"]
    expected, outputs = (case.call(case.ready().train(), b) for b in (batch, changed))
    for outs in (expected, outputs):
        outs["tokens"] = torch.where(hidden[:, :, None, None], 0, outs["tokens"])
    assert_identical(outputs, expected)
    case.ready().train()(**changed).loss.backward()
    for path, rows_hidden in where:
        for leaf in tree_leaves(at(changed, path)):
            if leaf.grad is not None:
                assert leaf.grad[rows_hidden].eq(0).all(), path


class ByTotal(nn.Module):
    """Makes NaN of the zeros it is given for an absent row."""

    def forward(self, rows):
        return rows / rows.sum(1, keepdim=True)


def test_what_an_encoder_makes_of_an_absent_row_is_dropped():
    model = mmfusion.CMML({"a": (ByTotal(), 3), "b": 2}, num_classes=2, dim=8)
    inputs = {"a": torch.rand(4, 3), "b": torch.randn(4, 2)}
    present = torch.tensor([[True, True], [False, True], [True, True], [False, False]])
    out = model(inputs, present, labels=torch.tensor([0, 1, 0, 1]))
    out.loss.backward()
    assert finite([out.logits, out.tokens, *(p.grad for p in model.parameters())])


# G2 ----------------------------------------------------------------------------------------------


@EVERY
def test_batch_mates_never_matter(case):
    module = case.ready()
    batch = case.batch(6, 3, generator())
    together = case.call(module, batch)
    for i in range(6):
        for name, value in case.call(module, rows(batch, slice(i, i + 1))).items():
            assert_close(value, together[name][i : i + 1], **FLOAT, equal_nan=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2, 2])
    for name, value in case.call(module, rows(batch, order)).items():
        assert_close(value, together[name][order], **FLOAT, equal_nan=True)


# G3 ----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("filled", [True, False], ids=["filled", "empty"])
@pytest.mark.parametrize("pattern", ["nothing", "everything", "random"])
@pytest.mark.parametrize("modalities", [1, 3])
def test_every_extreme_gives_finite_outputs_and_gradients(case, modalities, pattern, filled):
    for batch_size in (1, 4):
        for training in (False, True):
            module = case.ready(modalities, filled=filled).train(training)
            present = torch.rand(batch_size, modalities, generator=generator()) < 0.5
            present = {"nothing": present & False, "everything": present | True}.get(
                pattern, present
            )
            batch = require_grad(case.batch(batch_size, modalities, generator(), present))
            assert finite(case.call(module, batch))
            loss = case.objective(module, batch)
            assert finite(loss)
            if loss.requires_grad:
                loss.backward()
            gradients = [x.grad for x in (*module.parameters(), *tree_leaves(batch))]
            assert finite(gradients)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_no_label_known_gives_zero_task_and_contrastive_loss(case):
    model = case.ready().train()
    batch = case.batch(4, 3, generator())
    batch["labels"].fill_(torch.nan if batch["labels"].is_floating_point() else -100)
    out = model(**batch)
    assert out.losses["task"].item() == out.losses.get("contrastive", torch.zeros(())).item() == 0
    out.loss.backward()
    assert finite([p.grad for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_no_row_at_all_gives_zero_losses_in_the_type_of_the_model(case, dtype):
    """An empty batch with labels crashed some, and float64 models had losses in float32."""
    model = case.ready(**({} if "encoders" in case.name else {"dtype": dtype})).train()
    before, batch = copy.deepcopy(model.state_dict()), case.batch(0, 3, generator())
    out = model(**(batch if "encoders" in case.name else cast(batch, dtype)))
    assert out.loss.item() == 0
    out.loss.backward()
    assert finite([p.grad for p in model.parameters()])
    assert {x.dtype for x in (out.loss, *out.losses.values())} == {out.logits.dtype}
    for name, buffer in model.named_buffers():
        assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True)


def test_no_positive_pair_gives_exactly_zero():
    embeddings = torch.randn(3, 1, 4, requires_grad=True)
    loss = losses.class_contrastive_loss(embeddings, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.item() == 0
    assert embeddings.grad.eq(0).all()


# G4 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.cut], ids=lambda case: case.name)
def test_absent_equals_physically_cut_out(case):
    whole, alone = case.cut(case.ready(), case.batch(6, 3, generator()))
    assert whole
    for name, value in whole.items():
        assert_close(value, alone[name], **FLOAT)


def test_only_what_has_no_absent_part_is_excused_from_the_cut():
    excused = {case.covers.__name__ for case in CASES if case.cut is None}
    assert excused == NO_CUT | {case.covers.__name__ for case in MODELS}


def test_absent_vectors_are_not_in_the_contrastive_loss():
    embeddings, labels = torch.randn(4, 2, 5), torch.tensor([0, 1, 0, 1])
    present = torch.tensor([[True, False]] * 4)
    dirty = torch.where(present.unsqueeze(-1), embeddings, torch.nan)
    loss = losses.class_contrastive_loss(dirty, labels, present)
    assert_close(loss, losses.class_contrastive_loss(embeddings[:, :1], labels))


# G5 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.has_dropout], ids=lambda case: case.name
)
def test_dropout_follows_torch_and_stops_in_eval(case):
    module = case.ready(dropout=0.5)
    batch = case.batch(6, 3, generator())
    assert_identical(case.call(module, batch), case.call(module, batch))
    module.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(case.call(copy.deepcopy(module), batch))
    assert_identical(drawn[0], drawn[1])
    assert any(not torch.equal(value, drawn[2][name]) for name, value in drawn[0].items())


DRAWS = {
    "sample_rate": lambda g: missingness.sample_rate(40, 3, 0.5, g),
    "slot_rate": lambda g: missingness.slot_rate(40, 3, 0.5, g),
    "per_modality": lambda g: missingness.per_modality(40, (0.2, 0.5, 0.7), g),
    "not_at_random": lambda g: missingness.not_at_random(
        torch.arange(40) % 2, ((0.2, 0.5), (0.7, 0.1)), g
    ),
    "hide": lambda g: missingness.hide(torch.ones(40, 3, dtype=torch.bool), 0.5, g),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_same_generator_same_draw_and_the_global_one_is_not_touched(draw):
    before = torch.get_rng_state()
    first, again, other = (draw(generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# G6 ----------------------------------------------------------------------------------------------


def by_state_dict(case, module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = case.ready(seed=9, filled=False)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {
    "state_dict": by_state_dict,
    "pickle": lambda case, module: pickle.loads(pickle.dumps(module)),
    "deepcopy": lambda case, module: copy.deepcopy(module),
}


@EVERY
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_the_same_module(case, how):
    module = case.ready()
    twin = COPIES[how](case, module)
    batch = case.batch(6, 3, generator())
    assert_identical(case.call(twin, batch), case.call(module, batch))
    if case.loss:  # and goes on the same way, its memory included
        for model in (module, twin):
            model.train()(**batch)
            model.train()(**batch)
    state, twins = module.state_dict(), twin.state_dict()
    assert_close(state, twins, rtol=0, atol=0, equal_nan=True)


@EVERY
def test_names_and_seeded_initial_values_are_pinned(case):
    """A rename breaks people's checkpoints, another draw their seeds: see ``contract_golden``."""
    assert contract_golden.state(case) == contract_golden.pinned(case)


def test_no_golden_file_is_left_over():
    assert contract_golden.left_over(CASES) == []


# G9 ----------------------------------------------------------------------------------------------


def bank_of(modalities=2, num_slots=4, num_neighbours=1, **kind):
    return layers.MemoryBank(modalities, num_slots, DIM, num_neighbours, **kind)


def test_only_observed_vectors_enter_and_each_with_its_id_and_label():
    bank = bank_of()
    vectors = torch.randn(3, 2, DIM)
    present = torch.tensor([[True, False], [False, False], [True, True]])
    dirty = torch.where(present.unsqueeze(-1), vectors, torch.nan)
    bank.write(dirty, present, torch.tensor([7, 8, 9]), torch.tensor([0.0, 1.0, 2.0]))
    assert bank.held.tolist() == bank.cursor.tolist() == [2, 1]
    assert torch.equal(bank.slots[0, :2], vectors[[0, 2], 0])
    assert torch.equal(bank.slots[1, 0], vectors[2, 1])
    assert bank.slots[0, 2:].eq(0).all()
    assert bank.slots[1, 1:].eq(0).all()
    assert bank.ids.tolist() == [[7, 9, -1, -1], [9, -1, -1, -1]]
    assert bank.labels[0, :2, 0].tolist() == [0, 2]


def test_eval_writes_nothing_and_training_only_with_ids():
    case = BY_NAME["CMML-default"]
    batch = case.batch(6, 3, generator())
    model = case.ready(filled=False)
    empty = copy.deepcopy(model.memory.state_dict())
    model(**batch)
    model.memory.write(torch.randn(6, 3, DIM), batch["present"])
    model.train()(**{key: value for key, value in batch.items() if key != "sample_ids"})
    assert_close(model.memory.state_dict(), empty, rtol=0, atol=0, equal_nan=True)
    model(**batch)
    assert torch.equal(model.memory.held, batch["present"].sum(0))


def test_a_model_remembers_the_pooled_tokens_of_observed_modalities_even_if_hidden():
    case = BY_NAME["CMML-default"]
    batch = case.batch(6, 3, generator())
    batch["visible"] = torch.zeros_like(batch["visible"])
    model = case.ready(filled=False).train()
    tokens = model(**batch).tokens.mean(2)
    for m in range(3):
        observed = batch["present"][:, m]
        held = int(observed.sum())
        assert torch.equal(model.memory.slots[m, :held], tokens[observed, m])
        assert torch.equal(model.memory.ids[m, :held], batch["sample_ids"][observed])


def test_own_id_is_never_read():
    bank = bank_of(1)
    vectors = torch.eye(DIM)[:3].unsqueeze(1)
    bank.write(vectors, torch.ones(3, 1, dtype=torch.bool), torch.tensor([5, 6, -1]))
    absent = torch.zeros(3, 1, dtype=torch.bool)
    found = bank.lookup(vectors, absent, torch.tensor([5, 6, 5]))
    assert found.ids[0].item() != 5
    assert found.ids[1].item() != 6
    assert torch.equal(found.readout[2, 0], vectors[2, 0])  # an id of -1 keeps nobody away
    assert bank.lookup(vectors, absent).ids.flatten().tolist() == [5, 6, -1]


def test_one_training_step_reads_before_it_writes():
    case = BY_NAME["CMML-default"]
    batch = case.batch(6, 3, generator())
    model = case.ready(filled=False).train()
    assert model(**batch).neighbour_ids.eq(-1).all()
    assert model(**batch).neighbour_ids.ge(0).any()


def test_the_oldest_leaves_first():
    bank, twin = bank_of(1), bank_of(1)
    rows_written = torch.randn(11, 1, DIM)
    ids, here = torch.arange(11), torch.ones(11, 1, dtype=torch.bool)
    for start, stop in ((0, 3), (3, 5), (5, 11)):  # the last write has more rows than slots
        part = slice(start, stop)
        bank.write(rows_written[part], here[part], ids[part])
    for i in range(11):
        twin.write(rows_written[i : i + 1], here[i : i + 1], ids[i : i + 1])
    assert sorted(bank.ids[0].tolist()) == [7, 8, 9, 10]
    assert bank.cursor.item() == 11 % 4
    assert_close(bank.state_dict(), twin.state_dict() | gate_state(bank), equal_nan=True)


def gate_state(bank):
    return {f"gate.{key}": value for key, value in bank.gate.state_dict().items()}


def test_buffers_are_updated_in_place():
    bank = bank_of()
    before = {name: buffer.data_ptr() for name, buffer in bank.named_buffers()}
    bank.write(torch.randn(9, 2, DIM), torch.ones(9, 2, dtype=torch.bool))
    bank.reset()
    assert {name: buffer.data_ptr() for name, buffer in bank.named_buffers()} == before


def test_memory_lends_nothing_to_what_is_present():
    bank = BY_NAME["MemoryBank"].ready()
    query, present = torch.randn(4, 3, LENGTH, DIM), torch.rand(4, 3) < 0.5
    found = bank.lookup(query, present)
    assert found.weights.shape == (4, 3, LENGTH, NEIGHBOURS)
    assert found.readout[present].eq(0).all()
    assert found.ids[present].eq(-1).all()
    assert found.ids[~present].ge(100).all()
    assert HELD < SLOTS
    assert torch.equal(bank(query, present)[present], query[present])


# G10 ---------------------------------------------------------------------------------------------

WRONG_CALLS = [(place, *call) for place, calls in contract_errors.WRONG.items() for call in calls]
# Raised over several ranks alone: test_contract_ranks.py
ELSEWHERE = {
    ("encoders.py", "its encoder's input shape"),
    ("ops.py", "mapped by vmap"),  # tests/kernels
    ("tiles.py", "tile table"),  # tests/kernels
    ("presence_attention.py", "2^31"),  # needs more memory than a test has
    ("retrieve.py", "31 bits"),  # likewise
}


@pytest.mark.parametrize(("place", "call", "value", "rule", "cure"), WRONG_CALLS)
def test_errors_hold_value_rule_and_cure(place, call, value, rule, cure):
    with pytest.raises(ValueError, match=rf"(?s){value}.*: .*{rule}.*\. .*{cure}"):
        call()


def raises_in_source():
    """(file, line) of every ``raise ValueError`` of the core, less those tested elsewhere."""
    root, found = Path(mmfusion.__file__).parent, {}
    folders = ("", "layers/", "baselines/", "kernels/")
    for path in [path for folder in folders for path in root.glob(f"{folder}*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and "ValueError(" in ast.unparse(node):
                if not any(path.name == f and part in ast.unparse(node) for f, part in ELSEWHERE):
                    found[str(path), node.lineno] = ast.unparse(node)
    return found


def test_every_refusal_of_the_core_has_a_wrong_call():
    """A new ``raise ValueError`` needs a line in ``contract_errors.WRONG``."""
    seen = set()
    for _, call, *_ in WRONG_CALLS:
        try:
            call()
        except ValueError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            seen.add((frame.filename, frame.lineno))
    lacking = {place: text for place, text in raises_in_source().items() if place not in seen}
    assert lacking == {}


# The rest ----------------------------------------------------------------------------------------


@EVERY
def test_every_parameter_gets_a_gradient(case):
    """The queries of a modality that is a vector have one step to read: exactly zero."""
    module = case.ready().train()
    batch = case.batch(6, 3, generator())
    present = next((batch[k] for k in ("present", "attend", "wanted") if k in batch), None)
    if present is not None:
        present[1, :2], present[2, 1:] = False, False
    if case.loss:
        batch["visible"] = missingness.hide(batch["present"], 0.5, generator())
    # of a model by its loss alone: over ranks, parameters without a part in it are waited for
    (case.loss or case.objective)(module, batch).backward()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # frozen, since nothing reads it without the other stages
            assert (case.name, name) == ("CMML-bare", "context.tokens")
            continue
        assert parameter.grad is not None, name
        vector = name.endswith(("m0.queries", "table.queries"))
        assert bool(parameter.grad.any()) is not vector, name


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_honoured(case, dtype):
    if "encoders" in case.name:
        pytest.skip("a passed encoder keeps its own type")
    module = case.ready(dtype=dtype)
    fixed = {"labels", "tally"}  # fp32, so that no class number and no count is rounded
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            exempt = name.split(".")[-1] in fixed
            assert tensor.dtype == (torch.float32 if exempt else dtype), name
    batch = cast(case.batch(6, 3, generator()), dtype)
    outputs, expected = case.call(module, batch), None
    if dtype == torch.float64:
        twin = case.ready()
        twin.load_state_dict(module.state_dict())
        expected = case.call(twin, cast(batch, torch.float32))
    for name, value in outputs.items():
        if not value.is_floating_point():
            continue
        if "weights" not in name:  # of a readout: fp32
            assert value.dtype == dtype, name
        assert finite(value), name
        if expected is not None:
            assert_close(value.float(), expected[name].float(), rtol=1e-4, atol=1e-5)
    loss = case.objective(module, batch)
    if loss.requires_grad:
        loss.backward()
    assert finite([p.grad for p in module.parameters()])


@EVERY
def test_repr_is_short_and_says_the_sizes(case):
    text = repr(case.ready())
    own = type(case.ready()).__name__
    assert text.startswith(own)
    assert "tensor(" not in text
    assert text == repr(case.ready(filled=False, seed=1))


def test_sizes_in_the_repr():
    assert repr(layers.PresenceAttention(8, 2)).startswith(
        "PresenceAttention(\n  dim=8, num_heads=2, dropout=0.0"
    )
    assert "num_modalities=2, num_slots=4, dim=8, num_neighbours=1" in repr(bank_of())
    model = BY_NAME["CMML-default"].ready()
    assert "target='multiclass'" in repr(model)
    assert model(**BY_NAME["CMML-default"].batch(2, 3, generator())).logits.shape == (2, CLASSES)
