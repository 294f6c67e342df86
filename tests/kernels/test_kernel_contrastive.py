import pytest
import torch
from kernels.parity import check_contrastive

from mmfusion import functional, losses

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("interpreter")]


@pytest.mark.parametrize(
    ("batch", "modalities", "width", "classes"),
    [(1, 1, 1, 1), (2, 1, 3, 2), (9, 3, 40, 3), (50, 3, 65, 4), (33, 4, 130, 2)],
)
def test_parity(batch, modalities, width, classes):
    check_contrastive("cpu", batch, modalities, width, classes)
    check_contrastive("cpu", batch, modalities, width, classes, absent=False, temperature=0.5)


def test_every_tile_family(monkeypatch):
    from mmfusion.kernels import contrastive
    from mmfusion.kernels.tiles import Tile

    for rows, columns, out in ((16, 16, 16), (32, 64, 32), (64, 32, 64)):
        cut = {"BLOCK_R": rows, "BLOCK_C": columns, "BLOCK_D": 16}
        monkeypatch.setattr(
            contrastive,
            "pick",
            lambda op, *_, cut=cut, out=out, **__: Tile(
                cut | ({"BLOCK_O": out} if op.endswith("bwd") else {}), 4, 1
            ),
        )
        check_contrastive("cpu", 20, 3, 40, 3)


def test_no_positive_pair_gives_exactly_zero():
    embeddings = torch.randn(3, 1, 8, requires_grad=True)
    loss = losses.class_contrastive_loss(embeddings, torch.arange(3), backend="triton")
    assert loss.item() == 0
    assert bool((torch.autograd.grad(loss, embeddings)[0] == 0).all())


def test_anchors_that_start_elsewhere():
    columns = torch.nn.functional.normalize(torch.randn(10, 8), dim=-1).requires_grad_()
    labels, yes = torch.arange(10) % 3, torch.ones(10, dtype=torch.bool)
    part = slice(4, 9)
    results = []
    for backend in ("torch", "triton"):
        loss, number = functional.class_contrastive(
            columns[part], columns, labels[part], labels, yes[part], yes, start=4, backend=backend
        )
        results.append((loss, number, torch.autograd.grad(loss.sum(), columns)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_count_reaches_no_gradient():
    leaves = [torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)]
    used, real = torch.tensor([True, True, False]), torch.tensor([True, True, False, False])
    labels = torch.zeros(4, dtype=torch.int64)
    rows, columns = (
        torch.where(counts.unsqueeze(1), x, torch.nan)
        for x, counts in zip(leaves, (used, real), strict=True)
    )
    results = []
    for backend in ("torch", "triton"):
        arguments = (rows, columns, labels[:3], labels, used, real)
        loss, _ = functional.class_contrastive(*arguments, backend=backend)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves, retain_graph=True)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_float_labels():
    embeddings, labels = torch.randn(6, 2, 8), torch.tensor([0.0, -0.0, 1.0, 1.0, torch.nan, 0.5])
    one, other = (
        losses.class_contrastive_loss(embeddings, labels, backend=backend)
        for backend in ("torch", "triton")
    )
    torch.testing.assert_close(one, other)
