"""ONNX Runtime runs the bundle's own ONNX file; what is compiled is the choice of session options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx

from edgeattn.export.functions import tensor_types
from edgeattn.export.target import Artifact, Draft, Target
from edgeattn.ops.registry import DOMAIN, spec_name
from edgeattn.runtime.bundle import ArtifactEntry, Variant
from edgeattn.runtime_plugins import cpu


class OnnxRuntimeTarget(Target):
    """See `edgeattn.export.target.Target`."""

    name = "onnxruntime"

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Session options: every graph optimisation, and the plugin where it is installed and has the model's ops."""
        settings = {
            "plugin": cpu.missing_reason() is None and _has_kernels(draft, variant),
            "graph_optimization_level": "all",
            "threads": (profile or {}).get("threads"),
        }
        folder = draft.folder / self.name
        folder.mkdir(exist_ok=True)
        options = f"{self.name}/{variant}.json"
        (draft.folder / options).write_text(json.dumps(settings, indent=2) + "\n")
        files = [path.relative_to(draft.folder).as_posix() for path in draft.files(variant)]
        entry = ArtifactEntry(
            target=self.name, variant=variant, model=files[0], files=[*files, options], settings=settings
        )  # fmt: skip
        return Artifact(draft.folder, entry)


def _has_kernels(draft: Draft, variant: Variant) -> bool:
    """Whether every custom node of the model is an op that the plugin runs, on float32."""
    model = onnx.load(draft.folder / draft.onnx[variant], load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    types = tensor_types(model)
    if any(types.get(node.input[0], "float32") != "float32" for node in nodes):
        return False
    used = {spec_name(node.op_type) for node in nodes}
    return bool(used) and used <= cpu.KERNELS
