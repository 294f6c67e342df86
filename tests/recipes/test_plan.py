"""The numbers of a training run."""

from typing import Any

import pytest

from mmfusion.recipes.plan import Plan


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"epochs": 0}, "epochs=0: it is a count.*Raise"),
        ({"hide_rate": 2.0}, "hide_rate=2.0.*0 to"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: .*above 0.*Pass"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0: .*above 0.*Pass"),
    ],
)
def test_a_plan_refuses_what_is_no_plan(argument: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan(**argument)


def test_the_rate_of_hiding_rises_and_stays() -> None:
    plan = Plan(hide_rate=0.4, hide_ramp=0.5)
    rates = [plan.hiding(step, steps=8) for step in range(8)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert [Plan(hide_rate=0.4).hiding(step, steps=8) for step in (0, 7)] == [0.4, 0.4]
