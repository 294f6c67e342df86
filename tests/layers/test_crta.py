import pytest
import torch
from torch import nn

from mmfusion.layers import CRTA, CRTABlock
from mmfusion.losses import reconstruction_loss

NAN = float("nan")
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def made(num_blocks=2, **options):
    return CRTA(3, num_tokens=2, dim=8, num_heads=2, num_blocks=num_blocks, **options)


def trained(crta):
    """As after some training: the last projections are no longer zero."""
    for block in crta.blocks:
        nn.init.normal_(block.residual_weight, std=0.3)
        nn.init.normal_(block.residual_bias, std=0.3)
    return crta


TOKENS = torch.randn(4, 3, 2, 8, generator=torch.Generator().manual_seed(1))
CONTEXT = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
PRESENT = torch.tensor([[True, False, True], [False, True, False], [False] * 3, [True] * 3])
ABSENT = ~PRESENT


def test_an_untrained_cascade_is_the_identity():
    crta = made(num_blocks=3)
    out = crta(TOKENS, CONTEXT, PRESENT)
    expected = torch.where(PRESENT[:, :, None, None], TOKENS, crta.absent.tokens)
    assert torch.equal(out.synthesised, expected)
    assert torch.equal(out.completed, expected)
    assert torch.equal(out.context, CONTEXT.expand(4, -1, -1))
    assert all(torch.equal(stage, expected) for stage in out.stages)


def test_stages_are_the_start_plus_all_residuals_so_far():
    crta = trained(made(num_blocks=3)).eval()
    residuals, readable = [], []
    for block in crta.blocks:
        block.register_forward_hook(lambda _, args, out: residuals.append(out))
        block.register_forward_pre_hook(lambda _, args: readable.append(args[2]))
    out = crta(TOKENS, CONTEXT, PRESENT)
    z = crta.absent(TOKENS, PRESENT)
    c = CONTEXT.expand(4, -1, -1)
    assert len(out.stages) == 3
    for i, stage in enumerate(out.stages):
        total = z + sum(tokens for tokens, _ in residuals[: i + 1])
        torch.testing.assert_close(stage, total, **TOLERANCE)
        assert not torch.allclose(stage, z)
    torch.testing.assert_close(out.context, c + sum(x for _, x in residuals), **TOLERANCE)
    assert out.stages[-1] is out.synthesised
    assert torch.equal(readable[0], PRESENT)
    assert readable[1].all()
    assert readable[2].all()


def test_observed_tokens_pass_unchanged_and_absent_ones_are_the_guess():
    out = trained(made())(TOKENS, CONTEXT, PRESENT)
    assert torch.equal(out.completed[PRESENT], TOKENS[PRESENT])
    assert torch.equal(out.completed[ABSENT], out.synthesised[ABSENT])
    assert not torch.allclose(out.synthesised[PRESENT], TOKENS[PRESENT])


def others_read_an_absent_token(crta, stage):
    """Whether modality 0's guess depends on the learned token of modality 1, absent in row 0."""
    out = crta(TOKENS, CONTEXT, PRESENT)
    (grad,) = torch.autograd.grad(out.stages[stage][0, 0].square().sum(), crta.absent.tokens)
    moved = trained_copy(crta, 1)(TOKENS, CONTEXT, PRESENT)
    changed = not torch.equal(moved.stages[stage][0, 0], out.stages[stage][0, 0])
    assert changed is bool(grad[1].any())
    return changed


def trained_copy(crta, modality):
    """The same cascade with another absent token."""
    copy = made(len(crta.blocks)).eval()
    copy.load_state_dict(crta.state_dict())
    nn.init.normal_(copy.absent.tokens.data[modality])
    return copy


def test_the_first_block_reads_no_absent_token_the_second_may():
    crta = trained(made()).eval()
    assert not others_read_an_absent_token(crta, stage=0)
    assert others_read_an_absent_token(crta, stage=1)


