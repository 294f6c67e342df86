"""Public stateless ops: argument checks, autocast, and the choice of a backend.

``backend="torch"`` runs the definition in ``reference.py``. ``"triton"`` runs the fused kernel,
registered in ``ops.py``, or says why it cannot. ``"auto"`` takes the kernel whenever
``why_not_triton`` has nothing against it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mmfusion import ops, reference
from mmfusion.presence import visibility
from mmfusion.reference import autocasts, full_precision

__all__ = ["class_contrastive", "presence_attention", "retrieve", "why_not_triton"]

_OPS = ("retrieve", "presence_attention", "class_contrastive")
_DEVICES = ("cuda",)  # tests add the cpu, where Triton interprets
_HAS_TRITON = find_spec("triton") is not None
_MOST_NEIGHBOURS = 64
_MOST_MODALITIES = 62  # one bit each in an int64, and one for the context
_MOST_TOKENS = 512
_WIDEST_HEAD = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    k: int | None,
    temperature: float,
    held: Tensor | int | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    wanted: Tensor | None = None,
    similarity: str = "cosine",
    key_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the ``k`` most similar slots of a memory: exact top-k, softmax, weighted readout.

    Gradients flow to ``query``, and to ``keys`` and ``values`` if they require it, through the
    chosen slots only. ``weights`` and ``indices`` carry none: to differentiate a mix of something,
    pass it as ``values``. Scores and softmax are fp32 (fp64 for fp64 banks), also under autocast. A
    query with no slot to read gives exact zeros, and its gradient is zero.

    Args:
        query: What to look for. It is cast to the type of ``keys``, for cosine by its direction.
        keys: What is searched; the number of its axes decides between one bank and one per
            modality.
        values: What is mixed; None mixes the keys.
        k: Slots read per query. May exceed the slots there are: the rest has index -1 and weight 0.
            None reads all held slots, in slot order (for small banks of prototypes).
        temperature: Softmax temperature over the scores.
        held: The first ``held`` slots are valid, the others are never read and may hold NaN.
        exclude: One slot number that a query must not read (-1: none), or ``(query_ids, slot_ids)``
            to keep a query from every slot with its own id (negative ids match nothing).
        wanted: Queries that are False are not answered: zeros, weight 0, index -1.
        similarity: ``"cosine"`` or ``"dot"``. A vector shorter than 1e-12 has cosine 0; lengths up
            to 1e19, and products over the temperature up to 1e38, fit into fp32.
        key_scale: Inverse norms of the keys, if the caller keeps them; None, or keys that require a
            gradient, computes them. In forward mode they are constants.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``readout`` in the type of ``query``, ``weights`` in fp32, ``indices`` best first.

    Shape:
        - one bank: ``query`` ``(Q, D)``, ``keys`` ``(S, D)``, ``values`` ``(S, Dv)``,
          ``held`` a number, ``exclude`` ``(Q,)`` or ids ``(Q,)`` and ``(S,)``, ``wanted`` ``(Q,)``
        - a bank per modality: ``query`` ``(B, M, D)`` or ``(B, M, Q, D)``, ``keys`` ``(M, S, D)``,
          ``values`` ``(M, S, Dv)``, ``held`` ``(M,)``, ``exclude`` ``(B,)`` or the query's leading
          axes, with slot ids ``(M, S)``, ``wanted`` ``(B, M)``
        - results: the leading axes of ``query``, then ``Dv``, ``k``, ``k``

    Raises:
        ValueError: If shapes, types or ranges contradict each other, or ``backend="triton"`` cannot
            serve the call.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [float("nan"), 0.0]])
        >>> readout, weights, indices = retrieve(
        ...     torch.tensor([[0.0, 3.0]]), bank, k=3, temperature=0.1, held=2)
        >>> indices.tolist()
        [[1, 0, -1]]

    References:
        The lookup of section 2, stage 4, of the method: our design; softmax-weighted neighbours as
        in Wu et al., "Memorizing Transformers", ICLR 2022.
    """
    grouped = _check_retrieve(query, keys, values, k, temperature, similarity)
    leading = query.shape[:-1]
    groups = keys.shape[0] if grouped else 1
    bank = [None if x is None else (x if grouped else x.unsqueeze(0)) for x in (keys, values)]
    forbidden: Tensor | tuple[Tensor, Tensor] | None = None
    if isinstance(exclude, list):
        raise ValueError(
            "exclude is a list: it is a tensor of slot numbers, or a pair (query_ids, slot_ids). "
            "Use torch.as_tensor(exclude), or tuple(exclude)."
        )
    if isinstance(exclude, tuple):
        ids = _per_query("exclude[0]", exclude[0], leading, grouped)
        _check_ids("exclude[1]", exclude[1], keys.shape[:-1])
        forbidden = (ids, exclude[1].reshape(groups, -1))
    elif exclude is not None:
        forbidden = _per_query("exclude", exclude, leading, grouped)
    if wanted is not None:
        if wanted.dtype != torch.bool:
            raise ValueError(f"wanted is {wanted.dtype}: it is bool, True to answer. Use .bool().")
        wanted = _per_query("wanted", wanted, leading, grouped)
    if key_scale is not None and key_scale.shape != keys.shape[:-1]:
        raise ValueError(
            f"key_scale is {tuple(key_scale.shape)}: it holds one inverse norm per key, "
            f"{tuple(keys.shape[:-1])}. Pass them all, or None to compute them."
        )
    arguments = {
        "k": k,
        "temperature": temperature,
        "held": _check_held(held, keys, grouped),
        "exclude": forbidden,
        "wanted": wanted,
        "similarity": similarity,
        # keys that learn get theirs afresh, since an optimiser moves them
        "key_scale": None
        if key_scale is None or keys.requires_grad
        else key_scale.reshape(groups, -1),
    }
    fused = _choose("retrieve", backend, query, *(x for x in (keys, values) if x is not None), k=k)
    with full_precision(query.device):
        folded = _fold(query, 1, grouped)
        if similarity == "cosine" and _max(keys) < _max(query):
            folded = _directions(folded, wanted)
        if fused:
            results = _retrieve_fused(folded, *bank, **arguments)  # type: ignore[arg-type]
        else:
            results = reference.retrieve(folded, *bank, **arguments)  # type: ignore[arg-type]
    readout, weights, indices = (_unfold(x, leading, grouped) for x in results)
    return readout.to(query.dtype), weights, indices


