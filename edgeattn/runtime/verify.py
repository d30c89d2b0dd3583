"""`verify`: hashes and golden outputs of a bundle, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.errors import DeviceError, MissingDependency
from edgeattn.runtime.bundle import Bundle, Golden
from edgeattn.runtime.session import Session


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        files: how many files matched their digest.
        checked: target/variant to the largest difference from the golden outputs.
        problems: one line per artefact that does not reproduce them.
        skipped: one line per artefact that cannot run here: no runtime, no device.
        unlisted: files in the folder that the manifest does not know.
    """

    files: int
    checked: dict[str, float]
    problems: tuple[str, ...]
    skipped: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every artefact that could run here reproduces its golden outputs, and at least one could."""
        return not self.problems and bool(self.checked)

    def __str__(self) -> str:
        lines = [f"{self.files} files match their digests"]
        lines += [f"{name}: golden outputs reproduced to {value:.3g}" for name, value in self.checked.items()]
        lines += [f"not run: {line}" for line in self.skipped]
        lines += [f"unlisted file, never loaded: {name}" for name in self.unlisted]
        lines += [f"FAILED: {line}" for line in self.problems]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "ok": self.ok}


def golden_differences(session: Session, golden: Golden, graph: str) -> dict[str, float]:
    """Largest absolute difference from a graph's outputs, by output, sample by sample; infinite for NaN."""
    expected = golden.outputs[graph]
    worst = dict.fromkeys(expected, 0.0)
    for at in golden.samples():
        got = session.run({name: value[at] for name, value in golden.inputs.items()})
        for name, want in expected.items():
            difference = float(np.abs(got[name] - want[at]).max())
            worst[name] = max(worst[name], difference) if np.isfinite(difference) else float("inf")
    return worst


def golden_problems(differences: dict[str, float], tolerance: dict[str, float]) -> str:
    """ "" when every output stays within its tolerance, else what is wrong."""
    return "; ".join(
        f"{name} differs from golden by {value:.3g}, allowed {tolerance[name]:.3g}"
        for name, value in differences.items()
        if not value <= tolerance[name]
    )


def verify(path: str | Path) -> Verification:
    """Re-hash every file and re-run the golden inputs through every artefact whose runtime is installed.

    Raises:
        BundleError: a file does not match its digest; it is named.
    """
    bundle = Bundle.open(path)
    golden = bundle.golden()
    checked: dict[str, float] = {}
    problems, skipped = [], []
    for entry in bundle.manifest.artifacts:
        name = f"{entry.target}/{entry.variant}"
        try:
            session = bundle.open_session(entry.target, entry.variant)
        except (MissingDependency, DeviceError) as error:
            if isinstance(error, DeviceError) and not entry.not_run:
                raise
            skipped.append(f"{name}: {error}")
            continue
        try:
            differences = golden_differences(session, golden, entry.graph)
        finally:
            session.close()
        checked[name] = max(differences.values())
        problem = golden_problems(differences, bundle.manifest.golden_tolerance[entry.graph])
        if problem:
            problems.append(f"{name}: {problem}")
    return Verification(len(bundle.manifest.files), checked, tuple(problems), tuple(skipped), tuple(bundle.unlisted()))