def test_absent_tokens_query_from_the_first_block_on():
    crta = trained(made(num_blocks=1))
    tokens = TOKENS.clone().requires_grad_()
    out = crta(tokens, CONTEXT, PRESENT)
    (grad,) = torch.autograd.grad(out.synthesised[0, 1].square().sum(), tokens)
    assert grad[0, [0, 2]].flatten(1).any(1).all()
    assert not grad[1:].any(), "batch-mates are not read"


def test_the_context_reads_the_sample_and_is_read_by_it():
    crta = trained(made(num_blocks=1))
    context = CONTEXT.clone().requires_grad_()
    tokens = TOKENS.clone().requires_grad_()
    out = crta(tokens, context, PRESENT)
    assert torch.autograd.grad(out.context[0].square().sum(), tokens, retain_graph=True)[0].any()
    assert torch.autograd.grad(out.synthesised[0, 1].square().sum(), context)[0].any()
    assert not torch.allclose(out.context[0], out.context[1])


@pytest.mark.parametrize("content", [NAN, float("inf"), 1e30])
def test_what_lies_under_absent_changes_no_bit(content):
    crta = trained(made()).eval()
    dirty = TOKENS.clone()
    dirty[ABSENT] = content
    dirty.requires_grad_()
    clean, out = crta(TOKENS, CONTEXT, PRESENT), crta(dirty, CONTEXT, PRESENT)
    for one, other in zip(clean[:3], out[:3], strict=True):
        assert torch.equal(one, other)
    (out.completed.square().sum() + out.synthesised.square().sum()).backward()
    assert (dirty.grad[ABSENT] == 0).all()
    assert all(p.grad.isfinite().all() for p in crta.parameters())


def test_context_may_come_once_or_per_sample():
    crta = trained(made()).eval()
    once = crta(TOKENS, CONTEXT, PRESENT)
    each = crta(TOKENS, CONTEXT.expand(4, -1, -1).clone(), PRESENT)
    assert torch.equal(once.synthesised, each.synthesised)


def test_dropout_acts_in_training_alone():
    crta = trained(made(dropout=0.5))
    one, other = (crta(TOKENS, CONTEXT, PRESENT).synthesised for _ in range(2))
    assert not torch.equal(one, other)
    crta.eval()
    one, other = (crta(TOKENS, CONTEXT, PRESENT).synthesised for _ in range(2))
    assert torch.equal(one, other)


