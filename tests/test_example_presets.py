"""Presets of the further examples: each changes what it says, and nothing else."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfusion.recipes import presets
from mmfusion.recipes.presets import CFCML, SMALL

EXAMPLES = Path(__file__).parents[1] / "examples"
MEN = CFCML["men"] | {"size": (128, 128, 24)}
CASES = [("odir", "small", SMALL), ("men", "small", SMALL), ("men", "cfcml", MEN)]
CASES += [("custom", "small", SMALL)]


class Parsed(Exception):
    """Carries settings out of a script."""


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The settings of an example for a command line, as its last line reads them."""
    parse = presets.parse

    def stop(*arguments: Any, **kind: Any) -> None:
        raise Parsed(parse(*arguments, **kind))

    def settings(name: str, *options: str) -> dict[str, Any]:
        script = str(EXAMPLES / f"cmml_{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(script, run_name="__main__")
        return vars(parsed.value.args[0])

    monkeypatch.setattr(presets, "parse", stop)
    return settings


@pytest.mark.parametrize(("name", "preset", "changes"), CASES)
def test_a_preset_changes_what_it_says_and_nothing_else(
    settings_of: Callable[..., dict[str, Any]], name: str, preset: str, changes: dict[str, Any]
) -> None:
    plain = settings_of(name)
    assert plain["preset"] == "none"
    assert plain["plan"] != changes["plan"]
    assert settings_of(name, "--preset", preset) == plain | changes | {"preset": preset}


@pytest.mark.parametrize(("name", "preset", "changes"), CASES)
def test_the_command_line_goes_before_a_preset(
    settings_of: Callable[..., dict[str, Any]], name: str, preset: str, changes: dict[str, Any]
) -> None:
    found = settings_of(name, "--preset", preset, "--epochs", "3", "--dim", "8")
    assert (found["plan"].epochs, found["dim"]) == (3, 8)
    assert found["plan"].learning_rate == changes["plan"].learning_rate
    assert found["num_tokens"] == changes["num_tokens"]


@pytest.mark.parametrize("name", ["odir", "custom"])
def test_cfcml_is_of_the_data_it_was_published_for(
    settings_of: Callable[..., dict[str, Any]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings_of(name, "--preset", "cfcml")
    assert "cfcml" in capsys.readouterr().err
