import dataclasses
import re

import numpy as np
import pytest

from edgeattn.devices.accuracy import AccuracyResult, pair_accuracy
from edgeattn.devices.latency import LatencyResult, SpeedupResult
from edgeattn.devices.statistics import Interval, summarize_latency, wilson_interval
from edgeattn.devices.verdict import (
    GATES,
    Finding,
    Verdict,
    combine,
    gate_by_name,
    judge_accuracy,
    judge_placement,
    judge_speed,
    most_severe,
)
from edgeattn.errors import UsageError
from edgeattn.runtime.session import Placement

GATE = GATES["mlperf99"]


def accuracy(both, lost, gained, neither):
    reference = np.repeat([True, True, False, False], [both, lost, gained, neither])
    candidate = np.repeat([True, False, True, False], [both, lost, gained, neither])
    n = len(reference)
    agreement = wilson_interval(n - lost - gained, n).scaled(100)
    top1 = 100 * float(candidate.mean())
    paired = pair_accuracy(reference, candidate)
    return AccuracyResult("quantized", n, top1, None, 100 * (n - lost - gained) / n, agreement, 40.0, 1.0, paired, ())


def unlabelled(result):
    return dataclasses.replace(result, top1=None, paired=None)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        pytest.param((7800, 100, 100, 2000), Verdict.PASS, id="as good on 10000"),
        pytest.param((7500, 400, 100, 2000), Verdict.DRIFT, id="3.8 % lost on 10000"),
        pytest.param((7800, 130, 60, 2010), Verdict.INCONCLUSIVE, id="on the gate"),
        pytest.param((20, 0, 0, 0), Verdict.INCONCLUSIVE, id="20 perfect images"),
        pytest.param((100, 0, 0, 0), Verdict.INCONCLUSIVE, id="100 perfect images"),
        pytest.param((1000, 0, 0, 0), Verdict.PASS, id="1000 perfect images"),
        pytest.param((0, 20, 0, 0), Verdict.DRIFT, id="20 images all lost"),
        pytest.param((0, 0, 2, 18), Verdict.INCONCLUSIVE, id="reference never right"),
    ],
)
def test_accuracy_verdicts(counts, verdict):
    assert judge_accuracy(accuracy(*counts), GATE).verdict is verdict


def test_stricter_gate_is_stricter():
    result = accuracy(7800, 60, 60, 2080)
    assert judge_accuracy(result, GATE).verdict is Verdict.PASS
    assert judge_accuracy(result, GATES["mlperf999"]).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("counts", [(40, 0, 0, 10), (300, 8, 2, 90)], ids=["no change", "some lost"])
def test_the_advised_number_of_images_decides(labelled, counts):
    def judged(factor):
        result = accuracy(*(round(count * factor) for count in counts))
        return judge_accuracy(result if labelled else unlabelled(result), GATE)

    found = judged(1)
    advised = re.search(r"about (\d+) images would decide", found.sentence)
    if labelled or counts[1] == 0:
        assert found.verdict is Verdict.INCONCLUSIVE and advised
    if advised:
        assert judged(int(advised[1]) * 1.05 / sum(counts)).verdict is not Verdict.INCONCLUSIVE
        assert judged(int(advised[1]) * 0.7 / sum(counts)).verdict is Verdict.INCONCLUSIVE


def test_without_labels_the_gate_is_on_agreement():
    assert judge_accuracy(unlabelled(accuracy(990, 0, 10, 0)), GATE).verdict is Verdict.INCONCLUSIVE
    drifted = judge_accuracy(unlabelled(accuracy(700, 150, 150, 0)), GATE)
    assert drifted.verdict is Verdict.DRIFT and "float32 answers (no labels)" in drifted.sentence


