import torch
import torch.nn.functional as F

from mmfusion.baselines import RetrieveAndFill

SIZES = {"a": 3, "b": 2, "c": 4}


def model(**options):
    return RetrieveAndFill(SIZES, num_classes=2, dim=8, num_tokens=2, **options)


def draw(rows):
    present = torch.rand(rows, 3) < 0.6
    present[0] = True
    return {name: torch.randn(rows, width) for name, width in SIZES.items()}, present


def test_the_nearest_sample_that_has_the_modality_is_found():
    filled = model()
    inputs, present = draw(20)
    memory = filled(inputs, present, sample_ids=torch.arange(20)).tokens  # training: remembered
    inputs, visible = draw(30)
    out = filled.eval()(inputs, visible)
    side_by_side = torch.where(visible[:, :, None, None], out.tokens, 0).flatten(1)
    score = F.cosine_similarity(side_by_side.unsqueeze(1), memory.flatten(1), dim=-1)  # (30, 20)
    for i, m in (~visible).nonzero().tolist():
        if not visible[i].any():
            assert out.completed[i].eq(0).all()
            assert out.neighbour_ids[i].eq(-1).all()
            continue
        best = torch.where(present[:, m], score[i], -torch.inf).argmax()
        assert out.neighbour_ids[i, m].eq(best).all()
        assert torch.equal(out.completed[i, m], memory[best, m])
    assert (~visible).any()
    assert torch.equal(out.completed[visible], out.tokens[visible])


def test_a_sample_does_not_find_itself():
    filled = model()
    inputs, present = draw(10)
    ids = torch.arange(10)
    filled(inputs, present | True, sample_ids=ids)
    visible = torch.tensor([[True, True, False]] * 10)
    found = filled.eval()(inputs, visible=visible, sample_ids=ids).neighbour_ids[:, 2, 0, 0]
    assert (found != ids).all()
    assert torch.equal(filled(inputs, visible=visible).neighbour_ids[:, 2, 0, 0], ids)


def test_it_reads_before_it_writes_and_writes_only_in_training_with_ids():
    filled = model()
    inputs, present = draw(10)
    filled(inputs, present)
    filled.eval()(inputs, present, sample_ids=torch.arange(10))
    assert filled.memory.held.eq(0).all()
    first = filled.train()(inputs, present, sample_ids=torch.arange(10))
    assert first.completed[~present].eq(0).all()
    assert filled.memory.held.item() == present.any(1).sum()
    assert torch.equal(filled.memory.labels[0, : filled.memory.held] == 1, present[present.any(1)])


def test_the_oldest_samples_leave():
    filled = model(num_slots=4)
    for start in (0, 3, 6):
        inputs, present = draw(3)
        filled(inputs, present | True, sample_ids=start + torch.arange(3))
    assert sorted(filled.memory.ids[0].tolist()) == [5, 6, 7, 8]
