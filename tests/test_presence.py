import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmfusion import CMML
from mmfusion.presence import check_visible, collate, normalise, visibility

NAN = float("nan")
INF = float("inf")
NAMES = ("photo", "table")


def message_of(call, *args, **kwargs):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  callers match the message, in three parts
        call(*args, **kwargs)
    return str(caught.value)


def says(message, *parts):
    """Value, rule and cure, in that order."""
    places = [message.find(part) for part in parts]
    assert -1 not in places, (message, parts)
    assert places == sorted(places), (message, parts)


# normalise


def test_present_is_inferred_from_missing_keys_none_and_nan_rows():
    photo = torch.tensor([[1.0, 2.0], [NAN, NAN], [3.0, 4.0]])
    for inputs in ({"photo": photo}, {"photo": photo, "table": None}):
        tensors, present = normalise(inputs, NAMES)
        assert present.dtype == torch.bool
        assert present.tolist() == [[True, False], [False, False], [True, False]]
        assert tensors["photo"].tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]
        assert tensors["table"] is None
    assert photo[1].isnan().all(), "the caller's tensor is not ours to write to"


def test_columns_and_tensors_follow_the_declared_order():
    inputs = {"table": torch.ones(2, 3), "photo": torch.full((2, 4), NAN)}
    tensors, present = normalise(inputs, NAMES)
    assert tuple(tensors) == NAMES
    assert present.tolist() == [[False, True]] * 2


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (3, 1, 4, 4), (3, 1, 2, 2, 2)])
def test_a_row_is_absent_only_where_all_of_it_is_nan(shape):
    value = torch.ones(shape)
    value[0] = NAN
    value[1].view(-1)[0] = NAN
    tensors, present = normalise({"photo": value}, ["photo"], accepts_nan=["photo"])
    assert present.flatten().tolist() == [False, value[1].numel() > 1, True]
    assert (tensors["photo"][0] == 0).all()


def test_present_false_hides_any_content():
    value = torch.tensor([[1.0, 2.0], [NAN, INF], [NAN, NAN], [-INF, 1e30]])
    given = torch.tensor([[True], [False], [False], [False]])
    tensors, present = normalise({"photo": value}, ["photo"], given)
    assert torch.equal(present, given)
    assert tensors["photo"].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_gradients_reach_observed_rows_alone():
    value = torch.tensor([[1.0], [NAN], [INF]], requires_grad=True)
    tensors, _ = normalise({"photo": value}, ["photo"], torch.tensor([[True], [False], [False]]))
    tensors["photo"].square().sum().backward()
    assert value.grad.flatten().tolist() == [2.0, 0.0, 0.0]


def test_integers_hold_no_nan_and_are_present_unless_told_otherwise():
    value = torch.tensor([[5, 6], [7, 8]])
    tensors, present = normalise({"photo": value}, ["photo"])
    assert present.all()
    assert tensors["photo"].dtype == torch.int64
    tensors, _ = normalise({"photo": value}, ["photo"], torch.tensor([[True], [False]]))
    assert tensors["photo"].tolist() == [[5, 6], [0, 0]]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64]
)
def test_types_are_kept(dtype):
    value = torch.ones(2, 3).to(dtype)
    for inputs in (value, {"x": value}, (value, torch.ones(2))):
        tensors, _ = normalise({"photo": inputs}, ["photo"], torch.tensor([[True], [False]]))
        leaf = tensors["photo"]
        leaf = leaf["x"] if isinstance(leaf, dict) else leaf[0] if isinstance(leaf, tuple) else leaf
        assert leaf.dtype == dtype
        assert leaf.bool().tolist() == [[True] * 3, [False] * 3]


def test_a_structure_is_absent_where_all_its_floats_are_nan():
    text = {
        "embeddings": torch.tensor([[[1.0], [2.0]], [[NAN], [NAN]]]),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "extra": (torch.tensor([[5], [6]]), None),
    }
    tensors, present = normalise({"photo": text, "table": torch.ones(2, 1)}, NAMES)
    assert present.tolist() == [[True, True], [False, True]]
    assert tensors["photo"]["embeddings"].flatten().tolist() == [1.0, 2.0, 0.0, 0.0]
    assert tensors["photo"]["mask"].tolist() == [[True, True], [False, False]]
    assert tensors["photo"]["extra"][0].tolist() == [[5], [0]]
    assert tensors["photo"]["extra"][1] is None


