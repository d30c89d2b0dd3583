"""OpenVINO IR from the inlined ONNX: its frontend refuses model-local functions of an unknown domain."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from typing import Any

import onnx
from onnx.inliner import inline_local_functions

from edgeattn.data.interface import BATCH, TensorSpec
from edgeattn.errors import UnsupportedOp
from edgeattn.export.target import Artifact, Draft, Target
from edgeattn.ops.registry import DOMAIN
from edgeattn.runtime.bundle import ArtifactEntry, Variant
from edgeattn.runtime.openvino_session import import_openvino


def _static(spec: TensorSpec) -> list[int]:
    """The input's shape with a batch of one; other free axes stay free (-1)."""
    return [side if isinstance(side, int) else 1 if side == BATCH else -1 for side in spec.shape]


class OpenVinoTarget(Target):
    """See `edgeattn.export.target.Target`. The artefact has a static batch of 1, which its CPU plugin runs faster."""

    name = "openvino"

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Write `openvino/VARIANT.xml` and `.bin`; weights keep their precision (int8 stays int8, float32 float32)."""
        openvino = import_openvino()
        path = draft.folder / draft.onnx[variant]
        model = onnx.load(path, load_external_data=False)
        custom_nodes = sum(node.domain == DOMAIN for node in model.graph.node)
        size = sum(file.stat().st_size for file in draft.files(variant))
        try:
            # What has functions to inline is small; gigabytes of external weights are read from their file.
            source = inline_local_functions(onnx.load(path)).SerializeToString() if custom_nodes else str(path)
            converted = openvino.Core().read_model(source)
            converted.reshape({spec.name: _static(spec) for spec in draft.interface.inputs})
        except RuntimeError as error:
            raise UnsupportedOp(f"OpenVINO {openvino.__version__} cannot convert the model: {error}") from error
        (draft.folder / self.name).mkdir(exist_ok=True)
        xml = f"{self.name}/{variant}.xml"
        self._save(openvino, converted, draft.folder / xml, size)
        settings = {
            "inference_precision_hint": "f32", "custom_nodes": custom_nodes,
            "outputs": list(draft.interface.outputs), "threads": (profile or {}).get("threads"),
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
