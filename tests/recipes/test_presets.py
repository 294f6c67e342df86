"""Presets fit the script that offers them, and the command line goes before them."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from mmfusion.recipes.presets import CFCML, SMALL, parse

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmml_derm7pt.py"
PRESETS = {"cfcml": CFCML["derm7pt"], "small": SMALL}


@pytest.fixture(scope="module")
def derm7pt() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("cmml_derm7pt", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for the comments of its settings
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_settings(derm7pt: ModuleType, name: str) -> None:
    settings = parse(derm7pt.Settings, PRESETS, args=["--preset", name])
    assert {key: getattr(settings, key) for key in PRESETS[name]} == PRESETS[name]
    assert settings.preset == name


def test_the_command_line_goes_before_a_preset(derm7pt: ModuleType) -> None:
    settings = parse(derm7pt.Settings, PRESETS, args=["--preset=cfcml", "--epochs=2", "--dim=16"])
    assert (settings.plan.epochs, settings.dim) == (2, 16)
    assert settings.plan.learning_rate == 1e-4


def test_without_a_preset_defaults_are_the_scripts_own(derm7pt: ModuleType) -> None:
    settings, own = parse(derm7pt.Settings, PRESETS, args=[]), derm7pt.Settings()
    assert {f.name: getattr(settings, f.name) for f in fields(own)} == vars(own)
