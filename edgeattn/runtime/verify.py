"""`verify`: hashes and golden outputs of a bundle, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.errors import MissingDependency
from edgeattn.runtime.bundle import Bundle
from edgeattn.runtime.session import INPUT, Session


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        files: how many files matched their digest.
        checked: target/variant to the largest difference from the golden outputs.
        problems: one line per artefact that does not reproduce them.
        skipped: one line per artefact whose runtime is not installed here.
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


def golden_difference(session: Session, inputs: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference of the session's first output from `expected`, image by image (batch 1)."""
    worst = 0.0
    for i in range(len(inputs)):
        got = next(iter(session.run({INPUT: inputs[i : i + 1]}).values()))
        difference = float(np.abs(got - expected[i : i + 1]).max())
        worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst


def golden_problems(session: Session, inputs: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    """ "" when the session reproduces the golden outputs, else what is wrong."""
    worst = golden_difference(session, inputs, expected)
    return "" if worst <= tolerance else f"outputs differ by {worst:.3g}, allowed {tolerance:.3g}"


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
        except MissingDependency as error:
            skipped.append(f"{name}: {error}")
            continue
        try:
            checked[name] = golden_difference(session, golden["input"], golden[entry.variant])
        finally:
            session.close()
        allowed = bundle.manifest.golden_tolerance[entry.variant]
        if checked[name] > allowed:
            problems.append(f"{name}: outputs differ from golden by {checked[name]:.3g}, allowed {allowed:.3g}")
    return Verification(len(bundle.manifest.files), checked, tuple(problems), tuple(skipped), tuple(bundle.unlisted()))