def test_a_structure_with_one_number_left_is_observed():
    pair = (torch.tensor([[NAN], [NAN]]), torch.tensor([[NAN], [1.0]]))
    _, present = normalise({"photo": pair}, ["photo"], accepts_nan=["photo"])
    assert present.flatten().tolist() == [False, True]


def test_nan_cells_pass_for_an_encoder_that_takes_them():
    table = torch.tensor([[1.0, NAN], [NAN, NAN]])
    tensors, present = normalise({"table": table}, ["table"], accepts_nan=["table"])
    assert present.flatten().tolist() == [True, False]
    assert tensors["table"][0].isnan().tolist() == [False, True]
    assert tensors["table"][1].tolist() == [0.0, 0.0]


def test_shapes_fill_what_the_whole_batch_lacks():
    tensors, present = normalise({"photo": torch.ones(4, 2)}, NAMES, shapes={"table": (3, 5)})
    assert tensors["table"].shape == (4, 3, 5)
    assert not tensors["table"].any()
    assert not present[:, 1].any()


def test_nothing_given_at_all_but_present():
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    tensors, present = normalise({}, NAMES, nothing, shapes={"photo": (2,)})
    assert torch.equal(present, nothing)
    assert tensors["photo"].shape == (3, 2)
    assert tensors["table"] is None


def test_without_value_checks_observed_nan_passes():
    value = torch.tensor([[NAN, 1.0], [NAN, NAN]])
    present = torch.tensor([[True], [True]])
    tensors, _ = normalise({"photo": value}, ["photo"], present, check_values=False)
    assert tensors["photo"].isnan().sum() == 3


ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            {"inputs": {"phto": ROWS}},
            ("'phto'", "declared ones are ['photo', 'table']", "Drop or rename"),
        ),
        (
            {"inputs": {"photo": ROWS, "table": torch.ones(3, 1)}},
            ("inputs['table'] has 3 rows and inputs['photo'] 2", "share one batch", "set present"),
        ),
        (
            {"inputs": {"photo": {"x": ROWS, "mask": torch.ones(3)}}},
            ("inputs['photo'] has 3 rows", "share one batch", "present"),
        ),
        (
            {"inputs": {"photo": [[1.0, 2.0]]}},
            ("inputs['photo'] holds a float", "every leaf is a tensor", "torch.as_tensor"),
        ),
        (
            {"inputs": {"photo": np.ones((2, 2))}},
            ("inputs['photo'] holds a ndarray", "every leaf is a tensor", "torch.as_tensor"),
        ),
        (
            {"inputs": {"photo": torch.tensor(1.0)}},
            ("inputs['photo'] holds a 0-D tensor", "first axis", "add the batch axis"),
        ),
        (
            {"inputs": {"photo": None}},
            ("no tensor at all", "comes from a tensor or from present", "Pass present="),
        ),
        (
            {"inputs": {"photo": ROWS}, "shapes": {"photo": (3,)}},
            ("inputs['photo'] has rows of shape (2,)", "declared with (3,)", "Reshape it"),
        ),
        (
            {"inputs": {"photo": ROWS}, "present": torch.ones(2, 2)},
            ("present is (2, 2) torch.float32", "bool (B, M) = (2, 2)", "present.bool()"),
        ),
        (
            {"inputs": {"photo": ROWS}, "present": torch.ones(2, 3, dtype=torch.bool)},
            ("present is (2, 3)", "columns ['photo', 'table']", "Convert it"),
        ),
        (
            {"inputs": {"photo": ROWS}, "present": torch.ones(3, 2, dtype=torch.bool)},
            ("present is (3, 2)", "(B, M) = (2, 2)", "Convert it"),
        ),
        (
            {
                "inputs": {"photo": ROWS},
                "present": torch.ones(2, 2, dtype=torch.bool, device="meta"),
            },
            ("on meta", "on cpu", "move it to the inputs' device"),
        ),
        (
            {"inputs": {"photo": ROWS}, "present": torch.tensor([[True, False], [True, True]])},
            (
                "present[1, 'table'] is True but inputs['table'] is None:",
                "an observed row holds numbers",
                "Pass present=None",
            ),
        ),
        (
            {
                "inputs": {"photo": torch.tensor([[1.0], [NAN]])},
                "present": torch.tensor([[True, False], [True, False]]),
            },
            (
                "present[1, 'photo'] is True but that row of inputs['photo'] is NaN:",
                "an observed row holds numbers",
                "Pass present=None",
            ),
        ),
        (
            {"inputs": {"photo": torch.tensor([[1.0, 2.0], [NAN, 1.0]])}},
            (
                "inputs['photo'] row 1 is observed but holds NaN or Inf:",
                "an observed row holds finite numbers",
                "accepts_nan = True",
            ),
        ),
        (
            {
                "inputs": {"photo": torch.tensor([[1.0, 2.0], [NAN, -INF]])},
                "accepts_nan": ["photo"],
            },
            ("inputs['photo'] row 1", "finite numbers", "mark it absent"),
        ),
        (
            {"inputs": {"photo": {"x": torch.ones(2, 1), "y": torch.tensor([[INF], [0.0]])}}},
            ("inputs['photo'] row 0", "finite numbers", "mark it absent"),
        ),
    ],
)
def test_normalise_refuses(arguments, parts):
    says(message_of(normalise, names=NAMES, **arguments), *parts)


