"""The contract's list over the fused ops, interpreted: they keep what their plain twins promise."""

import contract_golden
import contract_ops
import pytest
import test_contract as contract
import torch
from contract_case import require_grad
from torch.testing import assert_close

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("interpreter")]

PLAIN = contract_ops.cases("torch")
FUSED = contract_ops.cases("triton")
EVERY = pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)


@EVERY
@pytest.mark.parametrize("filler", ["nan", "inf", "noise"])
def test_content_under_absent_never_matters(case, filler):
    contract.test_content_under_absent_never_matters(case, filler)


@EVERY
@pytest.mark.parametrize("pattern", ["nothing", "everything", "random"])
@pytest.mark.parametrize("modalities", [1, 3])
def test_every_extreme_gives_finite_outputs_and_gradients(case, modalities, pattern):
    contract.test_every_extreme_gives_finite_outputs_and_gradients(case, modalities, pattern, True)


@EVERY
@pytest.mark.parametrize(
    "check",
    [
        contract.test_batch_mates_never_matter,
        contract.test_absent_equals_physically_cut_out,
        contract.test_every_parameter_gets_a_gradient,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_it_keeps(case, check):
    check(case)


@EVERY
def test_half_precision_is_honoured(case):
    contract.test_dtype_is_honoured(case, torch.bfloat16)


@pytest.mark.parametrize(("fused", "plain"), [*zip(FUSED, PLAIN, strict=True)])
def test_it_equals_its_plain_twin_and_shares_its_golden_file(fused, plain):
    assert contract_golden.state(fused) == contract_golden.pinned(plain)
    results = []
    for case in (fused, plain):
        module, batch = case.ready(), require_grad(case.batch(6, 3, contract.generator()))
        outputs = case.call(module, batch)
        case.objective(module, batch).backward()
        leaves = {**batch, **dict(module.named_parameters())}
        slopes = {f"d{name}": x.grad for name, x in leaves.items() if x.requires_grad}
        results.append(outputs | slopes)
    assert_close(*results, **contract.FLOAT)
