"""`quantize`: a float model, a recipe and real pictures to a graph that computes what the exported model computes."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from edgeattn.data.interface import LOGITS, Interface, classifier_interface, interface_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import RecipeError, UsageError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import half, placement
from edgeattn.quant.ablation import ablation, held_aside
from edgeattn.quant.build import Built, build
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from edgeattn.quant.qat import exported
from edgeattn.quant.qat.convert import freeze
from edgeattn.quant.qat.exported import TrainedRecipe, recipe_for
from edgeattn.quant.recipe import Recipe

logger = logging.getLogger(__name__)

_FEW_IMAGES = 64  # below this the notes warn: small grids give thin statistics


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """The result of `quantize`; both graphs take the inputs of `interface` in order.

    Attributes:
        float_graph: the folded float32 graph, attention as one op per block.
        graph: the same with quantizers; equal to float_graph when the recipe is float32.
        precision: compute nodes by precision.
        calibration: images seen, digest of their pixels, observer; None for a float recipe.
        notes: one line for everything that was decided for the user.
        steps: what each part of the recipe gave (see ablation.StepEffect), where that was asked for.
    """

    name: str
    float_graph: fx.GraphModule
    graph: fx.GraphModule
    recipe: Recipe
    interface: Interface
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    config: dict[str, Any]
    parameters: int
    precision: dict[str, int]
    calibration: dict[str, Any] | None
    notes: tuple[str, ...]
    steps: tuple[dict[str, Any], ...] = ()

    @property
    def float_precision(self) -> dict[str, int]:
        """Compute nodes of `float_graph`, as `precision`."""
        return {"float32": _count_layers(self.float_graph)}


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, Any] | None = None,
    data: Any = None,
    *,
    targets: list[str] | None = None,
    dynamic_size: bool = False,
    skip_bad: bool = False,
    work: str | Path | None = None,
    explain: bool = False,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Fold, calibrate on real pictures and quantize a model. The given model is not changed.

    Args:
        model: a model of the zoo; or any classifier with a `preprocessing` attribute (see `Preprocessing`), any other
            model with an `interface` attribute (see `Interface`).
        recipe: None is w8a8; a model that was trained with quantizers (`load_trained`) carries its own and takes no
            other.
        data: folder, .npz, or iterable of pictures; needed unless the recipe is float32 or the model's own.
        targets: what the result will run on; decides the signedness of activations.
        dynamic_size: leave height and width free.
        work: folder for what a long step has finished, so that a run that was stopped goes on there.
        explain: also measure what each part of the recipe gives; builds the model once for each.
        progress: called with (stage, done, total).

    Raises:
        UsageError: the model takes no other size. DataError: no or unreadable data. RecipeError: the recipe does not
        fit. NumericError: NaN; the layer is named.
    """
    chosen = recipe_for(model, recipe).for_targets(targets or ["onnxruntime"])
    if isinstance(chosen, TrainedRecipe):
        source = None if data is None else open_source(data, skip_bad)
        return _trained(model, chosen, source, dynamic_size, explain)
    model = getattr(model, "for_export", lambda: model)()  # leaves out results that are for tests only
    interface = _free_size(model) if dynamic_size else interface_of(model)
    preprocessing = getattr(model, "preprocessing", None)
    if not interface.is_classifier and chosen.has_variant:
        names = ", ".join(spec.name for spec in interface.inputs)
        raise RecipeError(
            f"recipe {chosen.name!r} calibrates on pictures, and {getattr(model, 'name', type(model).__name__)} takes "
            f"{names}; this version quantizes classifiers only. Export it with the recipe float32."
        )
    float_graph = capture(fuse_attention(model), interface)
    folds = fold(float_graph)
    notes = list(getattr(model, "notes", []))
    notes.append("folded: " + (", ".join(f"{count} {what}" for what, count in folds.items() if count) or "nothing"))
    graph, precision, calibration = float_graph, {"float32": _count_layers(float_graph)}, None
    steps: tuple[dict[str, Any], ...] = ()
    source = None if not chosen.has_variant and data is None else open_source(data, skip_bad)
    if chosen.has_variant:
        assert source is not None and preprocessing is not None
        given, calibrator = chosen, Calibrator(source, chosen, preprocessing, progress)
        if chosen.is_float:
            made = half.build(float_graph, chosen, calibrator, targets or ["onnxruntime"])
            built = Built(made.graph, chosen, made.precision, made.notes)
        else:
            built = build(float_graph, chosen, calibrator, work=None if work is None else Path(work), progress=progress)
        graph, chosen, precision, calibration = built.graph, built.recipe, built.precision, calibrator.facts(chosen)
        notes += built.notes
        if explain and not given.is_float:
            steps, note = _explained(float_graph, graph, given, source, calibrator, preprocessing, progress)
            notes.append(note)
        if calibrator.images < min(_FEW_IMAGES, chosen.calibration.images):
            notes.append(f"calibrated on {calibrator.images} images only; 512 or more give steadier ranges")
    class_names = _class_names(model, graph, source, notes)
    return QuantizedModel(
        name=getattr(model, "name", type(model).__name__), float_graph=float_graph, graph=graph, recipe=chosen,
        interface=interface, preprocessing=preprocessing, class_names=class_names,
        config=getattr(model, "config", {}), parameters=sum(p.numel() for p in model.parameters()),
        precision=precision, calibration=calibration, notes=tuple(notes), steps=steps,
    )  # fmt: skip


