import pytest
import torch

from mmfusion.layers import AbsentTokens, ContextTokens, ModalityTokens

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def made(**options):
    return ModalityTokens({"photo": 5, "table": 3}, dim=8, num_tokens=2, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# ModalityTokens


def test_bare_numbers_are_a_modality_of_width_1():
    tokens = ModalityTokens({"age": 1}, dim=8, num_tokens=2)
    ages = torch.tensor([40.0, NAN, 60.0])
    assert torch.equal(tokens({"age": ages}), tokens({"age": ages.unsqueeze(1)}))
    with pytest.raises(ValueError, match=r"(?s)'photo' are \(4,\): declared with width 5"):
        made()({"photo": torch.ones(4)})


def test_double_precision_under_autocast_is_refused_with_its_cure():
    """Autocast does not cast float64: the product of two types failed."""
    with torch.autocast("cpu", torch.bfloat16):
        assert made()({"photo": torch.ones(4, 5)}).isfinite().all()
        with pytest.raises(ValueError, match=r"(?s)'photo' are torch.float64.*\.float\(\)"):
            made()({"photo": torch.ones(4, 5, dtype=torch.float64)})


@pytest.mark.parametrize("shape", [(4, 5), (4, 6, 5), (4, 5, 3, 3), (4, 5, 2, 3, 2), (4, 1, 5)])
def test_vectors_sequences_and_maps_become_tokens(shape):
    tokens = made()
    inputs = {"photo": torch.randn(shape), "table": torch.randn(4, 3)}
    out = tokens(inputs)
    assert out.shape == (4, 2, 2, 8)
    assert out.isfinite().all()
    assert not torch.allclose(out[:, 0, 0], out[:, 0, 1]), "the L tokens are told apart"
    inputs["photo"] = inputs["photo"] + torch.randn(shape)
    moved = tokens(inputs)
    assert not torch.allclose(moved[:, 0], out[:, 0])
    assert torch.equal(moved[:, 1], out[:, 1])


def test_a_vector_is_a_sequence_of_one_and_a_map_a_sequence_of_its_places():
    tokens, rest = made(), {"table": None}
    vector, image, volume = torch.randn(4, 5), torch.randn(4, 5, 3, 2), torch.randn(4, 5, 2, 3, 2)
    close(tokens({"photo": vector, **rest}), tokens({"photo": vector[:, None], **rest}))
    for grid in (image, volume):
        sequence = grid.flatten(2).mT
        close(tokens({"photo": grid, **rest}), tokens({"photo": sequence, **rest}))
        order = torch.randperm(sequence.shape[1])
        close(tokens({"photo": grid, **rest}), tokens({"photo": sequence[:, order], **rest}))


@pytest.mark.parametrize("content", [0.0, 1e4, 1e30])
def test_what_lies_in_the_padding_never_matters(content):
    tokens = made()
    sequence, valid = torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1] * 4]) > 0
    padded = sequence.clone()
    padded[~valid] = content
    padded.requires_grad_()
    out = tokens({"photo": (padded, valid), "table": None})
    assert torch.equal(out, tokens({"photo": (sequence, valid), "table": None}))
    out.square().sum().backward()
    assert (padded.grad[~valid] == 0).all()
    assert padded.grad[valid].any(-1).all()
    cut = tokens({"photo": sequence[:1, :2], "table": None})
    close(out[:1], cut)


def test_nan_in_the_padding_is_harmless_where_values_are_not_checked():
    """The edge of a model checks raw inputs; what encoders return goes through unchecked."""
    tokens = made(check_values=False)
    sequence, valid = torch.randn(2, 3, 5), torch.tensor([[True, True, False], [True] * 3])
    clean = tokens({"photo": (sequence, valid), "table": None}, torch.tensor([[True, False]] * 2))
    sequence[0, 2] = NAN
    dirty = tokens({"photo": (sequence, valid), "table": None}, torch.tensor([[True, False]] * 2))
    assert torch.equal(clean, dirty)


def test_a_sequence_of_padding_alone_is_finite():
    tokens = made()
    valid = torch.tensor([[False] * 3, [True] * 3])
    sequence = torch.randn(2, 3, 5, requires_grad=True)
    out = tokens({"photo": (sequence, valid), "table": None})
    out.square().sum().backward()
    assert out.isfinite().all()
    assert (sequence.grad[0] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokens.parameters())


def test_default_collate_makes_lists_of_pairs():
    tokens = ModalityTokens({"a": 4}, 8, 2)
    pair = (torch.randn(3, 4), torch.tensor([True, True, False]))
    batch = torch.utils.data.default_collate([{"a": pair}] * 2)
    assert isinstance(batch["a"], list)
    assert torch.equal(tokens(batch), tokens({"a": tuple(batch["a"])}))


def test_one_graph_serves_every_number_of_steps():
    torch._dynamo.reset()
    tokens = ModalityTokens({"a": 4, "b": 3}, 8, 2)
    graphs = []
    compiled = torch.compile(
        tokens, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g
    )
    for steps in range(5, 14):  # sizes that agree with another are taken for the same
        inputs = {"a": torch.randn(2, steps, 4), "b": torch.randn(2, 3)}
        present = torch.tensor([[True, False], [True, True]])
        torch.testing.assert_close(compiled(inputs, present), tokens(inputs, present))
    assert len(graphs) == 1


