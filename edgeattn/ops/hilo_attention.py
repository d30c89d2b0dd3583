"""HiLoAttention: windowed attention for high frequencies beside attention over a pooled map for low ones.

Pan et al., "Fast Vision Transformers with HiLo Attention", NeurIPS 2022 (arXiv 2205.13213), section 4. The op is what
lies between the projections, which stay outside as ordinary (int8) linear layers. With all heads in one of the parts
(alpha 0 or 1) that part is standard attention, and the model uses that.

Shapes, with an H x W grid of N tokens (row by row), windows of s x s, heads of width d, lo and hi heads:
    lo_q (B, N, lo * d), lo_kv (B, N / s^2, 2 * lo * d): k before v, from the s x s average-pooled map,
    hi_qkv (B, N, 3 * hi * d): q, k, v; each part head by head; the result is (B, N, (hi + lo) * d), Hi first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import BodyWriter, OpSpec, register_op
from edgeattn.ops.torch_op import torch_op

_INPUTS = ("lo_q", "lo_kv", "hi_qkv")
_ATTRIBUTES = {"grid": [14, 14], "window": 2, "head_dim": 32, "scale": 32**-0.5}


# 1. numpy reference -----------------------------------------------------------------------------------------------


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, head_dim: int, scale: float) -> np.ndarray:
    """(tokens, C) queries over (keys, C), head by head."""
    out = np.empty_like(q)
    for start in range(0, q.shape[1], head_dim):
        at = slice(start, start + head_dim)
        logits = q[:, at] @ k[:, at].T * scale
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[:, at] = weights / weights.sum(1, keepdims=True) @ v[:, at]
    return out


def reference(
    lo_q: np.ndarray, lo_kv: np.ndarray, hi_qkv: np.ndarray,
    *, grid: Sequence[int], window: int, head_dim: int, scale: float,
) -> tuple[np.ndarray]:  # fmt: skip
    """The definition, in float64."""
    lo_q, lo_kv, hi_qkv = (np.asarray(a, np.float64) for a in (lo_q, lo_kv, hi_qkv))
    (height, width), hi = grid, hi_qkv.shape[2] // 3
    place = np.arange(height * width).reshape(height, width)
    out = np.empty((*lo_q.shape[:2], hi + lo_q.shape[2]))
    for b in range(len(lo_q)):
        out[b, :, hi:] = _attend(lo_q[b], *np.split(lo_kv[b], 2, 1), head_dim=head_dim, scale=scale)
        for r, c in np.ndindex(height // window, width // window):
            tokens = place[r * window : (r + 1) * window, c * window : (c + 1) * window].ravel()
            out[b, tokens, :hi] = _attend(*np.split(hi_qkv[b, tokens], 3, 1), head_dim=head_dim, scale=scale)
    return (out,)


# 2. ONNX function body --------------------------------------------------------------------------------------------


def _attention(w: BodyWriter, part: str) -> None:
    """Nodes from `PART_query`, `PART_k`, `PART_v` of shape (B, heads, tokens, d) to `PART_out`."""
    w.add("Transpose", [f"{part}_k"], f"{part}_kt", perm=[0, 1, 3, 2])
    w.add("Mul", [f"{part}_query", "scale"], f"{part}_q_scaled")
    w.add("MatMul", [f"{part}_q_scaled", f"{part}_kt"], f"{part}_logits")
    w.add("Softmax", [f"{part}_logits"], f"{part}_probs", axis=-1)
    w.add("MatMul", [f"{part}_probs", f"{part}_v"], f"{part}_out")


def _lo(w: BodyWriter) -> None:
    """Low frequencies: every token attends to the pooled map; makes `lo`."""
    w.add("Concat", ["keep", "keep", "minus", "width"], "heads_shape", axis=0)
    w.add("Split", ["lo_kv"], ["lo_kv_k", "lo_kv_v"], axis=2, num_outputs=2)
    for source, part in (("lo_q", "lo_query"), ("lo_kv_k", "lo_k"), ("lo_kv_v", "lo_v")):
        w.add("Reshape", [source, "heads_shape"], f"{part}_tokens")
        w.add("Transpose", [f"{part}_tokens"], part, perm=[0, 2, 1, 3])
    _attention(w, "lo")
    w.add("Transpose", ["lo_out"], "lo_tokens", perm=[0, 2, 1, 3])
    w.add("Shape", ["lo_q"], "lo_shape")
    w.add("Reshape", ["lo_tokens", "lo_shape"], "lo")


def _hi(w: BodyWriter) -> None:
    """High frequencies: attention inside windows folded into the batch; makes `hi`."""
    w.add("Div", ["grid", "side"], "windows")
    w.add("Split", ["windows"], ["rows", "columns"], axis=0, num_outputs=2)
    w.add("Shape", ["hi_qkv"], "hi_shape")
    w.add("Split", ["hi_shape"], ["batch", "tokens", "hi_width"], axis=0, num_outputs=3)
    w.add("Div", ["hi_width", "three"], "hi_part")
    w.add("Div", ["hi_part", "width"], "hi_heads")
    w.add("Concat", ["batch", "rows", "side", "columns", "side", "three", "hi_heads", "width"], "map_shape", axis=0)
    w.add("Reshape", ["hi_qkv", "map_shape"], "hi_map")
    w.add("Transpose", ["hi_map"], "hi_windows", perm=[5, 0, 1, 3, 6, 2, 4, 7])  # 3, B, rows, columns, heads, s, s, d
    w.add("Mul", ["side", "side"], "per_window")
    w.add("Concat", ["three", "minus", "hi_heads", "per_window", "width"], "folded_shape", axis=0)
    w.add("Reshape", ["hi_windows", "folded_shape"], "hi_folded")
    w.add("Split", ["hi_folded"], ["hi_q_one", "hi_k_one", "hi_v_one"], axis=0, num_outputs=3)
    for part in ("hi_query", "hi_k", "hi_v"):
        w.add("Squeeze", [f"hi_{part[3]}_one", "first"], part)
    _attention(w, "hi")
    w.add("Concat", ["batch", "rows", "columns", "hi_heads", "side", "side", "width"], "back_shape", axis=0)
    w.add("Reshape", ["hi_out", "back_shape"], "hi_back")
    w.add("Transpose", ["hi_back"], "hi_rows", perm=[0, 1, 4, 2, 5, 3, 6])  # B, rows, s, columns, s, heads, d
    w.add("Concat", ["batch", "tokens", "hi_part"], "hi_out_shape", axis=0)
    w.add("Reshape", ["hi_rows", "hi_out_shape"], "hi")


def body(*, name: str = "", dtype: str = "float32", **_: Any) -> Any:
    """FunctionProto in standard ops; the same for all attribute values."""
    w = BodyWriter("hilo", dtype)
    for attribute, kind in (
        ("grid", "value_ints"), ("window", "value_int"), ("head_dim", "value_int"), ("scale", "value_float")
    ):  # fmt: skip
        w.attribute(attribute, attribute, kind)
    for constant, value in (("unit", [1]), ("keep", [0]), ("minus", [-1]), ("three", [3]), ("first", [0])):
        w.constant(constant, value)
    w.add("Reshape", ["window", "unit"], "side")
    w.add("Reshape", ["head_dim", "unit"], "width")
    _hi(w)
    _lo(w)
    w.add("Concat", ["hi", "lo"], "y", axis=2)
    return w.function(name or "HiLoAttention", _INPUTS, ("y",), tuple(_ATTRIBUTES))


# 3. Shape rule ----------------------------------------------------------------------------------------------------


def infer_shape(
    lo_q: Sequence[int], lo_kv: Sequence[int], hi_qkv: Sequence[int],
    *, grid: Sequence[int], window: int, head_dim: int, **_: Any,
) -> Any:  # fmt: skip
    """Shape of the result.

    Raises:
        UnsupportedOp: the window does not divide the grid, or an input has the wrong shape; it is named.
    """
    lo_q, lo_kv, hi_qkv = tuple(lo_q), tuple(lo_kv), tuple(hi_qkv)
    height, width = grid
    if height % window or width % window:
        raise UnsupportedOp(f"HiLoAttention: windows of {window} do not divide the grid {height}x{width}.")
    tokens = height * width
    if len(lo_q) != 3 or lo_q[1] != tokens or lo_q[2] % head_dim or not lo_q[2]:
        raise UnsupportedOp(f"HiLoAttention: lo_q is {lo_q}; expected (B, {tokens}, heads * {head_dim}).")
    expected = (lo_q[0], tokens // window**2, 2 * lo_q[2])
    if lo_kv != expected:
        raise UnsupportedOp(f"HiLoAttention: lo_kv is {lo_kv}, expected {expected} for lo_q {lo_q}, window {window}.")
    if hi_qkv[:2] != lo_q[:2] or len(hi_qkv) != 3 or hi_qkv[2] % (3 * head_dim) or not hi_qkv[2]:
        raise UnsupportedOp(f"HiLoAttention: hi_qkv is {hi_qkv}; expected {lo_q[:2]} and 3 * heads * {head_dim}.")
    return ((*lo_q[:2], hi_qkv[2] // 3 + lo_q[2]),)


# 4. Torch custom op and registration ------------------------------------------------------------------------------


def lo_attention(q: Tensor, kv: Tensor, head_dim: int, scale: float) -> Tensor:
    """q (B, N, C) over k, v in kv (B, M, 2C) to (B, N, C), in plain differentiable torch."""
    q, k, v = (part.unflatten(2, (-1, head_dim)).transpose(1, 2) for part in (q, *kv.chunk(2, 2)))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def hi_attention(qkv: Tensor, grid: Sequence[int], window: int, head_dim: int, scale: float) -> Tensor:
    """qkv (B, H * W, 3C) inside windows to (B, H * W, C), in plain differentiable torch."""
    rows, columns = grid[0] // window, grid[1] // window
    x = qkv.unflatten(2, (3, -1, head_dim)).unflatten(1, (rows, window, columns, window))
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # 3, B, rows, columns, heads, s, s, d
    q, k, v = x.flatten(5, 6).flatten(1, 3)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    out = out.unflatten(0, (-1, rows, columns)).unflatten(4, (window, window))
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(1, 4)


@torch_op("edgeattn::hilo_attention")
def hilo_attention(
    lo_q: Tensor, lo_kv: Tensor, hi_qkv: Tensor, grid: Sequence[int], window: int, head_dim: int, scale: float
) -> Tensor:
    """The op in eager torch, in the dtype of the inputs; shapes as on top of this file."""
    infer_shape(lo_q.shape, lo_kv.shape, hi_qkv.shape, grid=grid, window=window, head_dim=head_dim)
    hi = hi_attention(hi_qkv, grid, window, head_dim, scale)
    return torch.cat([hi, lo_attention(lo_q, lo_kv, head_dim, scale)], 2)


@hilo_attention.register_fake
def _(lo_q: Tensor, lo_kv: Tensor, hi_qkv: Tensor, *_: Any) -> Tensor:
    return lo_q.new_empty(*lo_q.shape[:2], hi_qkv.shape[2] // 3 + lo_q.shape[2])


register_op(OpSpec(
    name="HiLoAttention", inputs=_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=reference,
    body=body, infer_shape=infer_shape, torch_op="edgeattn::hilo_attention",
))  # fmt: skip
