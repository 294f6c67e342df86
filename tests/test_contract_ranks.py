"""G8: two gloo processes with uneven batches do what one process does with the joint batch."""

import datetime
import traceback

import pytest
import torch
from contract_baselines import CASES as BASELINES
from contract_builders import BY_NAME
from contract_case import rows
from torch import Generator, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from mmfusion.losses import TARGETS

ROWS = (3, 5)
STEPS = 3  # the second reads what the first wrote, and tells unused parameters from used ones
MODELS = (
    "CMML-default",
    "CMML-without-crta",
    "CMML-without-memory",
    "CMML-without-alignment",
    "CMML-bare",
    "CMML-prototypes",
    "CMML-encoders",
    "CMML-multilabel",
    "CMML-binary",
    "CMML-regression",
    *(f"CMML-evidence-{target}" for target in TARGETS),
    *(case.name for case in BASELINES),
)


def joint_batch(case, step):
    """All rows; each step has other patterns, and in the last nothing at all is hidden."""
    batch = case.batch(sum(ROWS), 3, Generator().manual_seed(step))
    if step == STEPS - 1:
        batch["visible"] = batch["present"].clone()
    else:
        batch["present"][: ROWS[0], 2] = batch["visible"][: ROWS[0], 2] = False  # not on rank 0
    batch["sample_ids"] = torch.arange(sum(ROWS))  # seen before: nobody may read itself
    return batch


def train(case, wrap=lambda model: model, part=slice(None)):
    """State after some steps, and the losses and gradients of every step."""
    model = case.ready(filled=False).train()
    wrapped = wrap(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = []
    for step in range(STEPS):
        out = wrapped(**rows(joint_batch(case, step), part))
        optimiser.zero_grad(set_to_none=True)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        steps.append({"losses": {k: v.detach() for k, v in out.losses.items()}, "grad": gradients})
        optimiser.step()
    return {"state": model.state_dict(), "steps": steps}


def refuse_a_skipped_encoder():
    """A parameter that takes no part would hang or fail somewhere else."""
    model = BY_NAME["CMML-encoders"].ready().train()
    batch = BY_NAME["CMML-encoders"].batch(2, 3, Generator())
    batch["present"][:, 2] = batch["visible"][:, 2] = False
    batch["inputs"]["photo"] = None
    with pytest.raises(ValueError, match=r"inputs\['photo'\] is None.*every parameter.*in_shape"):
        model(**batch)


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=40),
    )
    part = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    for name in MODELS:
        try:
            verdict = train(BY_NAME[name], DistributedDataParallel, part)
        except Exception:
            verdict = traceback.format_exc()
        torch.save(verdict, folder / f"{name}.{rank}")
    try:
        refuse_a_skipped_encoder()
        verdict = None
    except BaseException:  # pytest.fail is one
        verdict = traceback.format_exc()
    torch.save(verdict, folder / f"refusal.{rank}")
    distributed.destroy_process_group()


def run_both(folder):
    """What each rank had to say, by name; nothing hangs, whatever a rank does."""
    spawned = multiprocessing.spawn(work, args=(folder,), nprocs=2, join=False)
    try:
        for _ in range(2):
            if spawned.join(timeout=100):
                break
    finally:
        for process in spawned.processes:
            if process.is_alive():
                process.kill()
    return {path.name: torch.load(path) for path in folder.iterdir() if path.name != "meet"}


def assert_joint(first, second, joint, name):
    """Same state bit by bit on both ranks; state, losses and gradients as in the joint process."""
    assert_close(first["state"], second["state"], rtol=0, atol=0, equal_nan=True)
    for key, value in joint["state"].items():
        place = f"{name}, {key}"
        near = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
        assert_close(first["state"][key], value, msg=place, **near)
    for alone, *ranks in zip(joint["steps"], first["steps"], second["steps"], strict=True):
        for loss, value in alone["losses"].items():
            mean = sum(rank["losses"][loss] for rank in ranks) / 2
            assert_close(mean, value, rtol=1e-4, atol=1e-5, msg=f"{name}, {loss}")
        for key, value in alone["grad"].items():
            for rank in ranks:
                place = f"{name}, {key}"
                assert_close(rank["grad"][key], value, rtol=1e-3, atol=1e-5, msg=place)


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path):
    """One test for all models: starting two processes costs more than what they do."""
    verdicts = run_both(tmp_path)
    assert len(verdicts) == 2 * (len(MODELS) + 1)
    for name in MODELS:
        first, second = (verdicts[f"{name}.{rank}"] for rank in (0, 1))
        assert not isinstance(first, str), f"{name}\n{first}"
        assert not isinstance(second, str), f"{name}\n{second}"
        assert_joint(first, second, train(BY_NAME[name]), name)
    assert verdicts["refusal.0"] is None, verdicts["refusal.0"]
    assert verdicts["refusal.1"] is None, verdicts["refusal.1"]


def test_the_joint_runs_use_every_loss_and_the_memory():
    """What the comparison above is worth."""
    result = train(BY_NAME["CMML-default"])
    for step in result["steps"][:-1]:
        assert all(value > 0 for value in step["losses"].values())
    assert result["steps"][-1]["losses"]["reconstruction"] == 0
    assert result["state"]["memory.held"].gt(5).all()
