"""A run that ended, from its folder: the settings of its script, and the weights it selected."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from torch import nn

from mmfusion.recipes import checkpoint

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
    kind: Any = type(given)
    default, hints, asked = kind(), get_type_hints(kind), dict(vars(given))
    path = asked["out"] / "config.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["settings"]
        values = {name: _typed(hints[name], kept[name]) for name in asked if name in kept}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}): a training writes its settings there. Pass the "
            "folder of a run as out."
        ) from None
    values |= {name: asked[name] for name in ("out", *own)}
    run = dataclasses.replace(default, **values)
    flat = [_flat(settings) for settings in (given, default, run)]
    for name, (value, usual, theirs) in {n: [one[n] for one in flat] for n in flat[0]}.items():
        if value not in (usual, theirs):
            raise ValueError(
                f"{name}={value!r}, and the run in {asked['out']} has {theirs!r}: new patients are "
                f"read and predicted as it was trained. Leave out {name}."
            )
    return run


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
