"""ONNX ops that move, cut, repeat and make tensors. Definitions: https://onnx.ai/onnx/operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.models.from_onnx.node import Node, as_tensor, host_array, numbers, onnx_op

_SPLIT_BY_COUNT = 18  # from this opset without sizes the last part may be smaller


@onnx_op("Shape", either=(0,))
def _shape(node: Node, x: Any) -> np.ndarray:
    return host_array(list(x.shape)[node.get("start", 0) : node.get("end")])


@onnx_op("Size", either=(0,))
def _size(node: Node, x: Any) -> np.ndarray:
    return host_array(x.numel() if isinstance(x, Tensor) else x.size)


@onnx_op("Reshape", host=(1,))
def _reshape(node: Node, x: Tensor, sizes: np.ndarray) -> Tensor:
    kept = not node.get("allowzero", 0)
    return x.reshape(
        [x.shape[i] if kept and isinstance(n, int) and n == 0 else n for i, n in enumerate(numbers(sizes))]
    )


@onnx_op("Flatten")
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@onnx_op("Squeeze", host=(1,))
def _squeeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    chosen = node.get("axes") if axes is None else numbers(axes)
    if chosen is None:
        chosen = [i for i, side in enumerate(x.shape) if isinstance(side, int) and side == 1]
    return x.squeeze(tuple(chosen))


@onnx_op("Unsqueeze", host=(1,))
def _unsqueeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    chosen = node.get("axes") if axes is None else numbers(axes)
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@onnx_op("Transpose")
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or list(range(x.dim()))[::-1])


@onnx_op("Concat")
def _concat(node: Node, *values: Tensor) -> Tensor:
    return torch.cat(values, node.get("axis"))


@onnx_op("Split", host=(1,))
def _split(node: Node, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    given = node.get("split") if sizes is None else numbers(sizes)
    if given is None:
        parts = node.get("num_outputs", len(node.outputs))
        if node.opset < _SPLIT_BY_COUNT and x.shape[axis] % parts:
            raise node.refuse(f"{x.shape[axis]} values in {parts} parts", "parts of the same size")
        size = -(-x.shape[axis] // parts)
        given = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    return x.split(given, axis)


@onnx_op("Slice", host=(1, 2, 3, 4))
def _slice(node: Node, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    begin = node.get("starts") if starts is None else numbers(starts)
    end = node.get("ends") if ends is None else numbers(ends)
    along = node.get("axes", list(range(len(begin)))) if axes is None else numbers(axes)
    step = [1] * len(begin) if steps is None else numbers(steps)
    where = [slice(None)] * x.dim()
    for axis, first, last, by in zip(along, begin, end, step, strict=True):
        if by > 0:
            where[axis] = slice(first, last, by)
            continue
        kept = list(range(x.shape[axis]))[first:last:by]  # torch has no negative steps
        x = x.index_select(axis, torch.tensor(kept, dtype=torch.int64))
    return x[tuple(where)]


@onnx_op("Gather", either=(1,))
def _gather(node: Node, x: Tensor, indices: Any) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    if not isinstance(indices, Tensor) and indices.ndim == 0:
        return x.select(axis, numbers(indices)[0])
    where: tuple[Any, ...] = (*[slice(None)] * axis, as_tensor(indices).long())
    return x[where]


@onnx_op("GatherElements")
def _gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    wide = indices.long()
    return torch.gather(x, axis, torch.where(wide < 0, wide + x.shape[axis], wide))


@onnx_op("GatherND")
def _gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    if node.get("batch_dims", 0):
        raise node.refuse(f"batch_dims {node.get('batch_dims')}", "0")
    return x[indices.long().unbind(-1)]


@onnx_op("Expand", host=(1,))
def _expand(node: Node, x: Tensor, sizes: np.ndarray) -> Tensor:
    wanted = numbers(sizes)
    rank = max(x.dim(), len(wanted))
    wanted = [1] * (rank - len(wanted)) + wanted
    own = [1] * (rank - x.dim()) + list(x.shape)
    return x.expand(
        [mine if isinstance(side, int) and side == 1 else side for side, mine in zip(wanted, own, strict=True)]
    )


@onnx_op("Tile", host=(1,))
def _tile(node: Node, x: Tensor, repeats: np.ndarray) -> Tensor:
    return x.repeat(numbers(repeats))


@onnx_op("Pad", host=(1, 2, 3))
def _pad(node: Node, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    mode = node.get("mode", "constant")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise node.refuse(f"mode {mode!r}", ", ".join(modes))
    amounts = node.get("pads") if pads is None else numbers(pads)
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in numbers(axes)]
    pairs = [[0, 0] for _ in range(x.dim())]
    for i, axis in enumerate(along):
        pairs[axis] = [amounts[i], amounts[i + len(along)]]
    fill = node.get("value", 0.0) if value is None else numbers(value)[0]
    if mode == "constant":
        return F.pad(x, _flat(pairs), value=fill)
    padded = [i for i, pair in enumerate(pairs) if any(pair)]
    if not padded:
        return x
    # torch pads the last axes of a tensor of two more axes in these modes, three at most.
    count = max(1, x.dim() - padded[0])
    if count > min(3, x.dim() - 1):
        raise node.refuse(f"mode {mode!r} on axis {padded[0]} of {x.dim()}", "padding of the last three axes at most")
    lead = x.shape[: x.dim() - count]
    batched = x.reshape(1, -1, *x.shape[x.dim() - count :]) if len(lead) != 2 else x
    result = F.pad(batched, _flat(pairs[-count:]), mode=modes[mode])
    return result.reshape(*lead, *result.shape[2:])


def _flat(pairs: list[list[Any]]) -> list[Any]:
    """torch wants the last axis first."""
    return [amount for pair in reversed(pairs) for amount in pair]


@onnx_op("ConstantOfShape", host=(0,))
def _constant_of_shape(node: Node, sizes: np.ndarray) -> Tensor:
    value = as_tensor(node.get("value", np.zeros(1, np.float32)))
    return torch.full(numbers(sizes), value.reshape(-1)[0].item(), dtype=value.dtype)


@onnx_op("Range", host=(0, 1, 2))
def _range(node: Node, start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> Tensor:
    is_float = any(value.dtype.kind == "f" for value in (start, limit, step))
    bounds = [numbers(value)[0] for value in (start, limit, step)]
    return torch.arange(*bounds, dtype=torch.float32 if is_float else torch.int64)


@onnx_op("Trilu", host=(1,))
def _trilu(node: Node, x: Tensor, k: Any = None) -> Tensor:
    diagonal = 0 if k is None else numbers(k)[0]
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


@onnx_op("DepthToSpace")
def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    side = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, side)
    n, c, h, w = x.shape
    parts = x.reshape(n, side, side, c // side**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // side**2, h * side, w * side)


@onnx_op("SpaceToDepth")
def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    side = node.get("blocksize")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // side, side, w // side, side).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * side**2, h // side, w // side)
