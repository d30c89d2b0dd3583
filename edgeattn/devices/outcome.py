"""What check, bench and eval return: plain data for the command line, the report and `results.jsonl`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from edgeattn.devices.accuracy import AccuracyResult
from edgeattn.devices.latency import LatencyResult, SpeedupResult
from edgeattn.devices.verdict import Gate, Verdict
from edgeattn.errors import EXIT_OK
from edgeattn.runtime.session import Placement

Kind = Literal["check", "bench", "eval"]


@dataclasses.dataclass(frozen=True)
class TargetResult:
    """One target; dictionaries are by variant. bench leaves accuracy empty, eval leaves latency; only check judges."""

    target: str
    verdict: Verdict | None
    message: str
    accuracy: dict[str, AccuracyResult]
    latency: dict[str, LatencyResult]
    speedup: SpeedupResult | None
    placement: dict[str, Placement]
    settings: dict[str, dict[str, Any]]
    size_bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target, "verdict": self.verdict, "message": self.message,
            "accuracy": {name: result.to_dict() for name, result in self.accuracy.items()},
            "latency": {name: result.to_dict() for name, result in self.latency.items()},
            "speedup": self.speedup and self.speedup.to_dict(),
            "placement": {name: placement.to_dict() for name, placement in self.placement.items()},
            "settings": self.settings, "size_bytes": self.size_bytes,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Result of check, bench or eval.

    Attributes:
        verdict: the most severe of the targets'; None for bench and eval.
        message: one sentence for each target.
        data: where the images came from. skipped: images that could not be read and were left out.
        converted: how many images changed their pixel format, by what was done.
        command: reproduces this result. time: UTC. bundle_sha256: digest of the bundle's manifest.
    """

    kind: Kind
    verdict: Verdict | None
    message: str
    gate: Gate | None
    targets: tuple[TargetResult, ...]
    data: str | None
    skipped: tuple[str, ...]
    converted: dict[str, int]
    command: str
    time: str
    bundle_sha256: str | None
    machine: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 DRIFT, FALLBACK or SLOWER, 5 INCONCLUSIVE; 0 for bench and eval."""
        return EXIT_OK if self.verdict is None else self.verdict.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one line of `results.jsonl`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **values, "gate": self.gate and self.gate.to_dict(),
            "targets": [target.to_dict() for target in self.targets], "skipped": list(self.skipped),
        }  # fmt: skip
