"""Kernels against the definition in fp64; interpreter and GPU run the same checks."""

import torch

from mmfusion import functional, losses, reference

# max |error| / max |truth| against fp64 of the rounded inputs; two to four times what was measured
ATTENTION = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
READOUT = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
RETRIEVE_GRAD = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 1e-2}
CONTRASTIVE = 1e-5


def assert_close(name, found, truth, tolerance, scale=0.0):
    assert found.shape == truth.shape, name
    assert bool(found.isfinite().all()), f"{name} is not finite"
    if truth.numel() == 0:
        return
    truth = truth.to(found.device)
    # a truth of zero comes with the rounding of what cancelled, so the scale has a floor
    scale = truth.double().abs().max().clamp(max(1e-2, scale))
    error = (found.double() - truth.double()).abs().max() / scale
    assert error <= tolerance, f"{name}: error {error:.2g} > {tolerance}"


def attention_inputs(device, dtype, batch, heads, width, lengths, context, queries=None):
    tokens = context + sum(lengths)
    queries = tokens if queries is None else queries
    q, k, v = (
        torch.randn(batch, n, heads, width, device=device).to(dtype)
        for n in (queries, tokens, tokens)
    )
    present = torch.rand(batch, len(lengths), device=device) > 0.5
    return q, k, v, present


def check_attention(
    device, dtype, batch, heads, width, lengths, context, queries=None, allow=False, dropout=0.0
):
    """Forward and all gradients, with NaN under what is absent."""
    q, k, v, present = attention_inputs(
        device, dtype, batch, heads, width, lengths, context, queries
    )
    visible = reference.visibility(present, lengths, context)[:, :, None, None]
    options = {"lengths": lengths, "num_context": context, "dropout": dropout}
    if allow:
        options["allow"] = torch.rand(len(lengths), len(lengths), device=device) > 0.5
    if dropout:
        options["seed"] = torch.tensor(2**61 + 12345, device=device)
    truth_in = [x.double().requires_grad_() for x in (q, k, v)]
    truth = reference.presence_attention(*truth_in, present, **options)
    found_in = [q.clone().requires_grad_()]
    found_in += [torch.where(visible, x, torch.nan).requires_grad_() for x in (k, v)]
    found = functional.presence_attention(*found_in, present, **options, backend="triton")
    assert found.dtype == dtype
    grad = torch.randn(found.shape, device=device).to(dtype)
    truth_grads = torch.autograd.grad(truth, truth_in, grad.double())
    found_grads = torch.autograd.grad(found, found_in, grad)
    assert_close("out", found, truth, ATTENTION[dtype])
    # where a query sees one key, dq and dk are what is left of terms as large as dv
    scale = max(float(x.abs().max()) for x in truth_grads) if q.numel() else 0.0
    for name, mine, theirs in zip(("dq", "dk", "dv"), found_grads, truth_grads, strict=True):
        assert_close(name, mine, theirs, ATTENTION[dtype], scale)
    for mine in found_grads[1:]:
        assert bool((torch.where(visible, 0, mine) == 0).all()), "absent tokens get a gradient"


