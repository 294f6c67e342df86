"""The registered operators under everything that torch does to operators."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.library import opcheck

from mmfusion import functional, layers, ops
from mmfusion.layers import MemoryBank, PresenceAttention

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("interpreter")]

LENGTHS = (2, 3)
# Dynamo itself makes an instance of the Function as its context
BY_TORCH = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
BY_DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def attention(q, k, v, present, backend="triton", **options):
    return functional.presence_attention(
        q, k, v, present, lengths=LENGTHS, num_context=1, backend=backend, **options
    )


def retrieve(query, keys, values=None, backend="triton", **options):
    options = {"k": 3, "temperature": 0.5} | options
    return functional.retrieve(query, keys, values, backend=backend, **options)[0]


def contrastive(vectors, labels, backend="triton"):
    yes = torch.ones(len(vectors), dtype=torch.bool)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    loss, _ = functional.class_contrastive(
        vectors, vectors, labels, labels, yes, yes, backend=backend
    )
    return loss.sum()


def tokens(batch=2):
    q, k, v = (torch.randn(batch, 6, 2, 16, requires_grad=True) for _ in range(3))
    return q, k, v, torch.rand(batch, 2) > 0.5


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x, x])[len(x) :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_attention(layout):
    q, k, v = (LAYOUTS[layout](x.detach()) for x in tokens()[:3])
    present = torch.tensor([[True, False], [True, True]])
    rest = (present, None, None, [2, 3], 1, 0.0)
    opcheck(ops._attention_forward, (q, k, v, *rest))
    out, lse = ops._attention_forward(q, k, v, *rest)
    opcheck(ops._attention_backward, (LAYOUTS[layout](out), q, k, v, out, lse, *rest))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_retrieve(layout):
    query, keys = LAYOUTS[layout](torch.randn(2, 3, 8)), LAYOUTS[layout](torch.randn(2, 20, 8))
    ids = (torch.randint(0, 3, (2, 3)), torch.randint(0, 3, (2, 20)))
    rest = (*ids, torch.rand(2, 3) > 0.5, None, 3, 0.5, True, True)
    held = torch.tensor([20, 7])
    opcheck(ops._retrieve_forward, (query, keys, None, held, *rest))
    outs = ops._retrieve_forward(query, keys, keys[..., :4], held, *rest)
    readout, weights, indices, near_keys, near_values = outs
    saved = (query, near_keys, near_values, weights, indices, 20, 0.5, True)
    opcheck(ops._retrieve_backward, (LAYOUTS[layout](readout), *saved, True, True))
    opcheck(ops._retrieve_backward, (readout, *saved, False, False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_contrastive(layout):
    vectors = LAYOUTS[layout](torch.randn(5, 8))
    labels, yes = torch.tensor([0, 0, 1, 1, 2]), torch.ones(5, dtype=torch.bool)
    args = (vectors, vectors, labels, labels, yes, yes)
    opcheck(ops._contrastive_forward, (*args, 0, 0.1))
    loss, lse, number = ops._contrastive_forward(*args, 0, 0.1)
    opcheck(ops._contrastive_backward, (loss, *args, lse, number, 0, 0.1, True))


@BY_DYNAMO
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph_with_gradients(dynamic):
    def step(q, k, v, present, query, keys, vectors, labels):
        found = attention(q, k, v, present).sum() + retrieve(query, keys).square().sum()
        return found + contrastive(vectors, labels)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        leaves = [*tokens(batch)[:3]]
        leaves += [torch.randn(batch + 2, 8, requires_grad=True) for _ in range(3)]
        labels, present = torch.arange(batch + 2) % 2, torch.rand(batch, 2) > 0.5
        results = []
        for run in (step, compiled):
            loss = run(*leaves[:3], present, *leaves[3:5], leaves[5], labels)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@BY_DYNAMO
@BY_TORCH
@pytest.mark.slow
def test_compiles_with_inductor():
    q, k, v, present = tokens()
    compiled = torch.compile(lambda *x: attention(*x) * 2, fullgraph=True)
    one, other = compiled(q, k, v, present), attention(q, k, v, present) * 2
    torch.testing.assert_close(one, other)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (one, other)), strict=True):
        torch.testing.assert_close(a, b)


def test_exports_with_a_dynamic_batch():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = PresenceAttention(16, 2, backend="triton")
            self.memory = MemoryBank(2, 8, 16, 2, backend="triton")

        def forward(self, x, present, ids):
            x = self.attention(x, x, present, lengths=(1, 1))
            return self.memory.read(x, present, ids)

    model = Reader().eval()
    inputs = (torch.randn(3, 2, 16), torch.rand(3, 2) > 0.5, torch.arange(3))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * 3)
        more = (torch.randn(5, 2, 16), torch.rand(5, 2) > 0.5, torch.arange(5))
        torch.testing.assert_close(exported.module()(*more), model(*more))


def both(run, *args):
    return run("triton", *args), run("torch", *args)


def test_vmap_of_attention():
    q, k, v, present = (torch.stack([x, y]) for x, y in zip(tokens(), tokens(), strict=True))

    def run(backend):
        call = lambda q, k, present: attention(q, k, v[0], present, backend)  # noqa: E731
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*")  # of SDPA on CPU
            mapped = vmap(call, in_dims=(0, 0, None))(q, k, present[0])
            slope = vmap(grad(lambda *x: call(*x).square().sum()), in_dims=(1, 1, None))
            return mapped, slope(q.movedim(0, 1), k.movedim(0, 1), present[0])

    for one, other in zip(*both(run), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, None), (None, 0, 0)])
def test_vmap_of_retrieve(dims):
    query, keys, values = torch.randn(2, 3, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 5)
    args = [x if dim == 0 else x[0] for x, dim in zip((query, keys, values), dims, strict=True)]

    def run(backend):
        call = lambda q, k, v: retrieve(q, k, v, backend)  # noqa: E731
        slope = grad(lambda q, k, v: call(q, k, v).square().sum(), argnums=(0, 1, 2))
        return vmap(call, in_dims=dims)(*args), *vmap(slope, in_dims=dims)(*args)

    for one, other in zip(*both(run), strict=True):
        torch.testing.assert_close(one, other)


def test_vmap_of_contrastive():
    vectors, labels = torch.randn(2, 6, 8), torch.arange(6) % 2

    def run(backend):
        call = lambda x: contrastive(x, labels, backend)  # noqa: E731
        return vmap(call)(vectors), vmap(grad(call))(vectors)

    for one, other in zip(*both(run), strict=True):
        torch.testing.assert_close(one, other)


def test_an_ensemble_by_functional_call():
    model = PresenceAttention(16, 2, backend="triton")
    x, present = torch.randn(3, 2, 16), torch.tensor([[True, False]] * 3)
    params = {name: torch.stack([p, p * 2]) for name, p in model.named_parameters()}
    call = lambda p: functional_call(model, p, (x, x, present))  # noqa: E731
    out = vmap(call)({name: p.detach() for name, p in params.items()})
    for i in range(2):
        torch.testing.assert_close(out[i], call({name: p[i] for name, p in params.items()}))


def test_checkpoint_recomputes_the_same_dropout():
    q, k, v, present = tokens()
    options = {"dropout": 0.5, "seed": torch.tensor(7)}
    plain = attention(q, k, v, present, **options).sum()
    again = torch.utils.checkpoint.checkpoint(
        lambda *x: attention(*x, **options).sum(), q, k, v, present, use_reentrant=False
    )
    for one, other in zip(
        *(torch.autograd.grad(x, (q, k, v)) for x in (plain, again)), strict=True
    ):
        assert torch.equal(one, other)


def test_autocast_takes_the_operands_down_but_not_the_scores():
    q, k, v, present = tokens()
    query, keys = torch.randn(3, 8), torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, present).dtype == torch.bfloat16
        readout, weights, _ = functional.retrieve(
            query, keys, k=3, temperature=0.5, backend="triton"
        )
    assert readout.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(readout, retrieve(query, keys, backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_on_fake_cuda_tensors(dtype):
    with torch._subclasses.FakeTensorMode():  # no autograd: its engine needs CUDA
        q, k, v = (torch.empty(2, 6, 2, 16, device="cuda", dtype=dtype) for _ in range(3))
        present = torch.empty(2, 2, device="cuda", dtype=torch.bool)
        out = attention(q, k, v, present, backend="auto")
        assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
        rest = (present, None, None, [2, 3], 1, 0.0)
        out, lse = ops._attention_forward(q, k, v, *rest)
        for slope in ops._attention_backward(out, q, k, v, out, lse, *rest):
            assert (slope.shape, slope.dtype, slope.device.type) == (q.shape, dtype, "cuda")
        query, keys = (torch.empty(1, n, 8, device="cuda", dtype=dtype) for n in (3, 9))
        readout, weights, indices, near, none = ops._retrieve_forward(
            query, keys, *(None,) * 6, 3, 0.5, True, True
        )
        assert (readout.shape, readout.dtype) == ((1, 3, 8), dtype)
        assert (weights.dtype, indices.dtype, near.shape) == (
            torch.float32,
            torch.int64,
            (1, 3, 3, 8),
        )
        args = (readout, query, near, none, weights, indices, 9, 0.5, True)
        assert [x.shape for x in ops._retrieve_backward(*args, True, False)] == [
            (1, 3, 8),
            (1, 9, 8),
            (0,),
        ]


@BY_TORCH
def test_second_derivatives_and_forward_mode_are_refused():
    q, k, v, present = tokens()
    out = attention(q, k, v, present)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: attention(x, k, v, present), (q,), (q,))


def test_vmap_over_one_seed_per_sample_is_refused():
    q, k, v, present = tokens()
    call = lambda seed: attention(q, k, v, present, dropout=0.5, seed=seed)  # noqa: E731
    with pytest.raises(ValueError, match="seed is mapped by vmap"):
        vmap(call)(torch.tensor([1, 2]))


def test_layers_take_the_kernels(monkeypatch):
    torch.manual_seed(0)
    crta = layers.CRTA(2, 2, 16, 2, 2)
    x, context, present = torch.randn(3, 2, 2, 16), torch.randn(3, 1, 16), torch.rand(3, 2) > 0.4
    fused = crta(x, context, present)  # ``auto`` takes them here, since the test allows the cpu
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_DEVICES", ("cuda",))
        plain = crta(x, context, present)
    torch.testing.assert_close(fused.completed, plain.completed)


def test_reasons():
    x = torch.randn(2, 6, 2, 16)
    why = functional.why_not_triton
    assert why("presence_attention", x) is None
    assert why("presence_attention", x.double()) == "float64"
    assert "head width 192 > 128" in why("presence_attention", torch.ones(1, 2, 1, 192).half())
    assert "head width 80 > 64" in why("presence_attention", torch.ones(1, 2, 1, 80))
    assert "513 tokens > 512" in why("presence_attention", torch.ones(1, 513, 1, 8))
    assert why("presence_attention", x, num_modalities=63) == "allow of 63 modalities > 62"
    assert why("retrieve", x, k=100) == "k=100 > 64"
    assert "k=None" in why("retrieve", x, k=None)
    with torch._subclasses.FakeTensorMode():
        here, there = (torch.empty(3, 8, device=device) for device in ("cpu", "cuda"))
        assert why("retrieve", here, there) == "the tensors are on several devices"
    with pytest.raises(ValueError, match="Name one of them"):
        why("attention", x)


def test_a_number_of_held_slots_is_not_copied_to_the_device(monkeypatch):
    """A copy waits for the device, and no CUDA graph can hold it."""
    bank = torch.randn(9, 8)
    expected = retrieve(bank, bank, held=torch.tensor(5))
    monkeypatch.delattr(torch, "tensor")
    torch.testing.assert_close(retrieve(bank, bank, held=5), expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_attention_keeps_no_table_and_copies_none_to_the_device(allowed, monkeypatch):
    """A copy waits for the device; what a CUDA graph made may not be read after it."""
    q, k, v, present = tokens()
    options = {"allow": torch.tensor([[True, False], [True, True]]) if allowed else None}
    expected = attention(q, k, v, present, backend="torch", **options)
    for name in ("tensor", "as_tensor"):
        monkeypatch.delattr(torch, name)
    torch.testing.assert_close(attention(q, k, v, present, **options), expected)
    from mmfusion.kernels import presence_attention as launchers

    assert not [name for name, x in vars(launchers).items() if hasattr(x, "cache_info")]


def test_long_sequences_take_the_kernel_and_one_graph():
    torch._dynamo.reset()
    layer = PresenceAttention(16, 2, backend="triton")
    plain = PresenceAttention(16, 2, backend="torch")
    plain.load_state_dict(layer.state_dict())
    for n in (63, 70):
        x, attend = torch.randn(2, n, 16), torch.rand(2, n) > 0.5
        torch.testing.assert_close(layer(x, x, attend), plain(x, x, attend))
    shapes = ({1: torch.export.Dim("N", min=2, max=512)},) * 3
    torch.export.export(layer.eval(), (x, x, attend), dynamic_shapes=shapes)


def old_device(monkeypatch):
    def old(_device):
        torch._dynamo.graph_break()  # as asking a device is: a graph keeps the answer instead
        return 7, 5

    old.__dict__.update(vars(functional._capability))
    monkeypatch.setattr(functional, "_capability", old)


def test_an_old_device_falls_back_in_a_compiled_graph_too(monkeypatch):
    torch._dynamo.reset()
    old_device(monkeypatch)
    from mmfusion import kernels

    for name in kernels.__all__:
        monkeypatch.delattr(kernels, name)
    query, keys = torch.randn(3, 8), torch.randn(9, 8)
    q, k, v, present = tokens()

    def step(q, query):
        found = attention(q, k, v, present, backend="auto").sum()
        return found + retrieve(query, keys, backend="auto").sum()

    for run in (step, torch.compile(step, fullgraph=True, backend="eager")):
        assert run(q, query).isfinite()
    with pytest.raises(ValueError, match=r"capability 7\.5 < 8\.0.*Use backend='auto'"):
        retrieve(query, keys)


def test_rocm_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert functional.why_not_triton("retrieve", torch.randn(3, 8)) == "ROCm is not supported"


def test_the_capability_of_a_device_that_is_there(monkeypatch):
    assert functional._capability(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert functional._capability(torch.device("cuda:0")) == (7, 5)


def test_reasons_without_a_gpu(monkeypatch):
    monkeypatch.setattr(functional, "_DEVICES", ("cuda",))
    x = torch.randn(3, 8)
    assert functional.why_not_triton("retrieve", x) == "the tensors are on cpu"
    with pytest.raises(ValueError, match=r"the tensors are on cpu.*Use backend='auto'"):
        retrieve(x, x)
    monkeypatch.setattr(functional, "_HAS_TRITON", False)
    assert functional.why_not_triton("retrieve", x) == "triton is not installed"


def test_importing_the_library_does_not_import_triton():
    code = (
        "import sys, torch, mmfusion.functional as f; x = torch.randn(3, 8);"
        "f.retrieve(x, x, k=2, temperature=1.0); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outside_the_interpreter_a_cpu_tensor_is_refused():
    code = (
        "import torch, mmfusion.functional as f; f._DEVICES = ('cpu',); x = torch.randn(3, 8)\n"
        "try: f.retrieve(x, x, k=2, temperature=1.0)\n"
        "except RuntimeError as error: assert 'the tensors are on cpu' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