def test_absent_rows_are_zeros_with_zero_gradient():
    tokens = made()
    photo = torch.randn(3, 5)
    photo[1] = NAN
    photo.requires_grad_()
    out = tokens({"photo": photo, "table": None})
    assert (out[1] == 0).all()
    assert (out[:, 1] == 0).all()
    assert out[0, 0].any()
    out.square().sum().backward()
    assert photo.grad[1].tolist() == [0.0] * 5
    assert all(p.grad.isfinite().all() for p in tokens.modalities["photo"].parameters())
    assert all(p.grad is None for p in tokens.modalities["table"].parameters())


def test_every_parameter_of_an_observed_modality_learns():
    tokens = ModalityTokens({"photo": 5}, dim=8, num_tokens=2)
    out = tokens({"photo": torch.randn(3, 6, 5)})
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in tokens.named_parameters():
        assert parameter.grad.any(), name


def test_order_is_that_of_declaration():
    tokens = made()
    photo, table = torch.randn(2, 5), torch.randn(2, 3)
    one = tokens({"photo": photo, "table": table})
    assert torch.equal(one, tokens({"table": table, "photo": photo}))
    assert torch.equal(one[:, :1], tokens({"photo": photo})[:, :1])


def refuse(call, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        call()


@pytest.mark.parametrize("name", ["", "a.b", "keys", "train", "type", "weight.x"])
def test_names_that_break_a_module_dict_are_refused(name):
    refuse(lambda: ModalityTokens({name: 3}, 4, 1), "modality name.*state_dict key.*Use a name")


@pytest.mark.parametrize(
    ("photo", "pattern"),
    [
        (torch.ones(2, 4), r"'photo' are \(2, 4\).*width 5.*\(B, 5\).*Declare the width"),
        (torch.ones(2, 5, 4), r"'photo' are \(2, 5, 4\).*\(B, T, 5\).*Declare the width"),
        (torch.ones(2, 3, 3, 5), r"'photo' are \(2, 3, 3, 5\).*spatial.*move the axis"),
        (torch.ones(2), r"'photo' are \(2,\).*spatial.*move the axis"),
        (torch.ones(2, 5, 1, 1, 1, 1), r"'photo' are \(2, 5, 1.*2 or 3 spatial.*move the axis"),
        (
            (torch.ones(2, 3, 5), torch.ones(2, 3)),
            r"valid of 'photo' is \(2, 3\) torch\.float32.*bool \(B, T\) = \(2, 3\).*Convert",
        ),
        (
            (torch.ones(2, 3, 5), torch.ones(2, 4).bool()),
            r"valid of 'photo' is \(2, 4\).*bool \(B, T\) = \(2, 3\).*Convert",
        ),
    ],
)
def test_features_of_another_shape_are_refused(photo, pattern):
    refuse(lambda: made()({"photo": photo, "table": torch.ones(2, 3)}), pattern)


def test_sizes_below_one_are_refused():
    refuse(lambda: ModalityTokens({"a": 3}, 4, 0), "num_tokens=0.*at least one.*1 or more")
    refuse(lambda: ModalityTokens({"a": 0}, 4, 1), r"features\['a'\] is 0.*at least 1.*Pass")
    refuse(lambda: ModalityTokens({"a": -2}, 4, 1), r"features\['a'\] is -2.*at least 1.*Pass")


def test_what_normalise_refuses_is_refused_here():
    refuse(lambda: made()({"photos": torch.ones(2, 5)}), "'photos'.*declared.*Drop or rename")
    observed = torch.tensor([[1.0, NAN, 1.0]])
    refuse(lambda: made()({"table": observed}), r"inputs\['table'\] row 0.*finite.*Repair")


# ContextTokens


def test_context_is_the_same_for_every_sample_and_sums_their_gradients():
    context = ContextTokens(3, dim=4)
    out = context(5)
    assert out.shape == (5, 3, 4)
    assert all(torch.equal(row, context.tokens) for row in out)
    out.sum().backward()
    assert torch.equal(context.tokens.grad, torch.full((3, 4), 5.0))
    assert context(0).shape == (0, 3, 4)
    refuse(lambda: ContextTokens(0, dim=4), "num_context=0.*at least one.*1 or more")


# AbsentTokens


def test_absent_tokens_replace_what_is_absent_and_nothing_else():
    absent = AbsentTokens(2, num_tokens=3, dim=4)
    tokens, present = torch.randn(5, 2, 3, 4), torch.rand(5, 2) < 0.5
    tokens[~present] = NAN
    tokens.requires_grad_()
    out = absent(tokens, present)
    for b in range(5):
        for m in range(2):
            expected = tokens[b, m] if present[b, m] else absent.tokens[m]
            assert torch.equal(out[b, m], expected)
    out.sum().backward()
    assert torch.equal(tokens.grad, present[:, :, None, None].expand_as(tokens).float())
    counts = (~present).sum(0).float()[:, None, None].expand(2, 3, 4)
    assert torch.equal(absent.tokens.grad, counts)


@pytest.mark.parametrize(
    ("tokens", "present"),
    [((2, 3, 3, 4), (2, 3)), ((2, 2, 1, 4), (2, 2)), ((2, 2, 3, 4), (2, 1)), ((2, 2, 3, 4), (2,))],
)
def test_absent_tokens_refuse_other_sizes(tokens, present):
    absent = AbsentTokens(2, num_tokens=3, dim=4)
    refuse(
        lambda: absent(torch.ones(tokens), torch.ones(present).bool()),
        r"tokens is .*\(M, L, D\) = \(2, 3, 4\).*Rebuild|present is .*= \(2, 2\).*or reshape it",
    )
