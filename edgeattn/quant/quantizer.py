"""Scales, codes, and the two torch ops whose ONNX form is QuantizeLinear and DequantizeLinear.

Rounding is to nearest, ties to even, and x is divided by the scale (not multiplied by its reciprocal), as
ONNX specifies, so that the torch graph gives what a runtime computes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_INT32_BIAS_LIMIT = 2**30  # half of int32's range, so that bias plus accumulator cannot overflow


@torch.library.custom_op("edgeattn::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Codes of x, per tensor, in the dtype of zero_point (uint8 or int8); scale and zero_point are 0-dimensional."""
    low, high = _LIMITS[zero_point.dtype]
    return torch.clamp(torch.round(x / scale) + zero_point.float(), low, high).to(zero_point.dtype)


@torch.library.custom_op("edgeattn::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 values of codes; a 1-dimensional scale is per channel on axis 0."""
    if scale.dim() == 0:
        return (codes.float() - zero_point.float()) * scale
    shape = [-1] + [1] * (codes.dim() - 1)
    return (codes - zero_point.reshape(shape)).float() * scale.reshape(shape)


@torch.library.custom_op("edgeattn::dequantize_int4", mutates_args=())
def dequantize_int4(codes: Tensor, scale: Tensor, axis: int, block_size: int) -> Tensor:
    """float32 values of 4-bit codes (-8 to 7, held in int8); scale has their shape, `axis` divided by the blocks."""
    return codes.float() * scale.repeat_interleave(block_size, axis)


@dequantize_int4.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def activation_parameters(low: float, high: float, signedness: str) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) per tensor: asymmetric uint8 whose range is widened to hold 0, or symmetric int8."""
    low, high = min(low, 0.0), max(high, 0.0)
    if signedness == "int8":
        scale = _scale(max(-low, high), 127)
        return torch.tensor(float(scale)), torch.tensor(0, dtype=torch.int8)
    scale = _scale(high - low, 255)
    zero_point = int(np.clip(np.rint(-low / scale), 0, 255))
    return torch.tensor(float(scale)), torch.tensor(zero_point, dtype=torch.uint8)


def _scale(span: float, levels: int) -> np.float32:
    """A normal float32: 1 for a tensor of zeros, never zero or subnormal for a tiny span."""
    return np.float32(max(span / levels, float(np.finfo(np.float32).tiny)) if span else 1.0)


def quantize_weight(weight: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scale per output channel on axis 0), symmetric: scale = max|w| / 127.

    Args:
        floor: smallest scale per channel; an all-zero channel gets it, or 1.
    """
    scale = weight.detach().abs().flatten(1).amax(1).double() / 127
    scale = torch.maximum(scale, floor) if floor is not None else scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    shape = [-1] + [1] * (weight.dim() - 1)
    codes = torch.round(weight.detach() / scale.reshape(shape)).clamp(-128, 127).to(torch.int8)
    return codes, scale


def weight_scale_floor(bias: Tensor, input_scale: Tensor) -> Tensor:
    """Scale per channel below which the int32 bias (step: input scale x weight scale) would overflow."""
    return bias.detach().double().abs() / (float(input_scale) * _INT32_BIAS_LIMIT)


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 codes, float32 scale per channel = input scale x weight scale)."""
    scale = (input_scale * weight_scale).float()
    return torch.round(bias.detach().double() / scale.double()).to(torch.int32), scale
