import pytest
import torch
from torch import nn

from mmfusion.layers import ModalityEncoders

NAN = float("nan")


class Padded(nn.Module):
    """Tokens of a structure, and which are real; junk where they are not."""

    def __init__(self, junk=NAN):
        super().__init__()
        self.project = nn.Linear(2, 6)
        self.junk = junk

    def forward(self, text):
        tokens = self.project(text["x"])
        return tokens.masked_fill(~text["mask"].unsqueeze(-1), self.junk), text["mask"]


class Table(nn.Module):
    accepts_nan = True

    def __init__(self):
        super().__init__()
        self.seen = None
        self.project = nn.Linear(3, 6)

    def forward(self, table):
        self.seen = table
        return self.project(table.nan_to_num(0.0))


def encoder(*layers, **attributes):
    made = nn.Sequential(*layers)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def edge(first, **options):
    return ModalityEncoders({"first": first, "second": 3}, dim=8, num_tokens=2, **options)


SECOND = torch.ones(4, 3)


def test_a_width_needs_no_encoder_and_a_pair_brings_one():
    made = edge((encoder(nn.Conv2d(1, 6, 3), nn.ReLU()), 6))
    assert made.names == ("first", "second")
    tokens, present = made({"first": torch.randn(4, 1, 8, 8), "second": SECOND})
    assert tokens.shape == (4, 2, 2, 8)
    assert present.all()
    assert torch.equal(tokens[:, 1], made.tokens({"second": SECOND})[:, 1])


def test_an_encoder_sees_zeros_under_absent_rows_and_gets_no_gradient_from_them():
    first = Table()
    made = edge((first, 6))
    table = torch.randn(4, 3)
    table[1] = NAN
    table[2, 0] = NAN  # a cell: the encoder's business
    table[3] = 7.0
    given = torch.tensor([[True, True], [False, True], [True, True], [False, True]])
    tokens, present = made({"first": table, "second": SECOND}, given)
    assert torch.equal(present, given)
    assert (first.seen[[1, 3]] == 0).all()
    assert first.seen[2].isnan().tolist() == [True, False, False]
    assert (tokens[[1, 3], 0] == 0).all()
    tokens.square().sum().backward()
    grads = [p.grad.clone() for p in first.parameters()]
    made.zero_grad()
    rows = [0, 2]
    made({"first": table[rows], "second": SECOND[rows]})[0][:, 0].square().sum().backward()
    for whole, cut in zip(grads, first.parameters(), strict=True):
        torch.testing.assert_close(whole, cut.grad, atol=1e-5, rtol=1e-5)


def test_a_nan_row_is_absent_for_an_encoder_that_accepts_nan_too():
    _, present = edge((Table(), 6))({"first": torch.full((4, 3), NAN), "second": SECOND})
    assert present.tolist() == [[False, True]] * 4


def test_nan_cells_are_refused_without_accepts_nan():
    table = torch.ones(4, 3)
    table[2, 1] = NAN
    with pytest.raises(
        ValueError, match=r"(?s)inputs\['first'\] row 2.*finite.*accepts_nan = True"
    ):
        edge((nn.Linear(3, 6), 6))({"first": table, "second": SECOND})


@pytest.mark.parametrize("junk", [0.0, NAN, float("inf")])
def test_a_structure_goes_in_and_padded_tokens_come_out(junk):
    torch.manual_seed(1)
    made = edge((Padded(junk), 6))
    mask = torch.tensor([[True, True, False], [True, False, False], [True] * 3, [False] * 3])
    text = {"x": torch.randn(4, 3, 2), "mask": mask}
    tokens, present = made({"first": text, "second": SECOND})
    assert present.all()
    assert tokens.isfinite().all()
    torch.manual_seed(1)
    plain = edge((Padded(1.0), 6))({"first": text, "second": SECOND})[0]
    assert torch.equal(tokens, plain)
    tokens.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_batch_of_none_skips_an_encoder_of_unknown_shape(training):
    first = Table()
    made = edge((first, 6)).train(training)
    tokens, present = made({"first": None, "second": SECOND})
    assert first.seen is None
    assert not present[:, 0].any()
    assert (tokens[:, 0] == 0).all()


