import gc
import itertools

import numpy as np
import pytest

from edgeattn.devices import latency
from edgeattn.devices.latency import BLOCK_DISCARD, BLOCK_RUNS, SETTLE_MS, measure_latency
from edgeattn.errors import UsageError

IMAGE = {"image": np.zeros((1, 3, 4, 4), np.float32)}


@pytest.fixture
def pair(clock, make_session):
    """A function that makes two sessions of these costs (ms, or a function of the run number)."""

    def make(float32, quantized):
        return {
            name: make_session(name, cost, clock=clock)
            for name, cost in (("float32", float32), ("quantized", quantized))
        }

    return make


def test_known_costs_give_their_ratio(clock, pair):
    result = measure_latency(pair(6.0, 2.0), IMAGE, clock=clock)
    summary = result.results["quantized"].summary
    assert (summary.median_ms, summary.p90_ms, summary.p99_ms, summary.cv) == (2, 2, 2, 0)
    (speedup,) = result.speedups
    assert (speedup.baseline, speedup.candidate) == ("float32", "quantized")
    assert speedup.ratio == 3 and (speedup.interval.low, speedup.interval.high) == pytest.approx((3, 3))


def test_load_first_and_warm_up_are_apart(clock, pair):
    def cold(run):
        return 500.0 if run == 0 else 50.0 if run < 11 else 5.0

    result = measure_latency(pair(cold, 1.0), IMAGE, clock=clock).results
    assert (result["float32"].load_ms, result["float32"].first_ms) == (7.0, 500.0)
    assert result["float32"].warmup_runs >= latency.WARMUP_RUNS and result["quantized"].warmup_runs == 500
    assert result["float32"].summary.median_ms == result["float32"].summary.p99_ms == 5.0


def test_turns_are_blocks_in_abba_order(clock, pair):
    sessions, log = pair(2.0, 1.0), []
    for session in sessions.values():
        session.log = log
    result = measure_latency(sessions, IMAGE, clock=clock)
    counted = log[sum(1 + r.warmup_runs for r in result.results.values()) :]
    slow, fast = int(SETTLE_MS / 2.0) + BLOCK_RUNS, int(SETTLE_MS / 1.0) + BLOCK_RUNS
    turns = [(name, len(list(runs))) for name, runs in itertools.groupby(counted)]
    # Reversing every second round joins two blocks of the same session.
    assert turns[:4] == [("float32", slow), ("quantized", 2 * fast), ("float32", 2 * slow), ("quantized", 2 * fast)]


def test_first_runs_of_a_block_do_not_count(clock, make_session):
    sessions, last = {}, []

    def cost_of(name, usual):
        def cost(_):
            last.append(name)
            # Slow while the other session's threads still spin.
            return 100.0 if set(last[-BLOCK_DISCARD - 1 :]) != {name} else usual

        return cost

    for name, usual in (("float32", 4.0), ("quantized", 2.0)):
        sessions[name] = make_session(name, cost_of(name, usual), clock=clock)
    result = measure_latency(sessions, IMAGE, clock=clock)
    assert result.results["float32"].summary.mean_ms == 4 and result.results["quantized"].summary.mean_ms == 2


def test_steady_drift_falls_on_both_alike(clock, make_session):
    def heating(_):
        return 1.0 + clock.now_ns / 1e10

    sessions = {name: make_session(name, heating, clock=clock) for name in ("float32", "quantized")}
    (speedup,) = measure_latency(sessions, IMAGE, clock=clock).speedups
    assert speedup.ratio == pytest.approx(1, abs=0.02)
    assert speedup.interval.low <= 1 <= speedup.interval.high


@pytest.mark.parametrize(
    ("cost", "seconds", "runs"),
    [
        pytest.param(1.0, 20.0, 680, id="quick model: p99, then stops early"),
        pytest.param(40.0, 20.0, 210, id="middling model: fills the budget"),
        pytest.param(500.0, 20.0, 70, id="slow model: p90 past the budget"),
        pytest.param(5000.0, 2.0, 7, id="hopeless model: given up"),
    ],
)
def test_runs_fit_the_budget(clock, pair, cost, seconds, runs):
    result = measure_latency(pair(cost, cost), IMAGE, seconds=seconds, clock=clock)
    assert result.results["quantized"].summary.runs == pytest.approx(runs, rel=0.15)


def test_single_session_has_no_speedup(clock, make_session):
    result = measure_latency({"only": make_session(cost=1.0, clock=clock)}, IMAGE, clock=clock)
    assert result.speedups == () and result.results["only"].summary.median_ms == 1


def test_garbage_collection_is_restored_after_a_failure(clock, make_session):
    def broken(run):
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError):
        measure_latency({"a": make_session(cost=broken, clock=clock)}, IMAGE, clock=clock)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(sessions={}), "no session to measure"),
        (dict(seconds=0), "expected a positive number of seconds"),
        (dict(inputs={"image": np.zeros((2, 3, 4, 4))}), r"measured at batch 1, expected \(1, \.\.\.\)"),
    ],
    ids=["no session", "no time", "batch 2"],
)
def test_bad_arguments_say_what_to_do(clock, pair, change, text):
    with pytest.raises(UsageError, match=text):
        measure_latency(**{"sessions": pair(1.0, 1.0), "inputs": IMAGE, "clock": clock, **change})