def presence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    num_context: int = 0,
    allow: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend over the tokens of present modalities and the context, never over absent ones.

    Keys and values of an absent modality are not read: NaN there changes no bit of the result and
    gets exactly zero gradient, and cutting them out gives the same result. All queries are
    answered, absent ones too, since that is how absent tokens are synthesised. A query that may see
    nothing gives exact zeros. Scale ``Dh ** -0.5``; softmax in fp32; under autocast the operands
    take its type, fp64 apart, as in ``scaled_dot_product_attention``.

    Args:
        q: Queries.
        k: Keys: context tokens first, then ``lengths[0]`` tokens of modality 0, and so on.
        v: Values, in the order of the keys.
        present: Which modalities may be read.
        lengths: Tokens of each modality among the keys; None if every key is a modality of its own,
            the form for sequences: their length may vary without a new graph.
        num_context: Context tokens among the keys; always visible.
        allow: Which modality (row) may look at which (column). Needs self-attention.
        dropout: Share of attention weights set to zero.
        seed: With ``dropout``: an integer tensor from which the dropped weights follow.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Shape:
        - ``q`` and the result: ``(B, Nq, H, Dh)``
        - ``k``, ``v``: ``(B, N, H, Dh)``, ``N = num_context + sum(lengths)``
        - ``present``: ``(B, M)``; ``allow``: ``(M, M)``; ``seed``: ``()``

    Raises:
        ValueError: If shapes or types contradict each other, ``allow`` comes without
            self-attention, ``dropout`` without ``seed``, or ``backend="triton"`` cannot serve.

    Example:
        >>> v = torch.tensor([[1.0], [3.0], [float("nan")]]).reshape(1, 3, 1, 1)
        >>> present = torch.tensor([[True, False]])
        >>> out = presence_attention(torch.zeros(1, 1, 1, 1), v, v, present, lengths=(2, 1))
        >>> out.item()
        2.0

    References:
        Vaswani et al., "Attention Is All You Need", 2017. The presence contract is our design.
    """
    _check_attention(q, k, v, present, lengths, num_context, allow, dropout, seed)
    if autocasts(q.device):
        kind = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(kind) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they are of one type. Convert them with "
            ".to(q.dtype), or use autocast."
        )
    words = 1 if allow is None else present.shape[1]
    if _choose("presence_attention", backend, q, k, v, num_modalities=words):
        sizes = [] if lengths is None else [int(length) for length in lengths]
        if allow is None:  # the kernel reads one byte per key; backward shares them
            present, sizes, num_context = visibility(present, lengths, num_context), [], 0
        arguments = (present, allow, seed if dropout else None, sizes, num_context, dropout)
        return ops.PresenceAttention.apply(*_distinct(q, k, v), *arguments)[0]
    return reference.presence_attention(
        q,
        k,
        v,
        present,
        lengths=lengths,
        num_context=num_context,
        allow=allow,
        dropout=dropout,
        seed=seed,
    )


def class_contrastive(
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
    *,
    start: int = 0,
    temperature: float = 0.1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Supervised contrastive loss of each anchor against columns of which it is one.

    ``losses.class_contrastive_loss`` is this over all modalities and ranks. An anchor's positives
    are the other real columns with its label; the loss is minus their mean log softmax over all
    other real columns, in fp32. Gradients flow to ``anchors`` and ``columns``.

    Args:
        anchors: Vectors of unit length.
        columns: What they are contrasted with: the anchors, perhaps with those of other ranks.
        labels: Class numbers of the anchors.
        column_labels: Class numbers of the columns.
        used: Anchors that count; the others lose 0 and have no positives.
        real: Columns that exist.
        start: The column that is anchor 0.
        temperature: Divides the products.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; the fused kernel keeps no ``(A, C)``
            matrix.

    Returns:
        ``loss`` and ``number`` of positives, fp32; an anchor without positives has loss 0.

    Shape:
        - ``anchors``: ``(A, D)``; ``columns``: ``(C, D)``
        - ``labels``, ``used``, results: ``(A,)``; ``column_labels``, ``real``: ``(C,)``

    Raises:
        ValueError: If shapes contradict each other, or ``backend="triton"`` cannot serve.

    Example:
        >>> vectors, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> yes = torch.ones(3, dtype=torch.bool)
        >>> loss, number = class_contrastive(vectors, vectors, labels, labels, yes, yes)
        >>> number.tolist(), round(loss[0].exp().item(), 3)
        ([1.0, 1.0, 0.0], 2.0)

    References:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.
    """
    _check_contrastive(anchors, columns, labels, column_labels, used, real, start, temperature)
    with full_precision(anchors.device):
        if not _choose("class_contrastive", backend, anchors, columns):
            return reference.class_contrastive(
                anchors,
                columns,
                labels,
                column_labels,
                used,
                real,
                start=start,
                temperature=temperature,
            )
        if labels.is_floating_point():  # equal numbers, equal bits, once -0 is gone
            labels, column_labels = (
                (x.double() + 0.0).view(torch.int64) for x in (labels, column_labels)
            )
        tensors = _distinct(anchors, columns, labels, column_labels, used, real)
        loss, _, number = ops.ClassContrastive.apply(*tensors, start, temperature)
    return loss, number


