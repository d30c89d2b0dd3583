"""ONNX ops on tensors, element by element or along axes. Definitions: https://onnx.ai/onnx/operators.

The other ops are in `ops_shape` and `ops_nn`; `load_onnx_ops` has them all. To add one: a function of the
node and its inputs under `@onnx_op`, and a row in tests/models/from_onnx/test_ops.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.models.from_onnx.node import HOST_OPS, OPS, Node, Op, numbers, onnx_op

_MODULES = ("host", "ops_shape", "ops_nn")
_FLAT_SOFTMAX = 13  # before this opset softmax took all axes from `axis` on as one


def load_onnx_ops() -> tuple[dict[str, Op], dict[str, Callable[..., Any]]]:
    """Both tables with every op in them, by ONNX name: on tensors, and on host values."""
    for module in _MODULES:
        importlib.import_module(f"edgeattn.models.from_onnx.{module}")
    return OPS, HOST_OPS


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp,
    "Log": torch.log, "Erf": torch.erf, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Sign": torch.sign, "Sin": torch.sin, "Cos": torch.cos, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid,
    "Relu": torch.relu, "Softplus": F.softplus, "Softsign": F.softsign, "Mish": F.mish, "HardSwish": F.hardswish,
    "Identity": lambda x: x, "Not": torch.logical_not, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow,
    "Where": torch.where, "MatMul": torch.matmul,
}  # fmt: skip


def _plain(node: Node, *values: Tensor) -> Tensor:
    return _PLAIN[node.op](*values)


onnx_op(*_PLAIN)(_plain)


@onnx_op("Div")
def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


@onnx_op("Mod")
def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@onnx_op("Sum", "Mean", "Min", "Max")
def _variadic(node: Node, *values: Tensor) -> Tensor:
    step = {"Min": torch.minimum, "Max": torch.maximum}.get(node.op, torch.add)
    total = functools.reduce(step, values)
    return total / len(values) if node.op == "Mean" else total


@onnx_op("Cast")
def _cast(node: Node, x: Tensor) -> Tensor:
    return x.to(torch_dtype(node, node.get("to")))


@onnx_op("CastLike")
def _cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def torch_dtype(node: Node, number: int) -> torch.dtype:
    """torch's type for ONNX's number of it."""
    try:
        return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(number))).dtype
    except (TypeError, KeyError) as error:
        raise node.refuse(f"element type {number}", "float32, integers or bool") from error


@onnx_op("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@onnx_op("PRelu", names={1: "slope"})
def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


@onnx_op("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Tensor) -> Tensor:
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@onnx_op("Elu")
def _elu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@onnx_op("Celu")
def _celu(node: Node, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@onnx_op("Selu")
def _selu(node: Node, x: Tensor) -> Tensor:
    return node.get("gamma", 1.0507009873554805) * F.elu(x, node.get("alpha", 1.6732632423543772))


@onnx_op("Gelu")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@onnx_op("Swish")
def _swish(node: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


@onnx_op("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


@onnx_op("Clip", host=(1, 2))
def _clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    least = node.get("min") if low is None else numbers(low)[0]
    most = node.get("max") if high is None else numbers(high)[0]
    return x if least is None and most is None else torch.clamp(x, least, most)


@onnx_op("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    if node.opset >= _FLAT_SOFTMAX:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), -1).reshape(x.shape)


@onnx_op("Dropout", host=(1, 2))
def _dropout(node: Node, x: Tensor, ratio: Any = None, training: Any = None) -> Tensor:
    if training is not None and numbers(training)[0]:
        raise node.refuse("training_mode true", "an inference model")
    only_first(node)
    return x


def only_first(node: Node) -> None:
    """Refuse a node of which more than the first output is used."""
    used = [name for name in node.outputs[1:] if name]
    if used:
        raise node.refuse(f"its output {used[0]!r}", "that only the first output is used")


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim),
    "ReduceL2": lambda x, axes, keepdim: (x * x).sum(axes, keepdim).sqrt(),
    "ReduceSumSquare": lambda x, axes, keepdim: (x * x).sum(axes, keepdim),
}  # fmt: skip


def _axes(node: Node, x: Tensor, given: Any) -> list[int] | None:
    """The axes of a reduction, none negative; None: it does nothing."""
    axes = node.get("axes") if given is None else numbers(given)
    if not axes:
        return None if node.get("noop_with_empty_axes", 0) else list(range(x.dim()))
    return sorted(axis % x.dim() for axis in axes)


@onnx_op(*_REDUCTIONS, host=(1,))
def _reduce(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    chosen = _axes(node, x, axes)
    return x if chosen is None else _REDUCTIONS[node.op](x, chosen, keepdim=bool(node.get("keepdims", 1)))


@onnx_op("ReduceProd", host=(1,))
def _reduce_prod(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    for axis in reversed(_axes(node, x, axes) or []):
        x = torch.prod(x, axis, keepdim=bool(node.get("keepdims", 1)))
    return x


@onnx_op("ArgMax", "ArgMin")
def _arg(node: Node, x: Tensor) -> Tensor:
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    axis, keepdim = node.get("axis", 0), bool(node.get("keepdims", 1))
    if node.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim)
    return function(x, axis, keepdim)


@onnx_op("TopK", host=(1,))
def _top_k(node: Node, x: Tensor, k: Any) -> tuple[Tensor, Tensor]:
    largest, is_sorted = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    values, indices = torch.topk(x, numbers(k)[0], node.get("axis", -1), largest, is_sorted)
    return values, indices


@onnx_op("CumSum", host=(1,))
def _cumsum(node: Node, x: Tensor, axis: Any) -> Tensor:
    along = numbers(axis)[0]
    turned = x.flip(along) if node.get("reverse", 0) else x
    total = turned.cumsum(along)
    total = total - turned if node.get("exclusive", 0) else total
    return total.flip(along) if node.get("reverse", 0) else total


@onnx_op("LpNormalization")
def _lp_normalization(node: Node, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)


@onnx_op("Einsum")
def _einsum(node: Node, *values: Tensor) -> Tensor:
    return torch.einsum(node.get("equation"), *values)
