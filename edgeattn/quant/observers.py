"""Observers: activation ranges from a stream of batches, in memory that does not depend on the number of pictures.

One pass finds minimum and maximum, the moving average of both, and a histogram, from which percentile, MSE and entropy
read their ranges. Entropy is the KL criterion of Migacz, "8-bit inference
with TensorRT" (GTC 2017), with the convention of one-sided histograms: the tail goes into the reference only.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import NumericError
from edgeattn.quant.recipe import ObserverSettings

_BINS = 65536  # per tensor, both signs together
_SMALLEST = 2.0**-100  # reach of a histogram of smaller values, whose squares would underflow
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


class Histogram:
    """Counts in equal bins from -reach to reach, a power of two that doubles when a value lies beyond it.

    One pass over the data is enough, and the memory does not grow with it. After the last doubling more than half of a
    side is in use, so a bin is at most 1/16384 of the largest magnitude.
    """

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, x: Tensor, largest: float) -> None:
        """Count finite values of magnitude `largest` at most."""
        if largest > self.reach:
            self._widen(2.0 ** math.ceil(math.log2(largest)) if largest > _SMALLEST else _SMALLEST)
        if self.reach == 0.0:
            self.counts[_BINS // 2] += x.numel()
            return
        places = (x.float().flatten() * (_BINS / 2 / self.reach)).floor_().add_(_BINS // 2).clamp_(0, _BINS - 1)
        self.counts += torch.bincount(places.to(torch.int32), minlength=_BINS).numpy()

    def _widen(self, reach: float) -> None:
        """Merge bins until they cover `reach`; a bin's lower edge stays in the bin that it falls into."""
        if self.reach:
            edges = np.arange(_BINS) - _BINS // 2
            merged = np.floor(edges * (self.reach / reach)).astype(np.int64) + _BINS // 2
            self.counts = np.bincount(merged, self.counts, _BINS).astype(np.int64)
        self.reach = reach

    def bins(self, absolute: bool) -> tuple[np.ndarray, np.ndarray]:
        """(lower edges, counts) of the bins; of |x| where `absolute`."""
        width = 2 * self.reach / _BINS
        half = _BINS // 2
        if absolute:
            return np.arange(half) * width, self.counts[half:] + self.counts[:half][::-1]
        return (np.arange(_BINS) - half) * width, self.counts

    @property
    def bin_width(self) -> float:
        """Width of a bin."""
        return 2 * self.reach / _BINS


@dataclasses.dataclass
class Observer:
    """Statistics of one tensor; `where` names the layer in errors. Call `see` for every batch, then `range`."""

    where: str
    settings: ObserverSettings
    symmetric: bool
    minimum: float = np.inf
    maximum: float = -np.inf
    average: tuple[float, float] | None = None
    histogram: Histogram | None = None

    def __post_init__(self) -> None:
        if self.settings.method in ("percentile", "mse", "entropy"):
            self.histogram = Histogram()

    def see(self, x: Tensor) -> None:
        """Take a batch into account.

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
        if self.histogram is not None:
            self.histogram.add(x, max(abs(low), abs(high)))

    def range(self) -> tuple[float, float]:
        """(low, high) of the values to represent; a constant tensor gives its own value."""
        if self.settings.method == "moving_average":
            assert self.average is not None
            return self.average
        if self.histogram is None or self.minimum == self.maximum:
            return self.minimum, self.maximum
        if self.settings.method == "entropy":
            return self._entropy(self.histogram)
        if self.settings.method == "percentile":
            return self._percentile(self.histogram)
        edges, counts = self.histogram.bins(self.symmetric)
        largest = max(abs(self.minimum), abs(self.maximum))
        low, high = (-largest, largest) if self.symmetric else (self.minimum, self.maximum)
        used = counts > 0
        centres = edges[used] + self.histogram.bin_width / 2
        factor = mse_factor(centres, counts[used], low, high, self.symmetric)
        return low * factor, high * factor

    def _entropy(self, histogram: Histogram) -> tuple[float, float]:
        """KL over 2048 bins of |x| from 0 to the largest; fine bins go to the coarse one that holds their centre."""
        largest = max(abs(self.minimum), abs(self.maximum))
        edges, counts = histogram.bins(absolute=True)
        width = largest / _KL_BINS
        coarse = np.minimum((edges + histogram.bin_width / 2) / width, _KL_BINS - 1).astype(np.int64)
        threshold, _ = entropy_threshold(np.bincount(coarse, counts, _KL_BINS), width)
        return max(self.minimum, -threshold), min(self.maximum, threshold)

    def _percentile(self, histogram: Histogram) -> tuple[float, float]:
        edges, counts = histogram.bins(self.symmetric)
        cumulative = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        ends = np.append(edges, edges[-1] + histogram.bin_width)
        share = self.settings.percentile / 100
        high = min(float(np.interp(share, cumulative, ends)), max(abs(self.minimum), self.maximum))
        if self.symmetric:
            return -high, high
        # Inside a bin the values are taken as spread evenly; they never lie beyond the extremes.
        return max(float(np.interp(1 - share, cumulative, ends)), self.minimum), min(high, self.maximum)


@dataclasses.dataclass
class InputMean:
    """Mean of every channel over all pictures and places; `axis` is that of the channels."""

    axis: int
    total: Tensor | None = None
    count: int = 0

    def see(self, x: Tensor) -> None:
        """Take a batch into account."""
        rows = x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        new = rows.sum(0, dtype=torch.float64)
        self.total = new if self.total is None else self.total + new
        self.count += len(rows)

    @property
    def value(self) -> Tensor:
        """The mean, (channels,) float64."""
        assert self.total is not None
        return self.total / self.count