def test_contradicting_rows_are_all_named_up_to_six():
    values = torch.full((12, 2), NAN)
    values[[0, 5]] = 1.0
    message = message_of(normalise, {"photo": values}, ["photo"], torch.ones(12, 1).bool())
    says(message, "present[1, 'photo']", "(also rows 2, 3, 4, 6, 7): ", "Pass present=None")
    values = torch.ones(5, 2)
    values[[2, 4], 0] = INF
    says(message_of(normalise, {"photo": values}, ["photo"]), "row 2 ", "(also rows 4): ")


def test_inferred_presence_contradicts_nothing():
    values = torch.tensor([[NAN, NAN], [1.0, 2.0]])
    assert normalise({"photo": values}, ["photo"])[1].flatten().tolist() == [False, True]


# collate


def test_collate_takes_every_form_of_absence_and_of_value():
    samples = [
        {"inputs": {"photo": np.array([1.0, 2.0]), "table": torch.tensor([1.0])}},
        {"inputs": {"photo": [3, 4.5]}},
        {"inputs": {"photo": None, "table": [NAN]}},
        {"inputs": {"photo": np.array([NAN, NAN]), "table": np.float64(7.0).reshape(1)}},
        {"inputs": {"photo": np.array([NAN, 6.0], dtype=np.float32)}},
    ]
    batch = collate(samples, NAMES)
    expected = [[True, True], [True, False], [False, False], [False, True], [True, False]]
    assert batch["present"].tolist() == expected
    assert batch["inputs"]["photo"].dtype == torch.float32, "numpy's float64 is not carried along"
    assert batch["inputs"]["table"].flatten().tolist() == [1.0, 0.0, 0.0, 7.0, 0.0]
    rows = batch["inputs"]["photo"]
    assert rows[:4].tolist() == [[1.0, 2.0], [3.0, 4.5], [0.0, 0.0], [0.0, 0.0]]
    assert rows[4, 0].isnan()
    assert rows[4, 1] == 6.0


def test_collate_keeps_integers_and_tensor_types():
    samples = [
        {"inputs": {"photo": np.array([1, 2], dtype=np.uint8)}},
        {"inputs": {"table": torch.ones(1, dtype=torch.float64)}},
    ]
    batch = collate(samples, NAMES)
    assert batch["inputs"]["photo"].dtype == torch.uint8
    assert batch["inputs"]["table"].dtype == torch.float64
    assert batch["inputs"]["photo"].tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("number", [2.0, np.float32(2.0), np.float64(2.0)])
def test_collate_batches_bare_numbers_in_single_precision(number):
    batch = collate([{"inputs": {"photo": number}}, {"inputs": {}}], ["photo"])
    assert batch["inputs"]["photo"].dtype == torch.float32
    assert batch["inputs"]["photo"].tolist() == [2.0, 0.0]


