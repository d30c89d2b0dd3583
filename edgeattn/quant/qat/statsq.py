"""StatsQ: weights on a grid without zero, whose scale is a statistic of the weights and not learned.

OFQ (arXiv 2302.02210), section on the statistical weight quantizer. With n = 2^(bits - 1) and s = 2 mean|W| per row:
code k = round(n clip(W / s, -1, 1 - 1e-6) - 1/2), clamped to [-n, n - 1], value s (k + 1/2) / n. That is 2^bits levels
at odd multiples of s / 2^bits. Everything keeps the floating-point type of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.errors import RecipeError

_MOST = 1 - 1e-6  # the largest W / s: at 1 the code would be one too many
_LEAST = float(torch.finfo(torch.float32).tiny)  # scale of a row of zeros, which stays (almost) zero


def check_bits(bits: int) -> None:
    """Refuse what StatsQ is not defined for.

    Raises:
        RecipeError: fewer than 2 bits (the code -1.5 of a 1-bit grid rounds to a level that is not there) or over 8.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"StatsQ with {bits} bit(s): expected 2 to 8; at 1 bit its rounding leaves the grid.")


def scale_of(weight: Tensor) -> Tensor:
    """s = 2 mean|W|: (out, 1) of a weight (out, in); (1, dim, 1) of (heads, dim, in), over heads and inputs.

    Raises:
        RecipeError: a weight with another number of axes.
    """
    axes = {2: (1,), 3: (0, 2)}.get(weight.dim())
    if axes is None:
        raise RecipeError(f"StatsQ of a weight of {tuple(weight.shape)}: expected (out, in) or (heads, dim, in).")
    return (2 * weight.detach().abs().mean(axes, keepdim=True)).clamp(min=_LEAST)


def position(weight: Tensor, bits: int) -> Tensor:
    """n clip(W / s) - 1/2, of W's shape: where a weight lies among the codes; codes are its nearest integers."""
    half = 2 ** (bits - 1)
    return half * (weight.detach() / scale_of(weight)).clamp(-1, _MOST) - 0.5


def codes(weight: Tensor, bits: int) -> Tensor:
    """Codes k in [-n, n - 1], integral values in W's type and shape."""
    half = 2 ** (bits - 1)
    # Clamped as well: a weight clipped from below is a tie, -n - 1/2, which only ties-to-even takes to -n.
    return torch.round(position(weight, bits)).clamp(-half, half - 1)


class _StatsQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, clipped_gradient: bool) -> Tensor:  # type: ignore[override]
        half, scale = 2 ** (bits - 1), scale_of(weight)
        ctx.inside = (weight.abs() <= scale) if clipped_gradient else None
        return scale * (codes(weight, bits) + 0.5) / half

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (gradient if ctx.inside is None else gradient * ctx.inside), None, None


def statsq(weight: Tensor, bits: int, clipped_gradient: bool = False) -> Tensor:
    """The quantized weight, of W's shape; W receives its gradient unchanged (straight through), the scale none.

    Args:
        clipped_gradient: no gradient where |W| > s; the paper's release passes it there too.

    Raises:
        RecipeError: bits or shape that StatsQ is not defined for.
    """
    check_bits(bits)
    return _StatsQ.apply(weight, bits, clipped_gradient)


def export_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, float]:
    """(integer codes, scale, zero point) with W_q = (codes - zero point) * scale exactly.

    2 and 3 bits (int4), and 5 to 7 (int8): the odd integers 2k + 1, scale s / 2^bits, zero point 0. 4 and 8 bits: the
    odd integers do not fit as many bits, so codes 0 to 2^bits - 1 with the zero point n - 1/2, 7.5 at 4 bits, which
    MatMulNBits and OpenVINO's u4 take and the standard DequantizeLinear does not.

    Returns:
        codes of W's shape (int8, or uint8 with a zero point), scale as `scale_of`, zero point.

    Raises:
        RecipeError: bits or shape that StatsQ is not defined for.
    """
    check_bits(bits)
    half, k = 2 ** (bits - 1), codes(weight, bits)
    if bits in (4, 8):
        return (k + half).to(torch.uint8), scale_of(weight) / half, half - 0.5
    return (2 * k + 1).to(torch.int8), scale_of(weight) / 2**bits, 0.0


class StatsQuantizer(nn.Module):
    """`statsq` as a module without state."""

    def __init__(self, bits: int, clipped_gradient: bool = False) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.clipped_gradient = bits, clipped_gradient

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight, of the weight's shape."""
        return statsq(weight, self.bits, self.clipped_gradient)

    def position(self, weight: Tensor) -> Tensor:
        """See `position`."""
        return position(weight, self.bits)

    def codes(self, weight: Tensor) -> Tensor:
        """See `codes`."""
        return codes(weight, self.bits)

    def export_grid(self, weight: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `export_grid`."""
        return export_grid(weight.detach(), self.bits)
