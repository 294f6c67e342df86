"""Diagnostics against scikit-learn, brute force, and cases whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import nn

from mmfusion import CMML, baselines
from mmfusion.evaluation.diagnostics import (
    alignment_gap,
    diagnose,
    memory_use,
    projection,
    synthesis,
)
from mmfusion.evaluation.forward import batches
from mmfusion.evaluation.probing import Observed, Probe, observe, probe
from mmfusion.layers import FusionOutput, MemoryBank

NAMES = ("a", "b", "c")


def draw(count, *, complete, first_id=0):
    """Three modalities of width four that share their class."""
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(5))
    inputs = {name: centres[labels, m] + torch.randn(count, 4) for m, name in enumerate(NAMES)}
    present = torch.ones(count, 3, dtype=torch.bool) if complete else torch.rand(count, 3) < 0.6
    present[:, 0] |= ~present.any(1)
    return {
        "inputs": inputs,
        "present": present,
        "labels": labels,
        "sample_ids": torch.arange(count) + first_id,
    }


class Guesser(nn.Module):
    """Tokens are the inputs, one each; every guess is what it is told, so the answer is known."""

    names = NAMES

    def __init__(self, guess, reference=None):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # gives it a device
        self.guess, self.reference = guess, reference

    def forward(self, inputs, present=None, visible=None, sample_ids=None):
        tokens = torch.stack([inputs[name] for name in NAMES], 1)[:, :, None]
        tokens = tokens * present[:, :, None, None]
        visible = present if visible is None else visible
        guess = self.guess(tokens)
        completed = torch.where(
            visible[:, :, None, None], tokens, tokens if guess is None else guess
        )
        empty = dict.fromkeys(FusionOutput._fields)
        return FusionOutput(
            **empty
            | {"tokens": tokens, "synthesised": guess, "completed": completed}
            | {"aligned": 2 * completed, "reference": self.reference}
            | {"present": present, "visible": visible}
        )


@pytest.fixture
def data():
    torch.manual_seed(0)
    return draw(60, complete=False), draw(30, complete=False, first_id=100)


def test_a_perfect_guess_scores_one_and_the_training_mean_zero():
    torch.manual_seed(0)
    train, test = draw(60, complete=True), draw(30, complete=True)
    perfect = Guesser(lambda tokens: tokens)
    known = observe(perfect, train)
    found = synthesis(probe(perfect, test), known)
    assert list(found) == list(NAMES)
    for part in found.values():
        assert part["cases"] == 30
        assert part["model"]["cosine"] == pytest.approx(1)
        assert part["model"]["r2"] == pytest.approx(1)
    flat = Guesser(lambda tokens: known.tokens.mean(0).expand_as(tokens))
    for part in synthesis(probe(flat, test), known).values():
        assert part["model"]["r2"] == pytest.approx(0, abs=1e-6)


def test_the_references_are_those_of_scikit_learn_on_complete_data():
    torch.manual_seed(0)
    train, test = draw(60, complete=True), draw(30, complete=True)
    model = Guesser(torch.zeros_like)
    found = synthesis(probe(model, test), observe(model, train))
    for m, name in enumerate(NAMES):
        others = [other for other in NAMES if other != name]
        # a cosine over two modalities together
        keys, queries = (
            torch.cat([d["inputs"][o] for o in others], 1).numpy() for d in (train, test)
        )
        index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(keys)
        pool, truth = train["inputs"][name].double(), test["inputs"][name].double()
        classes = torch.stack([pool[train["labels"] == c].mean(0) for c in range(3)])
        for key, guess in {
            "nearest_neighbour": pool[index.kneighbors(queries)[1][:, 0]],
            "class_mean": classes[test["labels"]],
        }.items():
            wanted = 1 - (truth - guess).square().sum() / (truth - pool.mean(0)).square().sum()
            assert found[name][key]["r2"] == pytest.approx(float(wanted), abs=1e-6), (m, key)
            cosine = torch.cosine_similarity(guess, truth).mean()
            assert found[name][key]["cosine"] == pytest.approx(float(cosine), abs=1e-6)


def test_the_nearest_neighbour_is_sought_by_what_both_have(data):
    train, test = data
    model = Guesser(torch.zeros_like)
    known, found = observe(model, train), probe(model, test)
    result = synthesis(found, known)
    for m, name in enumerate(NAMES):
        guesses = []
        rows = found.hidden[:, m].nonzero()[:, 0].tolist()
        for row in rows:
            best, where = -math.inf, None
            for other in known.present[:, m].nonzero()[:, 0].tolist():
                shared = test["present"][row] & train["present"][other]
                shared[m] = False
                if shared.any():
                    pair = [
                        x[i, shared].flatten()
                        for x, i in ((found.observed.tokens, row), (known.tokens, other))
                    ]
                    near = float(torch.cosine_similarity(*pair, dim=0))
                    if near > best:
                        best, where = near, other
            guesses.append(train["inputs"][name][where])
        cosine = torch.cosine_similarity(torch.stack(guesses), test["inputs"][name][rows]).mean()
        assert result[name]["nearest_neighbour"]["cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_only_what_was_present_beside_another_counts(data):
    _, test = data
    found = probe(Guesser(torch.zeros_like), test)
    alone = test["present"].sum(1) == 1
    assert alone.any()
    assert torch.equal(found.hidden, test["present"] & ~alone[:, None])


def test_the_mean_stands_in_for_a_class_that_training_lacks_and_for_an_unknown_label():
    torch.manual_seed(0)
    train, test = draw(30, complete=True), draw(9, complete=True)
    train["labels"] = train["labels"] % 2
    test["labels"][0] = -100
    test = {
        key: {n: v[[0, 2]] for n, v in value.items()} if key == "inputs" else value[[0, 2]]
        for key, value in test.items()
    }  # an unknown one, and class 2
    model = Guesser(torch.zeros_like)
    found = synthesis(probe(model, test), observe(model, train))
    assert found["a"]["class_mean"]["r2"] == pytest.approx(0, abs=1e-6)


def test_a_regression_has_no_class_mean(data):
    train, test = (one | {"labels": one["labels"].float()} for one in data)
    model = Guesser(torch.zeros_like)
    assert synthesis(probe(model, test), observe(model, train))["b"]["class_mean"] is None


def test_points_of_the_projection_are_those_of_pca_and_belong_together(data):
    _, test = data
    found = probe(Guesser(lambda tokens: tokens + 1), test)
    points = projection(found, num_points=7)["b"]
    rows = found.hidden[:, 1]
    truth = test["inputs"]["b"][rows].double().numpy()
    axes = PCA(2).fit(truth)
    taken = np.linspace(0, len(truth) - 1, 7).astype(int)
    assert np.allclose(np.abs(points["observed"]), np.abs(axes.transform(truth[taken])), atol=1e-3)
    shift = np.array(points["synthesised"]) - np.array(points["observed"])
    assert np.allclose(np.abs(shift), np.abs(axes.components_.sum(1)), atol=1e-3)
    assert points["explained"] == pytest.approx(axes.explained_variance_ratio_, abs=1e-3)


def read_by(hidden, ids, weights, labels):
    """A probe of one modality."""
    count = len(labels)
    tokens = torch.zeros(count, 1, 1, 2)
    observed = Observed(("a",), tokens, torch.ones(count, 1, dtype=torch.bool), None, labels)
    shape = (count, 1, 1, -1)
    return Probe(observed, hidden, tokens, None, weights.reshape(shape), ids.reshape(shape))


def test_the_use_of_a_memory_is_counted():
    bank = MemoryBank(1, num_slots=8, dim=2, num_neighbours=2)
    everywhere = torch.ones(4, 1, dtype=torch.bool)
    labels = torch.tensor([0, 1, 1, -100])
    bank.write(torch.randn(4, 1, 2), everywhere, torch.tensor([10, 13, 12, 11]), labels)
    found = read_by(
        torch.tensor([[True], [True], [True], [False]]),
        torch.tensor([[10, 13], [13, -1], [-1, -1], [12, 12]]),
        torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]),
        torch.tensor([0, 1, 1, 0]),
    )
    assert memory_use(bank, found)["a"] == {
        "held": 4,
        "used": 2 / 4,  # 10 and 13; 12 was read for nothing that was hidden
        "hit_rate": pytest.approx(2 / 3),
        "sources": 2,
        "same_label": pytest.approx(2 / 3),  # 0-0 and 1-1 of 0-0, 0-1, 1-1
    }


def test_the_gap_is_in_units_of_the_spread(data):
    _, test = data
    found = probe(Guesser(lambda tokens: tokens + 3, reference=torch.zeros(())), test)
    for m, name in enumerate(NAMES):
        x = test["inputs"][name][found.hidden[:, m]]
        wanted = 6 / float(x.var(0, correction=0).sum().sqrt())  # a shift by 3 in each of 4
        gap = alignment_gap(found)[name]
        assert gap["before"] == pytest.approx(wanted, abs=1e-4)
        assert gap["after"] == pytest.approx(wanted, abs=1e-4)  # twice both


@pytest.mark.parametrize(
    "left_out", [(), ("memory",), ("alignment",), ("crta",), ("crta", "memory", "alignment")]
)
def test_a_model_is_diagnosed_by_what_it_has(data, left_out):
    torch.manual_seed(1)
    model = CMML(dict.fromkeys(NAMES, 4), num_classes=3, dim=8, **dict.fromkeys(left_out))
    train, test = data
    model(train["inputs"], train["present"], sample_ids=train["sample_ids"], labels=train["labels"])
    found = diagnose(model, train, test, batch_size=7)
    wanted = {"synthesis", "projection", "alignment", "memory"} - set(left_out)
    if "crta" in left_out:
        wanted -= {"synthesis", "projection", "alignment"}
    if "alignment" in left_out:
        wanted -= {"alignment"}
    assert set(found) == wanted
    json.dumps(found, allow_nan=False)
    parts = [list(batches(split, 7)) for split in data]
    assert flat(diagnose(model, *parts)) == pytest.approx(flat(found), nan_ok=True)
    again = diagnose(model, train, test)  # in one batch
    assert flat(found) == pytest.approx(flat(again), abs=1e-3, nan_ok=True)
    if "memory" in wanted:
        assert found["memory"]["a"]["held"] == int(train["present"][:, 0].sum())
        assert found["memory"]["a"]["hit_rate"] == 1


def flat(found):
    """All numbers of a tree."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for one in found for number in flat(one)]
    return [math.nan if found is None else found]


