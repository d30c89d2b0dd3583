"""A recipe applied to a folded float graph: rewrites, statistics, searches, quantizers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from edgeattn.errors import RecipeError
from edgeattn.quant import placement
from edgeattn.quant.attention_products import encode_probabilities, split_attention
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.graph import aten, is_call, module_path
from edgeattn.quant.methods.gptq import Hessian
from edgeattn.quant.observers import InputMean, Observer
from edgeattn.quant.recipe import Recipe
from edgeattn.quant.reconstruct import reconstruct
from edgeattn.quant.revert import Reverting
from edgeattn.quant.rewrite import equalize, prescale, smooth
from edgeattn.quant.rewrite_awq import awq
from edgeattn.quant.rewrite_layernorm import power_of_two, reparameterize
from edgeattn.quant.rewrite_rotation import rotate
from edgeattn.quant.steps import (
    AttentionProducts,
    Awq,
    BiasCorrection,
    Equalize,
    Gptq,
    PowerOfTwo,
    Prescale,
    Reconstruct,
    Reparameterize,
    Revert,
    Rotate,
    Smooth,
)

_SHOWN = 64  # pictures that show how large channels get
_REWRITES = (Equalize, Smooth, Prescale, Awq, Reparameterize, PowerOfTwo, Rotate, AttentionProducts)
_BY_RULES = (Awq, AttentionProducts)  # what they do depends on the rules


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
    graph, notes = rewritten(float_graph, recipe, calibrator)
    chosen, seen = _planned(graph, recipe, calibrator)
    reverting = next((step for step in recipe.steps if isinstance(step, Revert)), None)
    if reverting is not None:
        search = Reverting(graph, chosen, recipe, seen.ranges, calibrator.sample(reverting.images))
        for step in reverting.otherwise if search.needed else ():
            notes += _rewrite(graph, step, recipe, calibrator)
            chosen, seen = _planned(graph, recipe, calibrator)
            search = Reverting(graph, chosen, recipe, seen.ranges, calibrator.sample(reverting.images))
            search.recipe = recipe = recipe.model_copy(update={"steps": _with(recipe, step, reverting)})
        planned, (recipe, done) = recipe, search.run()
        if planned.rules != recipe.rules and any(isinstance(step, _BY_RULES) for step in recipe.steps):
            # The stored recipe does it by the new rules.
            graph, notes = rewritten(float_graph, recipe, calibrator)
            chosen, seen = _planned(graph, recipe, calibrator)
        chosen = placement.plan(graph, recipe)
        notes.append(f"{done}, without the noise of attention products" if chosen.products else done)
    notes += [f"float32: {path} ({reason})" for path, reason in chosen.kept_float.items()]
    precision = chosen.summary(graph)
    if any(isinstance(step, Reconstruct) for step in recipe.steps):
        seen, done = reconstruct(graph, chosen, seen, recipe, calibrator, work, progress)
        notes.append(done)
    notes += _encode(graph, chosen, recipe, calibrator)
    placement.insert(graph, chosen, seen, recipe)
    return Built(graph, recipe, precision, notes)


def _encode(graph: fx.GraphModule, chosen: placement.Plan, recipe: Recipe, calibrator: Calibrator) -> list[str]:
    step = next((step for step in recipe.steps if isinstance(step, AttentionProducts)), None)
    if step is None:
        return []
    assert recipe.activations is not None
    symmetric = recipe.activations.signedness == "int8"
    return encode_probabilities(graph, chosen.products, step, symmetric, calibrator.sample(_SHOWN))


def rewritten(float_graph: fx.GraphModule, recipe: Recipe, calibrator: Calibrator) -> tuple[fx.GraphModule, list[str]]:
    """A copy with what a recipe's steps do to a float graph, and what that was."""
    graph, notes = copy.deepcopy(float_graph), []
    for step in recipe.steps:
        notes += _rewrite(graph, step, recipe, calibrator)
    return graph, notes


def _with(recipe: Recipe, step: Any, reverting: Revert) -> tuple[Any, ...]:
    """The recipe's steps and one that was applied last, so that the stored recipe rewrites the graph in that order."""
    steps = recipe.steps
    at = max([steps.index(reverting), *(i + 1 for i, other in enumerate(steps) if isinstance(other, _REWRITES))])
    return (*steps[:at], step, *steps[at:])


def _rewrite(graph: fx.GraphModule, step: Any, recipe: Recipe, calibrator: Calibrator) -> list[str]:
    """Apply a step that changes the float graph; others come into play later."""
    if isinstance(step, Equalize):
        return [equalize(graph)]
    if isinstance(step, Smooth):
        return [smooth(graph, calibrator.sample(_SHOWN), step.alpha)]
    if isinstance(step, Prescale):
        return [prescale(graph, calibrator.sample(_SHOWN), step.alpha, step.imbalance)]
    if isinstance(step, Awq):
        return [awq(graph, calibrator.sample(_SHOWN), placement.plan(graph, recipe).weighted)]
    symmetric = recipe.activations is not None and recipe.activations.signedness == "int8"
    if isinstance(step, Reparameterize):
        return [reparameterize(graph, calibrator.sample(_SHOWN))]
    if isinstance(step, PowerOfTwo):
        return [power_of_two(graph, calibrator.sample(_SHOWN), symmetric)]
    if isinstance(step, Rotate):
        return [rotate(graph, calibrator.sample(2))]
    if isinstance(step, AttentionProducts):
        return [split_attention(graph, step, recipe)]
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
