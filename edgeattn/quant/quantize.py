"""`quantize`: a float model, a recipe and real pictures to a graph that computes what the exported model computes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeattn.data.interface import Interface, classifier_interface, interface_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import RecipeError, UsageError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import half, placement
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, capture, is_call, module_path
from edgeattn.quant.methods.gptq import Hessian
from edgeattn.quant.observers import InputMean, Observer
from edgeattn.quant.recipe import (
    BiasCorrection,
    Equalize,
    Gptq,
    Prescale,
    Recipe,
    Reconstruct,
    Revert,
    Smooth,
    load_recipe,
)
from edgeattn.quant.reconstruct import reconstruct
from edgeattn.quant.revert import Reverting
from edgeattn.quant.rewrite import equalize, prescale, smooth

logger = logging.getLogger(__name__)

_SHOWN = 64  # pictures that show how large channels get
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


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, Any] = "w8a8",
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
        data: folder, .npz, or iterable of pictures; needed unless the recipe is float32.
        targets: what the result will run on; decides the signedness of activations.
        dynamic_size: leave height and width free.
        work: folder for what a long step has finished, so that a run that was stopped goes on there.
        explain: also measure what each part of the recipe gives; builds the model once for each.
        progress: called with (stage, done, total).

    Raises:
        UsageError: the model takes no other size. DataError: no or unreadable data. RecipeError: the recipe does not
        fit. NumericError: NaN; the layer is named.
    """
    chosen = load_recipe(recipe).for_targets(targets or ["onnxruntime"])
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
    from edgeattn.quant.ablation import ablation, held_aside  # which builds its models with this module

    shown, note = held_aside(source, calibrator)
    pictures = torch.stack([torch.from_numpy(preprocessing(sample.image)) for sample in shown])
    calibrator_for = functools.partial(Calibrator, source, preprocessing=preprocessing)
    effects = ablation(float_graph, recipe, calibrator_for, pictures, graph, progress)
    return tuple(effect.to_dict() for effect in effects), note


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


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph with quantizers, and what was decided on the way; `recipe` is the one given with its searches done."""

    graph: fx.GraphModule
    recipe: Recipe
    precision: dict[str, int]
    notes: list[str]


def build(
    float_graph: fx.GraphModule, recipe: Recipe, calibrator: Calibrator, *,
    work: Path | None = None, progress: Progress | None = None,
) -> Built:  # fmt: skip
    """Apply a recipe to a copy of a folded float graph; `work` as in `quantize`.

    Raises:
        RecipeError: nothing is left to quantize, a rule matches nothing, a group size does not fit.
        NumericError: NaN in an activation; the layer is named.
    """
    graph, notes = copy.deepcopy(float_graph), []
    for step in recipe.steps:
        notes += _rewrite(graph, step, calibrator)
    chosen, seen = _planned(graph, recipe, calibrator)
    reverting = next((step for step in recipe.steps if isinstance(step, Revert)), None)
    if reverting is not None:
        search = Reverting(graph, chosen, recipe, seen.ranges, calibrator.sample(reverting.images))
        for step in reverting.otherwise if search.needed else ():
            notes += _rewrite(graph, step, calibrator)
            chosen, seen = _planned(graph, recipe, calibrator)
            search = Reverting(graph, chosen, recipe, seen.ranges, calibrator.sample(reverting.images))
            recipe = recipe.model_copy(update={"steps": (step, *recipe.steps)})
            search.recipe = recipe
        recipe, done = search.run()
        notes.append(done)
        chosen = placement.plan(graph, recipe)
    notes += [f"float32: {path} ({reason})" for path, reason in chosen.kept_float.items()]
    precision = chosen.summary(graph)
    if any(isinstance(step, Reconstruct) for step in recipe.steps):
        seen, done = reconstruct(graph, chosen, seen, recipe, calibrator, work, progress)
        notes.append(done)
    placement.insert(graph, chosen, seen, recipe)
    return Built(graph, recipe, precision, notes)


def _rewrite(graph: fx.GraphModule, step: Any, calibrator: Calibrator) -> list[str]:
    """Apply a step that changes the float graph; others come into play later."""
    if isinstance(step, Equalize):
        return [equalize(graph)]
    if isinstance(step, Smooth):
        return [smooth(graph, calibrator.sample(_SHOWN), step.alpha)]
    if isinstance(step, Prescale):
        return [prescale(graph, calibrator.sample(_SHOWN), step.alpha, step.imbalance)]
    return []


def _planned(
    graph: fx.GraphModule, recipe: Recipe, calibrator: Calibrator
) -> tuple[placement.Plan, placement.Statistics]:
    chosen = placement.plan(graph, recipe)
    if not chosen.weighted:
        raise RecipeError(f"recipe {recipe.name!r} quantizes no layer of this model; check its rules.")
    return chosen, _observe(graph, chosen, recipe, calibrator)


def _observe(
    graph: fx.GraphModule, chosen: placement.Plan, recipe: Recipe, calibrator: Calibrator
) -> placement.Statistics:
    """One pass over the pictures for everything that the recipe's steps need to know."""
    steps = {type(step) for step in recipe.steps}
    watch: dict[fx.Node, list[Callable[[Tensor], None]]] = {}
    observers: dict[fx.Node, Observer] = {}
    means: dict[fx.Node, InputMean] = {}
    hessians: dict[fx.Node, Hessian] = {}
    for node in chosen.tensors:
        assert recipe.activations is not None
        symmetric = recipe.activations.signedness == "int8"
        observers[node] = Observer(module_path(node) or node.name, recipe.activations.observer, symmetric)
        watch.setdefault(node, []).append(observers[node].see)
    for node, scheme in chosen.weighted.items():
        tensor, axis = node.args[0], -1 if is_call(node, aten.linear.default) else 1
        assert isinstance(tensor, fx.Node)
        if BiasCorrection in steps:
            means[node] = InputMean(axis)
            watch.setdefault(tensor, []).append(means[node].see)
        if Gptq in steps and scheme.bits == 4:
            hessians[node] = Hessian()
            watch.setdefault(tensor, []).append(_channels_last(hessians[node].update, axis))
    if watch or Reconstruct in steps:  # the latter wants its pictures' digest in the manifest
        calibrator.run(graph, watch)
    return placement.Statistics(
        ranges={node: observer.range() for node, observer in observers.items()},
        input_means={node: mean.value for node, mean in means.items()},
        hessians={node: hessian.value for node, hessian in hessians.items()},
    )


def _channels_last(see: Callable[[Tensor], None], axis: int) -> Callable[[Tensor], None]:
    return lambda x: see(x.movedim(axis, -1))