@pytest.mark.parametrize("method", baselines.__all__)
def test_every_baseline_is_diagnosed_and_one_that_retrieves_by_its_memory(data, method):
    train, test = data
    model = getattr(baselines, method)({name: 4 for name in NAMES}, num_classes=3, dim=8)
    model.train()(**train)
    found = json.loads(json.dumps(diagnose(model, train, test)))
    guesses = {"CascadeAutoencoder", "SharedSpecific", "RetrieveAndFill"}
    assert ("synthesis" in found) == (method in guesses)
    assert ("memory" in found) == (method == "RetrieveAndFill")
    if "memory" in found:
        assert [part["hit_rate"] for part in found["memory"].values()] == [1.0] * 3
        assert all(0 < part["same_label"] <= 1 for part in found["memory"].values())


def test_one_modality_alone_has_nothing_to_be_guessed_from():
    model = CMML({"a": 4}, num_classes=2, dim=8)
    data = {"inputs": {"a": torch.randn(6, 4)}, "labels": torch.arange(6) % 2}
    found = diagnose(model, data, data)
    assert found["synthesis"] == {"a": {"cases": 0}}
    assert found["projection"]["a"]["observed"] == []
    assert found["alignment"]["a"] == {"before": None, "after": None}
    json.dumps(found, allow_nan=False)


def test_what_a_model_lacks_is_refused(data):
    train, test = data
    model = Guesser(lambda tokens: None)
    found = probe(model, test)
    for call, rule in [
        (
            lambda: synthesis(found, observe(model, train)),
            "synthesised is None.*guesses nothing.*Pass",
        ),
        (lambda: projection(found), "synthesised is None.*guesses nothing.*Pass"),
        (lambda: alignment_gap(found), "aligned is None.*after an alignment.*Pass"),
        (lambda: memory_use(None, found), "neighbour_ids is None.*what was read.*Pass"),
    ]:
        with pytest.raises(ValueError, match=rule):
            call()
