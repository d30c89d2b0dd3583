"""Latency of sessions measured in turns: warm-up apart, blocks in ABBA order, stopped by run count and time budget."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgeattn.devices.statistics import (
    MIN_ROUNDS,
    Interval,
    LatencySummary,
    median_ratio_interval,
    min_samples,
    summarize_latency,
)
from edgeattn.errors import UsageError
from edgeattn.runtime.session import Session

WARMUP_RUNS = 10
WARMUP_SECONDS = 0.5
# Thread pools of an idle session spin for a while after its last run and slow down the other one. So a turn is a block
# of consecutive runs, and its first runs, which meet the other pool still spinning and cold caches, are not counted:
# at least BLOCK_DISCARD runs and SETTLE_MS. Without the time, p90 of a 0.5 ms model read 5 ms: a scheduler slice lost
# to a spinning thread.
BLOCK_RUNS = 20
SMALLEST_BLOCK_RUNS = 7
BLOCK_DISCARD = 3
SETTLE_MS = 40.0
WANTED_ROUNDS = 10
# A model too slow for the least number of runs is given up after this many times the time budget.
OVERTIME = 10
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LatencyResult:
    """One session at batch 1.

    Attributes:
        load_ms, first_ms: loading and the first inference; in no other number.
        settle_ms: time at the start of each block whose runs are not counted.
        settings: the session's own record of what it ran with.
        samples_ms: counted runs by round, shape (rounds, block_runs), milliseconds.
    """

    session: str
    summary: LatencySummary
    load_ms: float
    first_ms: float
    settings: dict[str, Any]
    warmup_runs: int
    settle_ms: float
    samples_ms: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; run times are rounded to the nanosecond."""
        return {
            "session": self.session,
            "summary": self.summary.to_dict(),
            "load_ms": self.load_ms,
            "first_ms": self.first_ms,
            "settings": self.settings,
            "warmup_runs": self.warmup_runs,
            "settle_ms": self.settle_ms,
            "samples_ms": [[round(sample, 6) for sample in block] for block in self.samples_ms],
        }


@dataclasses.dataclass(frozen=True)
class SpeedupResult:
    """Median of `baseline` over median of `candidate`: above 1 the candidate is faster. No interval: too few rounds."""

    baseline: str
    candidate: str
    ratio: float
    interval: Interval | None
    rounds: int
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LatencyComparison:
    """All sessions by name, and each one against the first."""

    results: dict[str, LatencyResult]
    speedups: tuple[SpeedupResult, ...]


class _Series:
    """One session while it is measured."""

    def __init__(self, session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], int]) -> None:
        self.session, self._inputs, self._clock = session, inputs, clock
        self.blocks: list[tuple[float, ...]] = []
        self.first_ms = self.run_ms()
        self.warmup_runs, self.typical_ms = self._warm_up()

    def run_ms(self) -> float:
        started = self._clock()
        self.session.run(self._inputs)
        return (self._clock() - started) / 1e6

    def _warm_up(self) -> tuple[int, float]:
        times: list[float] = []
        while len(times) < WARMUP_RUNS or sum(times) < WARMUP_SECONDS * 1e3:
            times.append(self.run_ms())
        return len(times), float(np.median(times))

    def run_block(self, runs: int) -> None:
        settling: list[float] = []
        while len(settling) < BLOCK_DISCARD or sum(settling) < SETTLE_MS:
            settling.append(self.run_ms())
        self.blocks.append(tuple(self.run_ms() for _ in range(runs)))

    @property
    def runs(self) -> int:
        return sum(map(len, self.blocks))


def measure_latency(
    sessions: Mapping[str, Session],
    inputs: Mapping[str, np.ndarray],
    *,
    seconds: float = 20.0,
    min_runs: int | None = None,
    max_runs: int | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
    progress: Progress | None = None,
) -> LatencyComparison:
    """Time sessions on one input of batch 1.

    Args:
        sessions: by name; the first is the baseline of the speed-ups. No other session should be open.
        seconds: time budget of the counted runs of all sessions; spent until `max_runs` is reached.
        min_runs: counted runs of each session even past the budget (None: enough for p90).
        max_runs: counted runs after which to stop early (None: enough for p99).
        clock: nanoseconds.

    Raises:
        UsageError: no session, a budget that is not positive, or a batch other than 1.
    """
    _check_arguments(sessions, inputs, seconds)
    least = min_samples(0.9) if min_runs is None else min_runs
    most = max(least, min_samples(0.99) if max_runs is None else max_runs)
    with _no_garbage_collection():
        series = {name: _Series(session, inputs, clock) for name, session in sessions.items()}
        block_runs = _block_runs([s.typical_ms for s in series.values()], seconds)
        started = clock()
        for order in _abba(list(series.values())):
            for one in order:
                one.run_block(block_runs)
            runs, elapsed = len(series[next(iter(series))].blocks) * block_runs, (clock() - started) / 1e9
            if progress:
                progress("latency", min(runs, most), most)
            if _enough(runs, runs // block_runs, elapsed, seconds, least, most):
                break
    return _comparison(series)


def _check_arguments(sessions: Mapping[str, Session], inputs: Mapping[str, np.ndarray], seconds: float) -> None:
    if not sessions:
        raise UsageError("no session to measure; give at least one.")
    if not seconds > 0:
        raise UsageError(f"the time budget is {seconds} s; expected a positive number of seconds.")
    for name, value in inputs.items():
        if value.shape[:1] != (1,):
            raise UsageError(
                f"input {name!r} has shape {value.shape}; latency is measured at batch 1, expected (1, ...)."
            )


def _block_runs(typical_ms: list[float], seconds: float) -> int:
    """Runs in a block: as many as let WANTED_ROUNDS fit the budget, within limits."""
    settling = sum(max(BLOCK_DISCARD * run_ms, SETTLE_MS) for run_ms in typical_ms)
    fitting = (seconds * 1e3 / WANTED_ROUNDS - settling) / max(sum(typical_ms), 1e-6)
    return int(max(SMALLEST_BLOCK_RUNS, min(BLOCK_RUNS, fitting)))


def _abba(series: list[_Series]) -> Iterator[list[_Series]]:
    # Every second round is reversed, so that a steady drift (heat, frequency) falls on both sides alike.
    while True:
        yield series
        yield series[::-1]


def _enough(runs: int, rounds: int, elapsed: float, seconds: float, least: int, most: int) -> bool:
    if elapsed > OVERTIME * seconds:
        return True
    if runs < least or rounds < MIN_ROUNDS:
        return False
    return runs >= most or elapsed >= seconds


def _comparison(series: Mapping[str, _Series]) -> LatencyComparison:
    results = {
        name: LatencyResult(
            name, summarize_latency(np.array(one.blocks)), one.session.load_ms, one.first_ms,
            dict(one.session.settings), one.warmup_runs, SETTLE_MS, tuple(one.blocks),
        )
        for name, one in series.items()
    }  # fmt: skip
    baseline, *others = series
    speedups = []
    for name in others:
        ratio, interval = median_ratio_interval(np.array(series[baseline].blocks), np.array(series[name].blocks))
        speedups.append(SpeedupResult(baseline, name, ratio, interval, len(series[name].blocks), series[name].runs))
    return LatencyComparison(results, tuple(speedups))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside a run would be counted as the model's time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