def why_not_triton(
    op: str, *tensors: Tensor, k: int | None = 1, num_modalities: int = 1
) -> str | None:
    """The reason why ``backend="auto"`` takes plain PyTorch for these tensors; None if it does not.

    Args:
        op: ``"retrieve"``, ``"presence_attention"`` or ``"class_contrastive"``.
        *tensors: The floating tensors of the call.
        k: Neighbours of a lookup.
        num_modalities: Modalities of an attention with ``allow``.

    Raises:
        ValueError: If there is no such op.

    Example:
        >>> why_not_triton("retrieve", torch.ones(2, 3)) is None
        False
    """
    if op not in _OPS:
        raise ValueError(f"op={op!r}: the fused ops are {_OPS}. Name one of them.")
    if not _HAS_TRITON:
        return "triton is not installed"
    if torch.version.hip:
        return "ROCm is not supported"
    for tensor in tensors:
        if tensor.device.type not in _DEVICES:
            return f"the tensors are on {tensor.device.type}"
        if tensor.dtype not in _WIDEST_HEAD:
            return str(tensor.dtype).removeprefix("torch.")
    if len({tensor.device for tensor in tensors}) > 1:
        return "the tensors are on several devices"
    if len({tensor.dtype for tensor in tensors}) > 1 and op == "presence_attention":
        return "q, k and v differ in type"
    if op == "retrieve" and k is None:
        return "k=None mixes all slots, which matrix products do best"
    if op == "retrieve" and k is not None and k > _MOST_NEIGHBOURS:
        return f"k={k} > {_MOST_NEIGHBOURS}"
    if op == "presence_attention":
        reason = _too_large(tensors, num_modalities)
        if reason is not None:
            return reason
    capability = _capability(tensors[0].device) if tensors else None
    if capability is not None and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} < 8.0"
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device that is there; a compiled graph, which is made for its device, keeps it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


