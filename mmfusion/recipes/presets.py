"""Settings with a name: those of the nearest public recipe, and some for small data.

A preset is a dict: ``plan``, and settings of model and data under the names the examples use.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from mmfusion.recipes.plan import Plan

Settings = TypeVar("Settings")

CFCML: dict[str, dict[str, Any]] = {
    "derm7pt": {
        "plan": Plan(
            epochs=50,
            batch_size=36,
            learning_rate=1e-4,
            backbone_rate=0.1,
            weight_decay=1e-4,
            patience=50,
        ),
        "encoder": "microsoft/swin-tiny-patch4-window7-224",
        "image_size": (224, 224),
        "target": "diagnosis2",
        "columns": "paper",
        "dim": 128,
        "num_heads": 4,
        "num_tokens": 32,
        "dropout": 0.5,
    },
    "men": {
        "plan": Plan(epochs=50, batch_size=36, learning_rate=5e-4, weight_decay=1e-4, patience=50),
        "dim": 128,
        "num_heads": 4,
        "num_tokens": 48,
        "dropout": 0.5,
    },
}
"""What CFCML trains with: the same group's work on the same data, where nothing is missing.

Width, heads, tokens per image, head dropout, epochs, batch, learning rates, weight decay and the
five epochs of warm-up are theirs. Not theirs: AdamW for Adam; a cosine after the warm-up for steps
of 0.8 every five epochs; as many tokens for the table as for an image (theirs has 24 and 16); an
encoder for each photo (they share one); dropout in cascade and alignment too; the loss weights,
which belong to losses that CMML does not have. The ``"paper"`` columns leak the label.

References:
    arXiv 2603.20016, github.com/IsDling/CFCML.
"""

SMALL: dict[str, Any] = {
    "plan": Plan(
        epochs=60, batch_size=16, learning_rate=5e-4, weight_decay=5e-2, ema=0.99, patience=20
    ),
    "dim": 32,
    "num_heads": 4,
    "num_tokens": 2,
    "dropout": 0.3,
}
"""For some hundred samples: a narrow model, more regularisation, averaged weights. Our design."""


def parse(
    settings: type[Settings],
    presets: Mapping[str, Mapping[str, Any]],
    description: str | None = None,
    args: list[str] | None = None,
) -> Settings:
    """Read the command line of a script; ``--preset`` names its defaults, other options go first.

    Args:
        settings: A dataclass whose ``preset`` is ``"none"`` or a name.
        presets: By the names ``--preset`` takes.
        description: For ``--help``.
        args: The command line; None for that of this process.

    Example:
        >>> from typing import Literal
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     preset: Literal["none", "wide"] = "none"
        ...     dim: int = 8
        ...     depth: int = 2
        >>> wide = {"dim": 64, "depth": 6}
        >>> parse(Sizes, {"wide": wide}, args=["--preset", "wide", "--depth", "3"])
        Sizes(preset='wide', dim=64, depth=3)
    """
    chosen: Any = tyro.cli(settings, description=description, args=args)
    preset = {"none": {}, **presets}[chosen.preset]
    defaults: Any = dataclasses.replace(settings(), **preset)  # type: ignore[type-var]
    return tyro.cli(settings, description=description, args=args, default=defaults)
