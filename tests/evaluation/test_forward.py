import datetime
import traceback

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader

from mmfusion.evaluation.forward import ROWS, collect, logits
from mmfusion.presence import collate

NAMES = ("clinic", "meta")
NAN = float("nan")


def data(cases=7):
    draw = torch.Generator().manual_seed(0)
    inputs = {"clinic": torch.randn(cases, 3, generator=draw), "meta": torch.ones(cases, 2)}
    return {"inputs": inputs, "labels": torch.arange(cases)}


def total(inputs, present):
    return sum(value.sum(1, keepdim=True) for value in inputs.values()) + 100 * present[:, :1]


def ask(model, of, seen=None):
    cases = collect(of)
    return logits([model], of, cases, [(0, cases.present if seen is None else seen)])[0]


def test_what_is_present_is_inferred_or_given():
    of = data(3)
    assert collect(of).present.tolist() == [[True, True]] * 3
    of["inputs"]["meta"] = None
    of["inputs"]["clinic"][1] = NAN
    assert collect(of).present.tolist() == [[True, False], [False, False], [True, False]]
    of = data(3) | {"present": torch.tensor([[True, False], [True, True], [False, True]])}
    assert collect(of).present.tolist() == of["present"].tolist()
    assert collect(data(3), ("meta", "clinic")).names == ("meta", "clinic")


def test_what_contradicts_itself_is_refused():
    of = data(3) | {"present": torch.ones(3, 2, dtype=torch.bool)}
    of["inputs"]["meta"] = None
    with pytest.raises(ValueError, match="present"):
        collect(of)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"labels": torch.arange(ROWS)},
            r"inputs\['clinic'\] has 300 rows and labels 256.*Pass as",
        ),
        ({"labels": torch.arange(400)}, r"inputs\['clinic'\] has 300 rows and labels 400.*Pass as"),
        ({"sample_ids": torch.arange(299)}, r"sample_ids has 299 rows and labels 300.*Pass as"),
        ({"present": torch.ones(9, 2).bool()}, r"present has 9 rows and labels 300.*Pass as"),
        ({"labels": ["a"] * 300}, r"labels begin with 'a'.*numbers.*Encode them"),
    ],
)
def test_parts_that_do_not_fit_the_labels_are_refused(rows, message):
    of = data(300) | rows
    for given in (of, [of]):
        with pytest.raises(ValueError, match=message):
            collect(given)


def test_labels_are_floating_and_one_column_is_no_axis():
    of = data(3) | {"labels": torch.tensor([[2], [-100], [0]])}
    assert collect(of).labels.tolist() == [2.0, -100.0, 0.0]
    of["labels"] = torch.tensor([[0.5, NAN], [1, 2], [3, 4]])
    assert collect(of).labels.shape == (3, 2)


def test_ids_are_given_or_row_numbers():
    assert collect(data(3)).ids.tolist() == [0, 1, 2]
    assert collect(data(3) | {"sample_ids": torch.tensor([7, 9, 8])}).ids.tolist() == [7, 9, 8]
    assert collect(data(3) | {"sample_ids": ["x", "y", "z"]}).ids.tolist() == ["x", "y", "z"]


def test_a_model_sees_what_it_may_and_zeros_elsewhere():
    of = data(4)
    seen = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    clinic = of["inputs"]["clinic"].sum(1)
    expected = [102 + clinic[0], 100 + clinic[1], 2, 0]
    np.testing.assert_allclose(ask(total, of, seen)[:, 0], expected, rtol=1e-6)


def test_structures_reach_the_model():
    words = {"ids": torch.arange(12).reshape(4, 3), "attend": torch.ones(4, 3, dtype=torch.bool)}

    def model(inputs, present):
        return (inputs["text"]["ids"] * inputs["text"]["attend"]).sum(1)

    of = {"inputs": {"text": words}, "labels": torch.zeros(4), "present": torch.ones(4, 1) > 0}
    assert ask(model, of, torch.tensor([[True], [True], [False], [True]]))[:, 0].tolist() == [
        3, 12, 0, 30,
    ]  # fmt: skip


def test_batches_of_a_loader_are_as_the_mapping():
    of = data(11)
    items = [
        {"inputs": {name: of["inputs"][name][row] for name in NAMES}, "labels": row}
        for row in range(11)
    ]
    loader = DataLoader(items, batch_size=4, collate_fn=lambda samples: collate(samples, NAMES))
    np.testing.assert_allclose(ask(total, loader), ask(total, of), rtol=1e-6)
    assert collect(loader).ids.tolist() == list(range(11))