# what torch.compiler.assume_constant_result does, less the import of the compiler, and of Triton
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _too_large(tensors: Sequence[Tensor], num_modalities: int) -> str | None:
    if num_modalities > _MOST_MODALITIES:
        return f"allow of {num_modalities} modalities > {_MOST_MODALITIES}"
    for tensor in tensors:
        if tensor.ndim != 4:
            continue
        widest = _WIDEST_HEAD[tensor.dtype]
        if tensor.shape[3] > widest:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"head width {tensor.shape[3]} > {widest} for {name}"
        if tensor.shape[1] > _MOST_TOKENS:
            return f"{tensor.shape[1]} tokens > {_MOST_TOKENS}"
    return None


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: If it is not one of the three.

    Example:
        >>> check_backend("auto")
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(
            f"backend={backend!r}: it is one of 'auto', 'torch', 'triton'. Use 'auto' unless you "
            "compare backends."
        )


def _choose(op: str, backend: str, *tensors: Tensor, **sizes: int | None) -> bool:
    """Whether the fused kernel serves this call."""
    check_backend(backend)
    if backend == "torch":
        return False
    reason = why_not_triton(op, *tensors, **sizes)  # type: ignore[arg-type]
    if reason is not None and backend == "triton":
        raise ValueError(
            f"backend='triton' for {op}, but {reason}: the fused kernel serves CUDA tensors it was "
            "built for. Use backend='auto', which falls back to PyTorch."
        )
    return reason is None


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors as different objects: Dynamo does not trace a Function that gets one twice.

    A view costs nothing, and autograd adds up what comes back through it.
    """
    different: list[Tensor | None] = []
    for tensor in tensors:
        seen = tensor is not None and any(tensor is other for other in different)
        different.append(tensor.view_as(tensor) if seen and tensor is not None else tensor)
    return different


def _max(x: Tensor) -> float:
    return torch.finfo(x.dtype).max


def _directions(query: Tensor, wanted: Tensor | None) -> Tensor:
    """Queries of length 1, which a cast to the narrow type of a bank does not turn into Inf."""
    if wanted is not None:  # what is not answered may hold anything
        query = torch.where(wanted.unsqueeze(-1), query, 0)
    return reference.unit(query.to(reference.wide_type(query)))


def _retrieve_fused(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    k: int,
    temperature: float,
    held: Tensor | None,
    exclude: Tensor | tuple[Tensor, Tensor] | None,
    wanted: Tensor | None,
    similarity: str,
    key_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused op on folded arguments; it keeps what it read only where gradients are on."""
    asker, owner = exclude if isinstance(exclude, tuple) else (exclude, None)
    readout, weights, indices, _, _ = ops.Retrieve.apply(
        *_distinct(query, keys, values),
        held,
        asker,
        owner,
        wanted,
        key_scale,
        k,
        temperature,
        similarity == "cosine",
        torch.is_grad_enabled(),
    )
    return readout, weights, indices


