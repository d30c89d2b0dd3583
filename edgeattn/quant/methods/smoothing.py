"""Scales that move range from activations into weights: SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edgeattn.errors import RecipeError
from edgeattn.quant.scheme import Scheme

LEAST_SCALE = 1e-5


@dataclasses.dataclass
class ActivationMaximum:
    """Per-channel max|x| of a stream of batches: maximum over tokens, mean over the batch, exponential average.

    The statistic of QuantVGGT (arXiv 2509.21302) and ViDiT-Q (arXiv 2406.02540). The first batch initialises it.
    """

    momentum: float = 0.95
    average: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch of shape (batch, ..., channels).

        Raises:
            RecipeError: x has fewer than two axes, or another number of channels than the batches before.
        """
        if x.dim() < 2:
            raise RecipeError(f"activations of shape {tuple(x.shape)}: expected (batch, ..., channels).")
        if self.average is not None and x.shape[-1] != len(self.average):
            raise RecipeError(f"a batch of {x.shape[-1]} channels after batches of {len(self.average)}.")
        new = x.detach().abs().reshape(len(x), -1, x.shape[-1]).amax(1).mean(0)
        self.average = new if self.average is None else self.momentum * self.average + (1 - self.momentum) * new

    @property
    def value(self) -> Tensor:
        """The statistic, (channels,).

        Raises:
            RecipeError: no batch was seen.
        """
        if self.average is None:
            raise RecipeError("no activation was seen: run calibration before asking for its maximum.")
        return self.average


def weight_maximum(w: Tensor) -> Tensor:
    """max|w| per input channel, (in,), of a weight (out, in, ...)."""
    return w.detach().abs().transpose(0, 1).flatten(1).amax(1)


def smoothquant_scale(act_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """s = act_max^alpha / weight_max^(1 - alpha) per input channel, at least 1e-5: x / s and w * s keep x w^T.

    SmoothQuant, section 4. `act_max` and `weight_max` have the shape (channels,).

    Raises:
        RecipeError: the shapes differ, or alpha lies outside 0 to 1.
    """
    if act_max.shape != weight_max.shape:
        raise RecipeError(f"maxima of {tuple(act_max.shape)} activations and {tuple(weight_max.shape)} inputs differ.")
    if not 0 <= alpha <= 1:
        raise RecipeError(f"alpha {alpha}: expected 0 to 1.")
    ratio = act_max**alpha / weight_max.clamp(min=LEAST_SCALE) ** (1 - alpha)
    return ratio.clamp(min=LEAST_SCALE)


@dataclasses.dataclass(frozen=True)
class AwqResult:
    """What the search of AWQ's scale found.

    Attributes:
        scale: (in,); the exported weight is `w * scale`, the activation `x / scale`.
        ratio: the exponent that won.
        loss: mean squared output error of every candidate, (grid,).
        wq: the quantized weight back in the space of w, (out, in).
    """

    scale: Tensor
    ratio: float
    loss: Tensor
    wq: Tensor


def awq_scale(x: Tensor, ratio: float) -> Tensor:
    """AWQ's channel scale of an exponent, (in,): mean|x|^ratio / sqrt(max * min), for x (..., in)."""
    scale = (x.detach().reshape(-1, x.shape[-1]).abs().mean(0) ** ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def awq_search(x: Tensor, w: Tensor, scheme: Scheme, grid: int = 20) -> AwqResult:
    """AWQ's channel scale mean|x|^r / sqrt(max * min), r = 0, 1/grid, ..., of the least output error (section 3.2).

    x is (..., in); w is (out, in): stack the rows of all linears that read x, so that they are judged together.

    Raises:
        RecipeError: x and w disagree in `in`, the group size does not divide it, or the grid is empty.
    """
    flat = _tokens(x, w)
    losses: list[Tensor] = []
    best = None
    for step in range(grid):
        scale = awq_scale(flat, step / grid)
        wq = scheme.fake_quantize(w * scale) / scale
        losses.append((flat @ (wq - w).T).square().mean())
        if best is None or losses[-1] < best.loss:
            best = AwqResult(scale, step / grid, losses[-1], wq)
    if best is None:
        raise RecipeError(f"a grid of {grid} exponents: expected at least 1.")
    return dataclasses.replace(best, loss=torch.stack(losses))


def awq_clip(x: Tensor, w: Tensor, scheme: Scheme, steps: int = 20, least: float = 0.5) -> tuple[Tensor, Tensor]:
    """(share, wq): per row and group the share of the range, from 1 down to `least`, of the least output error.

    AWQ's clip search: the error is that of the group's part of the output, over the tokens of x (..., in). share has
    the shape of the scheme's scales, (out, groups, 1) or (out, 1); wq is (out, in). Not for q and k: their error is
    judged after the softmax.

    Raises:
        RecipeError: x and w disagree in `in`, the group size does not divide it, or scales are not per row or group.
    """
    if scheme.granularity not in ("group", "channel"):
        raise RecipeError(f"clip search with granularity {scheme.granularity!r}: expected 'group' or 'channel'.")
    rows = scheme.rows(w)
    blocks = rows if rows.dim() == 3 else rows[:, None]
    inputs = _tokens(x, w).unflatten(1, (blocks.shape[1], -1))
    gram = torch.einsum("ngi,ngj->gij", inputs, inputs) / len(inputs)
    best_error = torch.full_like(rows[..., :1], torch.inf)
    best_share, best = torch.ones_like(best_error), w
    for share in torch.linspace(1, least, steps, dtype=torch.float64).tolist():
        scale, zero_point = scheme.parameters(w, share)
        wq = scheme.fake_quantize(w, scale, zero_point)
        off = (wq - w).reshape(blocks.shape)
        error = torch.einsum("ogi,gij,ogj->og", off, gram, off).reshape(best_error.shape)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_share = torch.where(better, share, best_share)
        best = torch.where(better, scheme.rows(wq), scheme.rows(best)).reshape(w.shape)
    return best_share, best


def _tokens(x: Tensor, w: Tensor) -> Tensor:
    if x.shape[-1] != w.shape[-1]:
        raise RecipeError(f"activations of {x.shape[-1]} channels for a weight of {w.shape[-1]} inputs.")
    return x.detach().reshape(-1, x.shape[-1])
