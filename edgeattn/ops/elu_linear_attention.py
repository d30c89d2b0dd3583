"""EluLinearAttention: attention with the kernel elu(x) + 1 and its normaliser, in time linear in the number of tokens.

Katharopoulos et al., "Transformers are RNNs", ICML 2020 (arXiv 2006.16236), section 3.2, in the form of Zhou et al.,
"CARE Transformer", CVPR 2025 (arXiv 2411.16170), section 3.1: v is the input itself, there is no output projection.
The projection to q and k stays outside, where it is an ordinary (int8) convolution.

Shapes, with h heads of width d, C = h * d channels, N = H * W tokens: qk (B, 2C, H, W), q before k, each head by head;
v (B, C, H, W); the result has the shape and type of v. Sums run in float32 whatever the input type.

Not ONNX's LinearAttention (opset 27), which is causal and has no normaliser; the name differs because parsers look at
the op type and ignore the domain.
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

EPSILON = 1e-6
_INPUTS = ("qk", "v")
_ATTRIBUTES = {"num_heads": 4, "epsilon": EPSILON}


# 1. numpy reference -----------------------------------------------------------------------------------------------


def reference(qk: np.ndarray, v: np.ndarray, *, num_heads: int, epsilon: float) -> tuple[np.ndarray]:
    """The definition, in float64."""
    qk, v = np.asarray(qk, np.float64), np.asarray(v, np.float64)
    q, k, values = (part.reshape(len(v), num_heads, -1, v.shape[2] * v.shape[3]) for part in (*np.split(qk, 2, 1), v))
    q, k = (np.where(part > 0, part, np.expm1(np.minimum(part, 0))) + 1 for part in (q, k))
    weights = np.einsum("bhdn,bhdm->bhnm", q, k)  # (queries, keys), never formed by the fused forms
    weights /= values.shape[-1] * (q.transpose(0, 1, 3, 2) @ k.mean(-1, keepdims=True) + epsilon)
    return (np.einsum("bhnm,bhdm->bhdn", weights, values).reshape(v.shape),)


# 2. ONNX function body --------------------------------------------------------------------------------------------


def body(*, name: str = "", dtype: str = "float32", **_: Any) -> Any:
    """FunctionProto in standard ops; the same for all attribute values. It computes in float32 whatever the dtype."""
    w = BodyWriter("lin")
    is_wide = dtype == "float32"
    w.attribute("num_heads", "num_heads", "value_int")
    w.attribute("epsilon", "epsilon", "value_float")
    for constant, value in (("unit", [1]), ("minus", [-1]), ("last", [3]), ("batch", [0])):
        w.constant(constant, value)
    w.constant("one", 1.0)
    w.add("Reshape", ["num_heads", "unit"], "heads")
    w.add("Shape", ["v"], "v_shape")
    w.add("Shape", ["v"], "grid", start=2)
    w.add("ReduceProd", ["grid"], "tokens", keepdims=1)
    w.add("Concat", ["batch", "heads", "minus", "tokens"], "split_shape", axis=0)
    w.add("Split", ["qk"], ["q_map", "k_map"], axis=1, num_outputs=2)
    for part, source in (("q", "q_map"), ("k", "k_map"), ("value", "v")):
        if not is_wide:
            w.cast(source, f"{part}_wide", "float32")
        w.add("Reshape", [source if is_wide else f"{part}_wide", "split_shape"], f"{part}_heads")
    for part in ("q", "k"):
        w.add("Elu", [f"{part}_heads"], f"{part}_elu")
        w.add("Add", [f"{part}_elu", "one"], f"{part}_phi")
    w.add("ReduceMean", ["k_phi", "last"], "k_mean", keepdims=1)
    w.cast("tokens", "count", "float32")
    w.add("Div", ["value_heads", "count"], "value_share")
    w.add("Transpose", ["k_phi"], "k_t", perm=[0, 1, 3, 2])
    w.add("MatMul", ["value_share", "k_t"], "context")
    w.add("MatMul", ["context", "q_phi"], "unnormed")
    w.add("Transpose", ["k_mean"], "k_mean_t", perm=[0, 1, 3, 2])
    w.add("MatMul", ["k_mean_t", "q_phi"], "weight_sum")
    w.add("Add", ["weight_sum", "epsilon"], "weight_sum_eps")
    w.add("Div", ["unnormed", "weight_sum_eps"], "normed")
    w.add("Reshape", ["normed", "v_shape"], "y" if is_wide else "y_wide")
    if not is_wide:
        w.cast("y_wide", "y", dtype)
    return w.function(name or "EluLinearAttention", _INPUTS, ("y",), tuple(_ATTRIBUTES))


# 3. Shape rule ----------------------------------------------------------------------------------------------------


def infer_shape(qk: Sequence[int], v: Sequence[int], *, num_heads: int, **_: Any) -> Any:
    """Shape of the result.

    Raises:
        UnsupportedOp: an input has the wrong shape; it is named with the expected one.
    """
    qk, v = tuple(qk), tuple(v)
    if len(v) != 4 or v[1] % num_heads:
        raise UnsupportedOp(
            f"EluLinearAttention: v is {v}; expected (B, channels, H, W), channels a multiple of {num_heads}."
        )
    expected = (v[0], 2 * v[1], *v[2:])
    if qk != expected:
        raise UnsupportedOp(f"EluLinearAttention: qk is {qk}, expected {expected} for v {v}.")
    return (v,)


# 4. Torch custom op and registration ------------------------------------------------------------------------------


@torch_op("edgeattn::elu_linear_attention")
def elu_linear_attention(qk: Tensor, v: Tensor, num_heads: int, epsilon: float) -> Tensor:
    """The op in eager torch; shapes as on top of this file."""
    infer_shape(qk.shape, v.shape, num_heads=num_heads)
    return linear_attention_formula(qk, v, num_heads, epsilon)


def linear_attention_formula(qk: Tensor, v: Tensor, num_heads: int, epsilon: float = EPSILON) -> Tensor:
    """The same in plain differentiable torch."""
    q, k, values = (part.flatten(2).unflatten(1, (num_heads, -1)).float() for part in (*qk.chunk(2, 1), v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = (values / values.shape[-1]) @ k.transpose(2, 3)
    out = (context @ q) / (k.mean(-1, keepdim=True).transpose(2, 3) @ q + epsilon)
    return out.to(v.dtype).reshape(v.shape)


@elu_linear_attention.register_fake
def _(qk: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


register_op(OpSpec(
    name="EluLinearAttention", inputs=_INPUTS, outputs=("y",), attributes=_ATTRIBUTES, reference=reference,
    body=body, infer_shape=infer_shape, torch_op="edgeattn::elu_linear_attention",
))  # fmt: skip
