"""check, bench and eval of a bundle on this machine: measure, judge, append the record, redraw the report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.data.interface import IMAGE, LOGITS
from edgeattn.data.labels import label_indices
from edgeattn.data.source import ImageSource, open_source
from edgeattn.devices.accuracy import AccuracyResult, evaluate
from edgeattn.devices.latency import LatencyResult, measure_latency
from edgeattn.devices.outcome import CheckResult, Kind, TargetResult
from edgeattn.devices.report import write_report
from edgeattn.devices.results import append_result, check_writable, machine_facts, read_results, utc_now
from edgeattn.devices.verdict import (
    Gate,
    Verdict,
    combine,
    gate_by_name,
    judge_accuracy,
    judge_placement,
    judge_speed,
    most_severe,
)
from edgeattn.errors import DeviceError, UsageError
from edgeattn.export.target import get_target
from edgeattn.runtime.bundle import MANIFEST_DIGEST, RESULTS, Bundle
from edgeattn.runtime.session import Session

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
VARIANTS = ("float32", "quantized")
DEFAULT_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What to do, with every choice made."""

    kind: Kind
    bundle: Bundle
    targets: tuple[str, ...]
    source: ImageSource | None
    gate: Gate | None
    threads: int | None
    limit: int | None
    batch_size: int
    seconds: float
    progress: Progress | None


