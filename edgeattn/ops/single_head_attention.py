"""SingleHeadAttention: group norm over the whole map, one projection to q, k and v, softmax attention, no bias table.

Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024 (arXiv 2401.16456),
section 3.2, on the channels that take part in attention; in inference form: BatchNorm and the norm's affine part are
folded into the projection. The untouched channels, concatenation and output projection stay outside, where they are
ordinary (int8) convolutions. `QSingleHeadAttention` is the same op with an int8 projection weight and its scale.

Shapes, with p channels, key width d, N = H * W tokens: x (B, p, H, W), qkv_weight (2d + p, p, 1, 1), qkv_bias (2d + p);
the result has the shape of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import BodyWriter, OpSpec, dequantize_inputs, register_op, with_scales
from edgeattn.ops.torch_op import torch_op

_WEIGHTS = ("qkv_weight",)
_INPUTS = ("x", "qkv_weight", "qkv_bias")
_Q_INPUTS = with_scales(_INPUTS, _WEIGHTS)
_ATTRIBUTES = {"key_dim": 16, "scale": 0.25, "epsilon": 1e-5}


# 1. numpy reference -----------------------------------------------------------------------------------------------


def reference(
    x: np.ndarray, qkv_weight: np.ndarray, qkv_bias: np.ndarray, *, key_dim: int, scale: float, epsilon: float
) -> tuple[np.ndarray]:
    """The definition, in float64."""
    x, qkv_weight, qkv_bias = (np.asarray(a, np.float64) for a in (x, qkv_weight, qkv_bias))
    batch, channels, height, width = x.shape
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    tokens = ((x - mean) / np.sqrt(var + epsilon)).reshape(batch, channels, -1)
    q, k, v = np.split(qkv_weight[:, :, 0, 0] @ tokens + qkv_bias[:, None], [key_dim, 2 * key_dim], axis=1)
    logits = q.transpose(0, 2, 1) @ k * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return ((v @ weights.transpose(0, 2, 1)).reshape(batch, channels, height, width),)


def q_reference(*inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
    """The definition of the int8-weight form: dequantize, then `reference`."""
    values = dequantize_inputs(
        inputs, _INPUTS, _WEIGHTS, lambda w, scale: w.astype(np.float64) * scale[:, None, None, None]
    )
    return reference(*values, **attributes)


# 2. ONNX function body --------------------------------------------------------------------------------------------


def body(*, quantized: bool = False, name: str = "", dtype: str = "float32", **_: Any) -> Any:
    """FunctionProto in standard ops; the same for all attribute values."""
    w = BodyWriter("sha", dtype)
    w.attribute("key_dim", "key_dim", "value_int")
    w.attribute("scale", "scale", "value_float")
    for constant, value in (("zero", [0]), ("one", [1]), ("two", [2]), ("axes", [1, 2, 3]), ("flat", [0, 0, -1])):
        w.constant(constant, value)
    w.constant("end", [2**31 - 1])
    w.add("Reshape", ["key_dim", "one"], "q_end")
    w.add("Mul", ["q_end", "two"], "k_end")
    _normalise(w)
    weight = "qkv_weight"
    if quantized:
        weight = "qkv_weight_f"
        w.add("DequantizeLinear", ["qkv_weight", "qkv_scale"], weight, axis=0)
    w.add("Conv", ["normed", weight, "qkv_bias"], "qkv")
    for part, start, end in (("q", "zero", "q_end"), ("k", "q_end", "k_end"), ("v", "k_end", "end")):
        w.add("Slice", ["qkv", start, end, "one"], part)
        w.add("Reshape", [part, "flat"], f"{part}_flat")
    w.add("Transpose", ["q_flat"], "q_t", perm=[0, 2, 1])
    w.add("Mul", ["q_t", "scale"], "q_scaled")
    w.add("MatMul", ["q_scaled", "k_flat"], "logits")
    w.add("Softmax", ["logits"], "probs", axis=-1)
    w.add("Transpose", ["probs"], "probs_t", perm=[0, 2, 1])
    w.add("MatMul", ["v_flat", "probs_t"], "out_flat")
    w.add("Shape", ["x"], "x_shape")
    w.add("Reshape", ["out_flat", "x_shape"], "y")
    default = "QSingleHeadAttention" if quantized else "SingleHeadAttention"
    return w.function(name or default, _Q_INPUTS if quantized else _INPUTS, ("y",), tuple(_ATTRIBUTES))


def _normalise(w: BodyWriter) -> None:
    """x to `normed`, in float32: a sum over the whole map overflows float16.

    Written out, because InstanceNormalization's epsilon attribute and GroupNormalization's opset differ by runtime.
    """
    w.attribute("epsilon", "epsilon", "value_float", dtype="float32")
    wide, result = ("x", "normed") if w.dtype == "float32" else ("x_wide", "normed_wide")
    if wide != "x":
        w.cast("x", wide, "float32")
    w.add("ReduceMean", [wide, "axes"], "mean", keepdims=1)
    w.add("Sub", [wide, "mean"], "centred")
    w.add("Mul", ["centred", "centred"], "squared")
    w.add("ReduceMean", ["squared", "axes"], "variance", keepdims=1)
    w.add("Add", ["variance", "epsilon"], "variance_eps")
    w.add("Sqrt", ["variance_eps"], "deviation")
    w.add("Div", ["centred", "deviation"], result)
    if result != "normed":
        w.cast(result, "normed", w.dtype)


# 3. Shape rule ----------------------------------------------------------------------------------------------------


def infer_shape(*shapes: Sequence[int], key_dim: int, **_: Any) -> Any:
    """Shape of the result.

    Raises:
        UnsupportedOp: an input has the wrong shape; it is named with the expected one.
    """
    names = _Q_INPUTS if len(shapes) == len(_Q_INPUTS) else _INPUTS
    given = dict(zip(names, (tuple(s) for s in shapes), strict=True))
    if len(given["x"]) != 4:
        raise UnsupportedOp(f"SingleHeadAttention: x is {given['x']}; expected (B, channels, H, W).")
    channels = given["x"][1]
    width = 2 * key_dim + channels
    expected = {"qkv_weight": (width, channels, 1, 1), "qkv_scale": (width,), "qkv_bias": (width,)}
    for name, shape in given.items():
        if name != "x" and shape != expected[name]:
            raise UnsupportedOp(
                f"SingleHeadAttention: {name} is {shape}, expected {expected[name]} for x {given['x']}, "
                f"key width {key_dim}."
            )
    return (given["x"],)


# 4. Torch custom op and registration ------------------------------------------------------------------------------


@torch_op("edgeattn::single_head_attention")
def single_head_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, key_dim: int, scale: float, epsilon: float
) -> Tensor:
    """The op in eager torch, in the dtype of x; shapes as on top of this file."""
    infer_shape(x.shape, qkv_weight.shape, qkv_bias.shape, key_dim=key_dim)
    qkv = F.conv2d(F.group_norm(x, 1, eps=epsilon), qkv_weight, qkv_bias).flatten(2)
    q, k, v = qkv.split([key_dim, key_dim, x.shape[1]], 1)
    logits = (q.transpose(1, 2) * scale) @ k
    return (v @ logits.softmax(-1).transpose(1, 2)).reshape(x.shape)


@torch_op("edgeattn::q_single_head_attention")
def q_single_head_attention(
    x: Tensor, qkv_weight: Tensor, qkv_scale: Tensor, qkv_bias: Tensor, key_dim: int, scale: float, epsilon: float
) -> Tensor:
    """`single_head_attention` with an int8 weight and its scale per output channel."""
    inputs = (x, qkv_weight, qkv_scale, qkv_bias)
    values = dequantize_inputs(inputs, _INPUTS, _WEIGHTS, lambda w, s: w.to(s.dtype) * s[:, None, None, None])
    return single_head_attention(*values, key_dim, scale, epsilon)


@single_head_attention.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@q_single_head_attention.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_op(OpSpec(
    name="SingleHeadAttention", inputs=_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=reference,
    body=body, infer_shape=infer_shape, torch_op="edgeattn::single_head_attention", weights=_WEIGHTS,
    quantized="QSingleHeadAttention",
))  # fmt: skip
register_op(OpSpec(
    name="QSingleHeadAttention", inputs=_Q_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=q_reference,
    body=lambda **attributes: body(quantized=True, **attributes), infer_shape=infer_shape,
    torch_op="edgeattn::q_single_head_attention",
))  # fmt: skip
