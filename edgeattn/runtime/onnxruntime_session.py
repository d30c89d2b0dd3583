"""ONNX Runtime on the CPU, with our plugin's kernels where the artefact asks for them."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.errors import DeviceError, MissingDependency
from edgeattn.ops.registry import DOMAIN
from edgeattn.runtime.session import Placement
from edgeattn.runtime_plugins import cpu

_FLOAT32_INPUTS = "1"
_QUIET = 3  # errors only; warnings about optimised-model dumps are ours to cause and not the user's to read


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            f"target onnxruntime needs the package onnxruntime: {error}. Install it: pip install onnxruntime."
        ) from error
    # The wheel reports usage by default; a deployment tool must not.
    onnxruntime.disable_telemetry_events()
    return onnxruntime


class OnnxRuntimeSession:
    """See `edgeattn.runtime.session.Session`."""

    target = "onnxruntime"

    def __init__(self, model: Path, settings: Mapping[str, Any], variant: str) -> None:
        self._ort = _import_runtime()
        self.variant, self._model = variant, model
        self._wants_plugin = bool(settings.get("plugin", False))
        self._missing = cpu.missing_reason() if self._wants_plugin else None
        threads = settings.get("threads") or available_threads()
        self.settings: dict[str, Any] = {
            "threads": threads, "graph_optimization_level": settings.get("graph_optimization_level", "all"),
            "provider": "CPUExecutionProvider", "plugin": None, "runtime_version": self._ort.__version__,
            "inputs_of_4_bit_layers": "float32",
        }  # fmt: skip
        if self._wants_plugin and self._missing is None:
            info = cpu.plugin_info()
            self.settings["plugin"] = {
                "version": info.version, "abi": info.abi, "isa": info.active_isa, "sha256": info.sha256,
            }  # fmt: skip
        started = time.perf_counter()
        self._session = self._create(self._options())
        self.load_ms = (time.perf_counter() - started) * 1e3
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        levels = self._ort.GraphOptimizationLevel
        options.graph_optimization_level = {
            "all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED,
            "basic": levels.ORT_ENABLE_BASIC, "disabled": levels.ORT_DISABLE_ALL,
        }[self.settings["graph_optimization_level"]]  # fmt: skip
        options.intra_op_num_threads, options.inter_op_num_threads = self.settings["threads"], 1
        options.log_severity_level = _QUIET
        # By default the runtime rounds the inputs of a layer with 4-bit weights to 8 bits, which nobody asked for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT32_INPUTS)
        # By default it turns int8 activations into uint8 on x86, and refuses the nodes that it made on the way.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        if self.settings["plugin"]:
            options.register_custom_ops_library(str(cpu.ort_library()))
        return options

    def _create(self, options: Any) -> Any:
        try:
            return self._ort.InferenceSession(str(self._model), options, providers=[self.settings["provider"]])
        except Exception as error:  # the binding raises many classes; all mean that this file does not run here
            raise DeviceError(
                f"ONNX Runtime {self._ort.__version__} refuses {self._model}: {error}. "
                "`edgeattn doctor` shows versions; export again with this version if it is newer."
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            DeviceError: the runtime failed; its reason is kept.
        """
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            shapes = {name: value.shape for name, value in inputs.items()}
            raise DeviceError(f"ONNX Runtime failed on {self._model} with inputs {shapes}: {error}") from error
        return dict(zip(self._outputs, values, strict=True))

    def placement(self) -> Placement:
        """Counts the nodes of the graph as the runtime optimised it."""
        import onnx

        written = sum(n.domain == DOMAIN for n in onnx.load(self._model, load_external_data=False).graph.node)
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self._create(options)
            nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        fused = sum(n.domain == DOMAIN for n in nodes)
        counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)
        reason = self._missing or ""
        if not reason and fused < written:
            reason = (
                "the runtime inlined them" if self._wants_plugin else "the artefact was compiled without the plugin"
            )
        return Placement(fused, written - fused, dict(counts), reason, self._wants_plugin)

    def close(self) -> None:
        """Free the session and its threads."""
        self._session = None


def open_session(model: Path, settings: Mapping[str, Any], variant: str) -> OnnxRuntimeSession:
    """Settings: threads (None: all processors), graph_optimization_level, plugin (use the fused kernels)."""
    return OnnxRuntimeSession(model, settings, variant)