def test_collate_batches_structures():
    text = {"ids": torch.tensor([5, 6]), "mask": np.array([True, False])}
    pair = (torch.tensor([[1.0], [2.0]]), np.array([True, True]))
    samples = [{"inputs": {"photo": text}}, {"inputs": {"table": pair}}, {"inputs": {}}]
    batch = collate(samples, NAMES)
    assert batch["present"].tolist() == [[True, False], [False, True], [False, False]]
    assert batch["inputs"]["photo"]["ids"].tolist() == [[5, 6], [0, 0], [0, 0]]
    assert batch["inputs"]["photo"]["mask"].dtype == torch.bool
    tokens, valid = batch["inputs"]["table"]
    assert tokens.shape == (3, 2, 1)
    assert valid.tolist() == [[False, False], [True, True], [False, False]]


def test_collate_takes_lists_inside_a_structure_for_one_tensor():
    """What a tokeniser returns: {"input_ids": [...], "attention_mask": [...]}."""
    text = {"input_ids": [101, 7, 102], "attention_mask": [1, 1, 1]}
    batch = collate([{"inputs": {"photo": text}}, {"inputs": {}}], ["photo"])
    assert batch["inputs"]["photo"]["input_ids"].tolist() == [[101, 7, 102], [0, 0, 0]]


