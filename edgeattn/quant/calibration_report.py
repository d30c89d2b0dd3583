"""What the calibration doctor reports: every tensor's numbers, and findings that say what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from edgeattn.errors import EXIT_OK, EXIT_VERDICT

OUTLIER_FACTOR = 8.0  # over the median: three of the eight bits are gone for the median channel or token
FIRST_CHECK = 16  # images; doubled from check to check
_CLIPPED, _POOR_BITS = 0.01, 3.0  # share of values, and bits, that make a warning
_NAMED = 5  # pictures or layers in a sentence; the report has all
Severity = Literal["error", "warning", "info"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know: a sentence with what to do, and the pictures or layers that it is about."""

    severity: Severity
    kind: str
    text: str
    where: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One quantized tensor.

    Attributes:
        name: module path of the layer that makes it.
        low, high: the range that the recipe's observer chooses; `smallest`, `largest`: what was seen.
        coverage: share of the 8-bit codes in use, 0 to 1.
        effective_bits: entropy of the codes in bits, at most 8.
        saturation: share of the values outside the range, 0 to 1.
        outlier_channels, outlier_tokens: index or name to its largest |x| over the median of all; above 8 only.
        ranges: number of images to (low, high) after them.
        settled: images from which the range stays within 5 % of the final one; None: it still moved at the last check.
    """

    name: str
    low: float
    high: float
    smallest: float
    largest: float
    coverage: float
    effective_bits: float
    saturation: float
    outlier_channels: dict[str, float]
    outlier_tokens: dict[str, float]
    ranges: dict[int, tuple[float, float]]
    settled: int | None


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `diagnose` found.

    Attributes:
        overlap: (calibration picture, validation picture) of equal pixels; `duplicates`: groups of equal pictures.
        constant: pictures of one colour.
        enough: images from which every range is settled; None: more are needed to tell.
    """

    model: str
    recipe: str
    source: str
    images: int
    skipped: tuple[str, ...]
    tensors: tuple[TensorReport, ...]
    findings: tuple[Finding, ...]
    overlap: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, ...], ...]
    constant: tuple[str, ...]
    enough: int | None

    @property
    def verdict(self) -> Severity:
        """The gravest severity."""
        found = {finding.severity for finding in self.findings}
        return "error" if "error" in found else "warning" if "warning" in found else "info"

    @property
    def exit_code(self) -> int:
        """1 with an error, else 0."""
        return EXIT_VERDICT if self.verdict == "error" else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "verdict": self.verdict, "exit_code": self.exit_code}

    def __str__(self) -> str:
        lines = [f"{self.model}, recipe {self.recipe}: {self.images} pictures of {self.source}"]
        lines += [f"{finding.severity:8}{finding.text}" for finding in self.findings]
        poorest = sorted(self.tensors, key=lambda t: t.effective_bits)[:_NAMED]
        if poorest:
            lines.append("tensors with the fewest effective bits (of 8):")
        lines += [
            f"  {t.name}: {t.effective_bits:.1f} bits, {100 * t.coverage:.0f} % of the codes, range {t.low:.4g} to "
            f"{t.high:.4g}, {100 * t.saturation:.3g} % clipped" for t in poorest
        ]  # fmt: skip
        return "\n".join(lines)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMED]) + (f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")


def findings(report: CalibrationReport) -> Iterator[Finding]:
    """What the report's numbers mean, gravest things first."""
    yield from _about_pictures(report)
    yield from _about_number(report)
    yield from _about_tensors(report.tensors)


def _about_pictures(report: CalibrationReport) -> Iterator[Finding]:
    if report.overlap:
        pairs = tuple(f"{own} = {other}" for own, other in report.overlap)
        yield Finding("error", "overlap", (
            f"{len(pairs)} calibration picture(s) are in the validation data too, pixel for pixel ({_some(pairs)}); "
            "accuracy measured on pictures that set the ranges is too good. Take them out of one of the two."
        ), pairs)  # fmt: skip
    if report.constant:
        yield Finding("warning", "constant", (
            f"{len(report.constant)} of {report.images} pictures are of one colour ({_some(report.constant)}); they "
            "show no layer what it will see. Remove them."
        ), report.constant)  # fmt: skip
    if report.duplicates:
        groups = tuple(" = ".join(group) for group in report.duplicates)
        extra = sum(len(group) - 1 for group in report.duplicates)
        yield Finding("warning", "duplicates", (
            f"{extra} of {report.images} pictures are copies of others ({_some(groups)}); they count double in every "
            "range. Replace them by others."
        ), groups)  # fmt: skip
    if report.skipped:
        yield Finding(
            "warning", "skipped", f"{len(report.skipped)} unreadable picture(s) were left out "
            f"({_some(report.skipped)}). Remove or repair them.", report.skipped,
        )  # fmt: skip


def _about_number(report: CalibrationReport) -> Iterator[Finding]:
    moving = tuple(t.name for t in report.tensors if t.settled is None)
    if report.tensors and report.images < 2 * FIRST_CHECK:
        yield Finding("warning", "number", (
            f"{report.images} pictures are too few to see whether the ranges have settled. Give "
            f"{2 * FIRST_CHECK} or more; 512 are the recipes' default."
        ))  # fmt: skip
    elif moving:
        yield Finding("warning", "number", (
            f"{len(moving)} of {len(report.tensors)} ranges still move by more than 5 % at {report.images} pictures "
            f"({_some(moving)}). Give more pictures."
        ), moving)  # fmt: skip
    elif report.enough:
        yield Finding("info", "number", (
            f"{report.enough} pictures are enough: from there on every range stays within 5 % of that of all "
            f"{report.images}."
        ))  # fmt: skip


def _about_tensors(tensors: tuple[TensorReport, ...]) -> Iterator[Finding]:
    flat = tuple(t.name for t in tensors if t.smallest == t.largest)
    clipped = tuple(t.name for t in tensors if t.saturation > _CLIPPED)
    poor = tuple(t.name for t in tensors if t.effective_bits < _POOR_BITS and t.name not in flat)
    channels = tuple(f"{t.name} ({len(t.outlier_channels)}, up to {max(t.outlier_channels.values()):.0f}x)"
                     for t in tensors if t.outlier_channels)  # fmt: skip
    tokens = tuple(f"{t.name} ({_some(t.outlier_tokens)})" for t in tensors if t.outlier_tokens)
    times = f"{OUTLIER_FACTOR:g} times the median"
    for kind, where, text in (
        ("dead", flat, "{n} tensor(s) have one value for all pictures ({some}). Check the checkpoint: the layer is "
         "dead, or the pictures are all alike."),
        ("saturation", clipped, f"{{n}} range(s) clip more than {_CLIPPED:.0%} of the values ({{some}}). Take a higher "
         "percentile, or the observer min_max or mse."),
        ("coverage", poor, f"{{n}} tensor(s) use fewer than {_POOR_BITS:g} of 8 bits ({{some}}). Take the observer mse "
         "or a lower percentile, or keep the layers float with a rule."),
        ("outlier channels", channels, f"{{n}} tensor(s) have channels beyond {times} ({{some}}). The steps equalize "
         "and smooth move them into the weights; else keep the layers float with a rule."),
        ("outlier tokens", tokens, f"{{n}} tensor(s) have tokens beyond {times} ({{some}}). One scale per tensor "
         "spends its codes on them; keep the layers float with a rule, or calibrate with a percentile."),
    ):  # fmt: skip
        if where:
            yield Finding("warning", kind, text.format(n=len(where), some=_some(where)), where)
