"""How numbers are printed: three decimals, but for errors that carry the scale of their target."""

import math

__all__ = ["fixed", "shown"]

_SCALED = ("mae", "rmse")


def fixed(value: float, metric: str = "", sign: str = "") -> str:
    """Three decimals; three digits of a small error in the unit of its target.

    Args:
        value: The number.
        metric: What it is a value or a difference of.
        sign: ``"+"`` writes one before positive numbers too.

    Example:
        >>> fixed(0.0000421, "mae"), fixed(0.0000421, "auc_macro"), fixed(0.5, "mae", "+")
        ('4.21e-05', '0.000', '+0.500')
    """
    small = metric in _SCALED and 0 < abs(value) < 0.1
    return f"{value:{sign}.3g}" if small else f"{value:{sign}z.3f}"


def shown(value: float | None, metric: str = "") -> str:
    """A number as the page and figures print it.

    Example:
        >>> shown(0.91234), shown(1234.5), shown(float("nan")), shown(0.00456, "rmse")
        ('0.912', '1.23e+03', '-', '0.00456')
    """
    if value is None or math.isnan(value):
        return "-"
    return fixed(value, metric) if abs(value) < 10 else f"{value:.3g}"