def _explained(
    float_graph: fx.GraphModule, graph: fx.GraphModule, recipe: Recipe, source: ImageSource, calibrator: Calibrator,
    preprocessing: Preprocessing, progress: Progress | None,
) -> tuple[tuple[dict[str, Any], ...], str]:  # fmt: skip
    """What each part of a recipe gives, and a note on the pictures."""
    shown, note = held_aside(source, calibrator)
    pictures = torch.stack([torch.from_numpy(preprocessing(sample.image)) for sample in shown])
    calibrator_for = functools.partial(Calibrator, source, preprocessing=preprocessing)
    effects = ablation(float_graph, recipe, calibrator_for, pictures, graph, progress)
    return tuple(effect.to_dict() for effect in effects), note


def _trained(
    model: nn.Module, recipe: TrainedRecipe, source: ImageSource | None, dynamic_size: bool, explain: bool
) -> QuantizedModel:
    """A model that was trained with quantizers: both graphs lie on its grids; pictures only name the classes."""
    interface = _free_size(model) if dynamic_size else interface_of(model)
    float_graph = capture(freeze(model), interface)
    fold(float_graph)
    built = exported.build(float_graph, model, recipe)
    notes = [*getattr(model, "notes", []), *built.notes]
    notes += ["nothing to explain: what was trained has no steps that could be left out"] if explain else []
    class_names = _class_names(model, built.graph, source, notes)
    return QuantizedModel(
        name=getattr(model, "name", type(model).__name__), float_graph=float_graph, graph=built.graph, recipe=recipe,
        interface=dataclasses.replace(interface, tolerance={LOGITS: exported.TIE_SHARE}),
        preprocessing=getattr(model, "preprocessing", None), class_names=class_names,
        config=getattr(model, "config", {}), parameters=sum(p.numel() for p in model.parameters()),
        precision=built.precision, calibration=None, notes=tuple(notes),
    )  # fmt: skip


def _free_size(model: nn.Module) -> Interface:
    """A classifier's interface with free height and width."""
    if not getattr(model, "any_size", False):
        raise UsageError(
            f"{getattr(model, 'name', type(model).__name__)} is built for one input size (position or bias tables, "
            "windows); export it once per size with img_size. Any size: SHViT and CARE."
        )
    return classifier_interface(("height", "width"))


def _class_names(
    model: nn.Module, graph: fx.GraphModule, source: ImageSource | None, notes: list[str]
) -> tuple[str, ...] | None:
    """The model's own class names, else those of labelled pictures when there is one per output."""
    own = getattr(model, "class_names", None)
    if own is not None or source is None or not source.class_names:
        return own
    logits = next(node for node in graph.graph.nodes if node.op == "output").args[0][0]
    if len(source.class_names) != logits.meta["val"].shape[-1]:
        return None
    notes.append(f"class names taken from {source.where}, in sorted order, since the checkpoint has none")
    return source.class_names


def _count_layers(graph: fx.GraphModule) -> int:
    return len(placement.plan(graph, Recipe(name="all", first_layer="int8")).weighted)
