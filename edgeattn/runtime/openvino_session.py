"""OpenVINO on the CPU. The inference precision is always set, because its default is bf16 on some processors."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.errors import DeviceError, MissingDependency
from edgeattn.runtime.onnxruntime_session import available_threads
from edgeattn.runtime.session import Placement


def import_openvino() -> Any:
    """The openvino package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency(
            f"target openvino needs the package openvino: {error}. Install it: pip install 'edgeattn[openvino]'."
        ) from error
    return openvino


class OpenVinoSession:
    """See `edgeattn.runtime.session.Session`. The artefact has batch 1; larger batches run picture by picture."""

    target = "openvino"

    def __init__(self, model: Path, settings: Mapping[str, Any], variant: str) -> None:
        openvino = import_openvino()
        self.variant, self._model = variant, model
        threads = settings.get("threads") or available_threads()
        properties = {
            "INFERENCE_PRECISION_HINT": settings.get("inference_precision_hint", "f32"),
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
            # By default inputs of layers with compressed weights are rounded to 8 bits, which nobody asked for.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }  # fmt: skip
        self._nodes = int(settings.get("custom_nodes", 0))
        started = time.perf_counter()
        try:
            compiled = openvino.Core().compile_model(str(model), "CPU", properties)
        except RuntimeError as error:
            raise DeviceError(
                f"OpenVINO {openvino.__version__} refuses {model}: {error}. Export again with this version."
            ) from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.settings: dict[str, Any] = {
            "threads": threads, "inference_precision_hint": properties["INFERENCE_PRECISION_HINT"],
            "performance_hint": "LATENCY", "streams": 1, "device": "CPU", "inputs_of_4_bit_layers": "float32",
            "runtime_version": openvino.__version__.split("-")[0],
        }  # fmt: skip
        self._compiled, self._request = compiled, compiled.create_infer_request()
        # A port may have further names of the compiler's own, so names are the artefact's, by position.
        self._outputs = list(settings.get("outputs") or [port.any_name for port in compiled.outputs])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        count = len(next(iter(inputs.values())))
        parts = [self._run_one({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(count)]
        if count == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _run_one(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self._request.infer(dict(inputs))
        except RuntimeError as error:
            shapes = {name: value.shape for name, value in inputs.items()}
            raise DeviceError(f"OpenVINO failed on {self._model} with inputs {shapes}: {error}") from error
        return {name: np.array(results[i]) for i, name in enumerate(self._outputs)}

    def placement(self) -> Placement:
        """Counts the executed nodes by kernel type and the precision each really computes in."""
        counts: Counter[str] = Counter()
        for op in self._compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            precision = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else "?"
            counts[f"{info['layerType'].astype(str)}:{precision}"] += 1
        return Placement(0, self._nodes, dict(counts), "", False)

    def close(self) -> None:
        """Free the compiled model."""
        self._request = self._compiled = None


def open_session(model: Path, settings: Mapping[str, Any], variant: str) -> OpenVinoSession:
    """Settings: threads (None: all), inference_precision_hint, custom_nodes (inlined at compile time), outputs."""
    return OpenVinoSession(model, settings, variant)