def speed(ratio, low, high, runs=680):
    summary = summarize_latency(np.full(runs, 2.0))
    interval = None if low is None else Interval(low, high)
    latency = LatencyResult("quantized", summary, 1.0, 1.0, {}, 10, 3, ())
    return SpeedupResult("float32", "quantized", ratio, interval, 34, runs), latency


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict", "text"),
    [
        pytest.param(2.0, 1.9, 2.1, Verdict.PASS, "2.00x", id="faster"),
        pytest.param(0.5, 0.4, 0.9, Verdict.SLOWER, "0.50x", id="slower"),
        pytest.param(1.1, 0.9, 1.3, Verdict.INCONCLUSIVE, "about 3", id="straddles 1"),
        pytest.param(0.95, 0.9, 1.01, Verdict.INCONCLUSIVE, "runs would decide", id="straddles 1 below"),
        pytest.param(1.0, 0.9, 1.1, Verdict.INCONCLUSIVE, "about equally fast", id="equal"),
        pytest.param(1.0, 1.0, 1.0, Verdict.INCONCLUSIVE, "about equally fast", id="exactly equal"),
        pytest.param(2.0, None, None, Verdict.INCONCLUSIVE, "allow more seconds", id="too few rounds"),
    ],
)
def test_speed_verdicts(ratio, low, high, verdict, text):
    found = judge_speed(*speed(ratio, low, high))
    assert found.verdict is verdict and text in found.sentence


def test_too_few_runs_are_inconclusive_whatever_the_speed():
    found = judge_speed(*speed(2.0, 1.9, 2.1, runs=63))
    assert found.verdict is Verdict.INCONCLUSIVE and "at least 64 runs" in found.sentence


@pytest.mark.parametrize(
    ("low", "high", "verdict", "text"),
    [
        pytest.param(1.6, 1.8, Verdict.PASS, "speed-up 1.70x", id="above"),
        pytest.param(1.1, 1.3, Verdict.SLOWER, "and the recipe asks for 1.5", id="faster, and below"),
        pytest.param(
            1.4, 1.8, Verdict.INCONCLUSIVE, "includes 1.5, and the recipe asks for 1.5; about", id="straddles"
        ),
        pytest.param(1.4, 1.6, Verdict.INCONCLUSIVE, "the speed-up is about what is asked for", id="equal"),
    ],
)
def test_the_margin_of_the_recipe_is_what_counts(low, high, verdict, text):
    found = judge_speed(*speed((low + high) / 2, low, high), margin=1.5)
    assert found.verdict is verdict and text in found.sentence


def test_recipes_for_size_may_be_slow():
    found = judge_speed(*speed(0.5, 0.4, 0.6), margin=None)
    assert (
        found.verdict is Verdict.PASS and "0.50x the speed of float32, of which its recipe promises" in found.sentence
    )


@pytest.mark.parametrize(
    ("placement", "verdict"),
    [
        pytest.param(Placement(12, 0, {}, "", True), Verdict.PASS, id="all fused"),
        pytest.param(Placement(0, 12, {}, "", False), Verdict.PASS, id="meant to be inlined"),
        pytest.param(Placement(10, 2, {}, "plugin 0.1 lacks stride 2", True), Verdict.FALLBACK, id="two fell back"),
    ],
)
def test_placement_verdicts(placement, verdict):
    found = judge_placement(placement)
    assert found.verdict is verdict and placement.reason in found.sentence


def test_order_of_severity():
    assert list(Verdict) == ["DRIFT", "FALLBACK", "SLOWER", "INCONCLUSIVE", "PASS"]
    assert most_severe([Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.SLOWER]) is Verdict.SLOWER
    assert {v: v.exit_code for v in Verdict} == dict(DRIFT=1, FALLBACK=1, SLOWER=1, INCONCLUSIVE=5, PASS=0)


def test_combined_message_tells_all_that_did_not_pass_worst_first():
    found = combine([Finding(Verdict.SLOWER, "slow"), Finding(Verdict.PASS, "fine"), Finding(Verdict.DRIFT, "drifts")])
    assert found == Finding(Verdict.DRIFT, "drifts; slow")
    assert combine([Finding(Verdict.PASS, "a"), Finding(Verdict.PASS, "")]) == Finding(Verdict.PASS, "a")


def test_unknown_gate_lists_the_known():
    with pytest.raises(UsageError, match="use one of mlperf99, mlperf999"):
        gate_by_name("strict")
