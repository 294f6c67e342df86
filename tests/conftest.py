import os

import pytest
import torch

# Tensors here are tiny, and pytest-xdist has filled the cores already.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # must be set before any @triton.jit runs; importing torch does not import triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace["torch"] = torch


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh memory holds NaN (or 113), so that an element that nobody wrote is seen."""

    def poison(make):
        def build(*args, **kwargs):
            out = make(*args, **kwargs)
            with torch.no_grad():  # torch itself makes empty leaves that require grad
                return out.fill_(float("nan") if out.is_floating_point() else 113)

        return build

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
