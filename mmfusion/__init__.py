"""Plug-in PyTorch layers for multimodal data with missing modalities.

Names load on first use, so that ``import mmfusion`` costs nothing and touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names, and the file each lives in. Losing or renaming one fails a test.
_MODULES = (
    "baselines",
    "cmml",
    "evaluation",
    "functional",
    "layers",
    "losses",
    "missingness",
    "patterns",
    "presence",
    "ranks",
    "reference",
)
_WHERE = {
    "CMML": "cmml",
    "Explanation": "cmml",
    "FusionOutput": "layers",
    "PatternSet": "missingness",
}
__all__ = ["__version__", *_MODULES, *_WHERE]

if TYPE_CHECKING:
    from mmfusion import baselines as baselines
    from mmfusion import cmml as cmml
    from mmfusion import evaluation as evaluation
    from mmfusion import functional as functional
    from mmfusion import layers as layers
    from mmfusion import losses as losses
    from mmfusion import missingness as missingness
    from mmfusion import patterns as patterns
    from mmfusion import presence as presence
    from mmfusion import ranks as ranks
    from mmfusion import reference as reference
    from mmfusion.cmml import CMML as CMML
    from mmfusion.cmml import Explanation as Explanation
    from mmfusion.layers import FusionOutput as FusionOutput
    from mmfusion.missingness import PatternSet as PatternSet


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"mmfusion.{_WHERE[name]}"), name)
    if name in _MODULES:
        return import_module(f"mmfusion.{name}")
    raise AttributeError(f"module 'mmfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