def test_the_first_batch_names_the_modalities():
    of = data(8)
    halves = [
        {"inputs": {n: x[rows] for n, x in of["inputs"].items()}, "labels": of["labels"][rows]}
        for rows in (slice(4), slice(4, 8))
    ]
    halves[1]["inputs"] = dict(reversed(halves[1]["inputs"].items()))
    np.testing.assert_array_equal(ask(total, halves), ask(total, of))
    halves[1]["inputs"].pop(NAMES[0])
    assert collect(halves).present[4:, 0].tolist() == [False] * 4


def test_a_large_mapping_goes_in_parts():
    sizes = []

    def model(inputs, present):
        sizes.append(len(present))
        return total(inputs, present)

    assert ask(model, data(ROWS + 5)).shape == (ROWS + 5, 1)
    assert sizes == [ROWS, 5]


def test_equal_questions_are_asked_once():
    calls = []

    def model(inputs, present):
        calls.append(present)
        return present.float()

    of = data(5)
    cases = collect(of)
    some = cases.present.clone()
    some[0] = False
    one, two, other, second = logits(
        [model, total], of, cases, [(0, cases.present), (0, cases.present), (0, some), (1, some)]
    )
    assert len(calls) == 2
    assert np.array_equal(one, two)
    assert other[0].tolist() == [0, 0]
    assert second.shape == (5, 1)


def test_modules_run_in_eval_mode_on_their_type_and_get_their_modes_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.drop = nn.BatchNorm1d(3).eval(), nn.Dropout(0.9)

        def forward(self, inputs, present):
            assert not torch.is_grad_enabled()
            return self.drop(self.frozen(inputs["clinic"]))

    model = Model()
    modes = [part.training for part in model.modules()]
    expected = data()["inputs"]["clinic"] / (1 + 1e-5) ** 0.5
    np.testing.assert_allclose(ask(model, data()), expected, rtol=1e-5)
    assert [part.training for part in model.modules()] == modes == [True, False, True]
    with pytest.raises(RuntimeError):
        ask(model, {"inputs": {"clinic": torch.ones(2, 5)}, "labels": torch.ones(2)})
    assert [part.training for part in model.modules()] == modes


def test_data_that_shuffle_are_refused():
    of = data(60)
    items = [{"inputs": {"clinic": of["inputs"]["clinic"][i]}, "labels": i} for i in range(60)]
    loader = DataLoader(
        items,
        batch_size=20,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=lambda samples: collate(samples, ("clinic",)),
    )
    with pytest.raises(ValueError, match=r"rows 0 to 20 have other labels.*same order.*not shuf"):
        ask(total, loader)


def test_data_that_end_after_one_pass_are_refused():
    with pytest.raises(
        ValueError, match=r"data is a generator, which ends.*Pass a list of batches"
    ):
        collect(batch for batch in [data()])


@pytest.mark.parametrize(
    "empty", [[], {"inputs": {"a": torch.ones(0, 2)}, "labels": torch.ones(0)}]
)
def test_nothing_to_score(empty):
    with pytest.raises(ValueError, match=r"data hold no case.*nothing to score\. Pass a mapping"):
        collect(empty)


def test_data_without_labels():
    with pytest.raises(ValueError, match=r"data hold \['inputs'\]: there is no score.*Add them"):
        collect({"inputs": {"a": torch.ones(3, 2)}})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (torch.ones(3, 2), r"returned \(3, 2\) for 7 cases: logits are a tensor \(B, Y\).*Wrap"),
        (torch.ones(7, 2, 2), r"returned \(7, 2, 2\) for 7 cases.*Wrap the model"),
        ({"logits": torch.ones(7)}, r"returned dict for 7 cases.*Wrap the model"),
    ],
)
def test_other_answers_are_refused(answer, words):
    with pytest.raises(ValueError, match=words):
        ask(lambda inputs, present: answer, data())


# Two processes, each with its part of the data ---------------------------------------------------

PARTS = [(slice(0, 4), slice(4, 7)), (slice(0, 0), slice(0, 7))]


def part(rows):
    of = data()
    inputs = {name: value[rows] for name, value in of["inputs"].items()}
    return {"inputs": inputs, "labels": of["labels"][rows]}


def gather(parts):
    joined = [None] * distributed.get_world_size()
    distributed.all_gather_object(joined, parts)
    return [one for parts in joined for one in parts]


def worker(rank, address, failures):
    try:
        distributed.init_process_group(
            "gloo",
            init_method=address,
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=60),
        )
        seen = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) > 0.5
        for rows in (parts[rank] for parts in PARTS):
            cases = collect(part(rows), gather=gather)
            assert cases.labels.tolist() == list(range(7))
            assert cases.mine == rows
            [found] = logits([total], part(rows), cases, [(0, seen)], gather)
            np.testing.assert_allclose(found, ask(total, data(), seen), rtol=1e-6)
    except BaseException:
        failures.put(traceback.format_exc())
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_a_part_each_get_the_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    address = f"file://{tmp_path}/rendezvous"
    processes = [context.Process(target=worker, args=(rank, address, failures)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0, 0]
