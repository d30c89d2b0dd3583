"""From a vision-transformer checkpoint to a verified quantized artefact for a board, phone or robot.

The names below are the whole Python interface; each loads its part (and torch or a runtime) on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ENTRY_POINTS = {
    "create_model": "edgeattn.models.factory",
    "list_models": "edgeattn.models.registry",
    "quantize": "edgeattn.quant.quantize",
    "check": "edgeattn.devices.check",
    "load": "edgeattn.runtime.classifier",
}
__all__ = ["__version__", "check", "create_model", "export", "list_models", "load", "quantize"]

if TYPE_CHECKING:
    from edgeattn.devices.check import check
    from edgeattn.export.pipeline import export
    from edgeattn.models.factory import create_model
    from edgeattn.models.registry import list_models
    from edgeattn.quant.quantize import quantize
    from edgeattn.runtime.classifier import load


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("edgeattn.export")
    if name in _ENTRY_POINTS:
        return getattr(importlib.import_module(_ENTRY_POINTS[name]), name)
    raise AttributeError(f"module 'edgeattn' has no attribute {name!r}; it has {', '.join(__all__)}")
