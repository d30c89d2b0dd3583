"""OpenVINO IR from the inlined ONNX: its frontend refuses model-local functions of an unknown domain."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from typing import Any

import onnx
from onnx.inliner import inline_local_functions

from edgeattn.errors import UnsupportedOp
from edgeattn.export.target import Artifact, Draft
from edgeattn.ops.registry import DOMAIN
from edgeattn.runtime.bundle import ArtifactEntry, Variant
from edgeattn.runtime.openvino_session import import_openvino


class OpenVinoTarget:
    """See `edgeattn.export.target.Target`. The artefact has a static batch of 1, which its CPU plugin runs faster."""

    name = "openvino"

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Write `openvino/VARIANT.xml` and `.bin`; weights keep their precision (int8 stays int8, float32 float32)."""
        openvino = import_openvino()
        model = onnx.load(draft.folder / draft.onnx[variant])
        custom_nodes = sum(node.domain == DOMAIN for node in model.graph.node)
        try:
            converted = openvino.Core().read_model(inline_local_functions(model).SerializeToString())
            converted.reshape([1, *draft.input_shape])
        except RuntimeError as error:
            raise UnsupportedOp(f"OpenVINO {openvino.__version__} cannot convert the model: {error}") from error
        (draft.folder / self.name).mkdir(exist_ok=True)
        xml = f"{self.name}/{variant}.xml"
        self._save(openvino, converted, draft.folder / xml, model.ByteSize())
        settings = {
            "inference_precision_hint": "f32", "custom_nodes": custom_nodes, "threads": (profile or {}).get("threads"),
        }  # fmt: skip
        files = [xml, f"{self.name}/{variant}.bin"]
        entry = ArtifactEntry(target=self.name, variant=variant, model=xml, files=files, settings=settings)
        return Artifact(draft.folder, entry)

    @staticmethod
    def _save(openvino: Any, converted: Any, path: Any, about_bytes: int) -> None:
        """save_model reports a full disk as a generic RuntimeError, or not at all: look before and after."""
        needed = about_bytes + (4 << 20)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        openvino.save_model(converted, str(path), compress_to_fp16=False)
