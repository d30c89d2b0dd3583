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

    Attributes: scale and zero, 0-dimensional; factor (channels,), integral.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor
    bits: int

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x (..., channels) as the grid holds it."""
        return _on_grid(x, self.scale * torch.exp2(self.factor), self.zero, self.bits)


def _on_grid(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return Scheme(bits, False, "token").fake_quantize(x, scale, zero)


def power_of_two_factors(x: Tensor, bits: int = 8, max_factor: int = 3) -> PowerOfTwoFactors:
    """The factor per channel, 0 to `max_factor`, of the least squared error on x (..., channels); ties: the smallest.

    The range of the whole tensor is what the largest factor covers: scale = range / (2^bits - 1) / 2^max_factor.
    """
    widest, zero = (t.reshape(()) for t in Scheme(bits, False).parameters(x))
    scale = widest / 2**max_factor
    flat = x.detach().reshape(-1, x.shape[-1])
    errors = [(_on_grid(flat, scale * 2**f, zero, bits) - flat).square().mean(0) for f in range(max_factor + 1)]
    return PowerOfTwoFactors(scale, zero, torch.stack(errors).argmin(0).to(x.dtype), bits)


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
) -> Reparameterized:
    """Turn scales per channel into one per tensor by changing the LayerNorm and the next linear.

    scale, zero_point, ln_weight, ln_bias are (in,), w (out, in), bias (out,). Exact in floating point; calibrate w
    anew. The targets are the plain means; `integer_zero` rounds that of the zero points and absorbs the rest in the
    bias (the release keeps the fraction, which no integer grid holds).

    Raises:
        RecipeError: the shapes do not fit.
    """
    if not scale.shape == zero_point.shape == ln_weight.shape == ln_bias.shape == w.shape[1:]:
        raise RecipeError(
            f"scales of {tuple(scale.shape)}, zero points of {tuple(zero_point.shape)}, LayerNorm of "
            f"{tuple(ln_weight.shape)} and weight of {tuple(w.shape)}: expected (in,) three times and (out, in)."
        )
    target, zero = scale.mean(), zero_point.mean()
    zero = zero.round() if integer_zero else zero
    ratio = scale / target
    # The smallest value of a channel's grid after division by ratio, less the smallest of the common grid.
    shift = -zero_point * scale / ratio + zero * target
    moved = w @ (shift * ratio)
    return Reparameterized(
        ln_weight / ratio, ln_bias / ratio - shift, w * ratio, moved if bias is None else bias + moved, target, zero
    )
