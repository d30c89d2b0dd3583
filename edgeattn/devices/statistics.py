"""Numbers that may be claimed from a sample: percentiles, ratios and paired proportions, each with its interval.

Sources: MLPerf Inference early stopping (percentiles); Hesterberg 2015, "What Teachers Should Know About the Bootstrap"
(expanded percentile interval); Wilson 1927 (one proportion); Tango 1998, Statistics in Medicine 17:891 (difference of
paired proportions); Tang, Tang and Chan 2003, Statistics in Medicine 22:1217 (ratio of paired proportions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from edgeattn.errors import UsageError

CONFIDENCE = 0.95
# MLPerf claims a percentile at this confidence.
PERCENTILE_CONFIDENCE = 0.99
# Fewer rounds than this say too little about how rounds differ for a bootstrap over them.
MIN_ROUNDS = 6
# Identical outputs have an infinite ratio, which JSON cannot hold; float32 rounding alone stays below 160 dB.
MAX_SQNR_DB = 200.0
_RESAMPLES = 2000
_SEED = 20240229


@dataclasses.dataclass(frozen=True)
class Interval:
    """Confidence interval, both ends included; the unit is that of the estimate beside it."""

    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit; `factor` is positive."""
        return Interval(self.low * factor, self.high * factor)

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"low": self.low, "high": self.high}


def _binomial_cdf(n: int, share: float) -> np.ndarray:
    """P(count <= k) for k = 0..n of n trials that succeed with probability `share`; shape (n + 1,)."""
    k = np.arange(1, n + 1)
    steps = np.log((n - k + 1) / k) + math.log(share / (1 - share))
    return np.cumsum(np.exp(n * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)])))


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{name} is {value}; expected a share between 0 and 1, such as 0.9.")


def min_samples(percentile: float, confidence: float = PERCENTILE_CONFIDENCE) -> int:
    """Runs needed before a percentile (a share: 0.9) may be claimed at all: 64 for p90, 662 for p99."""
    _check_share("percentile", percentile)
    n = 1
    while percentile**n + n * (1 - percentile) * percentile ** (n - 1) > 1 - confidence:
        n += 1
    return n


def early_stopping_percentile(
    samples: np.ndarray, percentile: float, confidence: float = PERCENTILE_CONFIDENCE
) -> float | None:
    """Value that the percentile (a share) does not exceed, at this confidence; None when there is not enough data.

    With t the largest count for which BinomCDF(t; n, 1 - percentile) <= 1 - confidence, it is the t-th largest sample.
    """
    _check_share("percentile", percentile)
    values = np.sort(np.asarray(samples, float).ravel())
    if len(values) == 0:
        return None
    allowed = int(np.searchsorted(_binomial_cdf(len(values), 1 - percentile), 1 - confidence, side="right")) - 1
    return float(values[-allowed]) if allowed >= 1 else None


@dataclasses.dataclass(frozen=True)
class LatencySummary:
    """One series of runs.

    Attributes:
        cv: standard deviation over mean.
        median_ms: middle of the sample; what speed-ups are ratios of.
        p50_ms .. p99_ms: values claimed by the early-stopping rule (no less than the sample's), None with too few runs.
    """

    runs: int
    mean_ms: float
    std_ms: float
    cv: float
    min_ms: float
    median_ms: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def summarize_latency(samples_ms: np.ndarray) -> LatencySummary:
    """Summary of at least one run time in milliseconds, any shape."""
    values = np.asarray(samples_ms, float).ravel()
    mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    p50, p90, p95, p99 = (early_stopping_percentile(values, share) for share in (0.5, 0.9, 0.95, 0.99))
    return LatencySummary(
        len(values),
        mean,
        std,
        std / mean if mean else 0.0,
        float(values.min()),
        float(np.median(values)),
        p50,
        p90,
        p95,
        p99,
    )


def median_ratio_interval(
    a: np.ndarray, b: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, Interval | None]:
    """median(a) / median(b) of two series measured in turns, each (rounds, runs); None with fewer than MIN_ROUNDS.

    Whole rounds are resampled, the same ones of both series: runs of a round share the state of the machine, and so do
    the two blocks of a round. The same input gives the same interval.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    ratio, rounds = float(np.median(a) / np.median(b)), len(a)
    if rounds < MIN_ROUNDS:
        return ratio, None
    picks = np.random.default_rng(_SEED).integers(0, rounds, (_RESAMPLES, rounds))
    logs = np.log(np.median(a[picks], axis=(1, 2))) - np.log(np.median(b[picks], axis=(1, 2)))
    # A plain percentile interval is too narrow for few rounds: its spread lacks n/(n-1), its tails are normal, not t.
    tail = NormalDist().cdf(-math.sqrt(rounds / (rounds - 1)) * _t_quantile(confidence, rounds - 1))
    low, high = np.exp(np.quantile(logs, [tail, 1 - tail]))
    return ratio, Interval(float(low), float(high))


def _t_quantile(confidence: float, freedom: int) -> float:
    """Two-sided Student quantile by Abramowitz and Stegun 26.7.5, within 0.2 % from 5 degrees of freedom on."""
    z = _z(confidence)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a proportion, as a share; `n` is positive. Never of zero width."""
    z2, share = _z(confidence) ** 2, successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


