"""ONNX Runtime runs the bundle's own ONNX file; what is compiled is the choice of session options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeattn.export.target import Artifact, Draft
from edgeattn.runtime.bundle import ArtifactEntry, Variant
from edgeattn.runtime_plugins import cpu


class OnnxRuntimeTarget:
    """See `edgeattn.export.target.Target`."""

    name = "onnxruntime"

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Session options: the plugin is asked for when it is installed here, every graph optimisation is on."""
        settings = {
            "plugin": cpu.missing_reason() is None,
            "graph_optimization_level": "all",
            "threads": (profile or {}).get("threads"),
        }
        folder = draft.folder / self.name
        folder.mkdir(exist_ok=True)
        options = f"{self.name}/{variant}.json"
        (draft.folder / options).write_text(json.dumps(settings, indent=2) + "\n")
        model = draft.onnx[variant]
        entry = ArtifactEntry(target=self.name, variant=variant, model=model, files=[model, options], settings=settings)
        return Artifact(draft.folder, entry)