@pytest.mark.parametrize("shape", [(3,), [2, 3], torch.Size((3,))])
def test_a_whole_batch_of_none_runs_an_encoder_of_known_shape_on_zeros(shape):
    first = Table()
    first.in_shape = shape
    made = edge((first, 6))
    tokens, present = made({"second": SECOND})
    assert first.seen.shape == (4, *shape)
    assert not first.seen.any()
    assert not present[:, 0].any()
    assert (tokens[:, 0] == 0).all()
    tokens.sum().backward()
    assert all((p.grad == 0).all() for p in first.parameters())
    assert all((p.grad == 0).all() for p in made.tokens.modalities["first"].parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_filled_has_the_type_of_the_parameters_that_read_it(dtype):
    """A whole-batch None met a model in double precision with single-precision zeros."""
    made = edge((encoder(nn.Linear(4, 6), in_shape=(4,)), 6)).to(dtype)
    nothing = torch.zeros(4, 2, dtype=torch.bool)
    for inputs in ({"first": None, "second": None}, {"second": None}, {}):
        tokens, _ = made(inputs, nothing)
        assert tokens.dtype == dtype
        assert not tokens.any()
    assert made({"first": torch.ones(4, 4, dtype=dtype)})[0].dtype == dtype


def test_an_encoder_without_parameters_is_filled_with_the_default_type():
    made = edge((encoder(nn.Flatten(), in_shape=(2, 3)), 6))
    assert made({"second": SECOND})[0].dtype == torch.float32


def test_inferred_presence_is_returned():
    second = SECOND.clone()
    second[0] = NAN
    _, present = edge(5)({"first": None, "second": second})
    assert present.tolist() == [[False, False]] + [[False, True]] * 3


def test_training_on_several_ranks_refuses_a_wholly_absent_modality(monkeypatch):
    monkeypatch.setattr("mmfusion.layers.encoders.world_size", lambda: 2)
    made = edge((Table(), 6))
    pattern = r"(?s)inputs\['first'\] is None for the whole batch.*every parameter.*Set in_shape"
    with pytest.raises(ValueError, match=pattern):
        made({"first": None, "second": SECOND})
    made.eval()({"first": None, "second": SECOND})
    made.train().encoders["first"].in_shape = (3,)
    made({"first": None, "second": SECOND})


def test_reset_reaches_the_encoders():
    made = edge((nn.Linear(3, 6), 6))
    before = [p.clone() for p in made.parameters() if p.std() > 0]
    made.reset_parameters()
    after = [p for p in made.parameters() if p.std() > 0]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("modalities", "pattern"),
    [
        ({}, "modalities is empty.*at least one.*Name"),
        ({"a": "x"}, r"modalities\['a'\] is 'x'.*a pair.*Use one"),
        ({"a": nn.Linear(1, 1)}, r"modalities\['a'\] is Linear.*a pair.*Use one"),
        ({"a": (3, nn.Linear(1, 1))}, r"modalities\['a'\] is \(3.*a pair.*Use one"),
        ({"a": (nn.Linear(1, 1),)}, r"modalities\['a'\] is \(Linear.*a pair.*Use one"),
        ({"a.b": 3}, "modality name 'a.b'.*state_dict.*without dots"),
        ({"keys": (nn.Linear(1, 1), 1)}, "modality name 'keys'.*ModuleDict.*Use a name"),
    ],
)
def test_refusals(modalities, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        ModalityEncoders(modalities, dim=4, num_tokens=1)


def test_an_encoder_that_returns_another_width_or_batch_is_named():
    with pytest.raises(ValueError, match=r"(?s)'first' are \(4, 5\).*width 6.*Declare the width"):
        edge((nn.Linear(3, 5), 6))({"first": SECOND, "second": SECOND})
    halving = encoder(nn.Flatten(0), nn.Unflatten(0, (2, 6)))
    with pytest.raises(ValueError, match=r"(?s)'first' returned \(2, 6\) for 4 rows.*one row per"):
        edge((halving, 6))({"first": SECOND, "second": SECOND})


class Standardised(nn.Module):
    """Not finite at zero, as an absent row is."""

    def __init__(self, eps):
        super().__init__()
        self.linear, self.eps = nn.Linear(5, 6), eps

    def forward(self, x):
        return self.linear(x / (x.std(1, keepdim=True) + self.eps))


def test_an_encoder_that_breaks_at_zero_is_named_in_training_and_dropped_without_gradient():
    present = torch.tensor([[False, True]]).expand(4, 2)
    inputs = {"first": torch.zeros(4, 5), "second": SECOND}
    broken = edge((Standardised(0.0), 6))
    with pytest.raises(ValueError, match=r"(?s)'first' returned NaN.*absent rows too.*eps"):
        broken(inputs, present)
    with torch.no_grad():
        assert bool(broken(inputs, present)[0].isfinite().all())
    assert bool(edge((Standardised(1e-6), 6))(inputs, present)[0].isfinite().all())


class Words(nn.Module):
    in_shape, in_dtype = (3,), torch.int64

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)

    def forward(self, x):
        return self.embedding(x)


def test_an_encoder_of_integers_declares_what_a_missing_batch_is_filled_with():
    model = edge((Words(), 6))
    assert model({"first": None, "second": SECOND})[1][:, 0].tolist() == [False] * 4
    assert model({"first": torch.ones(4, 3), "second": SECOND})[0].isfinite().all()


def test_the_cure_for_a_structure_that_a_batch_lacks_works(monkeypatch):
    """It was to set in_shape, which a dict of tensors does not have."""
    monkeypatch.setattr("mmfusion.layers.encoders.world_size", lambda: 2)
    made = edge((Padded(0.0), 6))
    with pytest.raises(ValueError, match=r"(?s)None for the whole batch.*structure.*of zeros"):
        made({"first": None, "second": SECOND})
    zeros = {"x": torch.zeros(4, 3, 2), "mask": torch.zeros(4, 3).bool()}
    tokens, _ = made({"first": zeros, "second": SECOND}, torch.tensor([[False, True]] * 4))
    assert not tokens[:, 0].any()
    tokens.sum().backward()
    assert all(p.grad is not None for p in made.encoders.parameters())


def test_one_number_is_a_shape():
    first = Table()
    first.in_shape = 3
    edge((first, 6))({"second": SECOND})
    assert first.seen.shape == (4, 3)


class Valid(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.unsqueeze(1).expand(-1, 5, -1), torch.ones(self.shape).bool()


@pytest.mark.parametrize("shape", [(4, 7), (4, 1), (4,), (4, 5, 3)])
def test_a_valid_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"(?s)valid of 'first' is \(4,.*\(B, T\).*Convert it"):
        edge((Valid(shape), 3))({"first": SECOND, "second": SECOND})