def check_temperature(temperature: Any) -> None:
    """Refuse what cannot divide scores in fp32, and a tensor, which would get no gradient.

    Raises:
        ValueError: If it is a tensor, or not within the normal numbers of fp32.

    Example:
        >>> check_temperature(0.1)
    """
    if isinstance(temperature, Tensor):
        raise ValueError(
            f"temperature={temperature}: it is a plain number, and gets no gradient. Pass "
            "temperature.item()."
        )
    bounds = torch.finfo(torch.float32)
    if not bounds.tiny <= temperature <= bounds.max:
        raise ValueError(
            f"temperature={temperature}: it divides fp32 scores. Use a number above 0, from "
            f"{bounds.tiny:.3g} to {bounds.max:.3g}."
        )


def _check_contrastive(
    anchors: Tensor,
    columns: Tensor,
    labels: Tensor,
    column_labels: Tensor,
    used: Tensor,
    real: Tensor,
    start: int,
    temperature: float,
) -> None:
    check_temperature(temperature)
    if anchors.ndim != 2 or columns.ndim != 2 or anchors.shape[1] != columns.shape[1]:
        raise ValueError(
            f"anchors is {tuple(anchors.shape)} and columns {tuple(columns.shape)}: they are "
            "(A, D) and (C, D), of one width. Flatten the modality axis into the first."
        )
    tables = {"labels": labels, "used": used, "column_labels": column_labels, "real": real}
    for name, table in tables.items():
        rows = anchors if name in ("labels", "used") else columns
        if table.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} is {tuple(table.shape)} for {len(rows)} vectors: one entry each. Reshape "
                "it."
            )
    if used.dtype != torch.bool or real.dtype != torch.bool:
        raise ValueError(
            f"used is {used.dtype} and real {real.dtype}: they are bool, True for what counts. "
            "Convert them with .bool()."
        )
    if labels.dtype != column_labels.dtype:
        raise ValueError(
            f"labels is {labels.dtype} and column_labels {column_labels.dtype}: they are compared, "
            "in one type. Convert one of them."
        )
    if not 0 <= start <= columns.shape[0] - anchors.shape[0]:
        raise ValueError(
            f"start={start} with {len(anchors)} anchors and {len(columns)} columns: the anchors "
            "are columns start to start + A. Correct start, or pass the anchors among the columns."
        )


def _check_retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    k: int | None,
    temperature: float,
    similarity: str,
) -> bool:
    """Whether the call is grouped."""
    grouped = keys.ndim == 3
    axes = "(B, M, D) or (B, M, Q, D) with keys (M, S, D)" if grouped else "(Q, D) with keys (S, D)"
    fits = query.ndim in ((3, 4) if grouped else (2,)) and keys.ndim in (2, 3)
    if (
        not fits
        or query.shape[-1] != keys.shape[-1]
        or (grouped and query.shape[1] != keys.shape[0])
    ):
        raise ValueError(
            f"query is {tuple(query.shape)} and keys {tuple(keys.shape)}: query is {axes}, of one "
            "width. Add or drop an axis."
        )
    if not (query.is_floating_point() and keys.is_floating_point()):
        raise ValueError(
            f"query is {query.dtype} and keys {keys.dtype}: similarities are of floating numbers. "
            "Convert them with .float()."
        )
    if keys.shape[-2] < 1:
        raise ValueError(
            f"keys is {tuple(keys.shape)}: a memory has at least one slot. Pass held=0 for one "
            "that holds nothing yet."
        )
    if values is not None and values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"values is {tuple(values.shape)} and keys {tuple(keys.shape)}: they agree in all axes "
            "but the last. Pass one value per key."
        )
    if k is not None and (isinstance(k, bool | float) or k < 1):
        raise ValueError(
            f"k={k}: at least one slot is read, a whole number. Use k >= 1, or k=None to read all."
        )
    check_temperature(temperature)
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity={similarity!r}: it is 'cosine' or 'dot'. Use one of them.")
    return grouped