@dataclasses.dataclass(frozen=True)
class PairedCounts:
    """The same images judged twice: right both times, only by the reference, only by the candidate, never."""

    both: float
    lost: float
    gained: float
    neither: float

    @property
    def n(self) -> float:
        """All images."""
        return self.both + self.lost + self.gained + self.neither

    def scaled(self, factor: float) -> PairedCounts:
        """What a sample `factor` times as large with the same shares would show."""
        return PairedCounts(self.both * factor, self.lost * factor, self.gained * factor, self.neither * factor)


def paired_counts(reference: np.ndarray, candidate: np.ndarray) -> PairedCounts:
    """Counts from two boolean arrays (n,): was this image right?"""
    r, c = np.asarray(reference, bool), np.asarray(candidate, bool)
    return PairedCounts(int((r & c).sum()), int((r & ~c).sum()), int((~r & c).sum()), int((~r & ~c).sum()))


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p-value that losses and gains are equally likely; 1.0 when nothing changed."""
    if lost + gained == 0:
        return 1.0
    return min(1.0, 2 * float(_binomial_cdf(lost + gained, 0.5)[min(lost, gained)]))


# Score intervals, because a paired Wald or bootstrap interval has zero width when no image changed its answer, and 20
# such images would then "prove" any gate. These give about 3.84 / n instead, near the exact "rule of three".
def difference_interval(counts: PairedCounts, confidence: float = CONFIDENCE) -> Interval:
    """Interval of share(reference right) - share(candidate right): what was lost. `counts.n` is positive."""
    n, up, down = counts.n, counts.lost, counts.gained

    def score(delta: float) -> float:
        b = -up - down + (2 * n - up + down) * delta
        c = -down * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        return _standardized(up - down - n * delta, n * (2 * share + delta * (1 - delta)))

    z, point = _z(confidence), (up - down) / n
    return Interval(_falls_to(score, z, -1.0, point), _falls_to(score, -z, point, 1.0))


def ratio_interval(counts: PairedCounts, confidence: float = CONFIDENCE) -> tuple[float, Interval] | None:
    """share(candidate right) / share(reference right) and its interval; None when the reference is never right."""
    n, some = counts.n, counts.both + counts.lost + counts.gained
    reference, candidate, lost = counts.both + counts.lost, counts.both + counts.gained, counts.lost
    if reference == 0:
        return None

    def score(ratio: float) -> float:
        a = n * (1 + ratio)
        b = reference * ratio**2 - (candidate + 2 * lost)
        c = lost * (1 - ratio) * some / n
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        return _standardized(candidate - ratio * reference, n * (1 + ratio) * share + some * (ratio - 1))

    z, point = _z(confidence), candidate / reference
    ceiling = 2 * point + 2
    while score(ceiling) > -z:
        ceiling *= 2
    return point, Interval(_falls_to(score, z, 0.0, point), _falls_to(score, -z, point, ceiling))


def _standardized(deviation: float, variance: float) -> float:
    if variance > 1e-12:
        return deviation / math.sqrt(variance)
    return math.copysign(math.inf, deviation) if deviation else 0.0


def _falls_to(function: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function passes `level` between `low` and `high`; the end nearest to it where it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > level else (low, middle)
    return (low + high) / 2


def sqnr_db(reference: np.ndarray, test: np.ndarray) -> float:
    """Signal to quantization noise of `test`, in dB, within +-MAX_SQNR_DB; the shapes are equal."""
    wanted = np.asarray(reference, float)
    return energy_ratio_db(float(np.square(wanted).sum()), float(np.square(wanted - np.asarray(test, float)).sum()))


def energy_ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) within +-MAX_SQNR_DB."""
    if noise == 0:
        return MAX_SQNR_DB
    if signal == 0:
        return -MAX_SQNR_DB
    return max(-MAX_SQNR_DB, min(MAX_SQNR_DB, 10 * (math.log10(signal) - math.log10(noise))))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two arrays of equal shape; 1.0 for two zeros, 0.0 for one."""
    x, y = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norms == 0:
        return 1.0 if not x.any() and not y.any() else 0.0
    return float(np.clip(x @ y / norms, -1.0, 1.0))
