"""A run that ended, from its folder: the settings of its script, and the weights it selected."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from torch import nn

from mmfusion.recipes import checkpoint
from mmfusion.recipes.splits import hash_split

Settings = TypeVar("Settings")


def restored(given: Settings, *own: str) -> Settings:
    """The settings of the run in ``given.out``, from its ``config.json``.

    Args:
        given: The settings of this call, a dataclass with defaults.
        own: What this call decides, beside ``out``; all else is that of the run.

    Raises:
        ValueError: If there is no such file, or ``given`` asks for what the run has not.

    Example:
        >>> import tempfile
        >>> from mmfusion.recipes.reporting import write_json
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     out: Path = Path("runs")
        ...     size: tuple[int, int] = (48, 48)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "config.json"), {"settings": {"size": (64, 96)}})
        ...     restored(Sizes(out=Path(folder))).size
        (64, 96)
    """
    asked: Any = given
    run = dataclasses.replace(_kept(asked)[0], **{n: getattr(given, n) for n in ("out", *own)})
    flat = [_flat(settings) for settings in (given, type(given)(), run)]
    for name, (value, usual, theirs) in {n: [one[n] for one in flat] for n in flat[0]}.items():
        if value not in (usual, theirs):
            raise ValueError(
                f"{name}={value!r}, and the run in {asked.out} has {theirs!r}: new patients are "
                f"read and predicted as it was trained. Leave out {name}."
            )
    return run


def check_resumed(given: Any, split: Mapping[str, Any], *own: str) -> None:
    """Before anything is written: does ``resume`` go on with the run that ``given.out`` holds?

    Args:
        given: The settings of this call, a dataclass with defaults, ``out`` and ``resume``.
        split: Split -> ids, as now; ``hash_split`` of it is in ``config.json``.
        own: What may differ, beside ``out``, ``resume`` and ``num_workers``.

    Raises:
        ValueError: If another setting or the split is not that of the run.

    Example:
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     out: Path = Path("runs")
        ...     resume: bool = False
        >>> check_resumed(Sizes(), {})  # starts anew
    """
    if not given.resume or not (given.out / "config.json").exists():
        return
    run, sha256 = _kept(given)
    mine, theirs = _flat(given), _flat(run)
    for name in ("out", "resume", "num_workers", *own):
        mine.pop(name, None)
    pairs = {name: (value, theirs[name]) for name, value in mine.items()}
    pairs["split_sha256"] = hash_split(split), sha256
    for name, (value, before) in pairs.items():
        if value != before:
            raise ValueError(
                f"{name}={value!r}, and the run in {given.out} has {before!r}: resuming goes on "
                "with the same run. Pass the same settings and data, or leave out resume."
            )


def take_best(model: nn.Module, folder: Path) -> nn.Module:
    """Load the weights of the epoch that validation selected: the average, where that was scored.

    Args:
        model: Built as the one that was trained.
        folder: What ``fit`` wrote its checkpoints to.

    Raises:
        ValueError: If there are no weights, or those of another model.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(Path(folder, "best.safetensors"), model.state_dict(), {})
        ...     take_best(nn.Linear(1, 1), Path(folder)).bias == model.bias
        tensor([True])
    """
    path = folder / "best.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: it holds the weights of the best epoch so far. Pass the folder "
            "of a run that finished an epoch."
        )
    weights, _ = checkpoint.load(path)
    try:
        checkpoint.load_weights(model, weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__} ({' '.join(str(error).split())[:300]}"
            "): weights belong to a model of the same settings. Build it as it was trained."
        ) from None
    return model.eval()


def _kept(given: Any) -> tuple[Any, Any]:
    """The settings in the ``config.json`` of ``given.out``, and the hash of the split."""
    hints, path = get_type_hints(type(given)), given.out / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = content["settings"]
        values = {name: _typed(hints[name], kept[name]) for name in vars(given) if name in kept}
        return dataclasses.replace(type(given)(), **values), content.get("split_sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}): a training writes its settings there. Pass the "
            "folder of a run as out."
        ) from None


def _flat(settings: Any) -> dict[str, Any]:
    """All fields, those of nested dataclasses among them."""
    found: dict[str, Any] = {}
    for name, value in vars(settings).items():
        found |= _flat(value) if dataclasses.is_dataclass(value) else {name: value}
    return found


def _typed(hint: Any, value: Any) -> Any:
    """A value of JSON as the field of a dataclass has it."""
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
        known = {field.name for field in dataclasses.fields(hint)}
        return hint(**{name: one for name, one in value.items() if name in known})  # type: ignore[operator]
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
