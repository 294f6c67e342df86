"""What an estimator may be set to, looked at before anything is trained."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from mmfusion.recipes.members import method_named


class Rule(NamedTuple):
    """What a value has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _count(least: int) -> Rule:
    words = f"a whole number from {least} on"
    return Rule(words, lambda value: isinstance(value, Integral) and int(value) >= least)


def _number(words: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(words, lambda value: isinstance(value, Real) and holds(float(value)))


_DROPPED = _number("a share from 0 up to, but not, 1", lambda value: 0 <= value < 1)
_RULES = {
    "dim": _count(1),
    "num_members": Rule(
        "two or more, a whole number, since each member is judged on rows that it left out",
        _count(2).holds,
    ),
    "epochs": _count(1),
    "learning_rate": _number("a finite number above 0", lambda value: 0 < value < math.inf),
    "hide_rate": _number("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "dropout": _DROPPED,
    "input_dropout": _DROPPED,
    "num_components": Rule(
        "a whole number from 1 on, or None", lambda value: value is None or _count(1).holds(value)
    ),
    "options": Rule(
        "a mapping, or None", lambda value: value is None or isinstance(value, Mapping)
    ),
    "random_state": Rule(
        "a whole number from 0 below 2**32, a numpy RandomState, or None",
        lambda value: (
            value is None
            or isinstance(value, np.random.RandomState)
            or (isinstance(value, Integral) and 0 <= int(value) < 2**32)
        ),
    ),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what an estimator cannot be set to.

    Args:
        settings: All arguments of its constructor.

    Raises:
        ValueError: If a value breaks its rule, or ``options`` hold what the method does not take.

    Example:
        >>> check_settings({"method": "cmml", "epochs": 0})
        Traceback (most recent call last):
        ValueError: epochs=0: it is a whole number from 1 on. Pass one, or leave epochs out.
    """
    for name, rule in _RULES.items():
        if name in settings and not rule.holds(settings[name]):
            raise ValueError(
                f"{name}={settings[name]!r}: it is {rule.words}. Pass one, or leave {name} out."
            )
    taken = inspect.signature(method_named(str(settings["method"]))).parameters
    if unknown := [name for name in settings.get("options") or () if name not in taken]:
        raise ValueError(
            f"options={unknown} with method={settings['method']!r}: its constructor takes "
            f"{', '.join(taken)}. Name some of these."
        )