def check(
    bundle: Bundle | str | Path,
    data: Any,
    *,
    device: str | None = None,
    gate: str | None = None,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> CheckResult:
    """Is the quantized model as accurate as promised, faster than float32, and running where it should?

    A target that got float32 at export, because the quantized model was no faster, passes; its message says why.

    Args:
        bundle: opened, or its path.
        data: folder, .npz, iterable or `ImageSource` of real images; labels are optional.
        device: None or "local": this machine.
        gate: a name of `GATES`; None: the one of the recipe that the bundle was made with.
        targets: None: all of the bundle.
        threads: None: as each artefact was exported.
        limit: use this many images, spread over the data.
        seconds: time budget of the latency measurement of one target.
        progress: called with (stage, done, total).

    Raises:
        UsageError: unknown device, gate or target. DataError, NumericError, DeviceError: see `evaluate` and `Bundle`.
    """
    _check_device(device)
    asked, source = gate and gate_by_name(gate), _source(data, skip_bad, limit)
    opened = _opened(bundle)
    opened.require_classifier("edgeattn check", "`edgeattn verify` and `edgeattn bench`")
    chosen = asked or gate_by_name(opened.manifest.gate)
    for target in _targets(opened, targets):
        if len(_variants(opened, target)) < len(VARIANTS) and target not in opened.manifest.placements:
            raise UsageError(
                f"{opened.path} was exported with recipe {opened.manifest.recipe!r}: there is no quantized "
                f"artefact for {target} to check against float32. Use `edgeattn eval` and `edgeattn bench`, or export "
                "with w8a8."
            )
    plan = _Plan("check", opened, _targets(opened, targets), source, chosen, threads, limit, 1, seconds, progress)
    return _run(plan, _command(plan, skip_bad))


def bench(
    bundle: Bundle | str | Path,
    *,
    device: str | None = None,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    data: Any = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Latency and placement only, on the first image of `data` or the bundle's golden input. Arguments as `check`."""
    _check_device(device)
    opened = _opened(bundle)
    source = None if data is None else open_source(data)
    if source is not None:
        opened.require_classifier("bench with pictures", "bench without data, on the golden inputs")
    plan = _Plan("bench", opened, _targets(opened, targets), source, None, threads, None, 1, seconds, progress)
    return _run(plan, _command(plan, False))


def evaluate_bundle(
    bundle: Bundle | str | Path,
    data: Any,
    *,
    device: str | None = None,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> CheckResult:
    """Accuracy and placement only. Arguments as `check`."""
    _check_device(device)
    opened, source = _opened(bundle), _source(data, skip_bad, limit)
    opened.require_classifier("edgeattn eval", "`edgeattn verify`")
    plan = _Plan("eval", opened, _targets(opened, targets), source, None, threads, limit, batch_size, 0.0, progress)
    return _run(plan, _command(plan, skip_bad))


def _check_device(device: str | None) -> None:
    if device not in (None, "local"):
        raise UsageError(
            f"device {device!r} is not this machine; this version measures on this machine (no device, or 'local'). "
            "Remote devices come with the device lab; until then copy the bundle there and run it there."
        )


def _source(data: Any, skip_bad: bool, limit: int | None) -> ImageSource:
    if limit is not None and limit < 1:
        raise UsageError(f"the limit of images is {limit}; it must be at least 1.")
    source = open_source(data, skip_bad)
    return source if limit is None else source.spread(limit)


def _opened(bundle: Bundle | str | Path) -> Bundle:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_writable(opened.path / RESULTS)
    return opened


def _targets(bundle: Bundle, targets: Sequence[str] | None) -> tuple[str, ...]:
    if targets:
        for target in targets:
            bundle.artifact(target, VARIANTS[0])
        return tuple(dict.fromkeys(targets))
    # What ran when it was made is tried; the others' targets know whether this machine is another.
    unseen = {entry.target for entry in bundle.manifest.artifacts if entry.not_run}
    reasons = {target: get_target(target).cannot_run() if target in unseen else "" for target in bundle.targets}
    for target, reason in reasons.items():
        if reason:
            logger.warning("%s is left out: %s.", target, reason)
    if chosen := tuple(target for target, reason in reasons.items() if not reason):
        return chosen
    told = "; ".join(f"{target}: {reason}" for target, reason in reasons.items()) or "it holds no artefact"
    raise DeviceError(f"{bundle.path}: nothing in it runs on this machine ({told}). Export for a target that does.")


def _variants(bundle: Bundle, target: str) -> list[str]:
    have = {entry.variant for entry in bundle.manifest.artifacts if entry.target == target}
    return [variant for variant in VARIANTS if variant in have]


def _run(plan: _Plan, command: str) -> CheckResult:
    # The machine's load is part of the evidence, so it is read before this process adds to it.
    machine, started = machine_facts(), utc_now()
    _check_labels(plan)
    inputs = _latency_input(plan) if plan.kind != "eval" else None
    results = tuple(_measure(plan, target, inputs) for target in plan.targets)
    digest, source = plan.bundle.path / MANIFEST_DIGEST, plan.source
    judged = [result for result in results if result.verdict is not None]
    result = CheckResult(
        kind=plan.kind,
        verdict=most_severe(r.verdict for r in judged if r.verdict) if judged else None,
        message="\n".join(f"{r.target}: {r.verdict}: {r.message}." for r in judged),
        gate=plan.gate,
        targets=results,
        data=None if source is None else source.where,
        skipped=() if source is None else tuple(source.skipped),
        converted={} if source is None else dict(source.converted),
        command=command,
        time=started,
        bundle_sha256=digest.read_text().strip() if digest.is_file() else None,
        machine=machine,
    )
    append_result(plan.bundle.path / RESULTS, result.to_dict())
    write_report(plan.bundle, read_results(plan.bundle.path / RESULTS))
    return result


def _check_labels(plan: _Plan) -> None:
    """Labels that do not fit are found before minutes are spent on timing."""
    if plan.source is not None and plan.source.labelled and plan.kind != "bench":
        outputs = plan.bundle.manifest.outputs[0].shape[-1]
        assert isinstance(outputs, int)
        label_indices(plan.source, plan.bundle.manifest.class_names, outputs)


def _latency_input(plan: _Plan) -> dict[str, np.ndarray]:
    """One sample by input name."""
    if plan.source is None:
        return {name: value[:1] for name, value in plan.bundle.golden().inputs.items()}
    return {IMAGE: plan.bundle.preprocessing(next(iter(plan.source)).image)[None]}


def _measure(plan: _Plan, target: str, inputs: dict[str, np.ndarray] | None) -> TargetResult:
    bundle, manifest = plan.bundle, plan.bundle.manifest
    overrides = {} if plan.threads is None else {"threads": plan.threads}
    accuracy: dict[str, AccuracyResult] = {}
    latency: dict[str, LatencyResult] = {}
    speedup = None
    with contextlib.ExitStack() as stack:
        # Only this target's two sessions are open: other thread pools would disturb their timing.
        sessions: dict[str, Session] = {}
        for variant in _variants(bundle, target):
            sessions[variant] = bundle.open_session(target, variant, **overrides)
            stack.callback(sessions[variant].close)
        if inputs is not None:
            # Before accuracy, so that the first inference is the session's first.
            compared = measure_latency(sessions, inputs, seconds=plan.seconds, progress=_staged(plan.progress, target))
            latency, speedup = compared.results, next(iter(compared.speedups), None)
        if plan.source is not None and plan.kind != "bench":
            accuracy = evaluate(
                sessions, plan.source, bundle.preprocessing, input_name=IMAGE, output_name=LOGITS,
                class_names=manifest.class_names, batch_size=plan.batch_size,
                progress=_staged(plan.progress, target),
            )  # fmt: skip
        placement = {variant: session.placement() for variant, session in sessions.items()}
        settings = {variant: dict(session.settings) for variant, session in sessions.items()}
    sizes = {variant: bundle.size_bytes(target, variant) for variant in placement}
    result = TargetResult(target, None, "", accuracy, latency, speedup, placement, settings, sizes)
    if plan.gate is not None and target in manifest.placements and "quantized" not in sessions:
        message = f"float32 is what was shipped; {manifest.placements[target].reason}"
        return dataclasses.replace(result, verdict=Verdict.PASS, message=message)
    return result if plan.gate is None else judge(result, plan.gate, manifest.margin)


def judge(result: TargetResult, gate: Gate, margin: float | None) -> TargetResult:
    """The same measurements with verdict and message; `result` has accuracy, latency and placement."""
    assert result.speedup is not None
    found = combine([
        judge_accuracy(result.accuracy["quantized"], gate),
        judge_placement(result.placement["quantized"]),
        judge_speed(result.speedup, result.latency["quantized"], margin),
    ])  # fmt: skip
    return dataclasses.replace(result, verdict=found.verdict, message=found.sentence)


def _staged(progress: Progress | None, target: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{target}: {stage}", done, total)


def _command(plan: _Plan, skip_bad: bool) -> str:
    """The command line that measures the same again."""
    words = ["edgeattn", plan.kind, str(plan.bundle.path)]
    if plan.source is not None:
        where = plan.source.where
        # Pictures handed over in Python have no path; the placeholder says so.
        words += ["--data", where if Path(where).exists() else f"<{where}>"]
    if plan.gate is not None:
        words += ["--gate", plan.gate.name]
    for target in plan.targets:
        words += ["--target", target]
    if plan.threads is not None:
        words += ["--threads", str(plan.threads)]
    if plan.limit is not None:
        words += ["--limit", str(plan.limit)]
    if plan.kind != "eval":
        words += ["--seconds", f"{plan.seconds:g}"]
    if plan.batch_size != 1:
        words += ["--batch-size", str(plan.batch_size)]
    if skip_bad:
        words.append("--skip-bad")
    return shlex.join(words)
