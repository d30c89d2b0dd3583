import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.devices import statistics as stats
from edgeattn.devices.statistics import PairedCounts
from edgeattn.errors import UsageError


@pytest.mark.parametrize(("percentile", "runs"), [(0.9, 64), (0.99, 662)], ids=["p90", "p99"])
def test_minimum_runs_are_those_of_mlperf(percentile, runs):
    assert stats.min_samples(percentile) == runs
    assert stats.early_stopping_percentile(np.arange(runs - 1), percentile) is None
    assert stats.early_stopping_percentile(np.arange(runs), percentile) == runs - 1


def test_percentile_needs_a_share():
    with pytest.raises(UsageError, match="expected a share between 0 and 1"):
        stats.min_samples(90)


def test_no_samples_are_not_enough():
    assert stats.early_stopping_percentile(np.array([]), 0.5) is None


def test_claimed_percentile_is_rarely_below_the_true_one():
    generator = np.random.default_rng(1)
    claims = [stats.early_stopping_percentile(generator.random(200), 0.9) for _ in range(1000)]
    # 1 % may be below by the rule's confidence; three standard errors of 1000 trials are another 1 %.
    assert np.mean(np.array(claims) < 0.9) <= 0.02


@given(st.lists(st.floats(0.1, 100), min_size=64, max_size=200), st.floats(0.5, 0.9))
@settings(max_examples=50, deadline=None)
def test_claimed_percentiles_rise(samples, share):
    lower, higher = (stats.early_stopping_percentile(np.array(samples), p) for p in (share - 0.1, share))
    assert lower is not None and higher is not None and lower <= higher <= max(samples)


def test_summary_of_a_known_series():
    summary = stats.summarize_latency(np.arange(1, 101))
    assert (summary.runs, summary.mean_ms, summary.min_ms, summary.median_ms) == (100, 50.5, 1, 50.5)
    assert summary.cv == pytest.approx(summary.std_ms / 50.5)
    assert summary.p50_ms is not None and summary.p90_ms is not None
    assert summary.p50_ms >= 50 and summary.p90_ms >= 90 and summary.p99_ms is None


def _rounds(generator, rounds, runs, scale):
    return scale * np.exp(generator.normal(0, 0.1, (rounds, 1)) + generator.normal(0, 0.02, (rounds, runs)))


@pytest.mark.parametrize("rounds", [6, 12])
def test_ratio_interval_covers_with_correlated_runs(rounds):
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        _, interval = stats.median_ratio_interval(
            _rounds(generator, rounds, 7, 2.0), _rounds(generator, rounds, 7, 1.0)
        )
        hits += interval.low <= 2.0 <= interval.high
    # 95 % of 60 is 57; three standard errors are 5.
    assert hits >= 52


def test_ratio_without_enough_rounds_has_no_interval():
    ratio, interval = stats.median_ratio_interval(np.full((stats.MIN_ROUNDS - 1, 20), 3.0), np.full((5, 20), 1.5))
    assert ratio == 2 and interval is None


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=15, deadline=None)
def test_ratio_knows_no_unit_and_inverts(seed, unit):
    generator = np.random.default_rng(seed)
    a, b = _rounds(generator, 8, 7, 1.3), _rounds(generator, 8, 7, 1.0)
    ratio, interval = stats.median_ratio_interval(a, b)
    scaled_ratio, scaled = stats.median_ratio_interval(a * unit, b * unit)
    inverse_ratio, inverse = stats.median_ratio_interval(b, a)
    assert (scaled_ratio, scaled.low, scaled.high) == pytest.approx((ratio, interval.low, interval.high))
    assert (inverse_ratio, inverse.low, inverse.high) == pytest.approx((1 / ratio, 1 / interval.high, 1 / interval.low))


def test_same_input_same_interval():
    a, b = _rounds(np.random.default_rng(3), 10, 7, 1.0), _rounds(np.random.default_rng(4), 10, 7, 1.0)
    assert stats.median_ratio_interval(a, b) == stats.median_ratio_interval(a, b)


