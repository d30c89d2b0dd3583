"""`quantize`: a float model, a recipe and real pictures to a graph that computes what the exported model computes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeattn.data.interface import Interface, classifier_interface, interface_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import ImageSource, open_source
from edgeattn.errors import RecipeError, UsageError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import placement
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture, module_path
from edgeattn.quant.observers import Observer
from edgeattn.quant.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
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


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, Any] = "w8a8",
    data: Any = None,
    *,
    targets: list[str] | None = None,
    dynamic_size: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Fold, calibrate on real pictures and quantize a model. The given model is not changed.

    Args:
        model: a model of the zoo; or any classifier with a `preprocessing` attribute (see `Preprocessing`), any other
            model with an `interface` attribute (see `Interface`).
        data: folder, .npz, or iterable of pictures; needed unless the recipe is float32.
        targets: what the result will run on; decides the signedness of activations.
        dynamic_size: leave height and width free.
        progress: called with (stage, done, total).

    Raises:
        UsageError: the model takes no other size. DataError: no or unreadable data. RecipeError: the recipe does not
        fit. NumericError: NaN; the layer is named.
    """
    chosen = load_recipe(recipe).for_targets(targets or ["onnxruntime"])
    model = getattr(model, "for_export", lambda: model)()  # leaves out results that are for tests only
    interface = _free_size(model) if dynamic_size else interface_of(model)
    preprocessing = getattr(model, "preprocessing", None)
    if not interface.is_classifier and not chosen.is_float:
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
    source = None if chosen.is_float and data is None else open_source(data, skip_bad)
    if not chosen.is_float:
        assert source is not None and preprocessing is not None
        graph = copy.deepcopy(float_graph)
        precision, calibration = _calibrate_and_insert(graph, chosen, source, preprocessing, notes, progress)
    class_names = _class_names(model, graph, source, notes)
    return QuantizedModel(
        name=getattr(model, "name", type(model).__name__), float_graph=float_graph, graph=graph, recipe=chosen,
        interface=interface, preprocessing=preprocessing, class_names=class_names,
        config=getattr(model, "config", {}), parameters=sum(p.numel() for p in model.parameters()),
        precision=precision, calibration=calibration, notes=tuple(notes),
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


def _calibrate_and_insert(
    graph: fx.GraphModule, recipe: Recipe, source: ImageSource, preprocessing: Preprocessing,
    notes: list[str], progress: Progress | None,
) -> tuple[dict[str, int], dict[str, Any]]:  # fmt: skip
    assert recipe.activations is not None
    chosen = placement.plan(graph, recipe)
    if not chosen.weighted:
        raise RecipeError(f"recipe {recipe.name!r} quantizes no layer of this model; check its rules.")
    notes += [f"float32: {path} ({reason})" for path, reason in chosen.kept_float.items()]
    precision = chosen.summary(graph)
    signedness = recipe.activations.signedness
    observers = {
        node: Observer(module_path(node) or node.name, recipe.activations.observer, signedness == "int8")
        for node in chosen.tensors
    }
    calibration = _observe(graph, observers, recipe, source, preprocessing, progress)
    if calibration["images"] < min(_FEW_IMAGES, recipe.calibration.images):
        notes.append(f"calibrated on {calibration['images']} images only; 512 or more give steadier ranges")
    ranges = {node: observer.range() for node, observer in observers.items()}
    placement.insert(graph, chosen, ranges, signedness)
    return precision, calibration


def _observe(
    graph: fx.GraphModule, observers: dict[fx.Node, Observer], recipe: Recipe, source: ImageSource,
    preprocessing: Preprocessing, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Run both passes over the data; returns the calibration facts."""
    digest = hashlib.sha256()
    source = source.spread(recipe.calibration.images)

    def walk(stage: str, watch: Mapping[fx.Node, Callable[[Tensor], None]], digest: Any = None) -> int:
        runner, seen = _Observing(graph, watch), 0
        for batch in _batches(source, recipe, preprocessing, digest):
            runner.run(batch)
            seen += len(batch)
            if progress:
                progress(stage, seen, len(source))
        return seen

    count = walk("ranges", {node: observer.see_range for node, observer in observers.items()}, digest)
    second = {node: observer.see_histogram for node, observer in observers.items() if observer.needs_histogram}
    if second:
        walk("histograms", second)
    settings = recipe.activations.observer.model_dump() if recipe.activations else {}
    return {
        "source": source.where, "images": count, "skipped": list(source.skipped), "sha256": digest.hexdigest(),
        "observer": settings,
    }  # fmt: skip


def _batches(source: ImageSource, recipe: Recipe, preprocessing: Preprocessing, digest: Any = None) -> Iterator[Tensor]:
    pictures: list[np.ndarray] = []
    for sample in source:
        pixels = np.asarray(preprocessing.resize_and_crop(sample.image))
        if digest is not None:
            digest.update(pixels.tobytes())
        pictures.append(preprocessing.normalize(pixels))
        if len(pictures) == recipe.calibration.batch_size:
            yield torch.from_numpy(np.stack(pictures))
            pictures = []
    if pictures:
        yield torch.from_numpy(np.stack(pictures))


class _Observing(fx.Interpreter):
    """Runs a graph and shows chosen nodes' outputs to observers; values are freed as soon as they are not needed."""

    def __init__(self, graph: fx.GraphModule, watch: Mapping[fx.Node, Callable[[Tensor], None]]) -> None:
        super().__init__(graph)
        self._watch = watch

    @torch.no_grad()
    def run(self, *args: Any) -> Any:  # type: ignore[override]
        return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._watch:
            self._watch[n](value)
        return value