def check_retrieve(
    device,
    dtype,
    banks,
    queries,
    slots,
    width,
    value_width,
    k,
    held=None,
    exclude=None,
    wanted=False,
    similarity="cosine",
    temperature=0.3,
    bank_grad=True,
):
    """Grouped lookup: readout, weights, indices, all gradients. ``value_width`` 0 mixes keys."""
    query = torch.randn(queries, banks, width, device=device).to(dtype)
    keys = torch.randn(banks, slots, width, device=device).to(dtype)
    values = None
    if value_width:
        values = torch.randn(banks, slots, value_width, device=device).to(dtype)
    options = {"k": k, "temperature": temperature, "similarity": similarity}
    if held is not None:
        options["held"] = torch.tensor(held, device=device)
    if exclude == "slot":
        options["exclude"] = torch.randint(-1, slots, (queries, banks), device=device)
    if exclude == "ids":
        ids = torch.randint(-1, 5, (queries,), device=device)
        options["exclude"] = (ids, torch.randint(-1, 5, (banks, slots), device=device))
    if wanted:
        options["wanted"] = torch.rand(queries, banks, device=device) > 0.5
    bank = [keys] if values is None else [keys, values]
    inputs = [query, *bank]
    wide = [x.double().requires_grad_() for x in inputs]
    truth, weights, indices = functional.retrieve(*wide, **options, backend="torch")
    if held is not None:  # what is not held may be anything
        inputs = [query, *(x.clone() for x in bank)]
        for x in inputs[1:]:
            for m, count in enumerate(held):
                x[m, max(count, 0) :] = torch.nan
    mine = [inputs[0].clone().requires_grad_()]
    mine += [x.clone().requires_grad_(bank_grad) for x in inputs[1:]]
    found, found_weights, found_indices = functional.retrieve(*mine, **options, backend="triton")
    assert found.dtype == dtype
    assert found_weights.dtype == torch.float32
    assert not found_weights.requires_grad
    assert found_indices.dtype == torch.int64
    assert torch.equal(found_indices < 0, indices < 0)
    assert_close("weights", found_weights, weights, 1e-4)
    # of many rows a few have a k-th and a next score that agree to rounding: either is right
    same = (found_indices.sort(-1).values == indices.sort(-1).values).all(-1, keepdim=True)
    assert same.float().mean() >= (0.99 if queries >= 100 else 0.98)
    assert_close(
        "readout", torch.where(same, found, 0), torch.where(same, truth, 0), READOUT[dtype]
    )
    grad = torch.where(same, torch.randn(found.shape, device=device), 0).to(dtype)
    leaves = 1 + bank_grad * len(bank)
    truth_grads = torch.autograd.grad(truth, wide[:leaves], grad.double())
    found_grads = torch.autograd.grad(found, mine[:leaves], grad)
    names = ("dquery", "dkeys", "dvalues")[:leaves]
    for name, one, other in zip(names, found_grads, truth_grads, strict=True):
        assert_close(name, one, other, RETRIEVE_GRAD[dtype])


def check_contrastive(device, batch, modalities, width, classes, absent=True, temperature=0.1):
    """The loss and its gradient; labels -100 and absent modalities are left out."""
    embeddings = torch.randn(batch, modalities, width, device=device)
    labels = torch.randint(0, classes, (batch,), device=device)
    labels = torch.where(torch.rand(batch, device=device) < 0.1, -100, labels)
    present = torch.rand(batch, modalities, device=device) > (0.4 if absent else -1)
    wide = embeddings.double().requires_grad_()
    mine = torch.where(present.unsqueeze(-1), embeddings, torch.nan).requires_grad_()
    options = {"present": present, "temperature": temperature}
    # the loss is fp32 throughout; in fp64 from the definition
    truth = _contrastive_truth(wide, labels, present, temperature)
    found = losses.class_contrastive_loss(mine, labels, **options, backend="triton")
    assert_close("loss", found, truth, CONTRASTIVE)
    (truth_grad,) = torch.autograd.grad(truth, wide)
    (found_grad,) = torch.autograd.grad(found, mine)
    assert_close("gradient", found_grad, truth_grad, 10 * CONTRASTIVE)


def _contrastive_truth(embeddings, labels, present, temperature):
    modalities = embeddings.shape[1]
    used = (present & (labels != -100)[:, None]).flatten()
    vectors = torch.nn.functional.normalize(embeddings, dim=-1).flatten(0, 1)
    label = labels.repeat_interleave(modalities)
    loss, number = reference.class_contrastive(
        vectors, vectors, label, label, used, used, start=0, temperature=temperature
    )
    counts = number > 0
    return torch.where(counts, loss, 0).sum() / counts.sum().clamp(min=1)