def test_wilson_matches_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, Table I.
    interval = stats.wilson_interval(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_mcnemar_by_hand():
    assert stats.mcnemar_p(0, 0) == 1
    assert stats.mcnemar_p(5, 0) == pytest.approx(2 / 32)
    assert stats.mcnemar_p(3, 1) == stats.mcnemar_p(1, 3) == pytest.approx(2 * 5 / 16)


@pytest.mark.parametrize("counts", [PairedCounts(20, 0, 0, 0), PairedCounts(10, 0, 0, 10), PairedCounts(0, 0, 0, 20)])
def test_no_changed_answer_on_twenty_images_proves_little(counts):
    difference = stats.difference_interval(counts)
    assert difference.low == pytest.approx(-0.161, abs=0.002) and difference.high == pytest.approx(0.161, abs=0.002)
    ratio = stats.ratio_interval(counts)
    if counts.both == 0:
        assert ratio is None
    else:
        assert ratio is not None and ratio[0] == 1 and ratio[1].low < 0.9 and ratio[1].high > 1.1


def _score_difference(counts, delta):
    """Tango's statistic from a restricted likelihood maximised by brute force."""
    share = np.linspace(max(0, -delta) + 1e-9, (1 - abs(delta)) / 2 + max(0, -delta) - 1e-9, 200001)
    # share: probability of `gained`; that of `lost` is share + delta.
    likelihood = (
        counts.gained * np.log(share) + counts.lost * np.log(share + delta)
        + (counts.both + counts.neither) * np.log(np.maximum(1 - 2 * share - delta, 1e-300))
    )  # fmt: skip
    best = share[np.argmax(likelihood)]
    return (counts.lost - counts.gained - counts.n * delta) / math.sqrt(counts.n * (2 * best + delta * (1 - delta)))


@pytest.mark.parametrize("counts", [PairedCounts(43, 9, 3, 45), PairedCounts(80, 1, 6, 13)])
def test_difference_interval_ends_where_the_score_test_rejects(counts):
    interval = stats.difference_interval(counts)
    assert _score_difference(counts, interval.low) == pytest.approx(1.96, abs=0.01)
    assert _score_difference(counts, interval.high) == pytest.approx(-1.96, abs=0.01)


def _score_ratio(counts, ratio):
    """The statistic of Tang et al. from a restricted likelihood maximised by brute force."""
    some = (counts.both + counts.lost + counts.gained) / counts.n
    lost = np.linspace(max(0, some * (1 - ratio)) + 1e-9, some / (1 + ratio) - 1e-9, 400001)
    both = (some - lost) / ratio - lost
    gained = some - both - lost
    likelihood = (
        counts.both * np.log(both) + counts.lost * np.log(lost) + counts.gained * np.log(np.maximum(gained, 1e-300))
    )
    i = np.argmax(likelihood)
    variance = counts.n * (gained[i] + ratio**2 * lost[i] + (1 - ratio) ** 2 * both[i])
    return (counts.both + counts.gained - ratio * (counts.both + counts.lost)) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [PairedCounts(43, 9, 3, 45), PairedCounts(80, 1, 6, 13)])
def test_ratio_interval_ends_where_the_score_test_rejects(counts):
    point, interval = stats.ratio_interval(counts)
    assert point == (counts.both + counts.gained) / (counts.both + counts.lost)
    assert _score_ratio(counts, interval.low) == pytest.approx(1.96, abs=0.01)
    assert _score_ratio(counts, interval.high) == pytest.approx(-1.96, abs=0.01)


@pytest.mark.parametrize("shares", [(0.7, 0.03, 0.02, 0.25), (0.9, 0.01, 0.01, 0.08)], ids=["noisy", "quiet"])
def test_paired_intervals_cover(shares):
    generator = np.random.default_rng(5)
    draws = [PairedCounts(*row) for row in generator.multinomial(400, shares, 400).tolist()]
    drop, ratio = shares[1] - shares[2], (shares[0] + shares[2]) / (shares[0] + shares[1])
    covered = [(stats.difference_interval(c), stats.ratio_interval(c)[1]) for c in draws]
    # 95 % less three standard errors of 400 draws.
    assert np.mean([d.low <= drop <= d.high for d, _ in covered]) >= 0.915
    assert np.mean([r.low <= ratio <= r.high for _, r in covered]) >= 0.915


@given(*[st.integers(0, 50)] * 4)
@settings(max_examples=100, deadline=None)
def test_paired_intervals_hold_their_estimate_and_mirror(both, lost, gained, neither):
    counts = PairedCounts(both, lost, gained, neither)
    if counts.n == 0:
        return
    interval, point = stats.difference_interval(counts), (lost - gained) / counts.n
    mirrored = stats.difference_interval(PairedCounts(both, gained, lost, neither))
    assert -1 <= interval.low <= point + 1e-9 and point - 1e-9 <= interval.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-6)
    ratio = stats.ratio_interval(counts)
    assert (ratio is None) == (both + lost == 0)
    if ratio is not None:
        assert 0 <= ratio[1].low <= ratio[0] + 1e-9 <= ratio[1].high + 2e-9


def test_sqnr_and_cosine():
    reference = np.array([3.0, 4.0])
    assert stats.sqnr_db(reference, reference * 1.1) == pytest.approx(20)
    assert stats.sqnr_db(reference, reference) == stats.MAX_SQNR_DB
    assert stats.sqnr_db(reference * 0, reference) == -stats.MAX_SQNR_DB
    assert stats.cosine(reference, 2 * reference) == pytest.approx(1)
    assert stats.cosine(reference, [-4, 3]) == pytest.approx(0)
    assert stats.cosine(reference * 0, reference) == 0 and stats.cosine(reference * 0, reference * 0) == 1