def test_it_learns_to_synthesise_a_linear_function_of_another_modality():
    crta = CRTA(2, num_tokens=1, dim=8, num_heads=2, num_blocks=2)
    context, mixing = nn.Parameter(torch.randn(2, 8)), torch.randn(8, 8) / 8**0.5
    optimiser = torch.optim.Adam([context, *crta.parameters()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=300)
    visible, hidden = torch.tensor([[True, False]]), torch.tensor([[False, True]])

    def loss_on(first):
        first = nn.functional.layer_norm(first, (8,))  # as ModalityTokens gives them
        tokens = torch.stack([first, first @ mixing], dim=1).unsqueeze(2)  # (B, 2, 1, D)
        out = crta(tokens, context, visible.expand(len(first), -1))
        return reconstruction_loss(out.synthesised, tokens, hidden.expand(len(first), -1))

    unseen = torch.randn(256, 8)
    with torch.no_grad():
        before = loss_on(unseen)
    for _ in range(300):
        optimiser.zero_grad()
        loss_on(torch.randn(64, 8)).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        after = loss_on(unseen)
    assert after < before / 10


def test_a_block_returns_residuals_of_tokens_and_context():
    block = CRTABlock(3, 8, num_heads=2, bottleneck=3)
    d_tokens, d_context = block(TOKENS, CONTEXT.expand(4, -1, -1), PRESENT)
    assert d_tokens.shape == TOKENS.shape
    assert d_context.shape == (4, 5, 8)
    assert not d_tokens.any()
    assert not d_context.any()
    assert block.encode.out_features == 3
    assert CRTABlock(3, 8, 2).encode.out_features == 4
    nn.init.normal_(block.residual_weight)
    d_tokens, d_context = block(TOKENS, CONTEXT.expand(4, -1, -1), PRESENT)
    assert d_tokens.flatten(2).any(2).all()
    block.reset_parameters()
    assert not block.residual_weight.any()


def test_each_modality_is_decoded_by_itself():
    """A projection that all share would give both the one residual that either needs."""
    block = CRTABlock(3, 8, num_heads=2)
    same = TOKENS[:, :1].expand(-1, 3, -1, -1)
    given = (same, CONTEXT.expand(4, -1, -1), torch.ones_like(PRESENT))
    nn.init.normal_(block.residual_weight.data[2])  # 0 is the context's
    nn.init.ones_(block.residual_bias.data[3])
    d_tokens, d_context = block(*given)
    assert not d_tokens[:, 0].any()
    assert d_tokens[:, 1].std() > 0.1
    assert (d_tokens[:, 2] == 1).all()
    assert not d_context.any()


def test_one_block_learns_what_a_shared_decoder_cannot():
    """Two modalities that say the opposite of a third: one projection cannot give x and -x."""
    torch.manual_seed(0)
    crta = CRTA(3, num_tokens=1, dim=8, num_heads=2, num_blocks=1, bottleneck=7)
    nn.init.zeros_(crta.absent.tokens).requires_grad_(False)  # so that both ask the same
    context, present = torch.zeros(1, 8), torch.tensor([[True, False, False]])
    optimiser = torch.optim.Adam([p for p in crta.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(200):
        first = nn.functional.layer_norm(torch.randn(64, 8), (8,))
        tokens = torch.stack([first, first, -first], dim=1).unsqueeze(2)
        out = crta(tokens, context, present.expand(64, -1))
        loss = (out.synthesised - tokens)[:, 1:].square().mean()  # 1 for the best shared guess
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3


def test_what_the_last_projection_reads_is_as_large_as_a_token():
    """A tenth of it, as two linear layers leave it, and the first steps of training move little."""
    block, seen = CRTABlock(3, 8, num_heads=2), []
    block.dropout.register_forward_hook(lambda _, args, out: seen.append(out))
    block(TOKENS, CONTEXT.expand(4, -1, -1), PRESENT)
    torch.testing.assert_close(seen[-1].square().mean(-1), torch.ones(4, 11), atol=0.05, rtol=0)


def test_every_part_of_the_cascade_learns():
    crta = trained(made())
    out = crta(TOKENS, CONTEXT, PRESENT)
    (out.synthesised * torch.randn_like(TOKENS)).sum().backward()
    for name, parameter in crta.named_parameters():
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: made(num_blocks=0), "num_blocks=0.*at least one.*leave CRTA out"),
        (lambda: made(bottleneck=8), "bottleneck=8 with dim=8.*narrows.*bottleneck between 1"),
        (lambda: CRTABlock(3, 8, 2, 0), "bottleneck=0 with dim=8.*narrows.*bottleneck between 1"),
        (lambda: CRTABlock(3, 8, 3), "num_heads=3 with dim=8.*evenly.*divisor"),
        (
            lambda: CRTABlock(2, 8, 2)(TOKENS, CONTEXT.expand(4, -1, -1), PRESENT),
            r"\(4, 3, 2, 8\).*M = 2.*Rebuild",
        ),
        (lambda: made()(TOKENS[:, :2], CONTEXT, PRESENT[:, :2]), r"\(3, 2, 8\).*Rebuild"),
        (
            lambda: made()(TOKENS, CONTEXT, PRESENT[:, :2]),
            r"present is \(4, 2\).*= \(4, 3\).*reshape it",
        ),
    ],
)
def test_refusals(call, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        call()
