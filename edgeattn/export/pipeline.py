"""`export`: model, recipe and data to a bundle whose artefacts were run on golden inputs before it got its name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import edgeattn
from edgeattn.data.files import atomic_folder, sha256_of
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import GateFailed, NumericError, UsageError
from edgeattn.export.model_card import model_card
from edgeattn.export.onnx_model import to_onnx
from edgeattn.export.target import Artifact, Draft, get_target
from edgeattn.quant.graph import first_nonfinite
from edgeattn.quant.quantize import Progress, QuantizedModel, quantize
from edgeattn.quant.recipe import Recipe
from edgeattn.runtime.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    Bundle,
    FileEntry,
    Manifest,
    TensorEntry,
    Variant,
)
from edgeattn.runtime.session import INPUT, OUTPUT
from edgeattn.runtime.verify import golden_problems

logger = logging.getLogger(__name__)

_ONNX: dict[Variant, str] = {"float32": "reference.onnx", "quantized": "model.onnx"}
_GOLDEN_IMAGES = 4
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "Pillow")


def export(
    model: nn.Module,
    targets: Sequence[str],
    out: str | Path,
    *,
    recipe: str | Recipe | dict[str, Any] = "w8a8",
    data: Any = None,
    profile: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a model, compile it for each target, check each artefact on golden inputs, and write the bundle.

    The folder `out` appears complete or not at all. With the recipe `float32` there is one variant only.

    Args:
        data: calibration pictures (folder, .npz, iterable); also the source of the golden inputs.
        profile: device profile; None is this machine.
        progress: called with (stage, done, total).

    Raises:
        UsageError and its kinds: bad target, data, recipe, or an existing `out` without `overwrite`.
        GateFailed: an artefact does not reproduce the golden outputs. DeviceError: disk full.
    """
    if not targets:
        raise UsageError("no target given; name at least one, for example onnxruntime.")
    chosen = {name: get_target(name) for name in dict.fromkeys(targets)}
    with atomic_folder(out, overwrite) as folder:
        source = None if data is None else open_source(data, skip_bad)
        quantized = quantize(model, recipe, source, targets=list(chosen), progress=progress)
        variants: list[Variant] = ["float32"] if quantized.recipe.is_float else ["float32", "quantized"]
        shape = (3, *quantized.preprocessing.size)
        tolerance = _write_golden(folder, quantized, source, variants)
        for i, variant in enumerate(variants):
            _report(progress, "onnx", i, len(variants))
            graph = quantized.float_graph if variant == "float32" else quantized.graph
            (folder / _ONNX[variant]).write_bytes(to_onnx(graph, shape).SerializeToString())
        draft = Draft(folder, _ONNX, shape)
        artifacts: list[Artifact] = []
        for target in chosen.values():
            for variant in variants:
                _report(progress, "compile", len(artifacts), len(chosen) * len(variants))
                artifacts.append(target.compile(draft, variant, profile))
                _verify_artifact(artifacts[-1], folder, tolerance[variant])
        _write_manifest(folder, quantized, artifacts, tolerance, profile)
        _report(progress, "compile", len(artifacts), len(artifacts))
    return Bundle.open(out)


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress:
        progress(stage, done, total)


def _write_golden(
    folder: Path, quantized: QuantizedModel, source: ImageSource | None, variants: list[Variant]
) -> dict[str, float]:
    """Golden inputs and the torch graphs' outputs; returns the largest allowed difference per variant.

    A float32 runtime may differ by rounding (1e-4 of the logits' spread). An integer runtime rounds each layer once
    more or less than the simulation, which can move a code by one: it may differ by no more than quantization itself
    changed the logits, twice over.
    """
    arrays = {"input": _golden_input(quantized, source)}
    with torch.no_grad():
        arrays["float32"] = quantized.float_graph(torch.from_numpy(arrays["input"])).numpy()
        if "quantized" in variants:
            arrays["quantized"] = quantized.graph(torch.from_numpy(arrays["input"])).numpy()
    for variant in variants:
        if not np.isfinite(arrays[variant]).all():
            graph = quantized.float_graph if variant == "float32" else quantized.graph
            layer = first_nonfinite(graph, torch.from_numpy(arrays["input"]))
            raise NumericError(
                f"the {variant} model gives NaN or infinite logits; they begin in layer {layer}. "
                "Check the checkpoint and the preprocessing."
            )
    np.savez(folder / "golden.npz", **arrays)  # type: ignore[arg-type]
    tolerance = {"float32": 1e-4 * max(1.0, float(arrays["float32"].std()))}
    if "quantized" in variants:
        tolerance["quantized"] = 2 * float(np.abs(arrays["quantized"] - arrays["float32"]).max()) + tolerance["float32"]
    return tolerance


def _golden_input(quantized: QuantizedModel, source: ImageSource | None) -> np.ndarray:
    if source is None:  # float32 export without pictures: any input shows whether a runtime computes the same
        generator = np.random.default_rng(0)
        return generator.standard_normal((_GOLDEN_IMAGES, 3, *quantized.preprocessing.size), np.float32)
    inputs = [quantized.preprocessing(sample.image) for sample in source.spread(_GOLDEN_IMAGES)]
    return np.stack(inputs)


def _verify_artifact(artifact: Artifact, folder: Path, tolerance: float) -> None:
    session = artifact.open()
    try:
        with np.load(folder / "golden.npz") as golden:
            problems = golden_problems(session, golden["input"], golden[artifact.entry.variant], tolerance)
    finally:
        session.close()
    if problems:
        raise GateFailed(
            f"{artifact.entry.target}/{artifact.entry.variant} does not compute what the torch graph computes: "
            f"{problems}. No bundle was written. Try another recipe, or report the model and versions."
        )


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "edgeattn": edgeattn.__version__}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _write_manifest(
    folder: Path, quantized: QuantizedModel, artifacts: list[Artifact], tolerance: dict[str, float],
    profile: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    (folder / "recipe.lock.yaml").write_text(quantized.recipe.to_yaml())
    notes = list(quantized.notes)
    if quantized.calibration is None:
        notes.append("golden inputs are synthetic: no pictures were given")
    values: dict[str, Any] = {
        "edgeattn_version": edgeattn.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": quantized.name,
        "model_config": _plain(quantized.config),
        "parameters": quantized.parameters,
        "input": TensorEntry(name=INPUT, shape=[None, 3, *quantized.preprocessing.size]),
        "output": TensorEntry(name=OUTPUT, shape=[None, _classes(folder)]),
        "preprocessing": quantized.preprocessing.to_dict(),
        "class_names": list(quantized.class_names) if quantized.class_names else None,
        "recipe": quantized.recipe.name,
        "gate": quantized.recipe.gate,
        "precision": quantized.precision,
        "calibration": quantized.calibration,
        "device_profile": dict(profile) if profile else None,
        "tools": _tool_versions(),
        "golden_tolerance": tolerance,
        "artifacts": [artifact.entry for artifact in artifacts],
        "notes": notes,
    }
    (folder / "README.md").write_text(model_card(Manifest(files={}, **values)))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {
        p.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in files
    }
    text = Manifest(files=entries, **values).model_dump_json(indent=2, by_alias=True) + "\n"
    (folder / MANIFEST).write_text(text)
    (folder / MANIFEST_DIGEST).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def _classes(folder: Path) -> int:
    with np.load(folder / "golden.npz") as golden:
        return int(golden["float32"].shape[1])


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, so that the manifest reads back equal."""
    return json.loads(json.dumps(config))
