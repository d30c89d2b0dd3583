"""ONNX ops on host values: the arithmetic of sizes. Definitions: https://onnx.ai/onnx/operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import torch

from edgeattn.models.from_onnx.node import Node, host_array, host_op, numbers


def _each(function: Any) -> Any:
    """A Python function over elements as one over arrays; symbolic elements stay what they are."""
    return np.frompyfunc(function, function.__code__.co_argcount, 1)


def _divide(a: Any, b: Any) -> Any:
    """ONNX divides whole numbers towards zero; sizes, the symbolic ones, are never negative."""
    if any(isinstance(v, (float, torch.SymFloat)) for v in (a, b)):
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b


_ELEMENTWISE: dict[str, Any] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _each(lambda a, b: _divide(a, b)),
    "Mod": np.remainder, "Pow": np.power, "Neg": np.negative, "Abs": np.abs, "Not": np.logical_not,
    "Floor": _each(lambda a: math.floor(a)), "Ceil": _each(lambda a: math.ceil(a)), "Sqrt": _each(lambda a: a**0.5),
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Where": np.where,
    "Min": _each(lambda a, b: torch.sym_min(a, b)), "Max": _each(lambda a, b: torch.sym_max(a, b)),
}  # fmt: skip


def _elementwise(node: Node, *values: np.ndarray) -> np.ndarray:
    function = _ELEMENTWISE[node.op]
    if node.op in ("Min", "Max"):  # any number of inputs
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
    else:
        result = function(*values)
    if node.op in ("Floor", "Ceil"):  # math's give whole numbers; ONNX's keep the type
        result = np.asarray(result * 1.0, dtype=object)
    array = host_array(result)
    kinds = {value.dtype for value in values if value.dtype != object}
    if array.dtype.kind == "f" and kinds and all(kind.kind == "f" for kind in kinds):
        return array.astype(np.result_type(*kinds))
    return array


host_op(*_ELEMENTWISE)(_elementwise)


@host_op("Cast")
def _cast(node: Node, x: np.ndarray) -> np.ndarray:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.get("to")))
    if x.dtype != object:
        return x.astype(dtype)
    convert = {"f": torch.sym_float, "i": torch.sym_int, "u": torch.sym_int}.get(dtype.kind)
    if convert is None:
        raise node.refuse(f"a cast of sizes to {dtype}", "whole or floating-point numbers")
    return host_array(np.asarray([convert(v) for v in numbers(x)], dtype=object).reshape(x.shape))


@host_op("Identity")
def _identity(node: Node, x: np.ndarray) -> np.ndarray:
    return x


@host_op("Concat")
def _concat(node: Node, *values: np.ndarray) -> np.ndarray:
    return host_array(np.concatenate(values, node.get("axis", 0)))


@host_op("Gather")
def _gather(node: Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return host_array(np.take(x, indices.astype(np.int64), axis=node.get("axis", 0)))


@host_op("Slice")
def _slice(
    node: Node, x: np.ndarray, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> np.ndarray:
    begin = node.get("starts") if starts is None else numbers(starts)
    end = node.get("ends") if ends is None else numbers(ends)
    along = node.get("axes", list(range(len(begin)))) if axes is None else numbers(axes)
    step = [1] * len(begin) if steps is None else numbers(steps)
    where: list[slice] = [slice(None)] * x.ndim
    for axis, *bounds in zip(along, begin, end, step, strict=True):
        where[axis] = slice(*bounds)
    return host_array(x[tuple(where)])


@host_op("Unsqueeze")
def _unsqueeze(node: Node, x: np.ndarray, axes: Any = None) -> np.ndarray:
    return np.expand_dims(x, tuple(node.get("axes") if axes is None else numbers(axes)))


@host_op("Squeeze")
def _squeeze(node: Node, x: np.ndarray, axes: Any = None) -> np.ndarray:
    chosen = node.get("axes") if axes is None else numbers(axes)
    return np.squeeze(x, None if chosen is None else tuple(chosen))


@host_op("Reshape")
def _reshape(node: Node, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    kept = not node.get("allowzero", 0)
    return x.reshape([x.shape[i] if side == 0 and kept else side for i, side in enumerate(numbers(sizes))])


@host_op("Transpose")
def _transpose(node: Node, x: np.ndarray) -> np.ndarray:
    return x.transpose(node.get("perm"))


@host_op("Split")
def _split(node: Node, x: np.ndarray, sizes: Any = None) -> tuple[np.ndarray, ...]:
    given = node.get("split") if sizes is None else numbers(sizes)
    axis, parts = node.get("axis", 0), len(node.outputs)
    length = -(-x.shape[axis] // parts)
    cuts = np.cumsum(given)[:-1] if given else [length * i for i in range(1, parts)]
    return tuple(host_array(part) for part in np.split(x, cuts, axis))


@host_op("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(node: Node, x: np.ndarray, axes: Any = None) -> np.ndarray:
    functions: dict[str, Any] = {
        "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min,
    }  # fmt: skip
    along = node.get("axes") if axes is None else numbers(axes)
    return host_array(
        functions[node.op](x, axis=tuple(along) if along else None, keepdims=bool(node.get("keepdims", 1)))
    )


@host_op("ConstantOfShape")
def _constant_of_shape(node: Node, sizes: np.ndarray) -> np.ndarray:
    value = node.get("value", np.zeros(1, np.float32))
    return np.full(numbers(sizes), value.reshape(-1)[0], value.dtype)


@host_op("Expand")
def _expand(node: Node, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(numbers(sizes))))


@host_op("Tile")
def _tile(node: Node, x: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return np.tile(x, numbers(repeats))


@host_op("Range")
def _range(node: Node, start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.arange(*(numbers(value)[0] for value in (start, limit, step)))
