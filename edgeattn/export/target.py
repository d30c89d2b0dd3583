"""The Target protocol, what a compile step gets and gives, and the table of targets."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from edgeattn.data.interface import Interface
from edgeattn.errors import DeviceError, UsageError
from edgeattn.runtime.bundle import ArtifactEntry, Variant, open_artifact
from edgeattn.runtime.session import Session

# One module per target; each has a class that implements Target, made on first use.
_TARGETS = {
    "onnxruntime": ("edgeattn.export.targets.onnxruntime", "OnnxRuntimeTarget"),
    "openvino": ("edgeattn.export.targets.openvino", "OpenVinoTarget"),
    "tensorrt-rtx": ("edgeattn.export.targets.tensorrt", "TensorRtRtxTarget"),
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A bundle that is being written: its folder, and the ONNX file of each variant relative to it.

    Attributes:
        interface: the model's inputs and outputs.
    """

    folder: Path
    onnx: Mapping[Variant, str]
    interface: Interface

    def files(self, variant: Variant) -> list[Path]:
        """The ONNX file of a variant, and the file of its weights where it is too large to hold them."""
        model = self.folder / self.onnx[variant]
        return [path for path in (model, model.with_name(f"{model.name}.data")) if path.is_file()]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What `Target.compile` made: files inside the draft's folder and the options they run with."""

    folder: Path
    entry: ArtifactEntry

    def open(self, device: str = "local", **overrides: Any) -> Session:
        """A session on a device; this version knows "local" only.

        Raises:
            DeviceError: another device was named.
        """
        if device != "local":
            raise DeviceError(f"device {device!r}: this version runs artefacts on 'local' only; copy the bundle there.")
        entry = self.entry
        return open_artifact(entry.target, self.folder / entry.model, {**entry.settings, **overrides}, entry.variant)


class Target(Protocol):
    """Turns the ONNX of a draft into what one runtime loads. Never re-calibrates, never changes precision silently."""

    name: str

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Write the artefact of one variant; `profile` is the device's (`threads`, `compute_capabilities`), None this
        machine."""
        ...

    def cannot_run(self) -> str:
        """Why artefacts cannot run on this machine, or ""."""
        return ""

    def stand_in(self, artifact: Artifact) -> Session:
        """A session that computes here what an artefact was made from, where the artefact itself cannot run."""
        return artifact.open()


def list_targets() -> list[str]:
    """Names of all targets."""
    return list(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: no such target; near names are suggested. MissingDependency: its package is not installed.
    """
    if name not in _TARGETS:
        near = difflib.get_close_matches(name, _TARGETS, n=1)
        raise UsageError(
            f"unknown target {name!r}: "
            + (f"did you mean {near[0]}? " if near else "")
            + f"Known: {', '.join(_TARGETS)}."
        )
    module, cls = _TARGETS[name]
    return getattr(importlib.import_module(module), cls)()
