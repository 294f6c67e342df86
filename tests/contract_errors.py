"""G10's list: wrong calls of public functions, and the value, rule and cure each is told."""

from functools import partial
from typing import Any

import torch
from torch import nn

from mmfusion import CMML, baselines, functional, info, layers, losses, missingness, presence
from mmfusion.layers.reset import reset_children

Z = torch.zeros
NAN = float("nan")


def yes(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def ids(*shape: int) -> torch.Tensor:
    return Z(*shape, dtype=torch.int64)


def contrast(*, width=2, rows=4, used=None, column_labels=None, **options):
    labels = (ids(rows), ids(4) if column_labels is None else column_labels)
    counts = (yes(4) if used is None else used, yes(4))
    return functional.class_contrastive(Z(4, 2), Z(4, width), *labels, *counts, **options)


look = partial(functional.retrieve, k=1, temperature=1.0)
bank = layers.MemoryBank(2, 4, 3, 2)
attention = layers.PresenceAttention(4, 2)
tokens = layers.ModalityTokens({"a": 2, "b": 3}, 4, 1)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=1, keepdim=True)


def attend(q=(1, 2, 1, 4), k=(1, 2, 1, 4), v=None, present=None, **options: Any) -> Any:
    present = yes(1, 2) if present is None else present
    options = {"lengths": (1, 1)} | options
    return functional.presence_attention(Z(*q), Z(*k), Z(*(v or k)), present, **options)


def model(target: str, labels: torch.Tensor) -> Any:
    num_classes = 1 if target == "binary" else 2
    made = CMML({"a": 2}, num_classes=num_classes, target=target, dim=4, num_heads=1, memory=None)
    return made({"a": Z(2, 2)}, labels=labels)


def normalise(inputs: Any, present: Any = None, **options: Any) -> Any:
    return presence.normalise(inputs, ("a", "b"), present, **options)


def with_table(table: Any) -> list[tuple[str, Any]]:
    """Calls with 3 samples of 2 modalities of width 4; None is an answer to some of them."""
    x = Z(3, 2, 1, 4)
    calls = [
        ("present", lambda: layers.ReadoutGate(4)(x, x, table)),
        ("present", lambda: layers.AbsentTokens(2, 1, 4)(x, table)),
        ("present", lambda: layers.CRTA(2, 1, 4, 2, 1)(x, Z(3, 4), table)),
        ("present", lambda: layers.PresencePool(4)(x, table)),
        ("present", lambda: layers.ConcatPool(2, 4)(x, table)),
        ("present", lambda: layers.ModalityEvidence(2, 4, 1, "binary")(x, table)),
        ("present", lambda: losses.evidence_loss(x[:, :, 0], ids(3), table, "multiclass")),
        ("hidden", lambda: losses.reconstruction_loss(x, x, table)),
    ]
    if table is None:
        return [*calls, ("present", lambda: layers.MemoryBank(2, 4, 4, 2)(x, table))]
    return [
        *calls,
        ("present", lambda: layers.ReferenceAlignment(4, 2)(x, Z(3, 4), table)),
        ("present", lambda: losses.class_contrastive_loss(x[:, :, 0], ids(3), table)),
    ]