def test_collate_fills_a_whole_batch_or_leaves_none():
    samples = [{"inputs": {"photo": [1.0]}}, {"inputs": {"photo": [2.0]}}]
    assert collate(samples, NAMES)["inputs"]["table"] is None
    filled = collate(samples, NAMES, shapes={"table": (2, 3)})
    assert filled["inputs"]["table"].shape == (2, 2, 3)
    assert not filled["inputs"]["table"].any()
    assert filled["present"].tolist() == [[True, False]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_collate_fills_has_the_type_of_the_rest(dtype):
    """A filled modality was float32, and a model of another type refused it."""
    samples = [{"inputs": {"photo": torch.ones(3, dtype=dtype)}}]
    model = CMML({"photo": 3, "table": 2}, num_classes=2, dim=8, dtype=dtype).eval()
    batch = collate(samples, NAMES, shapes={"table": (2,)})
    assert batch["inputs"]["table"].dtype == dtype
    unfilled = model(**collate(samples, NAMES)).logits
    assert torch.equal(model(**batch).logits, unfilled)


def test_collated_numbers_feed_a_model():
    batch = collate([{"inputs": {"photo": 1.5, "table": [2.0, 3.0]}}, {"inputs": {}}], NAMES)
    model = CMML({"photo": 1, "table": 2}, num_classes=2, dim=8)
    assert model(**batch).logits.shape == (2, 2)


def test_collate_hands_everything_else_to_default_collate():
    samples = [
        {"inputs": {"photo": [1.0]}, "labels": 2, "sample_ids": 5, "who": "a", "w": np.ones(2)},
        {"inputs": {}, "labels": -100, "sample_ids": 6, "who": "b", "w": np.zeros(2)},
    ]
    batch = collate(samples, NAMES)
    assert batch["labels"].tolist() == [2, -100]
    assert batch["labels"].dtype == torch.int64
    assert batch["sample_ids"].tolist() == [5, 6]
    assert batch["who"] == ["a", "b"]
    assert batch["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("samples", "parts"),
    [
        (
            [{"inputs": {"photo": [1.0]}}, {"photo": [1.0]}],
            ("sample 1 of the batch has the keys ['photo']", "under 'inputs'", "Return {'inputs'"),
        ),
        ([{"inputs": {"phto": [1.0]}}], ("'phto'", "declared ones", "Drop or rename")),
        (
            [{"inputs": {}}, {"inputs": {"photo": [1.0, 2.0]}}, {"inputs": {"photo": [1.0]}}],
            (
                "inputs['photo'] of sample 2 of the batch has shape (1,), the first observed one "
                "(2,)",
                "one modality has one shape",
                "Resize or pad",
            ),
        ),
        (
            [{"inputs": {}, "labels": 1}, {"inputs": {}}],
            ("sample 1 of the batch has no 'labels'", "same keys", "-100"),
        ),
        (
            [{"inputs": {"photo": {"x": [1.0]}}}, {"inputs": {"photo": {"y": [1.0]}}}],
            ("inputs['photo'] of sample 1 of the batch", "one modality has one", "dataset"),
        ),
        (
            [{"inputs": {"photo": {"x": [1.0]}}}, {"inputs": {"photo": [1.0]}}],
            ("inputs['photo'] of sample 1 of the batch", "one modality has one", "dataset"),
        ),
    ],
)
def test_collate_refuses(samples, parts):
    says(message_of(collate, samples, NAMES), *parts)


class Samples(Dataset):
    def __init__(self, size):
        draw = random.Random(0)
        self.seen = [(draw.random() < 0.6, draw.random() < 0.6) for _ in range(size)]

    def __len__(self):
        return len(self.seen)

    def __getitem__(self, index):
        inputs = {"photo": np.full(4, index + 1.0)} if self.seen[index][0] else {}
        if self.seen[index][1]:
            inputs["table"] = [float(index)] * 3
        return {"inputs": inputs, "labels": index % 2, "sample_ids": index}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
def test_a_loader_with_workers_feeds_a_model():
    data = Samples(10)
    loader = DataLoader(data, batch_size=4, num_workers=2, collate_fn=partial(collate, names=NAMES))
    model = CMML({"photo": 4, "table": 3}, num_classes=2, dim=8, num_tokens=1, num_blocks=1)
    rows = 0
    for batch in loader:
        out = model(**batch)
        out.loss.backward()
        size = len(batch["labels"])
        assert out.logits.shape == (size, 2)
        seen = data.seen[rows : rows + size]
        assert [tuple(row) for row in batch["present"].tolist()] == seen
        for i, row in enumerate(batch["inputs"]["photo"] if any(p for p, _ in seen) else ()):
            assert row.tolist() == [(rows + i + 1.0) * seen[i][0]] * 4
        rows += size
    assert rows == 10
    assert model.memory.held.tolist() == [sum(column) for column in zip(*data.seen, strict=True)]


class Text(nn.Module):
    """An encoder of a structure with a bool mask."""

    def forward(self, text):
        return text["tokens"], text["mask"]


def test_a_collated_structure_feeds_an_encoder():
    def text(length):
        return {"tokens": np.ones((3, 2)), "mask": np.arange(3) < length}

    samples = [{"inputs": {"text": text(2)}}, {"inputs": {"table": [1.0]}}]
    model = CMML({"text": (Text(), 2), "table": 1}, num_classes=2, dim=8, num_tokens=1).eval()
    batch = collate(samples, model.names)
    logits = model(**batch).logits
    batch["inputs"]["text"]["tokens"][0, 2] = 50.0  # behind the mask
    assert torch.equal(model(**batch).logits, logits)


# visibility


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (3, 0, 1)])
@pytest.mark.parametrize("num_context", [0, 1, 3])
@pytest.mark.parametrize("with_allow", [False, True])
def test_visibility_is_the_loop_over_pairs(lengths, num_context, with_allow):
    present = torch.rand(5, 3) < 0.5
    allow = torch.rand(3, 3) < 0.5 if with_allow else None
    owner = [None] * num_context + [m for m, n in enumerate(lengths) for _ in range(n)]
    got = visibility(present, lengths, num_context, allow)
    size = len(owner)
    assert got.shape == ((5, 1, size, size) if with_allow else (5, size))
    for b in range(5):
        for j, key in enumerate(owner):
            seen = key is None or bool(present[b, key])
            if not with_allow:
                assert bool(got[b, j]) is seen
                continue
            for i, query in enumerate(owner):
                allowed = key is None or query is None or bool(allow[query, key])
                assert bool(got[b, 0, i, j]) is (seen and allowed)


# check_visible


def test_a_subset_is_visible():
    present = torch.tensor([[True, False], [True, True]])
    for visible in (present, present & False, torch.tensor([[False, False], [True, False]])):
        check_visible(visible, present, NAMES)


@pytest.mark.parametrize(
    ("visible", "parts"),
    [
        (torch.ones(2, 2), ("visible is (2, 2) torch.float32", "is bool", "missingness.hide")),
        (torch.ones(2, 1).bool(), ("visible is (2, 1)", "present's shape (2, 2)", "hide")),
        (
            torch.tensor([[True, False], [True, True]]),
            ("visible[1, 'table'] is True but present is False", "subset", "present & visible"),
        ),
    ],
)
def test_check_visible_refuses(visible, parts):
    present = torch.tensor([[True, True], [True, False]])
    says(message_of(check_visible, visible, present, NAMES), *parts)


def test_check_visible_looks_at_values_only_if_asked():
    check_visible(torch.ones(1, 2).bool(), torch.zeros(1, 2).bool(), NAMES, check_values=False)
