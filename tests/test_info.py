import subprocess
import sys

import torch

from mmfusion import functional, info


def test_the_command_names_versions_device_and_backends():
    done = subprocess.run(
        [sys.executable, "-m", "mmfusion.info"], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    for word in ("mmfusion", "torch", "triton", "cuda", "retrieve", "presence_attention"):
        assert word in done.stdout


def test_every_fused_op_is_listed_with_a_reason():
    found = info.backends("cpu")
    assert {op.split(",")[0] for op in found} == set(functional._OPS)
    for choices in found.values():
        assert set(choices.values()) == {"torch (the tensors are on cpu)"}


def test_reasons_depend_on_the_type(monkeypatch):
    monkeypatch.setattr(functional, "_DEVICES", ("cpu",))
    found = info.backends("cpu")
    assert found["retrieve"] | {"float64": None} == {
        "float32": "triton",
        "float16": "triton",
        "bfloat16": "triton",
        "float64": None,
    }
    assert found["presence_attention"]["float64"] == "torch (float64)"
    assert "k=None" in found["retrieve, k=None"][str(torch.float16).removeprefix("torch.")]
