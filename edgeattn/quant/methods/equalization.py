"""Data-free quantization (arXiv 1906.04721): cross-layer equalization, high-bias absorption, bias correction.

Weights are (out, in / groups, ...): linear or convolution. Between the two layers stands a function with
f(s x) = s f(x) for s > 0 (identity, ReLU), not GELU, Hardswish or a softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.errors import RecipeError


def _is_depthwise(w2: Tensor, channels: int) -> bool:
    return w2.shape[1] == 1 and len(w2) == channels


def _input_range(w2: Tensor, channels: int) -> Tensor:
    """max|w2| per channel that it reads."""
    if _is_depthwise(w2, channels):
        return w2.abs().flatten(1).amax(1)
    if w2.shape[1] != channels:
        raise RecipeError(
            f"a layer of {channels} outputs before a weight of {tuple(w2.shape)}: expected {channels} inputs, or a "
            "depthwise convolution; other grouped convolutions cannot be equalized."
        )
    return w2.abs().transpose(0, 1).flatten(1).amax(1)


def equalization_scale(w1: Tensor, w2: Tensor) -> Tensor:
    """s = sqrt(range of w1's row / range of w2's input channel), (channels,); 1 where either is 0 (section 4.1).

    Raises:
        RecipeError: w2 does not read what w1 gives.
    """
    first, second = w1.abs().flatten(1).amax(1), _input_range(w2, len(w1))
    alive = (first > 0) & (second > 0)
    ratio = torch.where(alive, first, 1.0) / torch.where(alive, second, 1.0)
    return ratio.sqrt()


def equalize(w1: Tensor, b1: Tensor | None, w2: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(w1 / s, b1 / s, w2 * s, s): both layers get equal ranges per channel, the network's function stays.

    For a chain, call for each pair in turn and repeat until s is near 1.

    Raises:
        RecipeError: w2 does not read what w1 gives.
    """
    scale = equalization_scale(w1, w2)
    new1 = w1 / scale.reshape(-1, *[1] * (w1.dim() - 1))
    axis = 0 if _is_depthwise(w2, len(w1)) else 1
    new2 = w2 * scale.reshape([-1 if i == axis else 1 for i in range(w2.dim())])
    return new1, None if b1 is None else b1 / scale, new2, scale


def response_to_constant(w: Tensor, value: Tensor) -> Tensor:
    """Output (out,) of a layer without bias for inputs that are constant per channel, (in,); grouped layers too.

    Padding of a convolution is not seen: at the rim the true response is smaller.

    Raises:
        RecipeError: the input channels are no multiple of what a row of w reads, or do not divide its outputs.
    """
    rows = w.flatten(2).sum(2) if w.dim() > 2 else w
    groups, rest = divmod(len(value), rows.shape[1])
    if rest or not groups or len(rows) % groups:
        raise RecipeError(f"means of {len(value)} input channels for a weight of {tuple(w.shape)}.")
    per_group = rows.reshape(groups, -1, rows.shape[1])
    return (per_group @ value.reshape(groups, -1, 1)).flatten()


def absorb_high_bias(
    b1: Tensor, mean: Tensor, deviation: Tensor, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(b1 - c, b2 + w2 c), c = max(0, mean - 3 deviation): the part that ReLU nearly always passes (section 4.1.3).

    mean and deviation (channels,) are those of the first layer's output: beta and |gamma| of the folded BatchNorm,
    divided by the equalization scale. Exact where the output is at least c.

    Raises:
        RecipeError: w2 does not read what the first layer gives.
    """
    constant = (mean - 3 * deviation.abs()).clamp(min=0)
    moved = response_to_constant(w2, constant)
    return b1 - constant, moved if b2 is None else b2 + moved


def bias_correction(w: Tensor, wq: Tensor, input_mean: Tensor) -> Tensor:
    """-(wq - w) E[x], (out,): what to add to the bias so that the output keeps its mean (section 4.2).

    `input_mean` (in,) comes from data or from BatchNorm statistics.

    Raises:
        RecipeError: the number of means does not fit w.
    """
    return -response_to_constant(wq - w, input_mean)
