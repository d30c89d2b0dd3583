"""Grids that are not uniform, for attention probabilities and post-GELU values.

Codes are integral values in the type of the input. log2: FQ-ViT (arXiv 2111.13824); base sqrt(2):
RepQ-ViT (arXiv 2212.08254); twin: PTQ4ViT (arXiv 2111.12293). None of them has an operator
in a stock runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

GELU_MINIMUM = 0.17  # of -GELU, rounded up as the paper does


def _log_codes(p: Tensor, steps_per_octave: int, bits: int) -> tuple[Tensor, Tensor]:
    exponent = torch.round(-steps_per_octave * torch.log2(p))
    return exponent.clamp(0, 2**bits - 1), exponent >= 2**bits


def log2_encode(p: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """(codes, zeroed): code = round(-log2 p) clipped to 0..2^bits - 1; zeroed: it was more, the value is 0."""
    return _log_codes(p, 1, bits)


def log2_decode(codes: Tensor, zeroed: Tensor) -> Tensor:
    """2^-code, and 0 where zeroed."""
    return torch.exp2(-codes).masked_fill(zeroed, 0)


def log_sqrt2_encode(p: Tensor, delta: Tensor | float, bits: int = 4) -> tuple[Tensor, Tensor]:
    """(codes, zeroed): code = round(-2 log2(p / delta)) clipped to 0..2^bits - 1; zeroed as for log2."""
    return _log_codes(p / delta, 2, bits)


def log_sqrt2_decode(codes: Tensor, zeroed: Tensor, delta: Tensor | float) -> Tensor:
    """delta 2^-ceil(code / 2), times sqrt(2) for odd codes, and 0 where zeroed: a shift and one of two scales."""
    odd = codes.remainder(2) * (2**0.5 - 1) + 1
    return (torch.exp2(-torch.ceil(codes / 2)) * odd * delta).masked_fill(zeroed, 0)


def twin_encode(p: Tensor, split: float, bits: int = 4) -> Tensor:
    """Codes of probabilities on two uniform grids of 2^(bits - 1) levels each: 0 to split, and 0 to 1 above it.

    The upper bit of the code says which grid. Only one is used, where the release adds both. A value above `split`
    but under half a step of the coarse grid becomes 0.
    """
    half = 2 ** (bits - 1)
    top = half - 1
    low = torch.round(p / (split / top)).clamp(0, top)
    high = torch.round(p * top).clamp(0, top) + half
    return torch.where(p <= split, low, high)


def twin_decode(codes: Tensor, split: float, bits: int = 4) -> Tensor:
    """Values of `twin_encode`'s codes."""
    half = 2 ** (bits - 1)
    return torch.where(codes < half, codes * (split / (half - 1)), (codes - half) / (half - 1))


def _gelu_steps(scale: Tensor | float, bits: int) -> tuple[float, Tensor | float, int]:
    half = 2 ** (bits - 1)
    return GELU_MINIMUM / half, scale, half


def twin_gelu_encode(x: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    """Signed codes of values after GELU: negative ones on the fixed step 0.17 / 2^(bits - 1), others on `scale`.

    `scale` is searched by the caller (a power of two times the fixed step makes the ratio a shift).
    """
    fixed, scale, half = _gelu_steps(scale, bits)
    return torch.where(x < 0, torch.round(x / fixed).clamp(min=-half), torch.round(x / scale).clamp(max=half - 1))


def twin_gelu_decode(codes: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    """Values of `twin_gelu_encode`'s codes."""
    fixed, scale, _ = _gelu_steps(scale, bits)
    return torch.where(codes < 0, codes * fixed, codes * scale)
