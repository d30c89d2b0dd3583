"""Channel balancing of ViDiT-Q (arXiv 2406.02540): a scale per range of time steps (v1), or static scale and rotation.

Weights are asymmetric per output row, activations asymmetric per token and dynamic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.dual_smoothing import Steps, Transform, TransformedLinear, quantize_linear
from edgeattn.quant.methods.smoothing import smoothquant_scale, weight_maximum
from edgeattn.quant.scheme import Scheme

STATIC_THEN_ROTATE: Steps = ("smooth", "rotate")


def incoherence(x: Tensor) -> Tensor:
    """max|x| sqrt(numel) / ||x||_F of a whole tensor: 1 when all magnitudes are equal, large with outliers."""
    return x.abs().max() * x.numel() ** 0.5 / torch.linalg.vector_norm(x)


def scale_per_range(act_max: Tensor, w: Tensor, alpha: float | Sequence[float]) -> Tensor:
    """One channel scale per time range, (ranges, in), of maxima (ranges, in) and w (out, in); alpha for all, or each.

    Raises:
        RecipeError: the shapes or the number of alphas do not fit.
    """
    alphas = [alpha] * len(act_max) if isinstance(alpha, (int, float)) else list(alpha)
    if len(alphas) != len(act_max):
        raise RecipeError(f"{len(alphas)} values of alpha for {len(act_max)} time ranges.")
    top = weight_maximum(w)
    return torch.stack([smoothquant_scale(m, top, a) for m, a in zip(act_max, alphas, strict=True)])


def static_scale(act_max: Tensor, w: Tensor, alpha: float) -> Tensor:
    """The one channel scale (in,) for all steps: of the last range, which holds the largest time steps (most noise)."""
    return scale_per_range(act_max[-1:], w, alpha)[0]


def quantize_balanced(
    w: Tensor,
    bias: Tensor | None,
    channel_scale: Tensor | None = None,
    signs: Tensor | None = None,
    w_bits: int = 8,
    a_bits: int = 8,
) -> TransformedLinear:
    """A linear layer scaled, then rotated, then quantized; a step without its tensor is left out.

    w is (out, in), bias (out,), channel_scale and signs (in,). Raises what `quantize_linear` raises.
    """
    present: dict[str, bool] = {"smooth": channel_scale is not None, "rotate": signs is not None}
    steps = tuple(step for step in STATIC_THEN_ROTATE if present[step])
    activations = Scheme(a_bits, False, "token", dynamic=True)
    transform = Transform(steps, signs, channel_scale)
    return quantize_linear(w, bias, transform, Scheme(w_bits, False, "channel"), activations)


def range_index(ranges: Sequence[tuple[int, int]], timestep: int) -> int:
    """Which of the ranges (first, last) holds a time step.

    Raises:
        RecipeError: none does.
    """
    for index, (first, last) in enumerate(ranges):
        if first <= timestep <= last:
            return index
    raise RecipeError(f"time step {timestep} lies in none of the ranges {list(ranges)}.")


@dataclasses.dataclass(frozen=True)
class TimestepAwareLinear:
    """ViDiT-Q v1: one scale and one weight grid for each range (first, last) of time steps."""

    ranges: tuple[tuple[int, int], ...]
    layers: tuple[TransformedLinear, ...]

    def at(self, timestep: int) -> TransformedLinear:
        """The layer of a time step.

        Raises:
            RecipeError: no range holds it.
        """
        return self.layers[range_index(self.ranges, timestep)]


def quantize_per_range(
    w: Tensor, bias: Tensor | None, scales: Tensor, ranges: Sequence[Sequence[int]], w_bits: int = 4, a_bits: int = 8
) -> TimestepAwareLinear:
    """The timestep-aware layer of scales (ranges, in): the weight is stored once per range.

    Raises:
        RecipeError: the numbers of scales and of ranges differ.
    """
    if len(scales) != len(ranges):
        raise RecipeError(f"{len(scales)} scales for {len(ranges)} time ranges.")
    layers = tuple(quantize_balanced(w, bias, scale, None, w_bits, a_bits) for scale in scales)
    return TimestepAwareLinear(tuple((int(first), int(last)) for first, last in ranges), layers)
