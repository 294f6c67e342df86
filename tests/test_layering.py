"""The ladder of DESIGN.md 3: a file imports from lower rungs only, and outside packages late."""

import ast
import sys
from pathlib import Path

import pytest

import mmfusion

ROOT = Path(mmfusion.__file__).parent
LADDER = (
    ("presence", "patterns", "ranks"),
    ("missingness",),
    ("reference",),
    ("kernels",),
    ("ops",),
    ("functional",),
    ("layers",),
    ("losses",),
    ("cmml", "baselines"),
    ("evaluation",),
    ("info", "hub"),
    ("recipes",),
)
RUNG = {name: rung for rung, names in enumerate(LADDER) for name in names}
OWN = {"torch", "einops", "numpy"}  # what the core may import at module level
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part(path):
    """The rung's name of a file: its folder, or itself."""
    return Path(path).parts[0].removesuffix(".py")


def imports(source, path):
    """(module, whether it runs at import, line) of every import, deferred ones included.

    ``from mmfusion import x`` counts as ``mmfusion.x``; relative imports are made absolute. What a
    function or ``if TYPE_CHECKING`` holds does not run at import.
    """
    package = ["mmfusion", *Path(path).parts[:-1]]
    found = []

    def visit(node, runs):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, runs, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                whole = module.split(".")[0] == "mmfusion" and module.count(".") == 0
                names = [f"{module}.{alias.name}" for alias in child.names] if whole else [module]
                found.extend((name, runs, child.lineno) for name in names)
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            visit(child, runs and not deferred and not typing_only)

    visit(ast.parse(source), True)
    return found


def breaches(source, path):
    """What a file does that the ladder forbids, one sentence each."""
    own, found = part(path), []
    for module, runs, line in imports(source, path):
        first, *rest = module.split(".")
        where = f"{path}:{line} imports {module}"
        if first == "mmfusion":
            if str(path) == "__init__.py":
                if runs:
                    found.append(f"{where}: the package loads nothing by itself")
                continue
            target = rest[0] if rest else ""
            if target not in RUNG:
                found.append(f"{where}: it has no rung in LADDER")
            elif target != own and RUNG[target] >= RUNG[own]:
                found.append(f"{where}: that is not below {own}")
        elif first == "triton" and own != "kernels":
            found.append(f"{where}: triton is for kernels/ alone")
        elif runs and own not in ("recipes", "kernels"):
            if first not in OWN and first not in sys.stdlib_module_names:
                found.append(f"{where}: other packages load inside the function that needs them")
        elif not runs and own in RUNG and RUNG[own] < RUNG["evaluation"] and own != "kernels":
            if first not in OWN and first not in sys.stdlib_module_names:
                found.append(f"{where}: below evaluation.py there is torch, einops and numpy alone")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_lower_rungs(path):
    assert part(path) in {*RUNG, "__init__"}, "give the new file a rung in LADDER"
    assert breaches((ROOT / path).read_text(), path) == []


def edges(folder):
    """File to the files of the same folder that it imports."""
    graph = {}
    for path in FILES:
        if len(path.parts) > 1 and path.parts[0] == folder and path.name != "__init__.py":
            source = (ROOT / path).read_text()
            here = f"mmfusion.{folder}."
            graph[path.stem] = {
                module.removeprefix(here).split(".")[0]
                for module, _, _ in imports(source, path)
                if module.startswith(here)
            }
    return graph


def cycle(graph):
    """Files that import each other, directly or through others; empty if none do."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("folder", sorted({p.parts[0] for p in FILES if len(p.parts) > 1}))
def test_siblings_do_not_import_each_other_mutually(folder):
    assert cycle(edges(folder)) == []


def test_files_of_layers_do_not_import_the_whole_of_layers():
    """They import each other by file, so that a cycle can be seen."""
    for path in FILES:
        if path.parts[0] == "layers" and path.name != "__init__.py":
            modules = [module for module, *_ in imports((ROOT / path).read_text(), path)]
            assert "mmfusion.layers" not in modules, path


# The walker itself -------------------------------------------------------------------------------

FORBIDDEN = {
    "from mmfusion.losses import task_loss": "losses.py, say: not below",
    "from mmfusion import cmml": "upwards through the package",
    "from .. import cmml": "upwards, relative",
    "from ..cmml import CMML": "upwards, relative",
    "def f():\n    from mmfusion.cmml import CMML": "upwards, deferred",
    "if TYPE_CHECKING:\n    from mmfusion.cmml import CMML": "upwards, for types",
    "import mmfusion.unheard_of": "no rung",
    "import scipy": "another package",
    "try:\n    import pandas\nexcept ImportError:\n    pass": "another package, guarded",
    "def f():\n    import pandas": "another package in the core",
    "def f():\n    import triton": "triton",
    "from triton import language": "triton",
}
ALLOWED = (
    "import torch.nn.functional as F\nimport numpy as np\nfrom einops import rearrange",
    "from mmfusion import reference\nfrom mmfusion.presence import visibility",
    "from mmfusion.layers.attention import PresenceAttention",
    "from .attention import PresenceAttention",
    "import math\nfrom collections.abc import Mapping",
)


@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_walker_sees(source):
    assert len(breaches(source, Path("layers/new.py"))) == 1


@pytest.mark.parametrize("source", ALLOWED)
def test_the_walker_lets_pass(source):
    assert breaches(source, Path("layers/new.py")) == []


def test_the_walker_knows_the_exceptions():
    assert breaches("import pandas", Path("recipes/new.py")) == []
    assert breaches("def f():\n    import pandas", Path("evaluation.py")) == []
    assert len(breaches("import pandas", Path("evaluation.py"))) == 1
    assert breaches("import triton", Path("kernels/new.py")) == []
    assert len(breaches("def f():\n    import triton", Path("recipes/new.py"))) == 1
    lazy = "if TYPE_CHECKING:\n    from mmfusion.cmml import CMML"
    assert breaches(lazy, Path("__init__.py")) == []
    assert len(breaches("from mmfusion.cmml import CMML", Path("__init__.py"))) == 1
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert cycle({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == []
