"""The verdict drawn from measurements: certain failure, certain pass, or not enough evidence for either."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from edgeattn.devices.accuracy import AccuracyResult
from edgeattn.devices.latency import LatencyResult, SpeedupResult
from edgeattn.devices.statistics import (
    MIN_ROUNDS,
    Interval,
    PairedCounts,
    min_samples,
    ratio_interval,
    wilson_interval,
)
from edgeattn.errors import EXIT_INCONCLUSIVE, EXIT_OK, EXIT_VERDICT, UsageError
from edgeattn.runtime.session import Placement

# A thousand times the data is no advice; beyond it the result lies on the line.
_MOST_TIMES = 1000.0


class Verdict(StrEnum):
    """Of one target or of a bundle, the most severe first."""

    DRIFT = "DRIFT"
    FALLBACK = "FALLBACK"
    SLOWER = "SLOWER"
    INCONCLUSIVE = "INCONCLUSIVE"
    PASS = "PASS"

    @property
    def exit_code(self) -> int:
        """What the command line returns."""
        return {Verdict.PASS: EXIT_OK, Verdict.INCONCLUSIVE: EXIT_INCONCLUSIVE}.get(self, EXIT_VERDICT)


_SEVERITY = list(Verdict)


def most_severe(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several together."""
    return min(verdicts, key=_SEVERITY.index, default=Verdict.PASS)


@dataclasses.dataclass(frozen=True)
class Gate:
    """Share of the float32 top-1 to retain; without labels, share of images with the float32 answer."""

    name: str
    retained: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


# MLPerf Inference's accuracy targets for quantized submissions.
GATES = {gate.name: gate for gate in (Gate("mlperf99", 0.99), Gate("mlperf999", 0.999))}


def gate_by_name(name: str) -> Gate:
    """The gate.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in GATES:
        raise UsageError(f"gate {name!r} is unknown; use one of {', '.join(GATES)}.")
    return GATES[name]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One aspect of a target and the sentence that explains it."""

    verdict: Verdict
    sentence: str


def judge_accuracy(result: AccuracyResult, gate: Gate) -> Finding:
    """DRIFT below the gate for certain, PASS at or above it for certain, else INCONCLUSIVE."""
    if result.paired is None:
        return _judge_agreement(result, gate)
    retained, interval = result.paired.retained, result.paired.retained_interval
    if retained is None or interval is None:
        return Finding(
            Verdict.INCONCLUSIVE,
            f"float32 gets none of {result.images} images right, so nothing can be retained; the labels or the "
            "preprocessing do not belong to this model",
        )
    counts = _counts(result)

    def interval_at(factor: float) -> Interval:
        scaled = ratio_interval(counts.scaled(factor))
        return interval if scaled is None else scaled[1]

    return _judge_share(retained, interval, interval_at, result.images, gate, "of the float32 top-1")


def _judge_agreement(result: AccuracyResult, gate: Gate) -> Finding:
    if result.agreement is None or result.agreement_interval is None:
        raise UsageError(f"session {result.session} is the reference itself; judge the quantized session.")
    share = result.agreement / 100

    def interval_at(factor: float) -> Interval:
        return wilson_interval(share * result.images * factor, result.images * factor)

    interval = result.agreement_interval.scaled(0.01)
    return _judge_share(share, interval, interval_at, result.images, gate, "of the float32 answers (no labels)")


def _counts(result: AccuracyResult) -> PairedCounts:
    assert result.paired is not None and result.top1 is not None
    right = round(result.top1 * result.images / 100)
    both = right - result.paired.gained
    return PairedCounts(both, result.paired.lost, result.paired.gained, result.images - right - result.paired.lost)


def _judge_share(
    share: float, interval: Interval, interval_at: Callable[[float], Interval], images: int, gate: Gate, of_what: str
) -> Finding:
    measured = f"keeps {_percent(share)} [{_percent(interval.low)}, {_percent(interval.high)}] {of_what}"
    wanted = f"gate {gate.name} asks for {_percent(gate.retained)}"
    if interval.high < gate.retained:
        return Finding(Verdict.DRIFT, f"{measured}; {wanted}")
    if interval.low >= gate.retained:
        return Finding(Verdict.PASS, measured)
    factor = _factor_needed(interval_at, gate.retained)
    advice = (
        "the result lies on the gate and more images will hardly decide it"
        if factor is None
        else f"about {_rounded_up(images * factor)} images would decide if the shares stay as they are"
    )
    return Finding(Verdict.INCONCLUSIVE, f"{measured} on {images} images; {wanted}; {advice}")


def _factor_needed(interval_at: Callable[[float], Interval], gate: float) -> float | None:
    factor = 1.0
    while factor <= _MOST_TIMES:
        interval = interval_at(factor)
        if interval.low >= gate or interval.high < gate:
            return factor
        factor *= 1.1
    return None


def judge_speed(speedup: SpeedupResult, quantized: LatencyResult, margin: float | None = 1.0) -> Finding:
    """SLOWER or PASS for certain, else INCONCLUSIVE; with the margin None every speed passes."""
    runs, needed = quantized.summary.runs, min_samples(0.9)
    if margin is None:
        return Finding(
            Verdict.PASS, f"runs at {speedup.ratio:.2f}x the speed of float32, of which its recipe promises nothing"
        )
    if quantized.summary.p90_ms is None or speedup.interval is None:
        return Finding(
            Verdict.INCONCLUSIVE,
            f"only {runs} runs in {speedup.rounds} rounds fitted the time budget; at least {max(needed, runs)} runs in "
            f"{MIN_ROUNDS} rounds are needed: allow more seconds",
        )
    interval = speedup.interval
    measured = f"speed-up {speedup.ratio:.2f}x [{interval.low:.2f}, {interval.high:.2f}] over float32"
    wanted = "" if margin == 1 else f", and the recipe asks for {margin:g}"
    if interval.high < margin:
        return Finding(Verdict.SLOWER, measured + wanted)
    if interval.low > margin:
        return Finding(Verdict.PASS, measured)
    advice = _runs_advice(speedup.ratio, interval, runs, margin)
    return Finding(Verdict.INCONCLUSIVE, f"{measured}, which includes {margin:g}{wanted}; {advice}")


def _runs_advice(ratio: float, interval: Interval, runs: int, margin: float) -> str:
    distance = abs(math.log(ratio / margin))
    half = math.log(ratio / interval.low) if ratio > margin else math.log(interval.high / ratio)
    # The interval narrows with the square root of the runs.
    if distance == 0 or (half / distance) ** 2 > _MOST_TIMES:
        return "the two are about equally fast" if margin == 1 else "the speed-up is about what is asked for"
    # A point estimate can only be this close to the end of its own interval by rounding, so ask for some more at least.
    return (
        f"about {_rounded_up(runs * max((half / distance) ** 2, 1.1))} runs would decide if the speed-up stays as it is"
    )


def judge_placement(placement: Placement) -> Finding:
    """FALLBACK when nodes meant for the plugin's kernels run as standard ops."""
    if placement.expects_fused and placement.inlined:
        total = placement.fused + placement.inlined
        reason = placement.reason or "the runtime gives no reason"
        return Finding(
            Verdict.FALLBACK, f"{placement.inlined} of {total} attention nodes run without the fused kernel: {reason}"
        )
    return Finding(Verdict.PASS, f"{placement.fused} fused attention nodes" if placement.fused else "")


def combine(findings: list[Finding]) -> Finding:
    """The verdict of a target: the most severe finding, with the sentences of all that did not pass (or of all)."""
    verdict = most_severe(finding.verdict for finding in findings)
    told = [f for f in findings if f.sentence and (verdict is Verdict.PASS or f.verdict is not Verdict.PASS)]
    told.sort(key=lambda finding: _SEVERITY.index(finding.verdict))
    return Finding(verdict, "; ".join(finding.sentence for finding in told))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _rounded_up(count: float) -> int:
    """Two significant digits, upwards: the estimate is no better than that."""
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / unit) * unit
