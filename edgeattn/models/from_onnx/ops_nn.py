"""ONNX ops of networks: convolution, pooling, normalisation, resizing, attention. Definitions: https://onnx.ai/onnx/operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.models.from_onnx.node import Node, numbers, onnx_op
from edgeattn.models.from_onnx.ops import only_first

LINEAR = "edgeattn.Linear"  # what a Gemm or MatMul with constant weights becomes when a file is read
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_WEIGHTS = {1: "weight", 2: "bias"}
_GROUPS_SCALED_BY_CHANNEL = 21  # from this opset GroupNormalization has a scale per channel, before one per group


def _pads(node: Node, x: Tensor, kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Padding in front and behind, by spatial axis."""
    axes = len(kernel)
    how = node.get("auto_pad", "NOTSET")
    if how in ("NOTSET", ""):
        given = node.get("pads", [0] * 2 * axes)
        return [(given[i], given[i + axes]) for i in range(axes)]
    if how == "VALID":
        return [(0, 0)] * axes
    pairs = []
    for i, side in enumerate(x.shape[2:]):
        stride, reach = node.get("strides", [1] * axes)[i], (kernel[i] - 1) * node.get("dilations", [1] * axes)[i] + 1
        total = max((-(-side // stride) - 1) * stride + reach - side, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if how == "SAME_UPPER" else (more, less))
    return pairs


def _padded(x: Tensor, pairs: list[tuple[int, int]], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """x and the symmetric padding that is left to do; uneven padding is done."""
    if all(front == behind for front, behind in pairs):
        return x, [front for front, _ in pairs]
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value), [0] * len(pairs)


@onnx_op("Conv", names=_WEIGHTS)
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    x, padding = _padded(x, _pads(node, x, weight.shape[2:]))
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    return _CONV[axes](x, weight, bias, strides, padding, dilations, node.get("group", 1))


@onnx_op("ConvTranspose", names=_WEIGHTS)
def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    extra = node.get("output_padding", [0] * axes)
    full = [
        (side - 1) * strides[i] + (weight.shape[2 + i] - 1) * dilations[i] + 1 + extra[i]
        for i, side in enumerate(x.shape[2:])
    ]
    cuts = _transposed_cuts(node, x, full, strides)
    even = all(front == behind for front, behind in cuts)
    padding = [front for front, _ in cuts] if even else [0] * axes
    result = _CONV_TRANSPOSE[axes](x, weight, bias, strides, padding, extra, node.get("group", 1), dilations)
    if even:
        return result
    kept: tuple[Any, ...] = tuple(slice(front, size - behind) for size, (front, behind) in zip(full, cuts, strict=True))
    return result[(..., *kept)]


def _transposed_cuts(node: Node, x: Tensor, full: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """What is cut off the full result of a transposed convolution, in front and behind, by axis."""
    how = node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted is None and how not in ("SAME_UPPER", "SAME_LOWER"):
        return _pads(node, x, full)
    wanted = [side * strides[i] for i, side in enumerate(x.shape[2:])] if wanted is None else wanted[-len(full) :]
    totals = [max(size - want, 0) for size, want in zip(full, wanted, strict=True)]
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if how == "SAME_UPPER" else [(behind, front) for front, behind in halves]


@onnx_op(LINEAR, names=_WEIGHTS)
def _linear(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@onnx_op("Gemm", names=_WEIGHTS)
def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if node.get("transA", 0) else a) @ (b.T if node.get("transB", 0) else b)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@onnx_op("BatchNormalization", names={1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"})
def _batch_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if node.get("training_mode", 0) or not node.get("spatial", 1):
        raise node.refuse("training_mode 1 or spatial 0", "an inference model with one statistic per channel")
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


@onnx_op("LayerNormalization", names=_WEIGHTS)
def _layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    only_first(node)
    sizes, epsilon = list(x.shape[node.get("axis", -1) :]), node.get("epsilon", 1e-5)
    if list(weight.shape) == sizes and (bias is None or list(bias.shape) == sizes):
        return F.layer_norm(x, sizes, weight, bias, epsilon)
    plain = F.layer_norm(x, sizes, None, None, epsilon) * weight
    return plain if bias is None else plain + bias


@onnx_op("RMSNormalization", names=_WEIGHTS)
def _rms_norm(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    axes = list(range(node.get("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + node.get("epsilon", 1e-5)) * weight


@onnx_op("InstanceNormalization", names=_WEIGHTS)
def _instance_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], weight, bias, node.get("epsilon", 1e-5))


@onnx_op("GroupNormalization", names=_WEIGHTS)
def _group_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups, channels = node.get("num_groups"), x.shape[1]
    if node.opset < _GROUPS_SCALED_BY_CHANNEL:
        weight, bias = (value.repeat_interleave(channels // groups) for value in (weight, bias))
    return F.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


@onnx_op("LRN")
def _lrn(node: Node, x: Tensor) -> Tensor:
    size, alpha, beta = node.get("size"), node.get("alpha", 1e-4), node.get("beta", 0.75)
    return F.local_response_norm(x, size, alpha, beta, node.get("bias", 1.0))


@onnx_op("GlobalAveragePool")
def _global_average_pool(node: Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@onnx_op("GlobalMaxPool")
def _global_max_pool(node: Node, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@onnx_op("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Tensor:
    only_first(node)
    kernel = node.get("kernel_shape")
    axes = len(kernel)
    pairs = _pads(node, x, kernel)
    if any(amount > size // 2 for pair, size in zip(pairs, kernel, strict=True) for amount in pair):
        x, pairs = F.pad(x, [a for pair in reversed(pairs) for a in pair], value=-torch.inf), [(0, 0)] * axes
    x, padding = _padded(x, pairs, -torch.inf)
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    return _MAX_POOL[axes](x, kernel, strides, padding, dilations, bool(node.get("ceil_mode", 0)))


@onnx_op("AveragePool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    axes = len(kernel)
    if any(step != 1 for step in node.get("dilations", [1])):
        raise node.refuse(f"dilations {node.get('dilations')}", "no dilation")
    strides, ceil = node.get("strides", [1] * axes), bool(node.get("ceil_mode", 0))
    include = bool(node.get("count_include_pad", 0))
    pairs = _pads(node, x, kernel)
    half = all(front == behind and front <= size // 2 for (front, behind), size in zip(pairs, kernel, strict=True))
    if half:
        return _AVG_POOL[axes](x, kernel, strides, [front for front, _ in pairs], ceil, include)
    if ceil:
        raise node.refuse(f"ceil_mode with uneven padding {pairs}", "one of them")
    flat = [amount for pair in reversed(pairs) for amount in pair]
    mean = _AVG_POOL[axes](F.pad(x, flat), kernel, strides)
    if include:
        return mean
    inside = F.pad(torch.ones([1, 1, *x.shape[2:]]), flat)
    return mean / _AVG_POOL[axes](inside, kernel, strides)


@onnx_op("GridSample", names={1: "grid"})
def _grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "linear"), node.get("mode"))
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0)))


@onnx_op("Attention")
def _attention(
    node: Node, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *cache: Tensor | None
) -> Tensor:
    only_first(node)
    if any(tensor is not None for tensor in cache):
        raise node.refuse("past_key, past_value or nonpad_kv_seqlen", "attention without a cache")
    if node.get("softcap", 0.0):
        raise node.refuse(f"softcap {node.get('softcap')}", "0")
    packed = query.dim() == 3
    if packed:
        query = _heads(query, node.get("q_num_heads"))
        key, value = (_heads(tensor, node.get("kv_num_heads")) for tensor in (key, value))
    result = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=bool(node.get("is_causal", 0)), scale=node.get("scale"),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return result.transpose(1, 2).flatten(2) if packed else result


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


@onnx_op("Resize", host=(1, 2, 3))
def _resize(node: Node, x: Tensor, *given: Any) -> Tensor:
    if node.opset < 11:  # (x, scales), and floor(out / scale) throughout
        scales, sizes, coordinates, rounding = given[0], None, "asymmetric", "floor"
    else:
        scales, sizes = (
            given[i] if len(given) > i and given[i] is not None and given[i].size else None for i in (1, 2)
        )
        coordinates = node.get("coordinate_transformation_mode", "half_pixel")
        rounding = node.get("nearest_mode", "round_prefer_floor")
    target, factors = _target(node, x, scales, sizes)
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return _nearest(node, x, target, factors, coordinates, rounding)
    known = ("half_pixel", "pytorch_half_pixel", "align_corners")
    if coordinates not in known:
        raise node.refuse(f"coordinate_transformation_mode {coordinates!r} with mode {mode!r}", ", ".join(known))
    smooth, corners = bool(node.get("antialias", 0)), coordinates == "align_corners"
    if bool(node.get("exclude_outside", 0)) != smooth:  # what torch does
        raise node.refuse(f"exclude_outside {node.get('exclude_outside', 0)}", f"{int(smooth)}, the same as antialias")
    cubic = -0.5 if smooth else -0.75
    if mode == "cubic" and node.get("cubic_coeff_a", -0.75) != cubic:
        raise node.refuse(f"cubic_coeff_a {node.get('cubic_coeff_a', -0.75)}", str(cubic))
    methods = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    if (mode, len(target)) not in methods:
        raise node.refuse(f"mode {mode!r} on {len(target)} axes", "nearest, linear or (on two axes) cubic")
    factors = None if corners else factors
    method = methods[mode, len(target)]
    return F.interpolate(x, None if factors else target, factors, method, align_corners=corners, antialias=smooth)


def _target(node: Node, x: Tensor, scales: Any, sizes: Any) -> tuple[list[int], list[float] | None]:
    """Sizes of the spatial axes after a Resize, and the factors where these were given."""
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse(f"keep_aspect_ratio_policy {node.get('keep_aspect_ratio_policy')!r}", "stretch")
    given = numbers(scales if sizes is None else sizes)
    axes = [axis % x.dim() for axis in node.get("axes", list(range(x.dim())))]
    unchanged: list[Any] = [1.0] * x.dim() if sizes is None else list(x.shape)
    full = list(unchanged)
    for axis, value in zip(axes, given, strict=True):
        full[axis] = value
    for axis in (0, 1):
        if not isinstance(full[axis], torch.SymInt) and full[axis] != unchanged[axis]:
            raise node.refuse(f"resizing axis {axis}", "resizing of the spatial axes")
    if sizes is not None:
        return full[2:], None
    factors = [float(factor) for factor in full[2:]]
    # The file's numbers are float32: 3 * 1.6666666 is 5 there.
    target = [int(np.floor(np.float32(side) * np.float32(f))) for side, f in zip(x.shape[2:], factors, strict=True)]
    return target, factors


def _nearest(
    node: Node, x: Tensor, target: list[int], factors: list[float] | None, coordinates: str, rounding: str
) -> Tensor:
    """Positions are numbers while tracing: where torch's two ways agree with them it is one op, else one per axis."""
    sides = list(x.shape[2:])
    ratios = factors or [want / side for want, side in zip(target, sides, strict=True)]
    positions = [
        _positions(node, side, want, np.float32(ratio), coordinates, rounding)
        for side, want, ratio in zip(sides, target, ratios, strict=True)
    ]
    for method, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        torchs = [
            np.minimum(np.floor((np.arange(want) + shift) * (side / want)), side - 1)
            for side, want in zip(sides, target, strict=True)
        ]
        if all(np.array_equal(mine, other) for mine, other in zip(positions, torchs, strict=True)):
            return F.interpolate(x, target, mode=method)
    for axis, chosen in enumerate(positions, 2):
        x = x.index_select(axis, torch.tensor(chosen.tolist(), dtype=torch.int64))
    return x


def _positions(node: Node, side: int, want: int, ratio: Any, coordinates: str, rounding: str) -> np.ndarray:
    """The element that each output position takes, along one axis."""
    out = np.arange(want, dtype=np.float32)
    transforms = {
        "half_pixel": (out + np.float32(0.5)) / ratio - np.float32(0.5),
        "pytorch_half_pixel": (out + np.float32(0.5)) / ratio - np.float32(0.5) if want > 1 else out * 0,
        "asymmetric": out / ratio,
        "align_corners": out * np.float32(side - 1) / np.float32(want - 1) if want > 1 else out * 0,
        "tf_half_pixel_for_nn": (out + np.float32(0.5)) / ratio,
    }
    roundings: dict[str, Any] = {
        "round_prefer_floor": lambda p: np.ceil(p - np.float32(0.5)), "floor": np.floor, "ceil": np.ceil,
        "round_prefer_ceil": lambda p: np.floor(p + np.float32(0.5)),
    }  # fmt: skip
    if coordinates not in transforms:
        raise node.refuse(f"coordinate_transformation_mode {coordinates!r}", ", ".join(transforms))
    if rounding not in roundings:
        raise node.refuse(f"nearest_mode {rounding!r}", ", ".join(roundings))
    return np.clip(roundings[rounding](transforms[coordinates]), 0, side - 1)
