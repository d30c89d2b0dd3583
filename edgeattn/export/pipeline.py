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
from torch import fx, nn

import edgeattn
from edgeattn.data.files import atomic_folder, sha256_of
from edgeattn.data.interface import BATCH, IMAGE, RELATIVE_TOLERANCE
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import GateFailed, NumericError, UsageError
from edgeattn.export.model_card import model_card
from edgeattn.export.onnx_model import Written, save_onnx
from edgeattn.export.target import Artifact, Draft, get_target
from edgeattn.quant.graph import first_nonfinite
from edgeattn.quant.quantize import Progress, QuantizedModel, quantize
from edgeattn.quant.recipe import Recipe
from edgeattn.runtime.bundle import (
    GOLDEN,
    MANIFEST,
    MANIFEST_DIGEST,
    Bundle,
    FileEntry,
    Golden,
    Manifest,
    TensorEntry,
    Variant,
)
from edgeattn.runtime.verify import golden_differences, golden_problems

logger = logging.getLogger(__name__)

_ONNX: dict[Variant, str] = {"float32": "reference.onnx", "quantized": "model.onnx"}
_GOLDEN_SAMPLES = 4
_LARGE = 100_000_000  # parameters
_FREE_SIZES = {"height": 224, "width": 256}  # of golden pictures where the model takes any size
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "Pillow")


