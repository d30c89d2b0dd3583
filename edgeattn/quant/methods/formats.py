"""Narrow number formats: fp8, NVFP4, MXFP8, MXFP4, and int4 in groups with the packing of MatMulNBits.

Rounding is to nearest, ties to even, and exact in the input's type: a cast by way of float32 would round twice.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edgeattn.errors import RecipeError
from edgeattn.quant.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A small float: explicit mantissa bits, exponent of the smallest normal number and of the largest, the largest."""

    name: str
    mantissa: int
    least_exponent: int
    top_exponent: int
    largest: float

    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format; beyond the largest: the largest."""
        exponent = (torch.frexp(x)[1] - 1).clamp(min=self.least_exponent)
        step = torch.exp2((exponent - self.mantissa).to(x.dtype))
        return (torch.round(x / step) * step).clamp(-self.largest, self.largest)


E4M3 = FloatFormat("e4m3fn", 3, -6, 8, 448.0)
E2M1 = FloatFormat("e2m1fn", 1, 0, 2, 6.0)


def e4m3_bytes(x: Tensor) -> Tensor:
    """The E4M3FN byte (uint8) of numbers of that format."""
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


def e2m1_codes(x: Tensor) -> Tensor:
    """The E2M1 code 0 to 15 (uint8; sign in bit 3) of numbers of that format."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=x.dtype)
    index = torch.searchsorted(magnitudes, x.abs().contiguous())
    return (index + 8 * torch.signbit(x)).to(torch.uint8)


def fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale): E4M3FN numbers of x / scale, scale = max|x| / 448 for the tensor (arXiv 2209.05433)."""
    scale = _or_one(x.abs().max() / E4M3.largest)
    return E4M3.round(x / scale), scale


@dataclasses.dataclass(frozen=True)
class BlockFloat:
    """Numbers in blocks of the last axis. y = values * block_scale * tensor_scale.

    Attributes:
        values: numbers of the element format, (..., blocks, block).
        block_scale: (..., blocks, 1), a number of the scale's format.
        tensor_scale: 0-dimensional; 1 for MX formats.
    """

    values: Tensor
    block_scale: Tensor
    tensor_scale: Tensor

    def dequantize(self) -> Tensor:
        """The tensor, in the shape that was quantized."""
        return (self.values * (self.block_scale * self.tensor_scale)).flatten(-2)


def nvfp4_quantize(x: Tensor, block: int = 16) -> BlockFloat:
    """NVFP4 (NVIDIA Blackwell): E2M1 in blocks of 16, E4M3 scale = max / 6 over a tensor scale max|x| / (448 * 6).

    The tensor scale is rounded to float32, the type in which it is stored.

    Raises:
        RecipeError: the block size does not divide the last axis.
    """
    blocks = _blocks(x, block)
    tensor_scale = _or_one((x.abs().max() / (E4M3.largest * E2M1.largest)).float().to(x.dtype))
    block_scale = E4M3.round(blocks.abs().amax(-1, keepdim=True) / E2M1.largest / tensor_scale)
    return BlockFloat(E2M1.round(blocks / _or_one(block_scale * tensor_scale)), block_scale, tensor_scale)


def mx_quantize(x: Tensor, element: FloatFormat, block: int = 32) -> BlockFloat:
    """MXFP8 (element E4M3) or MXFP4 (E2M1): blocks of 32 with a power-of-two scale (OCP Microscaling 1.0, section 6.3).

    scale = 2^(floor(log2(max)) - exponent of the element's largest number), within 2^-127 to 2^127; what lies above
    the largest number is clipped to it.

    Raises:
        RecipeError: the block size does not divide the last axis.
    """
    blocks = _blocks(x, block)
    top = blocks.abs().amax(-1, keepdim=True)
    exponent = (torch.frexp(top)[1] - 1 - element.top_exponent).clamp(-127, 127)
    scale = torch.where(top > 0, torch.exp2(exponent.to(x.dtype)), torch.ones_like(top))
    return BlockFloat(element.round(blocks / scale), scale, torch.ones((), dtype=x.dtype))


def int4_quantize(w: Tensor, block: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero): w (out, in) in groups along the input axis; scale and zero are (out, blocks).

    Symmetric codes are -8 to 7 (zero 0), others 0 to 15: add 8 to codes and zero of the former before packing.

    Raises:
        RecipeError: the block size does not divide the inputs.
    """
    scheme = Scheme(4, symmetric, "group", block)
    scale, zero = scheme.parameters(w)
    return scheme.encode(w, scale, zero), scale.squeeze(-1), zero.squeeze(-1)


def pack_nibbles(codes: Tensor, block: int) -> Tensor:
    """Codes 0 to 15 (out, in) as uint8 (out, blocks, block / 2), low nibble first: the weight of ORT's MatMulNBits.

    Raises:
        RecipeError: an odd block, one that does not divide the inputs, or a code outside 0 to 15.
    """
    if block % 2:
        raise RecipeError(f"block of {block}: expected an even one, two codes share a byte.")
    if codes.numel() and (codes.min() < 0 or codes.max() > 15):
        raise RecipeError(
            f"codes from {int(codes.min())} to {int(codes.max())}: expected 0 to 15 (add 8 to signed ones)."
        )
    pairs = _blocks(codes, block).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes (out, in), uint8, of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def pack_zero_points(zero: Tensor) -> Tensor:
    """Zero points 0 to 15 (out, blocks) as uint8 (out, ceil(blocks / 2)), low nibble first; an odd row ends in a 0."""
    padded = torch.nn.functional.pad(zero, (0, zero.shape[1] % 2))
    return pack_nibbles(padded, padded.shape[1]).flatten(1)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _blocks(x: Tensor, block: int) -> Tensor:
    if block < 1 or x.shape[-1] % block:
        raise RecipeError(f"block of {block} does not divide the last axis of a tensor of {tuple(x.shape)}.")
    return x.unflatten(-1, (-1, block))
