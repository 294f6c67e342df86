import pytest
import torch

from mmfusion.evaluation.plan import KINDS, cannot, plan, subset_note

NAMES = ("clinic", "derm", "meta")
CAUSE = torch.arange(400) % 5


def planned(*kinds, rates=(0.0, 0.3, 0.6), names=NAMES, cause=CAUSE, seed=0):
    return list(plan(kinds, rates, seed, names, cause, None))


def test_every_subset_once_the_small_ones_first():
    found = planned("subset")
    assert [condition.name for condition, _ in found] == [
        "clinic", "derm", "meta", "clinic + derm", "clinic + meta", "derm + meta",
        "clinic + derm + meta",
    ]  # fmt: skip
    for condition, patterns in found:
        assert (patterns.present == torch.tensor(condition.pattern)).all()
        assert patterns.present.shape == (400, 3)
    assert len({patterns.hash for _, patterns in found}) == 7


@pytest.mark.parametrize(("count", "subsets"), [(1, 1), (7, 127), (8, 17), (20, 41)])
def test_of_very_many_subsets_the_plain_ones(count, subsets):
    names = [f"m{place}" for place in range(count)]
    found = planned("subset", names=names, cause=torch.zeros(2))
    sizes = [sum(condition.pattern) for condition, _ in found]
    assert len(found) == len({condition.pattern for condition, _ in found}) == subsets
    if count >= 8:
        assert sizes == [1] * count + [count - 1] * count + [count]
        assert subset_note(["subset"], count)[0].startswith(f"of {2**count - 1} subsets {subsets}")
        assert subset_note(["slot_rate"], count) == []
    else:
        assert subset_note(["subset"], count) == []


def test_each_modality_is_removed():
    found = planned("always_missing")
    assert [condition.name for condition, _ in found] == [f"without {name}" for name in NAMES]
    assert torch.equal(
        torch.stack([p.present[0] for _, p in found]), ~torch.eye(3, dtype=torch.bool)
    )
    assert planned("always_missing", names=("clinic",)) == []


@pytest.mark.parametrize("kind", ["sample_rate", "slot_rate"])
def test_rates_are_what_their_name_says(kind):
    found = planned(kind)
    assert [condition.rate for condition, _ in found] == [0.0, 0.3, 0.6]
    for condition, patterns in found:
        assert patterns.realised()[kind] == pytest.approx(condition.rate, abs=0.002)
        assert condition.name == f"{kind.replace('_', ' ')} {condition.rate}"


def test_per_modality_rates():
    found = planned("per_modality")
    assert [condition.name for condition, _ in found] == ["rate 0.0", "rate 0.3", "rate 0.6"]
    assert found[0][1].present.all()
    expected = 0.6 - 0.6**3 / 3  # one modality returns where all would go
    assert found[2][1].realised()["slot_rate"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("cause", "group"),
    [(CAUSE, CAUSE % 2), (torch.randn(400), None)],
)
def test_not_at_random_hides_what_the_label_says(cause, group):
    group = (cause >= cause.sort().values[200]).long() if group is None else group
    found = planned("not_at_random", rates=(0.0, 0.5), cause=cause)
    assert [c.name for c, _ in found] == ["tied to label, rate 0.5", "reversed, rate 0.5"]
    for (_, patterns), half in zip(found, (0, 1), strict=True):
        for label in (0, 1):
            absent = (~patterns.present[group == label]).double().mean(0)
            hit = [place % 2 == (label ^ half) for place in range(3)]
            assert ((absent > 0.3) == torch.tensor(hit)).all()
            assert (absent[~torch.tensor(hit)] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind):
    one, same, other = (planned(kind, seed=seed) for seed in (0, 0, 1))
    assert [p.hash for _, p in one] == [p.hash for _, p in same]
    assert [p.hash for _, p in one] != [p.hash for _, p in other]
    assert [c for c, _ in one] == [c for c, _ in other]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_what_a_kind_cannot_have_is_left_out_with_a_reason(kind, names):
    rates = (0.0, 0.5, 0.6, 1.0)
    drawn = [c.rate for c, _ in planned(kind, rates=rates, names=names)]
    if kind in ("per_modality", "sample_rate", "slot_rate"):
        assert drawn == [rate for rate in rates if cannot(kind, rate, len(names)) is None]
        assert drawn[0] == 0
    left_out = {rate for rate in rates[1:] if cannot(kind, rate, len(names))}
    expected = {"per_modality": {1.0}, "slot_rate": {0.6, 1.0}}.get(kind, set())
    if kind not in ("subset", "always_missing"):
        assert left_out == ({0.5, 0.6, 1.0} if len(names) == 1 else expected)


@pytest.mark.parametrize(
    ("kinds", "rates", "words"),
    [
        (("subsets",), (0.5,), r"kinds=\('subsets',\): a kind is one of subset, alw.*Pass names"),
        ("subset", (0.5,), r"kinds='subset': a kind is one of.*in a list"),
        ((), (0.5,), r"kinds=\(\): a kind is one of.*Pass"),
        (("subset",), (0.5, 30), r"rates hold 30: a rate is a share.*Pass 0\.3 for 30 per cent"),
        (("subset",), (float("nan"),), r"rates hold nan: a rate is a share.*Pass 0\.3"),
    ],
)
def test_unknown_kinds_and_rates(kinds, rates, words):
    with pytest.raises(ValueError, match=words):
        list(plan(kinds, rates, 0, NAMES, CAUSE))
