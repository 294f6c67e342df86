"""Files that are there whole or not at all, and a training state in one of them, without pickle."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under another name, flush it to the disk, then rename it.

    Killed at any moment, ``path`` holds what it held before, or all of the new content.

    Args:
        path: The file; its folder exists.
        write: Called with the name to write to, which has the same suffix.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "note.txt")
        ...     write_whole(path, lambda part: part.write_text("whole"))
        ...     path.read_text()
        'whole'
    """
    part = path.with_name(f".part-{path.name}")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and what JSON can hold about them, as one safetensors file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "weights.safetensors")
        ...     save(path, {"weight": torch.ones(2)}, {"epoch": 3})
        ...     load(path)
        ({'weight': tensor([1., 1.])}, {'epoch': 3})
    """
    # Clones, because safetensors refuses tensors that share memory (an encoder used twice).
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(own, part, metadata={"about": json.dumps(about)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: If the file is not one that ``save`` wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except Exception as error:  # whatever a damaged file upsets
        raise ValueError(
            f"{path} cannot be read ({error}): a checkpoint is a safetensors file written by "
            "mmfusion.recipes. Remove it, or start without resume."
        ) from error


def pack(model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Weights, buffers and the optimiser's moments by name; its plain settings beside them.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimiser = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 1)).sum().backward(); optimiser.step()
        >>> sorted(pack(model, optimiser)[0])
        ['model.weight', 'optimiser.0.exp_avg', 'optimiser.0.exp_avg_sq', 'optimiser.0.step']
    """
    state = optimiser.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in state["state"].items():
        tensors |= {f"optimiser.{index}.{name}": moment for name, moment in moments.items()}
    return tensors, state["param_groups"]


def unpack(
    tensors: Mapping[str, Tensor],
    groups: Any,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Load what ``pack`` gave, in place.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimiser = torch.optim.AdamW(model.parameters())
        >>> unpack(*pack(model, optimiser), model, optimiser)
    """
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == "model":
            weights[rest] = tensor
        else:
            index, _, moment = rest.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
    model.load_state_dict(weights)
    optimiser.load_state_dict({"state": moments, "param_groups": groups})
