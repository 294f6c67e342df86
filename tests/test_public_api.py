"""What users hold on to: public names and signatures, examples, and an import that does nothing."""

import importlib
import inspect
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import mmfusion

INVENTORY = Path(__file__).parent / "golden" / "public_api.txt"
MODULES = (
    "baselines",
    "cmml",
    "evaluation",
    "functional",
    "layers",
    "losses",
    "missingness",
    "presence",
    "ranks",
    "reference",
)
OPTIONAL = (
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "monai",
    "pandas",
    "safetensors",
    "scipy",
    "sklearn",
    "torchmetrics",
    "transformers",
    "triton",
)


def public_objects():
    """Dotted name to object, for everything in the ``__all__`` of a public module."""
    found = {}
    for module in MODULES:
        source = importlib.import_module(f"mmfusion.{module}")
        found |= {f"mmfusion.{module}.{name}": getattr(source, name) for name in source.__all__}
    return found


def inventory():
    """One line per public name: its signature, and below a class its public methods."""
    lines = [f"mmfusion: {', '.join(sorted(mmfusion.__all__))}"]
    for name, thing in sorted(public_objects().items()):
        if hasattr(thing, "_fields"):
            lines.append(f"{name}: {', '.join(thing._fields)}")
            continue
        lines.append(f"{name}{_signature(thing)}")
        if isinstance(thing, type):
            lines += [f"{name}.{line}" for line in _members(thing)]
    return lines


def _signature(thing):
    """Names, kinds and defaults; types are mypy's, and print differently in every Python."""
    signature = inspect.signature(thing)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _members(cls):
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, classmethod) else member
        if inspect.isfunction(function):
            yield f"{name}{_signature(function)}"
        elif isinstance(member, property):
            yield f"{name} (property)"


def test_no_public_name_or_signature_is_lost_or_changed():
    """After an intended change: ``python tests/contract_golden.py``, and say so in CHANGELOG.md."""
    pinned = INVENTORY.read_text().splitlines()
    now = inventory()
    lost = [line for line in pinned if line not in now]
    new = [line for line in now if line not in pinned]
    assert (lost, new) == ([], [])


def test_every_public_module_is_in_the_inventory():
    """The top level's lazy modules, less those that are tools and not interface."""
    assert set(MODULES) <= set(mmfusion._MODULES)
    assert set(mmfusion._MODULES) - set(MODULES) <= {"patterns", "info"}


@pytest.mark.parametrize("name", mmfusion.__all__)
def test_every_top_level_name_resolves_to_what_its_module_exports(name):
    thing = getattr(mmfusion, name)
    if name in mmfusion._MODULES:
        assert thing is sys.modules[f"mmfusion.{name}"]
    elif name in mmfusion._WHERE:
        module = importlib.import_module(f"mmfusion.{mmfusion._WHERE[name]}")
        assert name in module.__all__
        assert thing is getattr(module, name)
    else:
        assert name == "__version__"
    assert name in dir(mmfusion)


def test_the_lazy_table_and_its_type_checking_twin_agree():
    source = inspect.getsource(mmfusion)
    block = source.split("if TYPE_CHECKING:")[1].split("\n\n\n")[0]
    shown = {line.split(" as ")[1].strip() for line in block.splitlines() if " as " in line}
    assert shown == set(mmfusion.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'CMMl'"):
        mmfusion.CMMl  # noqa: B018


@pytest.mark.parametrize("module", [*MODULES, *mmfusion._MODULES])
def test_all_is_sorted_distinct_and_resolves(module):
    source = importlib.import_module(f"mmfusion.{module}")
    names = source.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert not name.startswith("_")
        assert hasattr(source, name)


@pytest.mark.parametrize("name", public_objects())
def test_every_public_object_is_documented_with_a_run_example(name):
    thing = public_objects()[name]
    assert thing.__doc__
    if hasattr(thing, "_fields"):  # a result is documented field by field
        for field in thing._fields:
            assert f"{field}: " in thing.__doc__, field
        return
    assert "Example:" in thing.__doc__
    assert ">>> " in thing.__doc__
    for method in [] if not isinstance(thing, type) else vars(thing).values():
        if inspect.isfunction(method) and not method.__name__.startswith("_"):
            assert method.__doc__, method


# Importing does nothing --------------------------------------------------------------------------


def fresh(code):
    """What a new process prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_and_the_whole_model_cost_a_tenth_of_a_second_beyond_torch():
    """Processor time, which other processes do not lengthen as they do the clock's."""
    code = (
        "import time, torch; start = time.process_time(); import mmfusion; "
        "print(time.process_time() - start); mmfusion.CMML; print(time.process_time() - start)"
    )
    times = [[float(line) for line in fresh(code).split()] for _ in range(3)]
    package, model = map(statistics.median, zip(*times, strict=True))
    assert package <= 0.02
    assert model <= 0.1


def test_import_loads_no_submodule():
    code = (
        "import sys, mmfusion; print(sorted(m for m in sys.modules if m.startswith('mmfusion.')))"
    )
    assert fresh(code) == "[]"


@pytest.mark.parametrize(
    "then", ["mmfusion.CMML", "[getattr(mmfusion, name) for name in mmfusion.__all__]"]
)
def test_optional_packages_stay_out(then):
    code = (
        "import torch, sys; before = set(sys.modules); import mmfusion; "
        f"{then}; print(*(set(sys.modules) - before))"
    )
    loaded = {name.split(".")[0] for name in fresh(code).split()}
    assert "mmfusion" in loaded
    assert loaded & set(OPTIONAL) == set()


def test_import_sets_nothing():
    """No environment variable, seed, log handler, default of torch, warning filter; no GPU."""
    code = """
import logging, os, random, warnings
import numpy, torch

def settings():
    known = sorted(logging.Logger.manager.loggerDict)
    loggers = [logging.getLogger(), *map(logging.getLogger, known)]
    return {
        "environment": dict(os.environ),
        "seeds": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "handlers": [(x.name, x.level, x.handlers) for x in loggers if x.handlers or x.level],
        "types": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "modes": (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.is_initialized(),
    }

before, filters = settings(), list(warnings.filters)
import mmfusion
assert settings() == before and warnings.filters == filters
mmfusion.CMML({"a": 2}, num_classes=2, dim=8)  # seeds move when parameters are drawn
after = settings()
for name in before:
    assert name == "seeds" or after[name] == before[name], name
print("nothing")
"""
    assert fresh(code) == "nothing"
