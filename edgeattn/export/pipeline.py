"""`export`: model, recipe and data to a bundle whose artefacts were run on golden inputs before it got its name."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

import edgeattn
from edgeattn.data.files import atomic_folder, sha256_of
from edgeattn.data.interface import interface_of
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import GateFailed, UsageError
from edgeattn.export.golden import FLOAT, make_golden
from edgeattn.export.model_card import model_card
from edgeattn.export.onnx_model import Written, save_onnx
from edgeattn.export.placer import Placed, Placer
from edgeattn.export.target import Artifact, Draft, Target, get_target
from edgeattn.quant.qat.exported import recipe_for
from edgeattn.quant.quantize import Progress, QuantizedModel, quantize
from edgeattn.quant.recipe import Recipe, load_recipe
from edgeattn.runtime.bundle import (
    GOLDEN,
    MANIFEST,
    MANIFEST_DIGEST,
    Bundle,
    FileEntry,
    Golden,
    Manifest,
    PlacementEntry,
    TensorEntry,
    Variant,
)
from edgeattn.runtime.verify import golden_differences, golden_problems

logger = logging.getLogger(__name__)

_QUANTIZED = "quantized"
_LOCK = "recipe.lock.yaml"
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "Pillow")


def export(
    model: nn.Module,
    targets: Sequence[str],
    out: str | Path,
    *,
    recipe: str | Recipe | dict[str, Any] | None = None,
    data: Any = None,
    profile: Mapping[str, Any] | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    work: str | Path | None = None,
    explain: bool = False,
    placer: Placer | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a model, compile it for each target, check each artefact on golden inputs, and write the bundle.

    The folder `out` appears complete or not at all. With the recipe `float32` there is one variant only.

    Args:
        recipe: None is w8a8, or what the model was trained with.
        data: calibration pictures (folder, .npz, iterable); also the source of the golden inputs.
        profile: device profile; None is this machine.
        dynamic_size: leave height and width free, in steps of 32 pixels; for models that take any size.
        work, explain: see `quantize`.
        placer: chooses for each target what is quantized, and whether anything is, where the recipe has a margin
            (`edgeattn.devices.placing.MeasuredPlacer`); None: every target gets what the recipe says.
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
        asked = recipe_for(model, recipe).for_targets(list(chosen))
        placed = _placed(model, asked, source, list(chosen), placer)
        options: dict[str, Any] = {"dynamic_size": dynamic_size, "work": work, "explain": explain, "progress": progress}
        shares = _shares(model, asked, source, list(chosen), placed, options)
        writer = _Writer(folder, shares, source, profile, progress)
        for name, target in chosen.items():
            writer.add(target, placed.get(name), placer, asked.least_speedup)
        _write_manifest(folder, writer.finish(), asked, profile)
    return Bundle.open(out)


@dataclasses.dataclass(frozen=True)
class _Share:
    """A quantized graph and the targets that run it; `name` is its key in the manifest."""

    name: str
    model: QuantizedModel
    targets: tuple[str, ...]

    @property
    def file(self) -> str:
        """Of its ONNX."""
        return "model.onnx" if self.name == _QUANTIZED else f"model-{self.targets[0]}.onnx"


def _placed(
    model: nn.Module, recipe: Recipe, source: ImageSource | None, targets: list[str], placer: Placer | None
) -> dict[str, Placed]:
    running = [name for name in targets if not get_target(name).cannot_run()]
    searched = recipe.least_speedup is not None and interface_of(model).is_classifier
    if placer is None or source is None or not searched or not running:
        return {}
    return placer.place(model, recipe, source, running)


def _shares(
    model: nn.Module, asked: Recipe, source: ImageSource | None, targets: list[str], placed: dict[str, Placed],
    options: dict[str, Any],
) -> list[_Share]:  # fmt: skip
    """The model quantized once for all targets with the same recipe."""
    groups: list[tuple[Recipe, list[str]]] = []
    for target in targets:
        recipe = placed[target].recipe if target in placed else asked
        known = next((group for group in groups if group[0] == recipe), None)
        if known is None:
            groups.append((recipe, [target]))
        else:
            known[1].append(target)
    return [
        _Share(
            f"{_QUANTIZED}-{users[0]}" if i else _QUANTIZED,
            quantize(model, recipe, source, targets=targets, **options),
            tuple(users),
        )
        for i, (recipe, users) in enumerate(groups)
    ]


class _Writer:
    """The bundle's folder while artefacts are added; what turns out not to pay is taken out again."""

    def __init__(
        self, folder: Path, shares: list[_Share], source: ImageSource | None, profile: Mapping[str, Any] | None,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.folder, self.profile, self.progress, self.source = folder, profile, progress, source
        self.model = shares[0].model
        self.shares = [share for share in shares if share.model.recipe.has_variant]
        graphs = {FLOAT: self.model.float_graph, **{share.name: share.model.graph for share in self.shares}}
        files = {FLOAT: "reference.onnx", **{share.name: share.file for share in self.shares}}
        self.golden, self.tolerance = make_golden(self.model, graphs, source)
        self.written: dict[str, Written] = {}
        self.artifacts: list[Artifact] = []
        self.placements: dict[str, PlacementEntry] = {}
        for i, (name, graph) in enumerate(graphs.items()):
            self._report("onnx", i, len(graphs))
            self.written[name] = save_onnx(graph, self.model.interface, folder / files[name])

    def add(self, target: Target, placed: Placed | None, placer: Placer | None, margin: float | None) -> None:
        """Compile and check a target's artefacts; with a placer, keep the quantized one only if it pays."""
        share = next((share for share in self.shares if target.name in share.targets), None)
        plain = self._compiled(target, "float32", share)
        self.artifacts.append(plain)
        quantized = None if share is None else self._compiled(target, "quantized", share)
        if quantized is not None and placed is not None and placer is not None and margin is not None:
            sample = {name: value[:1] for name, value in self.golden.inputs.items()}
            found = self.placements[target.name] = placer.judge(plain, quantized, sample, placed, margin)
            if found.ships == "float32":
                self._delete(quantized)
                return
        if quantized is not None:
            self.artifacts.append(quantized)

    def _compiled(self, target: Target, variant: Variant, share: _Share | None) -> Artifact:
        self._report("compile", len(self.artifacts), len(self.artifacts) + 1)
        onnx: dict[Variant, str] = {"float32": "reference.onnx"}
        if share is not None:
            onnx["quantized"] = share.file
        made = target.compile(Draft(self.folder, onnx, self.model.interface), variant, self.profile)
        name = FLOAT if variant == "float32" or share is None else share.name
        precision = self.model.float_precision if share is None or name == FLOAT else share.model.precision
        facts = {"graph": name, "precision": precision, "not_run": target.cannot_run()}
        made = dataclasses.replace(made, entry=made.entry.model_copy(update=facts))
        self._verify(target, made)
        return made

    def _verify(self, target: Target, artifact: Artifact) -> None:
        entry, session = artifact.entry, target.stand_in(artifact) if artifact.entry.not_run else artifact.open()
        try:
            differences = golden_differences(session, self.golden, entry.graph)
        finally:
            session.close()
        if problems := golden_problems(differences, self.tolerance[entry.graph]):
            raise GateFailed(
                f"{entry.target}/{entry.variant} does not compute what the torch graph computes: {problems}. "
                "No bundle was written. Try another recipe, or report the model and versions."
            )

    def _delete(self, artifact: Artifact) -> None:
        """Delete the files of an artefact that no other and no graph needs."""
        needed = {name for other in self.artifacts for name in other.entry.files}
        needed |= {share.file for share in self.shares} | {f"{share.file}.data" for share in self.shares}
        for name in set(artifact.entry.files) - needed:
            (self.folder / name).unlink()

    def finish(self) -> dict[str, Any]:
        """Take out graphs that no artefact has, write the golden outputs and the recipes; the manifest's entries."""
        used = {artifact.entry.graph for artifact in self.artifacts}
        for share in self.shares:
            for name in (share.file, f"{share.file}.data") if share.name not in used else ():
                (self.folder / name).unlink(missing_ok=True)
        kept = [share for share in self.shares if share.name in used]
        recipes = [share.model.recipe for share in kept] or [load_recipe(FLOAT)]
        (self.folder / _LOCK).write_text(recipes[0].to_yaml())
        for share in kept[1:]:
            (self.folder / f"recipe-{share.targets[0]}.lock.yaml").write_text(share.model.recipe.to_yaml())
        outputs = {name: value for name, value in self.golden.outputs.items() if name in used}
        Golden(self.golden.inputs, outputs).write(self.folder / GOLDEN)
        shown = kept[0].model if kept else self.model
        self._report("compile", len(self.artifacts), len(self.artifacts))
        return {
            **_described(shown),
            "golden_tolerance": {name: value for name, value in self.tolerance.items() if name in used},
            "nodes": {name: written.nodes for name, written in self.written.items() if name in used},
            "outputs": [TensorEntry(name=n, shape=s) for n, s in self.written[FLOAT].shapes.items()],
            "artifacts": [artifact.entry for artifact in self.artifacts], "placements": self.placements,
            "notes": self._notes(kept),
            "precision": kept[0].model.precision if kept else self.model.float_precision,
        }  # fmt: skip

    def _notes(self, kept: list[_Share]) -> list[str]:
        notes = list(kept[0].model.notes if kept else self.model.notes)
        for share in kept[1:]:
            notes += [f"{', '.join(share.targets)}: {note}" for note in share.model.notes if note not in notes]
        notes += [f"{target} gets {entry.ships}: {entry.reason}" for target, entry in self.placements.items()]
        unseen = {
            artifact.entry.target: artifact.entry.not_run for artifact in self.artifacts if artifact.entry.not_run
        }
        notes += [
            f"{target} was built and not run: {why}; what it was built from gives the golden outputs in a stand-in"
            for target, why in unseen.items()
        ]
        if self.source is None or not self.model.interface.is_classifier:
            notes.append("golden inputs are synthetic: no pictures were given")
        return notes

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "edgeattn": edgeattn.__version__}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _described(model: QuantizedModel) -> dict[str, Any]:
    """What the manifest says of the model itself."""
    is_classifier = model.interface.is_classifier
    return {
        "model": model.name,
        "model_config": json.loads(json.dumps(model.config)),  # tuples as lists, so that it reads back equal
        "parameters": model.parameters,
        "task": "classification" if is_classifier else "other",
        "inputs": [
            TensorEntry(name=spec.name, shape=list(spec.shape), dtype=spec.dtype) for spec in model.interface.inputs
        ],
        "preprocessing": model.preprocessing.to_dict() if model.preprocessing else None,
        "postprocessing": "softmax" if is_classifier else None,
        "class_names": list(model.class_names) if model.class_names else None,
        "calibration": model.calibration,
        "steps": list(model.steps),
    }


def _write_manifest(folder: Path, values: dict[str, Any], asked: Recipe, profile: Mapping[str, Any] | None) -> None:
    values = {
        **values, "edgeattn_version": edgeattn.__version__, "tools": _tool_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "recipe": asked.name, "gate": asked.gate,
        "margin": asked.least_speedup, "device_profile": dict(profile) if profile else None,
    }  # fmt: skip
    (folder / "README.md").write_text(model_card(Manifest(files={}, **values)))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {
        p.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in files
    }
    text = Manifest(files=entries, **values).model_dump_json(indent=2, by_alias=True) + "\n"
    (folder / MANIFEST).write_text(text)
    (folder / MANIFEST_DIGEST).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
