"""TensorRT-RTX: engines that any machine builds for the GPUs named, and that such a GPU's driver finishes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from edgeattn.data.files import atomic_file
from edgeattn.data.interface import BATCH, Interface
from edgeattn.errors import UnsupportedOp, UsageError
from edgeattn.export.target import Artifact, Draft, Target
from edgeattn.export.tensorrt_graph import to_tensorrt
from edgeattn.models.sources import cache_folder
from edgeattn.runtime.bundle import ArtifactEntry, Variant
from edgeattn.runtime.onnxruntime_session import OnnxRuntimeSession
from edgeattn.runtime.session import Session
from edgeattn.runtime.tensorrt_session import cannot_run, import_tensorrt_rtx

logger = logging.getLogger(__name__)

_DEFAULT = (80, 86, 89, 120)
_TURING = 75  # an engine for it holds no other
_DIGEST_BYTES = 32
_LAST_LINES = 3  # of the builder's log in an error


class TensorRtRtxTarget(Target):
    """See `edgeattn.export.target.Target`. The artefact has a static batch of 1; beside it lies the ONNX file that the
    builder was given, which other versions can build from."""

    name = "tensorrt-rtx"

    def compile(self, draft: Draft, variant: Variant, profile: Mapping[str, Any] | None = None) -> Artifact:
        """Write `tensorrt-rtx/VARIANT.onnx` and `.engine`; `compute_capabilities` of the profile, such as [86, 89].

        Raises:
            UnsupportedOp: the parser or the builder refuses the model, or it is too large.
            UsageError: a capability that is not built for.
        """
        trt = import_tensorrt_rtx()
        if len(draft.files(variant)) > 1:
            raise UnsupportedOp(
                f"the {variant} model keeps its weights in a file beside the graph, and target {self.name} takes "
                "models of up to 2 GB. Take a smaller model."
            )
        capabilities = _capabilities(trt, (profile or {}).get("compute_capabilities"))
        _check_axes(draft.interface)
        (draft.folder / self.name).mkdir(exist_ok=True)
        stem = f"{self.name}/{variant}"
        typed = to_tensorrt(onnx.load(draft.folder / draft.onnx[variant])).SerializeToString()
        (draft.folder / f"{stem}.onnx").write_bytes(typed)
        # What an engine depends on: a runtime refuses one from another version before it loads it.
        key = {
            "onnx_sha256": hashlib.sha256(typed).hexdigest(), "package": trt.__name__, "version": trt.__version__,
            "compute_capabilities": capabilities,
        }  # fmt: skip
        _build_cached(trt, typed, draft.interface, key, draft.folder / f"{stem}.engine")
        (draft.folder / f"{stem}.json").write_text(json.dumps(key, indent=2) + "\n")
        files = [f"{stem}{suffix}" for suffix in (".engine", ".onnx", ".json")]
        entry = ArtifactEntry(target=self.name, variant=variant, model=files[0], files=files, settings=key)
        return Artifact(draft.folder, entry)

    def cannot_run(self) -> str:
        """See `Target`."""
        return cannot_run()

    def stand_in(self, artifact: Artifact) -> Session:
        """The ONNX file that the engine was built from, in ONNX Runtime."""
        model = artifact.folder / artifact.entry.model
        return OnnxRuntimeSession(model.with_suffix(".onnx"), {"plugin": False}, artifact.entry.variant)


def _capabilities(trt: Any, asked: Sequence[int] | None) -> list[int]:
    """
    Raises:
        UsageError: one that this package does not build for, or Turing beside others.
    """
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    chosen = sorted(set(_DEFAULT if asked is None else asked))
    if unknown := [number for number in chosen if number not in known]:
        raise UsageError(
            f"target tensorrt-rtx: compute capability {', '.join(map(str, unknown))} is not one that {trt.__name__} "
            f"{trt.__version__} builds for: {', '.join(map(str, known))}. Orin (87), H100 and H200 (90) and Thor (110) "
            "need TensorRT itself."
        )
    if not chosen or (_TURING in chosen and len(chosen) > 1):
        raise UsageError(f"compute capabilities {chosen}: give one or more, and {_TURING} only alone.")
    return chosen


def _check_axes(interface: Interface) -> None:
    if free := [axis for axis in interface.free_axes if axis != BATCH]:
        raise UsageError(
            f"target tensorrt-rtx builds for fixed sizes, and {', '.join(free)} is free. Export without "
            "--dynamic-size, or with a number of --views."
        )


def _build_cached(trt: Any, typed: bytes, interface: Interface, key: dict[str, Any], out: Path) -> None:
    """The engine from the user's cache folder, where an equal one was built before: behind its own digest there, since
    nothing here runs it and would see that it is damaged."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    cached = cache_folder() / "engines" / f"{digest}.engine"
    stored = cached.read_bytes() if cached.is_file() else b""
    engine = stored[_DIGEST_BYTES:]
    if hashlib.sha256(engine).digest() != stored[:_DIGEST_BYTES]:
        if stored:
            logger.warning("%s is damaged; the engine is built again.", cached)
        engine = _build(trt, typed, interface, key["compute_capabilities"])
        with atomic_file(cached) as temporary:
            temporary.write_bytes(hashlib.sha256(engine).digest() + engine)
    out.write_bytes(engine)


def _build(trt: Any, typed: bytes, interface: Interface, capabilities: Sequence[int]) -> bytes:
    log = _log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)  # strongly typed: types are those of the graph
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(typed):
        raise UnsupportedOp(f"{trt.__name__} {trt.__version__} cannot parse the model: {_parser_errors(parser)}")
    _decompose_attention(trt, network)
    config, shapes = builder.create_builder_config(), builder.create_optimization_profile()
    for spec in interface.inputs:
        sides = spec.sized({BATCH: 1})
        shapes.set_shape(spec.name, sides, sides, sides)
    config.add_optimization_profile(shapes)
    config.num_compute_capabilities = len(capabilities)
    for i, number in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), i)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedOp(
            f"{trt.__name__} {trt.__version__} builds no engine for compute capability "
            f"{', '.join(map(str, capabilities))}: {log.last_errors()}"
        )
    return bytes(engine)


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors[:_LAST_LINES])


def _decompose_attention(trt: Any, network: Any) -> None:
    """Let the builder take attention apart where no fused kernel fits: it fails otherwise, as in float32."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


@dataclasses.dataclass(frozen=True)
class _Log:
    logger: Any
    errors: list[str]

    def last_errors(self) -> str:
        return "; ".join(self.errors[-_LAST_LINES:]) or "the builder gives no reason"


def _log(trt: Any) -> _Log:
    """Keeps the errors, passes warnings on; the package is imported late, and with it the class."""
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)
            elif severity == trt.ILogger.WARNING:
                logger.info("%s: %s", trt.__name__, message)

    return _Log(Logger(), errors)
