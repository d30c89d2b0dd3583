"""The ops that the model zoo calls, from `zoo.json`: this room may not import models, and shapes take no torch to read.

`tests/runtime_plugins/tensorrt/test_zoo.py` collects them from the models again, and says how to write the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeattn.errors import UsageError
from edgeattn.ops.registry import load_ops
from edgeattn.runtime_plugins.tensorrt.program import Program
from edgeattn.runtime_plugins.tensorrt.programs import TRITON_TYPES, build_program

ZOO_FILE = Path(__file__).with_name("zoo.json")


def zoo_calls() -> dict[str, list[dict[str, Any]]]:
    """Model to its distinct calls, each with `op`, `shapes` of the inputs in order, and `attributes`."""
    calls: dict[str, list[dict[str, Any]]] = json.loads(ZOO_FILE.read_text())
    return calls


def zoo_programs(models: Sequence[str] | None = None, dtypes: Sequence[str] = tuple(TRITON_TYPES)) -> list[Program]:
    """The distinct programs of the zoo in these types, and of the quantized forms of their ops.

    Args:
        models: names, None for all.

    Raises:
        UsageError: a model that calls no op of ours.
    """
    calls, specs = zoo_calls(), load_ops()
    unknown = sorted(set(models or ()) - set(calls))
    if unknown:
        raise UsageError(f"no attention op of edgeattn in {', '.join(unknown)}; there is one in {', '.join(calls)}.")
    programs: list[Program] = []
    for call in (call for model in models or calls for call in calls[model]):
        spec = specs[call["op"]]
        forms = [(spec.name, call["shapes"])]
        if spec.quantized:
            forms.append((spec.quantized, with_scale_shapes(call["op"], call["shapes"])))
        for name, shapes in forms:
            for dtype in dtypes:
                program = build_program(name, shapes, call["attributes"], dtype)
                if program not in programs:
                    programs.append(program)
    return programs


def with_scale_shapes(op: str, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Shapes of the inputs of an op's quantized form: every weight is followed by its scale, one per output channel."""
    spec = load_ops()[op]
    result: list[list[int]] = []
    for name, shape in zip(spec.inputs, shapes, strict=True):
        result.append(list(shape))
        if name in spec.weights:
            result.append([shape[0]])
    return result
