"""The protocol that everything which measures or compares depends on; backends implement it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
    """What really runs where inside a session.

    Attributes:
        fused: custom nodes of ours that run as one kernel of the plugin.
        inlined: custom nodes of ours that run as their function body of standard ops instead.
        nodes: nodes of the graph as the runtime executes it, by op type.
        reason: why nodes are inlined, or "" when none is or that is how this target is meant to run them.
        expects_fused: whether this target was compiled to run our nodes as plugin kernels.
    """

    fused: int
    inlined: int
    nodes: dict[str, int]
    reason: str = ""
    expects_fused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@runtime_checkable
class Session(Protocol):
    """A loaded artefact on one device.

    Attributes:
        target: "onnxruntime", "openvino", ...
        variant: "float32" (the reference) or "quantized".
        settings: every option that changes numbers or speed (threads, precision hint, graph level, plugin version).
        load_ms: time to load and prepare the artefact, in milliseconds.
    """

    target: str
    variant: str
    settings: dict[str, Any]
    load_ms: float

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name; the batch size is that of the input."""
        ...

    def placement(self) -> Placement:
        """What runs where."""
        ...

    def close(self) -> None:
        """Free the runtime's memory and threads."""
        ...