def load_changed() -> None:
    """A saved set of patterns in which somebody has changed one."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patterns.json"
        patterns = missingness.PatternSet.draw("slot_rate", 4, ("a", "b"), 0.25, seed=0, split="s")
        patterns.save(path)
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        missingness.PatternSet.load(path)


draw = partial(missingness.PatternSet.draw, rate=0.5, seed=0, split="test")

# Where: what is called, and three patterns that the message holds in this order.
WRONG: dict[str, list[tuple[Any, str, str, str]]] = {
    "presence.normalise": [
        (
            lambda: normalise({"a": Z(1, 1)}, [[True, False]]),
            "present is a list",
            "bool tensor",
            "as_tensor",
        ),
        (
            lambda: normalise({"a": Z(1, 0, 3), "b": Z(1, 1)}, yes(1, 2)),
            r"present\[0, 'a'\] is True but inputs\['a'\] is empty",
            "holds numbers",
            "present=None",
        ),
        (lambda: presence.normalise({}, ()), "names is empty", "at least one", "Name what"),
        (lambda: normalise({"c": Z(1, 1)}), "holds 'c'", "declared ones are", "Drop or rename"),
        (lambda: normalise({"a": None}), "holds no tensor", "from a tensor", r"=torch\.zeros"),
        (lambda: normalise({"a": 3.0}), r"'a'\] holds a float", "every leaf", "as_tensor"),
        (lambda: normalise({"a": Z(())}), "a 0-D tensor", "first axis is the batch", "add the"),
        (
            lambda: normalise({"a": Z(2, 1), "b": Z(3, 1)}),
            "3 rows and.* 2",
            "one batch",
            "to False",
        ),
        (lambda: normalise({"a": Z(2, 1)}, yes(2, 1)), r"\(2, 1\)", r"\(2, 2\)", r"\.bool\(\)"),
        (lambda: normalise({"a": Z(2, 1)}, Z(2, 2)), "float32", "it is bool", r"\.bool\(\)"),
        (
            lambda: normalise({"a": Z(2, 1)}, yes(2, 2).to("meta")),
            "on meta",
            "on cpu",
            "inputs' device",
        ),
        (
            lambda: normalise({"a": Z(2, 1)}, shapes={"a": (4,)}),
            r"'a'\] has rows of shape \(1,\)",
            r"declared with \(4,\)",
            "Reshape it",
        ),
        (
            lambda: normalise({"a": Z(2, 1)}, yes(2, 2)),
            r"present\[0, 'b'\] is True but inputs\['b'\] is None \(also rows 1\)",
            "holds numbers",
            "present=None",
        ),
        (
            lambda: normalise({"a": torch.tensor([[0.0], [NAN]]), "b": Z(2, 1)}, yes(2, 2)),
            r"present\[1, 'a'\] is True but that row of inputs\['a'\] is NaN",
            "holds numbers",
            "fill them",
        ),
        (
            lambda: normalise({"a": torch.tensor([[0.0, 1.0], [1.0, NAN]])}),
            r"'a'\] row 1 is observed but holds NaN or Inf",
            "finite numbers",
            "accepts_nan = True",
        ),
        (
            lambda: normalise({"a": torch.tensor([[float("inf")]])}, accepts_nan=("a",)),
            r"'a'\] row 0 is observed but holds Inf",
            "or NaN, which its encoder accepts",
            "Repair.*put NaN there",
        ),
    ],
    "presence.collate": [
        (lambda: presence.collate([{"a": 1}], ("a",)), r"sample 0.*\['a'\]", "'inputs'", "Return"),
        (
            lambda: presence.collate([{"inputs": {"c": 1}}], ("a",)),
            "'c'",
            "declared ones",
            "Drop or rename",
        ),
        (
            lambda: presence.collate([{"inputs": {"a": [1.0] * n}} for n in (1, 2)], ("a",)),
            r"sample 1.*\(2,\).*\(1,\)",
            "one shape",
            "Resize or pad",
        ),
        (
            lambda: presence.collate([{"inputs": {"a": 1}, "labels": 1}, {"inputs": {}}], ("a",)),
            "sample 1 .*no 'labels'",
            "same keys",
            "-100 or NaN",
        ),
    ],
    "presence.check_visible": [
        (
            lambda: presence.check_visible([[True, True]], yes(1, 2), ("a", "b")),
            "visible is a list",
            r"present's shape \(1, 2\)",
            "as_tensor",
        ),
        (
            lambda: presence.check_visible(yes(1, 1), yes(1, 2), ("a", "b")),
            r"\(1, 1\)",
            "present's shape",
            r"hide\(present",
        ),
        (
            lambda: presence.check_visible(yes(1, 2), ~yes(1, 2), ("a", "b")),
            r"visible\[0, 'a'\] is True",
            "subset",
            "present & visible",
        ),
    ],
    "missingness": [
        (lambda: missingness.sample_rate(0, 2, 0.5), "batch_size=0", "at least one", "=1 or more"),
        (lambda: missingness.sample_rate(2, 2, 1.5), "rate=1.5", "from 0 to 1", "Pass rate=0.3"),
        (lambda: missingness.sample_rate(2, 1, 0.5), "rate=0.5 with", "keeps one", "at least two"),
        (lambda: missingness.slot_rate(2, 0, 0.5), "num_modalities=0", "at least one", "Pass"),
        (lambda: missingness.slot_rate(2, 2, NAN), "rate=nan", "from 0 to 1", "Pass"),
        (lambda: missingness.slot_rate(2, 2, 0.6), "rate=0.6", "1/2 of the", "at most 1/2"),
        (lambda: missingness.per_modality(2, ()), r"\(0,\)", "one rate per", r"\(M\)"),
        (lambda: missingness.per_modality(2, (0, 2)), r"rates\[1\]=2", "share", "=0.3"),
        (lambda: missingness.per_modality(2, (1, 1)), r"rates=\(1.*1", "keeps one", "Lower"),
        (
            lambda: missingness.per_modality(2, (1 - 1e-9, 1 - 1e-9)),
            r"rates=\(0.9999",
            "in float32",
            "Lower a rate",
        ),
        (lambda: missingness.per_modality(2, (0.1,)), "rates=", "a sole one", "Lower a rate"),
        (
            lambda: missingness.not_at_random(Z(2, 2), ((0.1, 0.2),)),
            r"cause of shape \(2, 2\)",
            "one number per sample",
            r"\(B,\)",
        ),
        (
            lambda: missingness.not_at_random(torch.tensor([0, 3]), ((0.1, 0.2),)),
            r"cause\[1\]=3 with 1 rows",
            "numbers its row",
            "leave such samples out",
        ),
        (lambda: missingness.all_patterns(17), "num_modalities=17", "1 to 16", "sample_rate"),
        (lambda: missingness.hide(Z(2, 2), 0.5), "float32", "it is bool", r"present\.bool"),
        (lambda: missingness.hide(yes(2, 2), -1), "rate=-1", "from 0 to 1", "Pass rate"),
        (lambda: missingness.curriculum(-1, 4), "step=-1", "count from 0", "step >= 0"),
        (lambda: missingness.curriculum(1, 4, end=2), "end=2", "from 0 to 1", "Pass end=0.3"),
        (
            lambda: missingness.PatternSet(yes(2, 2), ("a", "a"), "slot_rate", 0.5, 0, "s"),
            r"\(2, 2\) with names=\('a', 'a'\)",
            "its own name",
            "distinct name",
        ),
        (lambda: draw("rate", 4, ("a", "b")), "kind='rate'", "draws nothing", "Pass one of"),
        (
            lambda: draw("slot_rate", 4, ("a", "b"), cause=ids(4)),
            "kind='slot_rate', num_samples=4 with 4 causes",
            "one cause per sample",
            "None elsewhere",
        ),
        (lambda: draw("slot_rate", 4, ("a", "b")).save("x.csv"), "x.csv", "suffix", r"\.npz"),
        (load_changed, r"patterns\.json", "do not match their hash", "Restore"),
    ],
    "functional.retrieve": [
        (lambda: look(ids(1, 2), Z(3, 2)), "query is torch.int64", "floating", r"\.float\(\)"),
        (lambda: look(Z(2, 3), Z(4, 5)), r"\(2, 3\).*\(4, 5\)", "one width", "axis"),
        (lambda: look(Z(2, 3), Z(1, 4, 3)), r"\(2, 3\)", r"\(B, M, D\)", "Add or drop"),
        (lambda: look(Z(2, 2, 3), Z(1, 4, 3)), r"\(2, 2, 3\)", r"\(B, M, D\)", "Add or drop"),
        (lambda: look(Z(2, 3), Z(0, 3)), r"keys is \(0, 3\)", "at least one slot", "held=0"),
        (lambda: look(Z(2, 3), Z(4, 3), Z(5, 3)), r"values is \(5, 3\)", "all axes", "per key"),
        (lambda: look(Z(2, 3), Z(4, 3), k=0), "k=0", "at least one", "k=None"),
        (lambda: look(Z(2, 3), Z(4, 3), k=2.0), "k=2.0", "a whole number", "k=None"),
        (lambda: look(Z(2, 3), Z(4, 3), k=True), "k=True", "a whole number", "k=None"),
        (lambda: look(Z(2, 3), Z(4, 3), exclude=[1, 2]), "a list", "slot numbers", "as_tensor"),
        (
            lambda: look(Z(2, 3), Z(4, 3), temperature=torch.tensor(0.5)),
            "temperature=0.5",
            "plain number, and gets no gradient",
            r"\.item",
        ),
        (lambda: look(Z(2, 3), Z(4, 3), temperature=1e-39), "=1e-39", "divides fp32", "above 0"),
        (lambda: look(Z(2, 3), Z(4, 3), temperature=0), "temperature=0", "divides", "above 0"),
        (lambda: look(Z(2, 3), Z(4, 3), similarity="l2"), "'l2'", "'cosine' or 'dot'", "Use"),
        (lambda: look(Z(2, 3), Z(4, 3), held=yes(4)), "bool", "counts the valid", "the count"),
        (lambda: look(Z(2, 2, 3), Z(2, 4, 3), held=3), r"held is \(\)", r"shape \(2,\)", "Pass"),
        (
            lambda: look(Z(2, 3), Z(4, 3), exclude=(ids(2), ids(5))),
            r"exclude\[1\] is \(5,\)",
            r"shape \(4,\)",
            "Cast or reshape",
        ),
        (
            lambda: look(Z(2, 3), Z(4, 3), exclude=Z(2)),
            "exclude is .*float32",
            "int64",
            "Cast or reshape",
        ),
        (
            lambda: look(Z(2, 3), Z(4, 3), exclude=ids(3)),
            r"exclude is \(3,\)",
            "leading ones of query",
            "Reshape",
        ),
        (lambda: look(Z(2, 3), Z(4, 3), wanted=Z(2)), "wanted is .*float32", "bool", r"\.bool"),
        (
            lambda: look(Z(2, 3), Z(4, 3), wanted=yes(3)),
            r"wanted is \(3,\)",
            "leading ones of query",
            "Reshape",
        ),
        (
            lambda: look(Z(2, 3), Z(4, 3), key_scale=Z(3)),
            r"key_scale is \(3,\)",
            "per key",
            "None to compute",
        ),
        (lambda: look(Z(2, 3), Z(4, 3), backend="cuda"), "'cuda'", "one of 'auto'", "Use 'auto'"),
        (
            lambda: look(Z(2, 3), Z(4, 3), backend="triton"),
            "backend='triton' for retrieve",
            "serves CUDA",
            "backend='auto'",
        ),
    ],
    "functional.presence_attention": [
        (lambda: attend(k=(1, 3, 1, 4), v=(1, 2, 1, 4)), r"k \(1, 3", r"\(B, N, H", "unflatten"),
        (lambda: attend(q=(2, 2, 1, 4)), r"q is \(2,", r"\(B, Nq, H, Dh\)", "unflatten"),
        (lambda: attend(q=(1, 2, 1, 3)), "width 3 and k of 4", "multiplied", "Project both"),
        (lambda: attend(present=Z(1, 2)), "float32", "it is bool", "one length per"),
        (lambda: attend(present=yes(1, 3)), r"\(1, 3\)", r"= \(1, 2\)", "one length per"),
        (lambda: attend(lengths=None, num_context=1), r"\(1, 2\)", r"= \(1, 1\)", "or none"),
        (lambda: attend(lengths=(1, 2)), r"lengths=\(1, 2\) with 2", "make up all", "Correct"),
        (lambda: attend(num_context=1), "num_context=1", "make up all keys", "Correct"),
        (lambda: attend(allow=yes(3, 3)), r"allow is \(3, 3\)", r"\(M, M\)", "Drop allow"),
        (lambda: attend(q=(1, 3, 1, 4), allow=yes(2, 2)), "3 queries", "the same", "Drop"),
        (lambda: attend(dropout=1.0), "dropout=1.0", "share", "< 1"),
        (lambda: attend(dropout=0.5), "seed=None", "integer tensor", "randint"),
        (lambda: attend(dropout=0.5, seed=Z(())), "seed=0.0", "integer tensor", "randint"),
        (lambda: attend(dropout=0.5, seed=5), "seed=5", "integer tensor", "randint"),
        (lambda: attend(lengths=(3, -1)), r"lengths=\(3, -1\)", "count tokens", "0 or more"),
        (lambda: attend(num_context=-1), "num_context=-1", "count tokens", "0 or more"),
        (
            lambda: functional.presence_attention(
                Z(1, 2, 1, 4).half(), *[Z(1, 2, 1, 4)] * 2, yes(1, 2)
            ),
            "q is torch.float16, k torch.float32",
            "of one type",
            "autocast",
        ),
        (lambda: attend(backend="fast"), "'fast'", "one of 'auto'", "Use 'auto'"),
    ],
    "functional.class_contrastive": [
        (lambda: contrast(temperature=0), "temperature=0", "divides", "above 0"),
        (lambda: contrast(width=3), r"columns \(4, 3\)", "of one width", "Flatten"),
        (lambda: contrast(rows=1), r"labels is \(1,\)", "one entry each", "Reshape"),
        (lambda: contrast(used=ids(4)), "used is torch.int64", "are bool", r"\.bool"),
        (lambda: contrast(column_labels=Z(4)), "column_labels torch.float32", "one type", "Conv"),
        (lambda: contrast(start=1), "start=1 with 4 anchors", "are columns start", "Correct"),
        (lambda: contrast(start=-1), "start=-1", "are columns start", "Correct"),
    ],
    "functional.why_not_triton": [
        (lambda: functional.why_not_triton("sum"), "op='sum'", "fused ops are", "Name one"),
    ],
    # every layer and loss that takes a table of modalities
    "presence.check_table": [
        (call, f"{name} is {what}", r"it is bool \(B, M\) = ", rf"{name}\.bool\(\)")
        for table, what in (
            (ids(3, 2), r"\(3, 2\) torch.int64"),
            (yes(1, 2), r"\(1, 2\) torch.bool"),
            (None, "a NoneType"),
        )
        for name, call in with_table(table)
    ],
    "info.backends": [
        (lambda: info.backends("cuda:7"), "device='cuda:7'", "no CUDA device", "Pass 'cpu'"),
    ],
    "presence.visibility": [
        (
            lambda: presence.visibility(yes(2, 3), (2, 2)),
            r"\(2, 3\).*\(2, 2\)",
            "every modality has a length",
            "one length per column",
        ),
        (
            lambda: presence.visibility(yes(1, 2), (1, 1), allow=yes(1, 1)),
            r"allow is \(1, 1\)",
            r"= \(2, 2\)",
            "one row",
        ),
    ],
    "layers.reset": [
        (
            lambda: reset_children(nn.Sequential(nn.ParameterList([Z(1)]))),
            "0 is a ParameterList",
            "unknown",
            "Give it that method",
        ),
    ],
    "layers.PresenceAttention": [
        (
            lambda: attention(Z(1, 2, 4), Z(1, 2, 4), yes(1, 1, 2, 2), lengths=(1, 1)),
            r"4-D with lengths=\(1, 1\)",
            "all by itself",
            "Leave them out",
        ),
        (lambda: layers.PresenceAttention(4, 3), "num_heads=3 with dim=4", "share", "divisor"),
        (lambda: layers.PresenceAttention(4, 2, backend="x"), "'x'", "one of 'auto'", "Use 'auto'"),
        (lambda: layers.PresenceAttention(4, 0), "num_heads=0", "evenly", "Choose"),
        (lambda: layers.PresenceAttention(4, 2, dropout=1.0), "dropout=1.0", "share", "< 1"),
        (lambda: attention(Z(1, 2, 4), Z(1, 3, 4), Z(1, 3)), "float32", "it is bool", "~mask"),
        (
            lambda: attention(Z(1, 2, 4), Z(1, 3, 4), yes(1, 1, 3, 3)),
            r"\(1, 1, 3, 3\)",
            r"= \(1, 1, 2, 3\)",
            "Convert it",
        ),
        (
            lambda: attention(Z(1, 2, 4), Z(2, 3, 4), yes(2, 1, 2, 3)),
            r"queries \(1, 2, 4\) and keys \(2, 3, 4\)",
            "in one batch",
            "Convert it",
        ),
        (
            lambda: attention(Z(1, 2, 4), Z(1, 3, 4), yes(1, 2)),
            r"attend is \(1, 2\)",
            "one column per modality",
            "Correct them",
        ),
    ],
    "layers.CRTA": [
        (lambda: layers.CRTABlock(2, 4, 2, 4), "bottleneck=4 with dim=4", "narrows", "Choose"),
        (
            lambda: layers.CRTABlock(2, 4, 2)(Z(1, 3, 1, 4), Z(1, 1, 4), yes(1, 3)),
            r"\(1, 3, 1, 4\)",
            "built for M = 2",
            "Rebuild it",
        ),
        (
            lambda: layers.CRTA(2, 1, 4, 2, 1)(Z(3, 2, 1, 4), Z(5, 3), yes(3, 2)),
            r"context is \(5, 3\)",
            "with D = 4",
            "with that width",
        ),
        (
            lambda: layers.CRTA(2, 1, 4, 2, 1)(Z(3, 2, 1, 4), Z(1, 5, 4), yes(3, 2)),
            r"context is \(1, 5, 4\) for 3 samples",
            r"\(C, D\)",
            "Drop or expand",
        ),
        (lambda: layers.CRTA(2, 1, 4, 2, 0), "num_blocks=0", "at least one", "leave CRTA out"),
        (
            lambda: layers.CRTA(2, 1, 4, 2, 1)(Z(1, 3, 1, 4), Z(1, 4), yes(1, 3)),
            r"\(1, 3, 1, 4\)",
            r"built for \(M, L, D\) = \(2, 1, 4\)",
            "Rebuild it",
        ),
    ],
    "layers.ReferenceAlignment": [
        (
            lambda: layers.ReferenceAlignment(4, 2)(Z(3, 2, 1, 4), Z(1, 5, 4)),
            r"context is \(1, 5, 4\) for 3 samples",
            r"\(B, C, D\)",
            "Drop or expand",
        ),
    ],
    "layers.tokens": [
        (lambda: layers.ContextTokens(0, 4), "num_context=0", "at least one", "Use 1"),
        (lambda: layers.ModalityTokens({"a": 2}, 4, 0), "num_tokens=0", "at least", "Use 1"),
        (lambda: layers.ModalityTokens({"a": 0}, 4, 1), r"'a'\] is 0", "1 wide", "Pass the width"),
        (lambda: layers.ModalityTokens({"a.b": 2}, 4, 1), "'a.b'", "state_dict key", "dots"),
        (lambda: layers.ModalityTokens({1: 2}, 4, 1), "name 1", "state_dict key", "a string"),
        (lambda: layers.ModalityTokens({"keys": 2}, 4, 1), "'keys'", "attribute", "methods"),
        (lambda: tokens({"a": Z(1, 2).double()}), "float64", "float32", r"\.float\(\)"),
        (lambda: tokens({"a": Z(1, 3)}), r"'a' are \(1, 3\)", "with width 2", "Declare the"),
        (
            lambda: tokens({"a": (Z(1, 5, 2), Z(1, 5))}),
            "valid of 'a' is .*float32",
            "bool",
            "Convert it",
        ),
        (
            lambda: layers.AbsentTokens(2, 1, 4)(Z(1, 3, 1, 4), yes(1, 3)),
            r"\(1, 3, 1, 4\)",
            "built for",
            "reshape them",
        ),
        (
            lambda: tokens({"a": [Z(1, 5, 2), yes(1, 5), yes(1, 5)]}),
            "'a' are a list of 3",
            "a pair",
            "one of the two",
        ),
    ],
    "layers.ConcatPool": [
        (
            lambda: layers.ConcatPool(2, 4)(Z(3, 1, 1, 4), yes(3, 1)),
            r"tokens is \(3, 1, 1, 4\)",
            r"M \* D = 8",
            "Rebuild it",
        ),
        (
            lambda: layers.PresencePool(4)(Z(3, 2, 4), yes(3, 2)),
            r"tokens is \(3, 2, 4\)",
            r"D = 4",
            "reshape them",
        ),
    ],
    "layers.ModalityEvidence": [
        (lambda: layers.ModalityEvidence(2, 4, 2, "x"), "target='x'", "one of", "Choose one"),
        (
            lambda: layers.ModalityEvidence(2, 4, 1, "binary")(Z(3, 2, 1, 5), yes(3, 2)),
            r"tokens is \(3, 2, 1, 5\)",
            "of width D = 4",
            "Rebuild it",
        ),
        (
            lambda: layers.ModalityEvidence(2, 4, 3, "multilabel").count(Z(6), yes(6)),
            r"labels is \(6,\)",
            r"both are \(6, 3\)",
            "Reshape them",
        ),
        (
            lambda: layers.ModalityEvidence(2, 4, 3, "multiclass").count(ids(6), yes(1)),
            r"known \(1,\)",
            r"both are \(6,\)",
            "Reshape them",
        ),
        (
            lambda: layers.ModalityEvidence(2, 4, 1, "binary")(Z(3, 1, 1, 4), yes(3, 1)),
            r"tokens is \(3, 1, 1, 4\)",
            "M = 2",
            "Rebuild it",
        ),
    ],
    "layers.ModalityEncoders": [
        (
            lambda: layers.ModalityEncoders({"a": (nn.GRU(2, 2), 2)}, 4, 1)({"a": Z(3, 5, 2)}),
            "encoder of 'a' returned tuple for 3 rows",
            "one row per sample",
            "Wrap it",
        ),
        (
            lambda: layers.ModalityEncoders({"a": (Scaled(), 2)}, 4, 1)({"a": Z(3, 2)}),
            "encoder of 'a' returned NaN",
            "for absent rows too",
            "Add an eps",
        ),
        (lambda: layers.ModalityEncoders({}, 4, 1), "is empty", "at least one", "Name what"),
        (
            lambda: layers.ModalityEncoders({"a": nn.Linear(1, 1)}, 4, 1),
            r"'a'\] is Linear",
            "or a pair",
            "one of the two",
        ),
    ],
    "layers.memory": [
        (lambda: layers.MemoryBank(2, 4, 3, 9), "=9 with num_slots=4", "between 1 and", "Lower"),
        (
            lambda: layers.MemoryBank(2, 4, 3, 2, temperature=-1),
            "temperature=-1",
            "divides",
            "above 0",
        ),
        (lambda: layers.MemoryBank(2, 4, 3, 2, backend="x"), "'x'", "one of 'auto'", "Use 'auto'"),
        (lambda: layers.MemoryBank(2, 4, 3, 2, sync="all"), "sync='all'", "shared by", "Choose"),
        (lambda: layers.PrototypeMemory(2, 0, 3), "num_slots=0", "at least one", "Use 1"),
        (
            lambda: layers.PrototypeMemory(2, 4, 3, temperature=0),
            "temperature=0",
            "divides",
            "above 0",
        ),
        (lambda: bank.read(Z(1, 2, 4)), r"query is \(1, 2, 4\)", "D=3", "Reshape it"),
        (
            lambda: bank.read(Z(1, 2, 3), yes(1, 1)),
            r"present is \(1, 1\)",
            r"= \(1, 2\)",
            "look up everything",
        ),
        (lambda: bank.read(Z(1, 2, 3), None, ids(2)), r"sample_ids is \(2,\)", "int64", "Number"),
        (lambda: bank.write(Z(1, 2, 3), yes(1, 1)), r"present \(1, 1\)", "one vector", "Pool"),
        (lambda: bank.write(Z(1, 3, 3), yes(1, 3)), r"vectors is \(1, 3, 3\)", "M=2", "rebuild"),
        (
            lambda: bank.write(Z(1, 2, 3), yes(1, 2), Z(1)),
            "sample_ids is .*float32",
            "int64",
            "Number the samples",
        ),
        (
            lambda: bank.write(Z(1, 2, 3), yes(1, 2), ids(1), Z(1, 2)),
            r"labels is \(1, 2\) for 1",
            "keeps num_labels=1",
            "num_labels=Y",
        ),
        (lambda: bank.write(Z(1, 2, 3), yes(1, 2), ids(1) - 7), "-7", "from 0", "or pass None"),
        (
            lambda: bank.write(Z(1, 2, 3) + NAN, yes(1, 2)),
            r"vectors\[0, 0\]",
            "is finite",
            "Mark it absent",
        ),
    ],
    "losses": [
        (
            lambda: losses.reconstruction_loss(Z(1, 2, 1, 4), Z(1, 2, 1, 5), yes(1, 2)),
            r"tokens \(1, 2, 1, 5\)",
            r"\(B, M, L, D\) twice",
            "Reshape",
        ),
        (
            lambda: losses.alignment_loss(Z(2, 1, 1, 3), Z(1, 1, 3)),
            r"\(2, 1, 1, 3\).*\(1, 1, 3\)",
            r"\(B, C, D\)",
            "Reshape",
        ),
        (
            lambda: losses.class_contrastive_loss(Z(2, 1, 3), ids(2), temperature=0),
            "temperature=0",
            "divides",
            "above 0",
        ),
        (
            lambda: losses.class_contrastive_loss(Z(2, 1, 3), ids(3)),
            r"labels \(3,\)",
            r"\(B, M, D\)",
            "Pool tokens",
        ),
        (
            lambda: losses.class_contrastive_loss(Z(2, 1, 3), ids(2, 1) + 5),
            r"labels \(2, 1\) hold 5",
            "multi-hot",
            r"squeeze\(1\)",
        ),
        (
            lambda: losses.evidence_loss(Z(2, 4), ids(2), yes(2, 4), "multiclass"),
            r"scores is \(2, 4\)",
            r"\(B, M, Y\)",
            "Stack them",
        ),
        (
            lambda: losses.evidence_loss(Z(2, 3, 4), ids(2) + 4, yes(2, 3), "multiclass"),
            r"labels\[0\] is 4",
            "0 to 3",
            "Correct it",
        ),
        (
            lambda: losses.evidence_loss(Z(2, 3, 4), ids(1), yes(2, 3), "multiclass"),
            r"labels is \(1,\)",
            r"\(2,\)",
            "Reshape",
        ),
        (lambda: losses.task_loss(Z(2), Z(2), "binary"), r"logits is \(2,\)", "Y = 1", "unsqu"),
        (lambda: losses.task_loss(Z(2, 1), Z(2) + 5, "binary"), "is 5.0", "0 or 1", "Correct"),
        (lambda: losses.task_loss(Z(2, 3), ids(2) + 3), r"labels\[0\] is 3", "0 to 2", "Correct"),
        (lambda: losses.task_loss(Z(2, 3), Z(2)), "float32", "whole", r"\.long\(\)"),
        (
            lambda: losses.task_loss(Z(2, 3), ids(2, 3), "regression"),
            "int64",
            "floating",
            r"\.float\(\)",
        ),
        (lambda: losses.task_loss(Z(2, 3), ids(2), "class"), "'class'", "one of", "Choose one"),
        (lambda: losses.task_loss(Z(2, 3), ids(3)), r"labels is \(3,\)", r"\(2,\)", "Reshape"),
    ],
    "CMML": [
        (
            lambda: CMML({"a": 2}, num_classes=2, crta="none"),
            "crta='none'",
            "None to leave",
            "Pass",
        ),
        (
            lambda: CMML({"a": 2}, num_classes=2, memory=None)({"a": Z(1, 2)}, sample_ids=ids(2)),
            r"sample_ids is \(2,\)",
            r"\(B,\) = \(1,\)",
            "Number the samples",
        ),
        (
            lambda: CMML({"a": 2}, num_classes=2)({"a": Z(1, 2)}, labels=[0]),
            "labels is a list",
            "is a tensor",
            "as_tensor",
        ),
        (lambda: CMML({"a": 2}, num_classes=2, target="x"), "target='x'", "one of", "Choose one"),
        (lambda: CMML({"a": 2}, num_classes=1), "num_classes=1", "at least two", "'binary'"),
        (
            lambda: CMML({"a": 2}, num_classes=2, target="binary"),
            "num_classes=2 with target='binary'",
            "one logit",
            "num_classes=1",
        ),
        (
            lambda: CMML(
                {"a": 2}, num_classes=2, evidence=layers.ModalityEvidence(1, 4, 2, "multilabel")
            ),
            "target='multilabel' with target='multiclass'",
            "classify alike",
            "one target",
        ),
        (
            lambda: CMML(
                {"a": 2}, num_classes=2, evidence=layers.ModalityEvidence(1, 4, 3, "multiclass")
            ),
            "num_classes=3 with num_classes=2",
            "classify alike",
            "one num_classes",
        ),
        (lambda: model("multiclass", Z(2)), "float32", "whole numbers", "Convert them"),
        (lambda: model("regression", ids(2, 2)), "int64", "floating", "Convert them"),
        (
            lambda: model("multiclass", torch.tensor([0, -1])),
            r"labels\[1\] is -1",
            "0 to 1, and a missing one is -100",
            "Correct it",
        ),
        (lambda: model("multiclass", torch.tensor([2, 0])), r"labels\[0\] is 2", "0 to 1", "Corr"),
        (lambda: model("binary", torch.tensor([0.0, 0.5])), r"\[1\] is 0.5", "NaN", "Correct it"),
        (lambda: model("multilabel", Z(2, 2) - 1), r"\[0, 0\] is -1", "0 or 1", "Correct it"),
        (lambda: model("regression", Z(2, 2) + torch.inf), "is inf", "finite", "Correct it"),
    ],
    "baselines": [
        (
            lambda: baselines.ZeroFill({"a": 2}, num_classes=2)({"a": Z(1, 2)}, sample_ids=ids(2)),
            r"sample_ids is \(2,\)",
            r"\(B,\) = \(1,\)",
            "Number the samples",
        ),
        (
            lambda: baselines.ZeroFill({"a": 2}, num_classes=2)({"a": Z(1, 2)}, labels=[0]),
            "labels is a list",
            "is a tensor",
            "as_tensor",
        ),
        (
            lambda: baselines.LateFusion({"a": 2}, num_classes=2)({"a": Z(1, 2)}, labels=ids(2)),
            r"labels is \(2,\) with logits \(1, 2\)",
            r"labels are \(1,\)",
            "Reshape",
        ),
        (
            lambda: baselines.ModalityDropout({"a": 2}, num_classes=2, modality_dropout=1.0),
            "modality_dropout=1.0",
            "below 1",
            "Use 0 <=",
        ),
        (
            lambda: baselines.MaskedTransformer({"a": 2}, num_classes=2, num_blocks=0),
            "num_blocks=0",
            "at least one",
            "Use 1",
        ),
        (
            lambda: baselines.CascadeAutoencoder({"a": 2}, num_classes=2, num_blocks=0),
            "num_blocks=0",
            "at least one",
            "Use 1",
        ),
        (
            lambda: baselines.ExpertBank({"a": 2}, num_classes=2, num_experts=2, num_active=3),
            "num_active=3 with num_experts=2",
            "1 to num_experts",
            "Lower",
        ),
        (
            lambda: baselines.RetrieveAndFill({"a": 2}, num_classes=2, num_slots=0),
            "num_neighbours=1 with num_slots=0",
            "between 1",
            "raise num_slots",
        ),
    ],
}
