"""Golden files: state_dict keys with types, shapes and seeded initial values, per row of the list.

They change only by hand. After an intended change, from the repository root::

    python tests/contract_golden.py            # writes tests/golden/*.json and public_api.txt

and say in the changelog which keys or seeds moved.
"""

import json
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"


def state(case):
    """What a build under seed 0 holds: type, shape, and two rounded sums of every entry."""
    torch.manual_seed(0)
    module = case.build(3)
    return {name: _describe(tensor) for name, tensor in module.state_dict().items()}


def _describe(tensor):
    values = tensor.double().flatten()
    known = values[~values.isnan()]
    place = torch.arange(1, len(known) + 1, dtype=torch.float64)
    sums = [known.sum(), (known * place).sum() / max(1, len(known))]
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "known": len(known),
        "sums": [round(float(value), 3) + 0.0 for value in sums],  # + 0.0: no negative zero
    }


def path(case):
    return GOLDEN / f"{case.name}.json"


def pinned(case):
    return json.loads(path(case).read_text())


def left_over(cases):
    """Golden files that no row claims."""
    return sorted(
        {file.name for file in GOLDEN.glob("*.json")} - {path(case).name for case in cases}
    )


def write():
    """Write all golden files anew."""
    from contract_builders import CASES
    from test_public_api import inventory

    GOLDEN.mkdir(exist_ok=True)
    for name in left_over(CASES):
        (GOLDEN / name).unlink()
    for case in CASES:
        path(case).write_text(json.dumps(state(case), indent=1) + "\n")
    (GOLDEN / "public_api.txt").write_text("\n".join(inventory()) + "\n")


if __name__ == "__main__":
    write()
