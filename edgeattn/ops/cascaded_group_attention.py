"""CascadedGroupAttention: windowing, per-head cascade, softmax attention with bias, ReLU and projection in one op.

Liu et al., "EfficientViT", CVPR 2023 (arXiv 2305.07027), section 2.2, equations 3-5, in inference form (BatchNorm
folded). `QCascadedGroupAttention` is the same op with int8 weights: each weight is followed by its scale per output
channel; activations stay in floating point.

Shapes, with h heads, key width d, value width v = C / h, window (wh, ww), N = wh * ww tokens:
    x (B, C, H, W), qkv_weight (h * (2d + v), v, 1, 1), qkv_bias (h * (2d + v)), dw_weight (h * d, 1, K, K) with smaller
    kernels zero-padded to the odd K, dw_bias (h * d), attention_bias (h, N, N) rows are queries,
    proj_weight (C, C, 1, 1), proj_bias (C); the result has the shape of x.
A grid that the window does not divide is zero-padded at the bottom and right; padded tokens take part in the softmax.
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

_WEIGHTS = ("qkv_weight", "dw_weight", "proj_weight")
_INPUTS = ("x", "qkv_weight", "qkv_bias", "dw_weight", "dw_bias", "attention_bias", "proj_weight", "proj_bias")
_Q_INPUTS = with_scales(_INPUTS, _WEIGHTS)
_ATTRIBUTES = {"num_heads": 4, "key_dim": 16, "window": [7, 7], "scale": 0.25}


# 1. numpy reference -----------------------------------------------------------------------------------------------


def reference(
    x: np.ndarray, qkv_weight: np.ndarray, qkv_bias: np.ndarray, dw_weight: np.ndarray, dw_bias: np.ndarray,
    attention_bias: np.ndarray, proj_weight: np.ndarray, proj_bias: np.ndarray,
    *, num_heads: int, key_dim: int, window: Sequence[int], scale: float,
) -> tuple[np.ndarray]:  # fmt: skip
    """The definition, in float64."""
    x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, proj_bias = (
        np.asarray(a, np.float64)
        for a in (x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, proj_bias)
    )
    batch, channels, height, width = x.shape
    (win_h, win_w), value_dim = window, channels // num_heads
    rows, cols = -(-height // win_h), -(-width // win_w)
    padded = np.pad(x, ((0, 0), (0, 0), (0, rows * win_h - height), (0, cols * win_w - width)))
    result = np.empty_like(padded)
    for b, r, c in np.ndindex(batch, rows, cols):
        place = (b, slice(None), slice(r * win_h, (r + 1) * win_h), slice(c * win_w, (c + 1) * win_w))
        tokens = padded[place].reshape(channels, -1)
        heads: list[np.ndarray] = []
        for i in range(num_heads):
            chunk = tokens[i * value_dim : (i + 1) * value_dim] + (heads[-1] if i else 0)
            at = slice(i * (2 * key_dim + value_dim), (i + 1) * (2 * key_dim + value_dim))
            qkv = qkv_weight[at, :, 0, 0] @ chunk + qkv_bias[at, None]
            q, k, v = np.split(qkv, [key_dim, 2 * key_dim])
            at = slice(i * key_dim, (i + 1) * key_dim)
            q = _depthwise(q.reshape(key_dim, win_h, win_w), dw_weight[at, 0], dw_bias[at]).reshape(key_dim, -1)
            logits = q.T @ k * scale + attention_bias[i]
            weights = np.exp(logits - logits.max(1, keepdims=True))
            heads.append(v @ (weights / weights.sum(1, keepdims=True)).T)
        out = proj_weight[:, :, 0, 0] @ np.maximum(np.concatenate(heads), 0) + proj_bias[:, None]
        result[place] = out.reshape(channels, win_h, win_w)
    return (result[:, :, :height, :width],)


def _depthwise(q: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    side = weight.shape[-1]
    padded = np.pad(q, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    views = np.lib.stride_tricks.sliding_window_view(padded, [side, side], axis=(1, 2))  # type: ignore[call-overload]
    return np.einsum("cyxij,cij->cyx", views, weight) + bias[:, None, None]


def q_reference(*inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
    """The definition of the int8-weight form: dequantize, then `reference`."""
    values = dequantize_inputs(
        inputs, _INPUTS, _WEIGHTS, lambda w, scale: w.astype(np.float64) * scale[:, None, None, None]
    )
    return reference(*values, **attributes)


# 2. ONNX function body --------------------------------------------------------------------------------------------


def body(*, num_heads: int, quantized: bool = False, name: str = "", dtype: str = "float32", **_: Any) -> Any:
    """FunctionProto in standard ops; its structure depends on `num_heads` only, the rest are attribute references."""
    w = BodyWriter("cga", dtype)
    _constants(w)
    _partition(w)
    w.add("Split", ["windows"], [f"chunk_{i}" for i in range(num_heads)], axis=1, num_outputs=num_heads)
    for weight, bias in (("qkv_weight", "qkv_bias"), ("dw_weight", "dw_bias")):
        _split_weights(w, weight, bias, num_heads, quantized)
    w.add("Split", ["attention_bias"], [f"bias4_{i}" for i in range(num_heads)], axis=0, num_outputs=num_heads)
    for i in range(num_heads):
        _head(w, i)
    w.add("Concat", [f"out_{i}" for i in range(num_heads)], "heads", axis=1)
    w.add("Relu", ["heads"], "activated")
    proj = "proj_weight"
    if quantized:
        proj = "proj_weight_f"
        w.add("DequantizeLinear", ["proj_weight", "proj_scale"], proj, axis=0)
    w.add("Conv", ["activated", proj, "proj_bias"], "projected")
    _unpartition(w)
    inputs = _Q_INPUTS if quantized else _INPUTS
    default = "QCascadedGroupAttention" if quantized else "CascadedGroupAttention"
    return w.function(name or default, inputs, ("y",), tuple(_ATTRIBUTES))


def _constants(w: BodyWriter) -> None:
    w.attribute("key_dim", "key_dim", "value_int")
    w.attribute("window", "window", "value_ints")
    w.attribute("scale", "scale", "value_float")
    for name, value in (
        ("zero", [0]),
        ("one", [1]),
        ("two", [2]),
        ("minus_one", [-1]),
        ("keep2", [0, 0]),
        ("hw", [2, 3]),
    ):
        w.constant(name, value)
    w.constant("end", [2**31 - 1])
    w.add("Reshape", ["key_dim", "one"], "q_end")
    w.add("Mul", ["q_end", "two"], "k_end")


def _partition(w: BodyWriter) -> None:
    """x to `windows` (B * rows * cols, C, wh, ww); shapes are arithmetic on Shape, which runtimes fold when static."""
    w.add("Shape", ["x"], "channels", start=1, end=2)
    w.add("Shape", ["x"], "grid", start=2, end=4)
    w.add("Add", ["grid", "window"], "grid_up")
    w.add("Sub", ["grid_up", "one"], "grid_ceil")
    w.add("Div", ["grid_ceil", "window"], "counts")
    w.add("Mul", ["counts", "window"], "padded_grid")
    w.add("Sub", ["padded_grid", "grid"], "missing")
    w.add("Concat", ["keep2", "missing"], "pads", axis=0)
    w.add("Concat", ["keep2", "keep2", "pads"], "all_pads", axis=0)
    w.add("Pad", ["x", "all_pads"], "padded")
    w.add("Gather", ["counts", "zero"], "rows", axis=0)
    w.add("Gather", ["counts", "one"], "cols", axis=0)
    w.add("Gather", ["window", "zero"], "win_h", axis=0)
    w.add("Gather", ["window", "one"], "win_w", axis=0)
    w.add("Concat", ["keep2", "rows", "win_h", "cols", "win_w"], "split_shape", axis=0)
    w.add("Reshape", ["padded", "split_shape"], "split_grid")
    w.add("Transpose", ["split_grid"], "by_window", perm=[0, 2, 4, 1, 3, 5])
    w.add("Concat", ["minus_one", "channels", "window"], "window_shape", axis=0)
    w.add("Reshape", ["by_window", "window_shape"], "windows")


def _unpartition(w: BodyWriter) -> None:
    w.add("Concat", ["minus_one", "rows", "cols", "channels", "window"], "join_shape", axis=0)
    w.add("Reshape", ["projected", "join_shape"], "joined")
    w.add("Transpose", ["joined"], "by_grid", perm=[0, 3, 1, 4, 2, 5])
    w.add("Concat", ["minus_one", "channels", "padded_grid"], "grid_shape", axis=0)
    w.add("Reshape", ["by_grid", "grid_shape"], "whole")
    w.add("Slice", ["whole", "keep2", "grid", "hw"], "y")


def _split_weights(w: BodyWriter, weight: str, bias: str, num_heads: int, quantized: bool) -> None:
    short = weight.removesuffix("_weight")
    parts = [f"{short}_w_{i}" for i in range(num_heads)]
    w.add("Split", [bias], [f"{short}_b_{i}" for i in range(num_heads)], axis=0, num_outputs=num_heads)
    if not quantized:
        w.add("Split", [weight], parts, axis=0, num_outputs=num_heads)
        return
    # Split the integers, not their dequantized values: the split of a constant folds, a DequantizeLinear is kept.
    w.add("Split", [weight], [f"{p}_q" for p in parts], axis=0, num_outputs=num_heads)
    w.add("Split", [f"{short}_scale"], [f"{p}_s" for p in parts], axis=0, num_outputs=num_heads)
    for part in parts:
        w.add("DequantizeLinear", [f"{part}_q", f"{part}_s"], part, axis=0)


def _head(w: BodyWriter, i: int) -> None:
    source = f"chunk_{i}"
    if i:
        w.add("Add", [f"chunk_{i}", f"out_{i - 1}"], f"in_{i}")
        source = f"in_{i}"
    w.add("Conv", [source, f"qkv_w_{i}", f"qkv_b_{i}"], f"qkv_{i}")
    w.add("Slice", [f"qkv_{i}", "zero", "q_end", "one"], f"q_{i}")
    w.add("Slice", [f"qkv_{i}", "q_end", "k_end", "one"], f"k_{i}")
    w.add("Slice", [f"qkv_{i}", "k_end", "end", "one"], f"v_{i}")
    # Grouped by the key width; SAME_UPPER pads an odd kernel evenly, whatever its size.
    w.add("Conv", [f"q_{i}", f"dw_w_{i}", f"dw_b_{i}"], f"qd_{i}", auto_pad="SAME_UPPER")
    reference_attr = w.nodes[-1].attribute.add()
    reference_attr.name, reference_attr.ref_attr_name, reference_attr.type = "group", "key_dim", 2
    w.add("Concat", ["keep2", "minus_one"], f"flat_{i}", axis=0)
    for name in ("qd", "k", "v"):
        w.add("Reshape", [f"{name}_{i}", f"flat_{i}"], f"{name}f_{i}")
    w.add("Transpose", [f"qdf_{i}"], f"qt_{i}", perm=[0, 2, 1])
    w.add("Mul", [f"qt_{i}", "scale"], f"qs_{i}")
    w.add("MatMul", [f"qs_{i}", f"kf_{i}"], f"dot_{i}")
    w.add("Add", [f"dot_{i}", f"bias4_{i}"], f"logits_{i}")
    w.add("Softmax", [f"logits_{i}"], f"probs_{i}", axis=-1)
    w.add("Transpose", [f"probs_{i}"], f"probs_t_{i}", perm=[0, 2, 1])
    w.add("MatMul", [f"vf_{i}", f"probs_t_{i}"], f"of_{i}")
    w.add("Concat", ["keep2", "window"], f"square_{i}", axis=0)
    w.add("Reshape", [f"of_{i}", f"square_{i}"], f"out_{i}")


# 3. Shape rule ----------------------------------------------------------------------------------------------------


def infer_shape(*shapes: Sequence[int], num_heads: int, key_dim: int, window: Sequence[int], **_: Any) -> Any:
    """Shape of the result; every input is checked against x.

    Raises:
        UnsupportedOp: an input has the wrong shape; it is named with the expected one.
    """
    names = _Q_INPUTS if len(shapes) == len(_Q_INPUTS) else _INPUTS
    given = dict(zip(names, (tuple(s) for s in shapes), strict=True))
    if len(given["x"]) != 4 or given["x"][1] % num_heads:
        raise UnsupportedOp(
            f"CascadedGroupAttention: x is {given['x']}; expected (B, C, H, W) with C divisible by {num_heads} heads."
        )
    channels, tokens = given["x"][1], window[0] * window[1]
    value_dim, side = channels // num_heads, given["dw_weight"][-1]
    width = num_heads * (2 * key_dim + value_dim)
    expected: dict[str, tuple[int, ...]] = {
        "qkv_weight": (width, value_dim, 1, 1), "qkv_scale": (width,), "qkv_bias": (width,),
        "dw_weight": (num_heads * key_dim, 1, side, side), "dw_scale": (num_heads * key_dim,),
        "dw_bias": (num_heads * key_dim,), "attention_bias": (num_heads, tokens, tokens),
        "proj_weight": (channels, channels, 1, 1), "proj_scale": (channels,), "proj_bias": (channels,),
    }  # fmt: skip
    for name, shape in given.items():
        if name != "x" and shape != expected[name]:
            raise UnsupportedOp(
                f"CascadedGroupAttention: {name} is {shape}, expected {expected[name]} for x {given['x']}, "
                f"{num_heads} heads, key width {key_dim}, window {tuple(window)}."
            )
    if side % 2 == 0:
        raise UnsupportedOp(
            f"CascadedGroupAttention: depthwise kernel side {side} is even; pad it with zeros to an odd side."
        )
    return (given["x"],)


# 4. Torch custom op and registration ------------------------------------------------------------------------------


@torch_op("edgeattn::cascaded_group_attention")
def cascaded_group_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, dw_weight: Tensor, dw_bias: Tensor, attention_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, num_heads: int, key_dim: int, window: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """The op in eager torch, in the dtype of x; shapes as on top of this file."""
    batch, channels, height, width = x.shape
    infer_shape(
        *(t.shape for t in (x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, proj_bias)),
        num_heads=num_heads, key_dim=key_dim, window=window,
    )  # fmt: skip
    (win_h, win_w), value_dim = window, channels // num_heads
    rows, cols = -(-height // win_h), -(-width // win_w)
    x = F.pad(x, (0, cols * win_w - width, 0, rows * win_h - height))
    x = (
        x.reshape(batch, channels, rows, win_h, cols, win_w)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(-1, channels, win_h, win_w)
    )
    qkv_w, qkv_b, dw_w, dw_b = (t.chunk(num_heads) for t in (qkv_weight, qkv_bias, dw_weight, dw_bias))
    outputs: list[Tensor] = []
    for i, chunk in enumerate(x.chunk(num_heads, 1)):
        head_in = chunk + outputs[-1] if i else chunk
        q, k, v = F.conv2d(head_in, qkv_w[i], qkv_b[i]).split([key_dim, key_dim, value_dim], 1)
        q = F.conv2d(q, dw_w[i], dw_b[i], padding=dw_w[i].shape[-1] // 2, groups=key_dim)
        logits = (q.flatten(2).transpose(1, 2) * scale) @ k.flatten(2) + attention_bias[i]
        out = v.flatten(2) @ logits.softmax(-1).transpose(1, 2)
        outputs.append(out.reshape(-1, value_dim, win_h, win_w))
    y = F.conv2d(F.relu(torch.cat(outputs, 1)), proj_weight, proj_bias)
    y = y.reshape(batch, rows, cols, channels, win_h, win_w).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(batch, channels, rows * win_h, cols * win_w)[:, :, :height, :width].contiguous()


@torch_op("edgeattn::q_cascaded_group_attention")
def q_cascaded_group_attention(
    x: Tensor, qkv_weight: Tensor, qkv_scale: Tensor, qkv_bias: Tensor, dw_weight: Tensor, dw_scale: Tensor,
    dw_bias: Tensor, attention_bias: Tensor, proj_weight: Tensor, proj_scale: Tensor, proj_bias: Tensor,
    num_heads: int, key_dim: int, window: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """`cascaded_group_attention` with int8 weights, each followed by its scale per output channel."""
    inputs = (
        x,
        qkv_weight,
        qkv_scale,
        qkv_bias,
        dw_weight,
        dw_scale,
        dw_bias,
        attention_bias,
        proj_weight,
        proj_scale,
        proj_bias,
    )
    values = dequantize_inputs(inputs, _INPUTS, _WEIGHTS, lambda w, s: w.to(s.dtype) * s[:, None, None, None])
    return cascaded_group_attention(*values, num_heads, key_dim, window, scale)


@cascaded_group_attention.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@q_cascaded_group_attention.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_op(OpSpec(
    name="CascadedGroupAttention", inputs=_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=reference,
    body=body, infer_shape=infer_shape, torch_op="edgeattn::cascaded_group_attention", signature=("num_heads",),
    weights=_WEIGHTS, quantized="QCascadedGroupAttention",
))  # fmt: skip
register_op(OpSpec(
    name="QCascadedGroupAttention", inputs=_Q_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=q_reference,
    body=lambda **attributes: body(quantized=True, **attributes), infer_shape=infer_shape,
    torch_op="edgeattn::q_cascaded_group_attention", signature=("num_heads",),
))  # fmt: skip
