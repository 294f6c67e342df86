import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.missingness import (
    PatternSet,
    all_patterns,
    curriculum,
    hide,
    not_at_random,
    per_modality,
    sample_rate,
    slot_rate,
)

NAN = float("nan")
few = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 40)
modalities = st.integers(2, 9)
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32)

DRAWS = {
    "sample_rate": lambda g: sample_rate(50, 3, 0.6, g),
    "slot_rate": lambda g: slot_rate(50, 3, 0.4, g),
    "per_modality": lambda g: per_modality(50, (0.2, 0.5, 0.9), g),
    "not_at_random": lambda g: not_at_random(torch.arange(50) % 2, [[0.1, 0.9], [0.9, 0.1]], g),
    "hide": lambda g: hide(torch.ones(50, 3, dtype=torch.bool), 0.5, g),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def absent_share(present, dim=None):
    return (~present).double().mean(dim)


def chi_square(counts):
    """Of counts that should be equal."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return float((counts - counts.mean()).square().sum() / counts.mean())


def codes(present):
    return (present.long() << torch.arange(present.shape[1])).sum(1)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_generator_decides_the_draw_and_spares_the_global_one(draw):
    before = torch.get_rng_state()
    first = draw(seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert first.dtype == torch.bool
    assert torch.equal(first, draw(seeded()))
    assert not torch.equal(first, draw(seeded(1)))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_without_a_generator_torch_decides(draw):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = draw(None), draw(None)
        torch.manual_seed(3)
        assert torch.equal(first, draw(None))
    assert not torch.equal(first, second)


@few
@given(sizes, modalities, shares, seeds)
def test_sample_rate_is_exact_and_keeps_one(batch_size, num_modalities, rate, seed):
    present = sample_rate(batch_size, num_modalities, rate, seeded(seed))
    assert present.shape == (batch_size, num_modalities)
    assert int((~present.all(1)).sum()) == round(rate * batch_size)
    assert present.any(1).all()


def test_sample_rate_draws_samples_and_patterns_uniformly():
    present = sample_rate(60_000, 3, 0.5, seeded())
    counts = torch.bincount(codes(present), minlength=8)
    assert counts[0] == 0
    assert counts[7] == 30_000
    assert chi_square(counts[1:7]) < 20  # 5 degrees of freedom: exceeded once in 800
    assert chi_square((~present.all(1)).view(10, -1).sum(1)) < 27


def test_sample_rate_takes_many_modalities():
    present = sample_rate(2000, 70, 1.0, seeded())
    assert absent_share(present) == pytest.approx(0.5, abs=0.006)


@few
@given(sizes, modalities, shares, seeds)
def test_slot_rate_is_exact_and_keeps_one(batch_size, num_modalities, share, seed):
    rate = share * (num_modalities - 1) / num_modalities
    present = slot_rate(batch_size, num_modalities, rate, seeded(seed))
    assert present.shape == (batch_size, num_modalities)
    assert int((~present).sum()) == round(rate * batch_size * num_modalities)
    assert present.any(1).all()


@pytest.mark.parametrize(
    ("num_modalities", "rate"), [(1, 0.0), (60, 0.0), (60, 59 / 60), (3, 2 / 3)]
)
def test_slot_rate_reaches_both_ends(num_modalities, rate):
    present = slot_rate(1000, num_modalities, rate, seeded())
    assert int((~present).sum()) == round(rate * 1000 * num_modalities)


def test_slot_rate_takes_every_arrangement_equally_often():
    generator, found = seeded(), {}
    for _ in range(900):
        key = tuple(slot_rate(2, 3, 1 / 3, generator).flatten().tolist())
        found[key] = found.get(key, 0) + 1
    assert len(found) == 15  # 2 of 6 slots
    assert chi_square(list(found.values())) < 36  # 14 degrees of freedom: once in 1000


def test_slot_rate_loses_as_many_per_sample_as_uniform_arrangements_do():
    """Keeping one slot first and dropping among the rest would give .0625, .375, .5625."""
    present = slot_rate(200_000, 3, 0.5, seeded())
    golden = (1 + math.sqrt(5)) / 2  # the tilt at which 1.5 of 3 are expected to go
    weights = torch.tensor([1, 3 * golden, 3 * golden**2])
    shares = torch.bincount((~present).sum(1), minlength=3) / 200_000
    torch.testing.assert_close(shares, weights / weights.sum(), atol=0.003, rtol=0)
    assert chi_square((~present).sum(0)) < 14


FIELD_3 = {2: (0.255, 0.375, 0.455), 3: (0.291, 0.458, 0.586)}


@pytest.mark.parametrize("num_modalities", FIELD_3)
@pytest.mark.parametrize("index", range(3))
def test_keeping_one_lowers_the_realised_slot_rate(num_modalities, index):
    rate, expected = (0.3, 0.5, 0.7)[index], FIELD_3[num_modalities][index]
    complete = torch.ones(200_000, num_modalities, dtype=torch.bool)
    dropped = per_modality(len(complete), [rate] * num_modalities, seeded())
    assert absent_share(dropped) == pytest.approx(expected, abs=0.003)
    assert absent_share(hide(complete, rate, seeded(1))) == pytest.approx(expected, abs=0.003)


def test_per_modality_realises_the_documented_shares():
    rates = torch.tensor([0.9, 0.5, 0.6])
    present = per_modality(200_000, rates, seeded())
    expected = rates - rates.prod() * (1 - rates) / (1 - rates).sum()
    torch.testing.assert_close(absent_share(present, 0).float(), expected, atol=0.004, rtol=0)
    assert present.any(1).all()


def test_per_modality_drops_independently():
    absent = ~per_modality(200_000, (0.4, 0.3, 0.0), seeded())
    assert (absent[:, 0] & absent[:, 1]).double().mean() == pytest.approx(0.12, abs=0.003)


@few
@given(sizes, st.lists(shares, min_size=2, max_size=6), seeds)
def test_per_modality_keeps_one_and_honours_zero_and_one(batch_size, rates, seed):
    rates[0] = 0.99 * rates[0]
    present = per_modality(batch_size, rates, seeded(seed))
    assert present.any(1).all()
    for column, rate in enumerate(rates):
        assert rate != 0 or present[:, column].all()
        assert rate != 1 or not present[:, column].any()


def test_not_at_random_follows_the_class_and_can_be_reversed():
    labels = torch.arange(90_000) % 3
    rates = torch.tensor([[0.1, 0.5], [0.4, 0.4], [0.8, 0.0]])
    realised = rates - rates.prod(1, keepdim=True) * (1 - rates) / (1 - rates).sum(1, keepdim=True)
    for table, expected in ((rates, realised), (rates.flip(0), realised.flip(0))):
        present = not_at_random(labels, table, seeded())
        assert present.any(1).all()
        found = torch.stack([absent_share(present[labels == row], 0) for row in range(3)])
        torch.testing.assert_close(found.float(), expected, atol=0.012, rtol=0)


def test_not_at_random_splits_a_feature_at_its_quantiles():
    feature = torch.randn(30, generator=seeded())
    present = not_at_random(feature, [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    lowest, middle, highest = feature.argsort().view(3, 10)
    for column, rows in enumerate((lowest, middle, highest)):
        assert present[rows].sum(0).tolist() == [10 * (column == m) for m in range(3)]


def test_not_at_random_gives_equal_values_one_row():
    feature = torch.tensor([2.0, 1.0, 1.0, 1.0])
    assert not_at_random(feature, [[0, 1], [1, 0]]).int().tolist() == [[0, 1], *[[1, 0]] * 3]


def test_not_at_random_takes_a_boolean_label():
    labels = torch.tensor([True, False])
    assert not_at_random(labels, [[0, 1], [1, 0]]).int().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("num_modalities", [1, 2, 5, 16])
def test_all_patterns_count_upwards(num_modalities):
    patterns = all_patterns(num_modalities)
    digits = 2 ** torch.arange(num_modalities - 1, -1, -1)
    assert patterns.dtype == torch.bool
    assert torch.equal((patterns * digits).sum(1), torch.arange(1, 2**num_modalities))


@few
@given(sizes, modalities, shares, shares, seeds)
def test_hide_keeps_a_subset_with_one_left(batch_size, num_modalities, share, rate, seed):
    generator = seeded(seed)
    present = torch.rand(batch_size, num_modalities, generator=generator) < share
    before = present.clone()
    visible = hide(present, rate, generator)
    assert torch.equal(present, before)
    assert not (visible & ~present).any()
    assert torch.equal(visible.any(1), present.any(1))
    assert rate > 0 or torch.equal(visible, present)
    assert rate < 1 or torch.equal(visible.sum(1), present.any(1).long())


def test_hide_is_independent_per_slot_and_keeps_the_last_uniformly():
    present = torch.tensor([True, True, False, True]).expand(120_000, 4)
    counts = torch.bincount(codes(hide(present, 0.5, seeded())), minlength=16)
    single, several = counts[[1, 2, 8]], counts[[3, 9, 10, 11]]
    assert single.sum() + several.sum() == 120_000
    assert chi_square(single) < 14  # each 1/8 + 1/24
    assert chi_square(several) < 17  # each 1/8
    assert several.sum() / 120_000 == pytest.approx(0.5, abs=0.006)


def test_hide_takes_an_empty_batch():
    assert hide(torch.ones(0, 3, dtype=torch.bool), 0.5).shape == (0, 3)


@pytest.mark.slow
def test_hide_compiles_to_one_graph_for_all_patterns_and_rates():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(hide, backend=counter, fullgraph=True)
    rates = [step / 10 for step in range(11)]
    with torch.random.fork_rng():
        for seed, rate in enumerate(rates):
            present = torch.rand(8, 3, generator=seeded(seed)) < 0.5
            torch.manual_seed(seed)
            visible = compiled(present, rate)
            torch.manual_seed(seed)
            assert torch.equal(visible, hide(present, rate))
    assert counter.frame_count <= 2  # torch specialises the first rate, then takes any


def test_curriculum_is_linear_and_then_holds():
    rates = [curriculum(step, 10, start=0.2, end=0.7) for step in range(15)]
    assert rates == pytest.approx([0.2 + 0.05 * min(step, 10) for step in range(15)])
    assert rates[-1] == 0.7
    assert curriculum(3, 4, start=0.8, end=0.0) == pytest.approx(0.2)


LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
SETS = {
    "sample_rate": (0.5, None),
    "slot_rate": (0.3, None),
    "per_modality": ((0.1, 0.2, 0.3), None),
    "not_at_random": (((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)), LABELS),
}


def drawn(kind="slot_rate", seed=0, split="test"):
    rate, cause = SETS[kind]
    names = ("clinic", "derm", "meta")
    return PatternSet.draw(kind, 8, names, rate, seed=seed, split=split, cause=cause)


def by_hand():
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    return PatternSet(present, ["derm", "süß"], "slot_rate", 0.25, seed=7, split="valid")


@pytest.mark.parametrize("kind", SETS)
def test_a_set_depends_on_seed_and_split_alone(kind):
    before = torch.get_rng_state()
    first = drawn(kind)
    assert torch.equal(before, torch.get_rng_state())
    assert first.hash == drawn(kind).hash
    changed = [drawn(kind, seed=1), drawn(kind, seed=-1), drawn(kind, split="train")]
    assert len({str(other[:].tolist()) for other in (first, *changed)}) == 4
    assert len({other.hash for other in (first, *changed)}) == 4


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("kind", SETS)
def test_a_set_survives_its_file(kind, suffix, tmp_path):
    patterns = drawn(kind)
    patterns.save(tmp_path / f"patterns{suffix}")
    loaded = PatternSet.load(str(tmp_path / f"patterns{suffix}"))
    assert torch.equal(loaded.present, patterns.present)
    assert loaded.names == patterns.names
    assert (loaded.kind, loaded.rate) == (kind, SETS[kind][0])
    assert (loaded.seed, loaded.split, loaded.hash) == (0, "test", patterns.hash)
    assert [path.name for path in tmp_path.iterdir()] == [f"patterns{suffix}"]


def test_the_hash_is_pinned():
    assert by_hand().hash == "8fd36ced0512e103965ab941103a84a80a157de066573fc76f7cf4ae16c2f10f"


def test_the_hash_covers_everything_and_ignores_types():
    plain = by_hand()
    fields = {
        "present": ~plain.present,
        "names": ("süß", "derm"),
        "kind": "sample_rate",
        "rate": 0.5,
        "seed": 8,
        "split": "test",
    }
    held = {name: getattr(plain, name) for name in fields}
    altered = {PatternSet(**{**held, name: value}).hash for name, value in fields.items()}
    assert len(altered | {plain.hash}) == 7
    same = {"names": list(plain.names), "rate": np.float64(0.25), "seed": np.int64(7)}
    assert PatternSet(**{**held, **same}).hash == plain.hash
    rates = {**held, "kind": "per_modality"}
    as_tuple = PatternSet(**{**rates, "rate": (0.5, 0.25)})
    assert PatternSet(**{**rates, "rate": torch.tensor([0.5, 0.25])}).hash == as_tuple.hash


def test_a_set_reports_nominal_and_realised_rates():
    patterns = by_hand()
    assert patterns.realised() == {"sample_rate": 0.5, "slot_rate": 0.25}
    assert str(patterns).splitlines() == [
        "PatternSet valid: 4 samples x 2 modalities (derm, süß), seed 7",
        "nominal slot_rate 0.25; realised sample_rate 0.5000, slot_rate 0.2500",
        f"sha256 {patterns.hash}",
    ]


def test_a_set_is_indexed_like_its_rows_and_owns_them():
    present = torch.tensor([[True, False], [True, True]])
    patterns = PatternSet(present, ("a", "b"), "slot_rate", 0.25, seed=0, split="test")
    present.fill_(False)
    assert len(patterns) == 2
    assert patterns[0].tolist() == [True, False]
    assert patterns[torch.tensor([1, 0])].tolist() == [[True, True], [True, False]]
    assert [row.tolist() for row in patterns] == patterns[:].tolist()
    with pytest.raises(AttributeError):
        patterns.seed = 1


@pytest.mark.parametrize("key", ["names", "kind", "rate", "seed", "split", "rows", "hash"])
def test_an_altered_json_is_refused(key, tmp_path):
    path = tmp_path / "patterns.json"
    by_hand().save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    others = {"names": ["derm", "b"], "kind": "x", "rate": 0.5, "seed": 8, "split": "test"}
    others |= {"rows": content["rows"].replace("01", "11"), "hash": "0" * 64}
    for damaged in (content | {key: others[key]}, {k: v for k, v in content.items() if k != key}):
        path.write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"patterns\.json: .* do not match .* Restore the file"
        ):
            PatternSet.load(path)


def test_an_altered_npz_is_refused(tmp_path):
    path = tmp_path / "patterns.npz"
    by_hand().save(path)
    with np.load(path) as arrays:
        np.savez(path, present=~arrays["present"], about=arrays["about"])
    with pytest.raises(ValueError, match="do not match their hash"):
        PatternSet.load(path)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_damaged_file_is_never_read_as_something_else(suffix, tmp_path):
    path = tmp_path / f"patterns{suffix}"
    by_hand().save(path)
    written = path.read_bytes()
    rng = np.random.default_rng(0)
    damages = [written[:cut] for cut in (0, 1, len(written) // 2)]
    for place in rng.integers(len(written), size=100):
        damages.append(written[:place] + bytes([written[place] ^ 4]) + written[place + 1 :])
    for damage in damages:
        path.write_bytes(damage)
        try:
            assert PatternSet.load(path).hash == by_hand().hash
        except ValueError as error:
            assert "do not match their hash" in str(error)  # noqa: PT017, either end is right
    with pytest.raises(FileNotFoundError):
        PatternSet.load(tmp_path / f"none{suffix}")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "patterns.json"
    by_hand().save(path)

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            drawn().save(path)
    assert PatternSet.load(path).hash == by_hand().hash
    assert list(tmp_path.iterdir()) == [path]


TRUE = torch.ones(2, 2, dtype=torch.bool)
RATES = [[0.1, 0.2], [0.2, 0.1]]


def holding(present=TRUE, names=("a", "b")):
    return PatternSet(present, names, "slot_rate", 0.0, seed=0, split="test")


def drawing(kind, num_samples, **options):
    return PatternSet.draw(kind, num_samples, ("a", "b"), 0.1, seed=0, split="test", **options)


@pytest.mark.parametrize(
    ("call", "value", "rule", "cure"),
    [
        (lambda: sample_rate(0, 2, 0.1), "batch_size=0", "at least one", "batch_size=1"),
        (lambda: slot_rate(2, 0, 0.1), "num_modalities=0", "at least one", "num_modalities=1"),
        (lambda: per_modality(0, [0.1, 0.1]), "batch_size=0", "at least one", "batch_size=1"),
        (lambda: sample_rate(2, 2, 1.1), "rate=1.1", "from 0 to 1", "rate=0.3"),
        (lambda: slot_rate(2, 2, -0.1), "rate=-0.1", "from 0 to 1", "rate=0.3"),
        (lambda: hide(TRUE, NAN), "rate=nan", "from 0 to 1", "rate=0.3"),
        (lambda: per_modality(2, [0.5, NAN]), "rates[1]=nan", "from 0 to 1", "rates[1]=0.3"),
        (lambda: sample_rate(2, 1, 0.1), "rate=0.1 with num_mod", "keeps one", "Pass rate=0"),
        (lambda: slot_rate(2, 3, 0.7), "rate=0.7 with num_mod", "keeps one", "at most 2/3"),
        (lambda: slot_rate(2, 1, 0.1), "rate=0.1 with num_mod", "keeps one", "at most 0/1"),
        (lambda: per_modality(2, RATES), "shape (2, 2)", "one rate per modality", "shape (M)"),
        (
            lambda: not_at_random(LABELS, [[0, 0], [1.1, 0]]),
            "rates[1, 0]=1.1",
            "0 to 1",
            "[1, 0]=0.3",
        ),
        (lambda: per_modality(2, []), "shape (0,)", "one rate per modality", "shape (M)"),
        (lambda: per_modality(2, [1, 1]), "rates=(1.0, 1.0)", "keeps one", "Lower a rate"),
        (lambda: per_modality(2, [0.5]), "rates=(0.5,)", "keeps one", "Lower a rate"),
        (lambda: not_at_random(LABELS, [0.1, 0.2]), "shape (2,)", "one rate per", "(Y, M)"),
        (lambda: not_at_random(TRUE, RATES), "shape (2, 2)", "one number per", "shape (B,)"),
        (lambda: not_at_random(LABELS - 1, RATES), "cause[0]=-1", "numbers its row", "leave such"),
        (
            lambda: not_at_random(LABELS + 1, RATES),
            "cause[1]=2",
            "numbers its row",
            "row per class",
        ),
        (lambda: not_at_random(LABELS / 0, RATES), "cause[0]=nan", "be ranked", "leave such"),
        (lambda: all_patterns(0), "num_modalities=0", "1 to 16", "sample_rate or slot_rate"),
        (lambda: all_patterns(17), "num_modalities=17", "1 to 16", "sample_rate or slot_rate"),
        (lambda: hide(TRUE.int(), 0.1), "present is torch.int32", "it is bool", "present.bool()"),
        (lambda: hide(TRUE[0], 0.1), "of shape (2,)", "(B, M)", "column per modality"),
        (lambda: curriculum(-1, 5), "step=-1", "count from 0", "Pass step >= 0"),
        (lambda: curriculum(0, 0), "num_steps=0", "at least one", "num_steps >= 1"),
        (lambda: curriculum(0, 1, end=2), "end=2", "from 0 to 1", "end=0.3"),
        (lambda: holding(names=("a",)), "names=('a',)", "its own name", "one distinct name"),
        (
            lambda: holding(names=("a", "a")),
            "names=('a', 'a')",
            "its own name",
            "one distinct name",
        ),
        (lambda: holding(TRUE[:0]), "shape (0, 2)", "a row is a sample", "Pass some rows"),
        (lambda: holding(TRUE.float()), "torch.float32", "it is bool", "present.bool()"),
        (lambda: drawing("random", 2), "kind='random'", "draws nothing", "sample_rate, slot_rate"),
        (lambda: drawing("slot_rate", 8, cause=LABELS), "8 causes", "it alone", "None elsewhere"),
        (lambda: drawing("not_at_random", 8), "None causes", "one cause per", "Pass cause=labels"),
        (
            lambda: drawing("not_at_random", 2, cause=LABELS),
            "num_samples=2",
            "one cause per",
            "Pass",
        ),
        (lambda: holding().save("a.pt"), "path='a.pt'", "suffix is the format", ".json or .npz"),
        (lambda: PatternSet.load("a.pt"), "path='a.pt'", "suffix is the format", ".json or .npz"),
    ],
)
def test_errors_give_value_rule_and_cure(call, value, rule, cure):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the three parts are checked below
        call()
    message = str(caught.value)
    assert value in message
    assert rule in message
    assert cure in message
    assert message.index(value) < message.rindex(cure)
