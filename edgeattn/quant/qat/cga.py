"""CGA: a last fine-tuning in which only weights near a rounding boundary may move.

OFQ (arXiv 2302.02210), section on confidence-guided annealing. The mask is taken anew in every iteration from the
current weights and scales: the scale is a mean over the row, so what was frozen may become free again. Works with a
loss scaler too (zero is zero at any scale), where the paper's release does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edgeattn.errors import RecipeError
from edgeattn.quant.qat.layers import WeightQuantizer


def frozen_mask(position: Tensor, boundary_range: float) -> Tensor:
    """Which weights are frozen: further than `boundary_range` from every boundary i + 1/2 between two codes in use.

    Args:
        position: where weights lie among the codes, see `StatsQuantizer.position`; any shape.
        boundary_range: in steps of the grid, over 0 and under 1/2.

    Raises:
        RecipeError: a boundary range that freezes nothing or everything by definition.
    """
    if not 0 < boundary_range < 0.5:
        raise RecipeError(f"boundary range {boundary_range}: expected over 0 and under 0.5; 0.005 is the paper's.")
    code = torch.round(position)
    # Ties to even also take a weight clipped from below, which lies half a step under the last code, to that code.
    lowest, highest = code.min(), code.max()
    if lowest >= highest:
        return torch.ones_like(position, dtype=torch.bool)
    nearest = torch.floor(position).clamp(min=lowest, max=highest - 1) + 0.5
    return (position - nearest).abs() > boundary_range


class Annealer:
    """Freezes entries of parameters around the optimizer's step, whatever the optimizer does (decay, momentum).

    Call `before_step` after backward (and before gradients are clipped), `after_step` after the optimizer.

    Args:
        weights: pairs of a parameter and its quantizer.
        boundary_range: see `frozen_mask`; 0.003 to 0.01 in the paper.
    """

    def __init__(self, weights: Iterable[tuple[nn.Parameter, WeightQuantizer]], boundary_range: float) -> None:
        self.weights, self.boundary_range = list(weights), boundary_range
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before_step(self) -> float:
        """Take the masks, zero the frozen gradients, remember the frozen values; returns the share that is free."""
        self._kept, free, total = [], 0, 0
        for parameter, quantizer in self.weights:
            frozen = frozen_mask(quantizer.position(parameter), self.boundary_range)
            if parameter.grad is not None:
                # Not a product with the mask: a gradient that overflowed under a loss scaler would leave NaN.
                parameter.grad.masked_fill_(frozen, 0)
            self._kept.append((frozen, parameter.detach().clone()))
            free, total = free + frozen.numel() - int(frozen.sum()), total + frozen.numel()
        return free / max(1, total)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the frozen values back."""
        for (parameter, _), (frozen, value) in zip(self.weights, self._kept, strict=True):
            parameter.copy_(torch.where(frozen, value, parameter))
        self._kept = []
