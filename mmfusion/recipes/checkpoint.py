"""Files that are there whole or not at all, and a training state in one of them, without pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmfusion.recipes.sharding import split_like, whole


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

    Raises:
        OSError: If it cannot be written; what was there before still is.

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
    metadata = {"about": json.dumps(about)}
    try:
        write_whole(path, lambda part: save_file(own, part, metadata=metadata))
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in own.values()) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"{path} could not be written ({error}): it takes {needed:.1f} MB, and {free:.1f} MB "
            "are free there. The file of before is kept, if there was one. Free some space, and "
            "go on with resume."
        ) from error


def check_folder(folder: Path) -> None:
    """Make a folder if need be, and see that files can be written there, before hours of work.

    Raises:
        ValueError: If they cannot.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_folder(Path(folder, "a", "b"))
        ...     Path(folder, "a", "b").is_dir()
        True
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"folder={str(folder)!r} takes no files ({error.strerror}): checkpoints go there. Pass "
            "another folder, or make this one writable."
        ) from None


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
            "mmfusion.recipes. Restore it, or remove it and start without resume."
        ) from error


def pack(
    modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Any]:
    """Weights, buffers and the optimiser's moments by name; its plain settings beside them.

    Over several ranks each has to ask.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimiser = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 1)).sum().backward(); optimiser.step()
        >>> sorted(pack({"model": model}, optimiser)[0])
        ['model.weight', 'optimiser.0.exp_avg', 'optimiser.0.exp_avg_sq', 'optimiser.0.step']
    """
    state = optimiser.state_dict()
    owners = {owner: module.state_dict() for owner, module in modules.items()}
    owners |= {f"optimiser.{index}": moments for index, moments in state["state"].items()}
    tensors = {
        f"{owner}.{name}": whole(tensor)
        for owner, group in owners.items()
        for name, tensor in group.items()
    }
    return tensors, state["param_groups"]


def unpack(
    tensors: Mapping[str, Tensor],
    groups: Any,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Load what ``pack`` gave, in place.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimiser = torch.optim.AdamW(model.parameters())
        >>> unpack(*pack({"model": model}, optimiser), {"model": model}, optimiser)
    """
    owned: dict[str, dict[str, Tensor]] = {name: {} for name in (*modules, "optimiser")}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        owned[owner][rest] = tensor
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in owned.pop("optimiser").items():
        number, _, moment = name.partition(".")
        parameter = parameters[int(number)]
        split = split_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        moments.setdefault(int(number), {})[moment] = split
    for owner, weights in owned.items():
        load_weights(modules[owner], weights)
    optimiser.load_state_dict({"state": moments, "param_groups": groups})


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, which may be split over ranks.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> load_weights(model, {"weight": torch.ones(1, 1)})
        >>> model.weight.item()
        1.0
    """
    own = module.state_dict()
    module.load_state_dict(
        {k: split_like(v, own[k]) if k in own else v for k, v in weights.items()}
    )
