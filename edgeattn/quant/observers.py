"""Observers: activation ranges from a stream of batches, in memory that does not depend on the number of pictures.

Two passes: the first finds minimum and maximum (and the moving average of both), the second fills a histogram between
them, from which percentile, MSE and entropy read their ranges. Entropy is the KL criterion of Migacz, "8-bit inference
with TensorRT" (GTC 2017), with the convention of one-sided histograms: the tail goes into the reference only.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import NumericError
from edgeattn.quant.recipe import ObserverSettings

_BINS = 16384  # per tensor; percentile and MSE are read off bin centres, so ranges are within 1/16384 of the span
_KL_BINS, _KL_LEVELS = 2048, 128
_MSE_GRID, _MSE_STEPS = 100, 80


def percentile_range(values: np.ndarray, percentile: float, symmetric: bool) -> tuple[float, float]:
    """(low, high) of raw values: the percentile of |x|, or of both tails. Linear interpolation."""
    values = np.asarray(values, np.float64)
    if symmetric:
        high = float(np.percentile(np.abs(values), percentile))
        return -high, high
    return float(np.percentile(values, 100 - percentile)), float(np.percentile(values, percentile))


def mse_factor(
    values: np.ndarray, counts: np.ndarray, low: float, high: float, symmetric: bool, bits: int = 8, p: float = 2.0
) -> float:
    """The share of (low, high), from 1, 0.99, ... to 0.21, of the least mean |x - quantized(x)|^p; ties: the first."""
    best, best_error = 1.0, np.inf
    for step in range(_MSE_STEPS):
        factor = 1 - step / _MSE_GRID
        error = float(
            np.sum(counts * np.abs(values - _fake_quantize(values, low * factor, high * factor, symmetric, bits)) ** p)
        )
        if error < best_error:
            best, best_error = factor, error
    return best


def _fake_quantize(values: np.ndarray, low: float, high: float, symmetric: bool, bits: int) -> np.ndarray:
    if symmetric:
        levels = 2 ** (bits - 1)
        scale = max(abs(low), abs(high)) / (levels - 1) or 1.0
        return np.clip(np.rint(values / scale), -levels, levels - 1) * scale
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top or 1.0
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, top) - zero) * scale


def entropy_threshold(histogram: np.ndarray, bin_width: float) -> tuple[float, np.ndarray]:
    """(threshold, KL of every candidate) for a histogram of |x| that starts at 0.

    Candidate i keeps the first i bins; the reference has the tail added to its last bin, the quantized distribution is
    the same bins without the tail, averaged over the bins that the reference occupies in each of 128 cells. The first
    minimum wins.
    """
    histogram = np.asarray(histogram, np.float64)
    curve = np.array([_divergence(histogram, i) for i in range(_KL_LEVELS, len(histogram) + 1)])
    best = int(np.argmin(curve)) + _KL_LEVELS
    return best * bin_width, curve


def _divergence(histogram: np.ndarray, count: int) -> float:
    kept = histogram[:count]
    reference = kept.copy()
    reference[-1] += histogram[count:].sum()
    width = count // _KL_LEVELS
    cell = np.minimum(np.arange(count) // width, _KL_LEVELS - 1)
    occupied = reference > 0
    sums = np.bincount(cell, kept, _KL_LEVELS)
    sizes = np.bincount(cell, occupied, _KL_LEVELS)
    quantized = np.where(occupied, (sums / np.maximum(sizes, 1))[cell], 0.0)
    if reference.sum() == 0 or quantized.sum() == 0:
        return np.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    mask = p > 0
    if (q[mask] == 0).any():
        return np.inf
    return float(np.sum(p[mask] * np.log(p[mask] / q[mask])))


@dataclasses.dataclass
class Observer:
    """Statistics of one tensor; `where` names the layer in errors.

    Call `see_range` for every batch, then (when `needs_histogram`) `see_histogram` for every batch again, then `range`.
    """

    where: str
    settings: ObserverSettings
    symmetric: bool
    minimum: float = np.inf
    maximum: float = -np.inf
    average: tuple[float, float] | None = None
    counts: np.ndarray | None = None

    @property
    def needs_histogram(self) -> bool:
        """Whether the method needs the second pass."""
        return self.settings.method in ("percentile", "mse", "entropy")

    def see_range(self, x: Tensor) -> None:
        """First pass.

        Raises:
            NumericError: NaN or infinity; the layer is named.
        """
        low, high = (float(v) for v in torch.aminmax(x))
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = int((~torch.isfinite(x)).sum())
            raise NumericError(
                f"activations of layer {self.where} hold {bad} NaN or infinite value(s) of {x.numel()}. "
                "Check the checkpoint and the preprocessing; quantizing them would hide the fault."
            )
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if self.average is None:
            self.average = (low, high)
        else:
            m = self.settings.momentum
            self.average = (m * self.average[0] + (1 - m) * low, m * self.average[1] + (1 - m) * high)

    def _bounds(self) -> tuple[float, float]:
        """Histogram limits: symmetric and entropy count |x| from 0."""
        if self.symmetric or self.settings.method == "entropy":
            return 0.0, max(abs(self.minimum), abs(self.maximum))
        return self.minimum, self.maximum

    def see_histogram(self, x: Tensor) -> None:
        """Second pass."""
        low, high = self._bounds()
        if high <= low:
            return
        x = x.abs() if self.symmetric or self.settings.method == "entropy" else x
        bins = _KL_BINS if self.settings.method == "entropy" else _BINS
        counts = torch.histc(x.float(), bins, low, high).double().numpy()
        self.counts = counts if self.counts is None else self.counts + counts

    def range(self) -> tuple[float, float]:
        """(low, high) of the values to represent; a constant tensor gives its own value."""
        if self.settings.method == "moving_average":
            assert self.average is not None
            return self.average
        if self.counts is None or not self.needs_histogram:
            return self.minimum, self.maximum
        low, high = self._bounds()
        width = (high - low) / len(self.counts)
        if self.settings.method == "entropy":
            threshold, _ = entropy_threshold(self.counts, width)
            return max(self.minimum, -threshold), min(self.maximum, threshold)
        if self.settings.method == "percentile":
            return self._percentile(low, width)
        centres = low + (np.arange(len(self.counts)) + 0.5) * width
        factor = mse_factor(centres, self.counts, -high if self.symmetric else low, high, self.symmetric)
        return (-high * factor if self.symmetric else low * factor), high * factor

    def _percentile(self, low: float, width: float) -> tuple[float, float]:
        assert self.counts is not None
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.counts.sum()
        edges = low + np.arange(len(self.counts) + 1) * width
        share = self.settings.percentile / 100
        high = float(np.interp(share, cumulative, edges))
        return (-high, high) if self.symmetric else (float(np.interp(1 - share, cumulative, edges)), high)
