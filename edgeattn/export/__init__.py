"""Torch graph to ONNX, graph checks, one module per target, and the bundle writer.

The package is also the entry point `edgeattn.export(model, targets, out, ...)`: room and function share the name, so
calling the package calls `edgeattn.export.pipeline.export`.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from edgeattn.export.pipeline import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
