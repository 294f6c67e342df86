"""G7 over every row of the list: compile, export, ensembles, autocast, the meta device."""

import copy
import shutil

import pytest
import torch
from contract_baselines import CASES as BASELINES
from contract_builders import BY_NAME, CASES
from contract_case import finite, poison, rows
from test_contract import FLOAT, MODELS, assert_identical, generator
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.export import Dim
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.filterwarnings(  # torch's own compilers, at their first import
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TARGETS = ("multilabel", "binary", "regression")
PATTERNS = 20  # random ones that share one graph
MEMBERS = 3  # of an ensemble
INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"  # it compiles C++
# Targets differ in their losses alone, which have no part in inference; evidence has.
INFERENCE = [
    case for case in CASES if "evidence" in case.name or case.name.split("-")[-1] not in TARGETS
]
COMPILED = [
    *((case, "aot_eager") for case in INFERENCE),
    (BY_NAME["CMML-default"], INDUCTOR),
]


class Called(nn.Module):
    """A row's module as one from a batch to named outputs."""

    def __init__(self, case, module):
        super().__init__()
        self.case, self.module = case, module

    def forward(self, batch):
        return self.case.call(self.module, batch)


class Counting:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, name):
        self.compiler, self.graphs = lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compiler(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), COMPILED, ids=lambda x: getattr(x, "name", x))
def test_one_full_graph_serves_every_pattern(case, name):
    module = case.ready()
    backend = Counting(name)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for seed in range(PATTERNS):
        batch = case.batch(5, 3, generator(seed))
        for key, value in case.call(compiled, batch).items():
            assert_close(value, case.call(module, batch)[key], **FLOAT, equal_nan=True)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("CMML-default", "CMML-prototypes", "CMML-encoders", "CMML-evidence-multiclass"),
        *(case.name for case in BASELINES),
    ],
)
def test_one_full_graph_serves_every_training_step(name):
    case = BY_NAME[name]
    model = case.ready(filled=False).train()
    twin = copy.deepcopy(model)
    backend = Counting("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for seed in range(6):
        batch = case.batch(5, 3, generator(seed))
        batch["sample_ids"] += 5 * seed
        model(**batch).loss.backward()
        compiled(**batch).loss.backward()
    assert backend.graphs == 1
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)
    assert_close(twin.state_dict(), model.state_dict(), equal_nan=True, **FLOAT)
    if name == "CMML-default":
        assert model.memory.held.gt(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: case.name)
def test_export_has_a_dynamic_batch_and_knows_the_empty_sample(case):
    called = Called(case, case.ready()).eval()
    batch = case.batch(4, 3, generator())
    size = Dim("B", max=64)
    shapes = (tree_map(lambda leaf: {0: size}, batch),)
    exported = torch.export.export(called, (batch,), dynamic_shapes=shapes).module()
    for batch_size in (1, 2, 7):
        other = case.batch(batch_size, 3, generator(1))
        if batch_size == 1:
            other = rows(case.batch(2, 3, generator(1)), slice(0, 1))  # nothing observed
        assert_close(exported(other), called(other), **FLOAT, equal_nan=True)


@EVERY
def test_an_ensemble_runs_under_vmap(case):
    members = [Called(case, case.ready(seed=seed)) for seed in range(MEMBERS)]
    state = stack_module_state(members)
    batch = case.batch(5, 3, generator())
    together = vmap(lambda *state: functional_call(members[0], state, (batch,)))(*state)
    for i, member in enumerate(members):
        for key, value in member(batch).items():
            assert_close(together[key][i], value, **FLOAT, equal_nan=True)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_an_ensemble_gets_each_members_gradient(case):
    members = [case.ready(seed=seed) for seed in range(MEMBERS)]
    parameters, buffers = stack_module_state(members)
    batch = case.batch(5, 3, generator())

    def loss(*state):
        return functional_call(members[0], state, (), batch).loss

    gradients = vmap(grad(loss))(parameters, buffers)
    for i, member in enumerate(members):
        member(**batch).loss.backward()
        for key, parameter in member.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(gradients[key][i], expected, rtol=1e-3, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near_and_keeps_absent_content_out(case, dtype):
    module = case.ready()
    batch = case.batch(6, 3, generator())
    with torch.autocast("cpu", dtype):
        outputs = case.own_rows(case.call(module, batch), batch)
        dirty = poison(batch, case.ignored(batch), case.fillers[0])
        assert_identical(case.own_rows(case.call(module, dirty), dirty), outputs)
        loss = case.objective(module, batch)
    assert finite(outputs)
    if loss.requires_grad:
        loss.backward()
    assert finite([parameter.grad for parameter in module.parameters()])
    expected = case.own_rows(case.call(module, batch), batch)
    for name, value in outputs.items():
        if value.is_floating_point():
            error = (value.float() - expected[name]).abs().mean()
            assert error <= 0.05 * expected[name].abs().mean().clamp(min=0.1), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_keep_full_precision_under_autocast(dtype):
    for case in CASES:
        if case.name.startswith("retrieve"):
            module, batch = case.ready(), case.batch(6, 3, generator())
            with torch.autocast("cpu", dtype):
                outputs = case.call(module, batch)
            assert_identical(outputs, case.call(module, batch))


@EVERY
def test_a_meta_build_becomes_a_normal_one(case):
    meta = case.build(3, device="meta")
    own = {
        k: v for k, v in meta.state_dict().items() if "encoders." not in k or case.covers is None
    }
    assert all(value.is_meta for value in own.values())
    meta = meta.to_empty(device="cpu")
    torch.manual_seed(4)
    meta.reset_parameters()
    torch.manual_seed(4)
    normal = case.build(3)
    if case.loss and case.name != "CMML-default":  # stages passed in were drawn before the model
        torch.manual_seed(4)
        normal.reset_parameters()
    assert_close(meta.state_dict(), normal.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert {k for k, _ in meta.named_buffers()} == {k for k, _ in normal.named_buffers()}


@EVERY
def test_reset_parameters_forgets_everything(case):
    module = case.ready()
    torch.manual_seed(4)
    module.reset_parameters()
    fresh = case.build(3)
    torch.manual_seed(4)
    fresh.reset_parameters()
    assert_close(module.state_dict(), fresh.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["presence_attention-torch", "CMML-default", "CMML-bare"])
def test_onnx_agrees(name):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    case = BY_NAME[name]
    called = Called(case, case.ready()).eval()
    batch = case.batch(4, 3, generator())
    batch.pop("labels", None)
    program = torch.onnx.export(called, kwargs={"batch": batch}, dynamo=True, verbose=False)
    assert program is not None
    outputs = program(batch=batch)
    for value, (key, expected) in zip(outputs, called(batch).items(), strict=True):
        assert_close(torch.as_tensor(value), expected, rtol=1e-3, atol=1e-4, msg=key)