def _check_held(held: Tensor | int | None, keys: Tensor, grouped: bool) -> Tensor | None:
    if held is None:
        return None
    if not isinstance(held, Tensor):  # filled on the device: a copy would wait for it
        held = torch.full((), held, device=keys.device)
    expected = keys.shape[:1] if grouped else torch.Size([])
    if held.dtype == torch.bool or held.is_floating_point() or held.shape != expected:
        raise ValueError(
            f"held is {tuple(held.shape)} {held.dtype}: it counts the valid slots, integers of "
            f"shape {tuple(expected)}. Pass the count, not a boolean per slot."
        )
    return held.reshape(-1)


def _check_ids(name: str, ids: Tensor, expected: torch.Size) -> None:
    if ids.dtype != torch.int64 or ids.shape != expected:
        raise ValueError(
            f"{name} is {tuple(ids.shape)} {ids.dtype}: it holds int64 numbers of shape "
            f"{tuple(expected)}, negative for none. Cast or reshape it."
        )


def _per_query(name: str, table: Tensor, leading: torch.Size, grouped: bool) -> Tensor:
    """A table per sample or per query -> (groups, queries)."""
    if name != "wanted" and table.dtype != torch.int64:
        _check_ids(name, table, leading)
    if not any(table.shape == leading[:n] for n in range(1, len(leading) + 1)):
        raise ValueError(
            f"{name} is {tuple(table.shape)}: its axes are the leading ones of query, "
            f"{tuple(leading)}. Reshape it."
        )
    table = table.reshape(*table.shape, *[1] * (len(leading) - table.ndim)).expand(leading)
    return _fold(table, 0, grouped)


def _fold(x: Tensor, trailing: int, grouped: bool) -> Tensor:
    """(B, M, ...) or (Q, ...) -> (groups, queries, *trailing axes)."""
    if not grouped:
        return x.unsqueeze(0)
    x = x.transpose(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[x.ndim - trailing :])


def _unfold(x: Tensor, leading: torch.Size, grouped: bool) -> Tensor:
    if not grouped:
        return x.squeeze(0)
    return x.reshape(leading[1], leading[0], *leading[2:], x.shape[-1]).transpose(0, 1)


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor,
    lengths: Sequence[int] | None,
    num_context: int,
    allow: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    sizes = (num_context, *(lengths or ()))
    if min(sizes) < 0:
        raise ValueError(
            f"num_context={num_context} and lengths={lengths}: they count tokens. Use 0 or more."
        )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0::2] != k.shape[0::2]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: q is (B, Nq, H, Dh), "
            "k and v (B, N, H, Dh). Use unflatten(-1, (num_heads, -1))."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q has heads of width {q.shape[3]} and k of {k.shape[3]}: they are multiplied, so the "
            "widths agree. Project both to one width."
        )
    num_modalities = k.shape[1] - num_context if lengths is None else len(lengths)
    if present.dtype != torch.bool or present.shape != (k.shape[0], num_modalities):
        raise ValueError(
            f"present is {tuple(present.shape)} {present.dtype}: it is bool (B, M) = "
            f"{(k.shape[0], num_modalities)}, True where observed. Give one length per modality, "
            "or none and one column per key."
        )
    if lengths is not None and num_context + sum(lengths) != k.shape[1]:
        raise ValueError(
            f"num_context={num_context} and lengths={tuple(lengths)} with {k.shape[1]} keys: "
            "context and modality tokens make up all keys. Correct the lengths."
        )
    if allow is not None and (
        allow.dtype != torch.bool
        or allow.shape != (num_modalities, num_modalities)
        or q.shape[1] != k.shape[1]
    ):
        raise ValueError(
            f"allow is {tuple(allow.shape)} {allow.dtype} with {q.shape[1]} queries and "
            f"{k.shape[1]} keys: it is bool (M, M), and queries and keys are the same tokens. Drop "
            "allow in cross-attention."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it is a share of weights. Use 0 <= dropout < 1.")
    drawn = isinstance(seed, Tensor) and not (seed.ndim or seed.is_floating_point())
    if dropout and not drawn:
        raise ValueError(
            f"dropout={dropout} with seed={seed}: what is dropped follows from one integer tensor. "
            "Draw it, for example torch.randint(2**63 - 1, (), device=q.device)."
        )
