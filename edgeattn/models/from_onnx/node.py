"""What a node of an ONNX file is, the table of ops that can be run, and values that are known while tracing.

Two kinds of value travel between nodes. Tensors are torch's. Sizes and what is computed from them are host values:
numpy arrays, of Python objects where an element is a torch.SymInt, so that a free batch survives torch.export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import UnsupportedOp

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclasses.dataclass(frozen=True)
class Node:
    """One node; an input or output that is left out has the name ""."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, attribute: str, default: Any = None) -> Any:
        """The attribute's value, or the default where it is not set."""
        return self.attributes.get(attribute, default)

    def refuse(self, found: str, expected: str) -> UnsupportedOp:
        """The error for an option of this op that is not handled."""
        return UnsupportedOp(
            f"node {self.name!r} ({self.op}, opset {self.opset}): {found} is not handled; expected {expected}. "
            "Export the model with other options, or give it as package.module:callable."
        )


@dataclasses.dataclass(frozen=True)
class Op:
    """How a node is run.

    Attributes:
        run: (node, *inputs) to the output or a tuple of them; an input that is left out is None.
        host: indices of the inputs that must be host values.
        either: indices of the inputs that `run` takes as they come, tensors or host values.
        names: index of an input to the name that a constant has in its layer; others are input0, input1, ...
    """

    run: Callable[..., Any]
    host: frozenset[int] = frozenset()
    either: frozenset[int] = frozenset()
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)


OPS: dict[str, Op] = {}
HOST_OPS: dict[str, Callable[..., Any]] = {}


def onnx_op(
    *types: str, host: tuple[int, ...] = (), either: tuple[int, ...] = (), names: Mapping[int, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: run nodes of these types on tensors with the function.

    Raises:
        ValueError: a type is taken.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        for op_type in types:
            if op_type in OPS:
                raise ValueError(f"ONNX op {op_type!r} is registered twice")
            OPS[op_type] = Op(run, frozenset(host), frozenset(either), names or {})
        return run

    return decorate


def host_op(*types: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: run nodes of these types with the function where all inputs are host values.

    Raises:
        ValueError: a type is taken.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        for op_type in types:
            if op_type in HOST_OPS:
                raise ValueError(f"ONNX op {op_type!r} is registered twice for host values")
            HOST_OPS[op_type] = run
        return run

    return decorate


def host_array(value: Any) -> np.ndarray:
    """A host value from numbers: of a plain type unless one of them is symbolic."""
    array = np.asarray(value, dtype=object)
    flat = array.reshape(-1).tolist()
    if any(isinstance(element, _SYMBOLIC) for element in flat):
        return array
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    return np.asarray(flat or np.empty(0, np.int64)).reshape(array.shape)


def numbers(value: np.ndarray) -> list[Any]:
    """The elements of a host value as Python numbers or symbolic ones."""
    return value.reshape(-1).tolist()


def as_tensor(value: Any) -> Tensor:
    """A tensor of a host value; tensors are returned as they are."""
    if isinstance(value, Tensor):
        return value
    if value.dtype != object:
        # Not torch.from_numpy: while tracing only torch.tensor makes a constant of the graph.
        return torch.tensor(value.tolist(), dtype=torch.from_numpy(np.zeros(0, value.dtype)).dtype)
    flat = numbers(value)
    dtype = torch.float32 if any(isinstance(v, (float, torch.SymFloat)) for v in flat) else torch.int64
    return torch.stack([torch.scalar_tensor(v, dtype=dtype) for v in flat]).reshape(value.shape)


def call(op: Op, node: Node, values: list[Any]) -> Any:
    """Run one node on tensors and host values; host values become tensors where the op wants these."""
    given = [
        value if value is None or i in op.host or i in op.either else as_tensor(value) for i, value in enumerate(values)
    ]
    return op.run(node, *given)