def export(
    model: nn.Module,
    targets: Sequence[str],
    out: str | Path,
    *,
    recipe: str | Recipe | dict[str, Any] = "w8a8",
    data: Any = None,
    profile: Mapping[str, Any] | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    work: str | Path | None = None,
    explain: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a model, compile it for each target, check each artefact on golden inputs, and write the bundle.

    The folder `out` appears complete or not at all. With the recipe `float32` there is one variant only.

    Args:
        data: calibration pictures (folder, .npz, iterable); also the source of the golden inputs.
        profile: device profile; None is this machine.
        dynamic_size: leave height and width free, in steps of 32 pixels; for models that take any size.
        work, explain: see `quantize`.
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
        quantized = quantize(
            model, recipe, source, targets=list(chosen), dynamic_size=dynamic_size, work=work, explain=explain,
            progress=progress,
        )  # fmt: skip
        variants: list[Variant] = ["float32", "quantized"] if quantized.recipe.has_variant else ["float32"]
        golden, tolerance = _golden(quantized, source, variants)
        golden.write(folder / GOLDEN)
        written: dict[str, Written] = {}
        for i, variant in enumerate(variants):
            _report(progress, "onnx", i, len(variants))
            graph = quantized.float_graph if variant == "float32" else quantized.graph
            written[variant] = save_onnx(graph, quantized.interface, folder / _ONNX[variant])
        draft = Draft(folder, _ONNX, quantized.interface)
        artifacts: list[Artifact] = []
        for target in chosen.values():
            for variant in variants:
                _report(progress, "compile", len(artifacts), len(chosen) * len(variants))
                artifacts.append(target.compile(draft, variant, profile))
                _verify_artifact(artifacts[-1], golden, tolerance[variant])
        notes = list(quantized.notes)
        if source is None or not quantized.interface.is_classifier:
            notes.append("golden inputs are synthetic: no pictures were given")
        facts = {
            "golden_tolerance": tolerance, "nodes": {variant: model.nodes for variant, model in written.items()},
            "outputs": [TensorEntry(name=n, shape=s) for n, s in written["float32"].shapes.items()], "notes": notes,
            "device_profile": dict(profile) if profile else None,
        }  # fmt: skip
        _write_manifest(folder, quantized, artifacts, facts)
        _report(progress, "compile", len(artifacts), len(artifacts))
    return Bundle.open(out)


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress:
        progress(stage, done, total)


def _golden(
    quantized: QuantizedModel, source: ImageSource | None, variants: list[Variant]
) -> tuple[Golden, dict[str, dict[str, float]]]:
    """Golden inputs and the torch graphs' outputs; the largest allowed difference per variant and output.

    A float32 runtime may differ by rounding (1e-4 of an output's spread unless the interface says more). An integer
    runtime rounds each layer once more or less than the simulation, which can move a code by one: it may differ by no
    more than quantization itself changed the output, twice over.
    """
    inputs = _golden_inputs(quantized, source)
    outputs: dict[str, dict[str, np.ndarray]] = {
        variant: _run(quantized.float_graph if variant == "float32" else quantized.graph, quantized, inputs, variant)
        for variant in variants
    }
    plain = outputs["float32"]
    shares = {name: quantized.interface.tolerance.get(name, RELATIVE_TOLERANCE) for name in plain}
    tolerance = {"float32": {name: shares[name] * max(1.0, float(value.std())) for name, value in plain.items()}}
    if "quantized" in variants:
        tolerance["quantized"] = {
            name: 2 * float(np.abs(outputs["quantized"][name] - value).max()) + tolerance["float32"][name]
            for name, value in plain.items()
        }
    return Golden(inputs, outputs), tolerance


def _run(
    graph: fx.GraphModule, quantized: QuantizedModel, inputs: dict[str, np.ndarray], variant: str
) -> dict[str, np.ndarray]:
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    with torch.no_grad():
        results = graph(*tensors)
    results = tuple(results.values()) if isinstance(results, dict) else results
    results = results if isinstance(results, tuple) else (results,)
    outputs = {name: value.numpy() for name, value in zip(quantized.interface.outputs, results, strict=True)}
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            layer = first_nonfinite(graph, *tensors)
            raise NumericError(
                f"the {variant} model gives NaN or infinite {name}; they begin in layer {layer}. "
                "Check the checkpoint and the preprocessing."
            )
    return outputs


def _golden_inputs(quantized: QuantizedModel, source: ImageSource | None) -> dict[str, np.ndarray]:
    if source is None or quantized.preprocessing is None or not quantized.interface.is_classifier:
        # Without pictures any input shows whether a runtime computes the same. Large models get one sample.
        samples = _GOLDEN_SAMPLES if quantized.parameters < _LARGE else 1
        sizes = {axis: _FREE_SIZES.get(axis, 2) for axis in quantized.interface.free_axes} | {BATCH: samples}
        return quantized.interface.examples(sizes)
    images = [quantized.preprocessing(sample.image) for sample in source.spread(_GOLDEN_SAMPLES)]
    return {IMAGE: np.stack(images)}


def _verify_artifact(artifact: Artifact, golden: Golden, tolerance: dict[str, float]) -> None:
    session = artifact.open()
    try:
        problems = golden_problems(golden_differences(session, golden, artifact.entry.variant), tolerance)
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


def _write_manifest(folder: Path, quantized: QuantizedModel, artifacts: list[Artifact], facts: dict[str, Any]) -> None:
    (folder / "recipe.lock.yaml").write_text(quantized.recipe.to_yaml())
    is_classifier = quantized.interface.is_classifier
    values: dict[str, Any] = {
        "edgeattn_version": edgeattn.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": quantized.name,
        "model_config": _plain(quantized.config),
        "parameters": quantized.parameters,
        "task": "classification" if is_classifier else "other",
        "inputs": [
            TensorEntry(name=spec.name, shape=list(spec.shape), dtype=spec.dtype) for spec in quantized.interface.inputs
        ],
        "preprocessing": quantized.preprocessing.to_dict() if quantized.preprocessing else None,
        "postprocessing": "softmax" if is_classifier else None,
        "class_names": list(quantized.class_names) if quantized.class_names else None,
        "recipe": quantized.recipe.name,
        "gate": quantized.recipe.gate,
        "precision": quantized.precision,
        "calibration": quantized.calibration,
        "steps": list(quantized.steps),
        "tools": _tool_versions(),
        "artifacts": [artifact.entry for artifact in artifacts],
        **facts,
    }
    (folder / "README.md").write_text(model_card(Manifest(files={}, **values)))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {
        p.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in files
    }
    text = Manifest(files=entries, **values).model_dump_json(indent=2, by_alias=True) + "\n"
    (folder / MANIFEST).write_text(text)
    (folder / MANIFEST_DIGEST).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, so that the manifest reads back equal."""
    return json.loads(json.dumps(config))
