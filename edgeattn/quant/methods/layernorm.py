"""Around LayerNorm: power-of-two factors (FQ-ViT, arXiv 2111.13824), reparameterized scales (RepQ-ViT, 2212.08254)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edgeattn.errors import RecipeError
from edgeattn.quant.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class PowerOfTwoFactors:
    """FQ-ViT's grid: channel j has the scale `scale * 2^factor[j]`, one zero point for all.

    Attributes: scale and zero, 0-dimensional; factor (channels,), integral; symmetric: signed codes, zero is 0.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor
    bits: int
    symmetric: bool = False

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x (..., channels) as the grid holds it."""
        grid = Scheme(self.bits, self.symmetric, "token")
        return grid.fake_quantize(x, self.scale * torch.exp2(self.factor), self.zero)


def power_of_two_factors(x: Tensor, bits: int = 8, max_factor: int = 3, symmetric: bool = False) -> PowerOfTwoFactors:
    """The factor per channel, 0 to `max_factor`, of the least squared error on x (..., channels); ties: the smallest.

    The range of the whole tensor is what the largest factor covers: scale = range / (2^bits - 1) / 2^max_factor.
    """
    widest, zero = (t.reshape(()) for t in Scheme(bits, symmetric).parameters(x))
    scale, grid = widest / 2**max_factor, Scheme(bits, symmetric, "token")
    flat = x.detach().reshape(-1, x.shape[-1])
    held = [grid.fake_quantize(flat, scale * 2**f, zero) for f in range(max_factor + 1)]
    factor = torch.stack([(values - flat).square().mean(0) for values in held]).argmin(0)
    return PowerOfTwoFactors(scale, zero, factor.to(x.dtype), bits, symmetric)


@dataclasses.dataclass(frozen=True)
class Reparameterized:
    """RepQ-ViT's result: new LayerNorm and next layer, and the one scale and zero point that now fit all channels."""

    ln_weight: Tensor
    ln_bias: Tensor
    w: Tensor
    bias: Tensor
    scale: Tensor
    zero_point: Tensor


def channel_parameters(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """(scale, zero_point), (channels,) each, of ranges per channel of a LayerNorm's output."""
    return Scheme(bits, False, "channel").from_range(low, high)


def reparameterize(
    scale: Tensor,
    zero_point: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w: Tensor,
    bias: Tensor | None,
    integer_zero: bool = True,
    zero: float | None = None,
) -> Reparameterized:
    """Turn scales per channel into one per tensor by changing the LayerNorm and the next linear.

    scale, zero_point, ln_weight, ln_bias are (in,), w (out, in), bias (out,). Exact in floating point; calibrate w
    anew. The targets are the plain means; `integer_zero` rounds that of the zero points and absorbs the rest in the
    bias (the release keeps the fraction, which no integer grid holds). `zero` takes the place of the zero points' mean:
    2^(bits - 1) centres every channel, for a grid that is symmetric.

    Raises:
        RecipeError: the shapes do not fit.
    """
    if not scale.shape == zero_point.shape == ln_weight.shape == ln_bias.shape == w.shape[1:]:
        raise RecipeError(
            f"scales of {tuple(scale.shape)}, zero points of {tuple(zero_point.shape)}, LayerNorm of "
            f"{tuple(ln_weight.shape)} and weight of {tuple(w.shape)}: expected (in,) three times and (out, in)."
        )
    target = scale.mean()
    middle = zero_point.mean() if zero is None else torch.full_like(target, zero)
    middle = middle.round() if integer_zero else middle
    ratio = scale / target
    # The smallest value of a channel's grid after division by ratio, less the smallest of the common grid.
    shift = -zero_point * scale / ratio + middle * target
    moved = w @ (shift * ratio)
    return Reparameterized(
        ln_weight / ratio, ln_bias / ratio - shift, w * ratio, moved if bias is None else bias + moved, target, middle
    )
