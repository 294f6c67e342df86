import os

import pytest
import torch


@pytest.fixture
def interpreter(monkeypatch, poisoned_empty):
    """The kernels on CPU tensors, in Triton's interpreter; ``tl.topk`` in one numpy call."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU the same checks run on it")
    tl = pytest.importorskip("triton.language")
    from kernels.fast_topk import fast_topk

    from mmfusion import functional

    monkeypatch.setattr(functional, "_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(tl, "topk", fast_topk)
