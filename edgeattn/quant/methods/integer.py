"""Integer-only nonlinear functions: I-ViT (arXiv 2207.01405) and the log-int-softmax of FQ-ViT (arXiv 2111.13824).

The integers are integral values in float64, whatever the input's type: sums exceed 2^31 (and float32's 2^24), and the
releases compute in floating point as well. Every division is followed by rounding down.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INT32 = 2**31 - 1
_EXP_A, _EXP_B, _EXP_C = 0.35815147, 0.96963238, 1.0  # of I-BERT's polynomial a x^2 + b x + c for e^x, -ln 2 < x <= 0
_LN2 = 0.6931


def _shift_exp(x: Tensor, scale: float, n: int) -> Tensor:
    """e^(x scale) as an integer, up to a common factor, by shifts: x log2(e) as x + x/2 - x/16, 2^r as 1 + r/2."""
    x = x + torch.floor(x / 2) - torch.floor(x / 16)
    one = torch.floor(torch.tensor(-1.0 / scale, dtype=torch.float64))
    x = torch.maximum(x, n * one)
    whole = torch.floor(x / one)
    rest = x - one * whole
    return torch.floor((rest / 2 - one) * torch.exp2(n - whole)).clamp(min=0)


def _share(part: Tensor, total: Tensor, bits: int) -> Tensor:
    """part / total in units of 2^-(bits - 1), through the 32-bit reciprocal of the total."""
    factor = torch.floor(_INT32 / total.clamp(max=_INT32))
    return torch.floor(part * factor / 2 ** (31 - bits + 1))


def shiftmax(x: Tensor, scale: float, n: int = 15, bits: int = 8) -> tuple[Tensor, float]:
    """(integers, their scale): I-ViT's softmax along the last axis of the integers x with the given scale."""
    x = x.double()
    exponential = _shift_exp(x - x.amax(-1, keepdim=True), scale, n)
    return _share(exponential, exponential.sum(-1, keepdim=True), bits), 2.0 ** -(bits - 1)


def shift_gelu(x: Tensor, scale: float, n: int = 23, bits: int = 8) -> tuple[Tensor, float]:
    """(integers, their scale): I-ViT's GELU, x sigmoid(1.702 x), of the integers x with the given scale."""
    x = x.double()
    top = x.amax(-1, keepdim=True)
    exponential = _shift_exp(x - top, scale * 1.702, n)
    sigmoid = _share(exponential, exponential + _shift_exp(-top, scale * 1.702, n), bits)
    return x * sigmoid, scale * 2.0 ** -(bits - 1)


def integer_layernorm(x: Tensor, weight: Tensor, bias: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """(integers, their scale per channel): I-ViT's LayerNorm of the integers x (..., channels).

    The square root takes `iterations` Newton steps from 2^16. The input's scale cancels; epsilon is left out. A weight
    of 0 has no scale: its channel gives NaN.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - torch.round(x.mean(-1, keepdim=True))
    variance = centred.square().sum(-1, keepdim=True)
    root = torch.full_like(variance, 2**16)
    for _ in range(iterations):
        root = torch.floor((root + torch.floor(variance / root)) / 2).clamp(min=1)
    normal = torch.floor(centred * torch.floor(_INT32 / root) / 2)
    unit = x.shape[-1] ** 0.5 / 2**30
    return normal + torch.floor(bias / weight / unit), unit * weight


def log_int_exp(x: Tensor, scale: float, n: int = 30) -> Tensor:
    """e^((x - max x) scale) along the last axis as integers up to a common factor (FQ-ViT)."""
    x = x.double()
    x = x - x.amax(-1, keepdim=True)
    steps = torch.tensor([-_LN2 / scale, _EXP_B / _EXP_A / scale, _EXP_C / _EXP_A / scale**2], dtype=torch.float64)
    ln2, b, c = torch.floor(steps)
    x = torch.maximum(x, n * ln2)
    halvings = torch.floor(x / ln2)
    rest = x - ln2 * halvings
    return torch.floor((rest * (rest + b) + c) * torch.exp2(n - halvings)).clamp(min=0)


def log_int_softmax(x: Tensor, scale: float, bits: int = 4) -> tuple[Tensor, Tensor]:
    """(codes, values): log2 codes of the softmax of the integers x, from the integer ratio sum / exp (FQ-ViT).

    The logarithm of the ratio r is rounded on r itself: up when r >= 1.5 * 2^floor(log2 r). A code of 2^bits or more
    has the value 0.
    """
    exponential = log_int_exp(x, scale)
    ratio = torch.round(exponential.sum(-1, keepdim=True) / exponential)
    _, exponent = torch.frexp(ratio)
    below = (exponent - 1).double()
    rounded = torch.where(ratio >= 1.5 * torch.exp2(below), below + 1, below)
    rounded = torch.where(torch.isinf(ratio), torch.full_like(rounded, 2**bits), rounded)
    return rounded.clamp(0, 2**bits - 1), torch.exp2(-rounded).masked_fill(rounded >= 2**bits, 0)
