"""What each part of a recipe gives: the recipe built up from plain rounding, one part more at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.data.source import ImageSource
from edgeattn.quant.build import build
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.recipe import ObserverSettings, Recipe

IMAGES = 64  # at most, for calibrating every prefix and for measuring it
_FEWEST = 16  # pictures held aside that tell something; with fewer, calibration's own are taken
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class StepEffect:
    """The recipe up to one of its parts, against float32.

    Attributes:
        label: the part that was added last.
        sqnr_db: of the logits; infinite where they are equal.
        agreement: share of the pictures with the same first class.
        seconds: that building it took; None where that was not timed.
    """

    label: str
    sqnr_db: float
    agreement: float
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ratio is null."""
        return dataclasses.asdict(self) | {"sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None}


def prefixes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(what was added, recipe so far), from plain rounding of every layer up to the whole recipe."""
    so_far = recipe.model_copy(update={"rules": (), "first_layer": "int8", "steps": ()})
    label = "rounding only, every layer"
    if recipe.activations is not None:
        plain = recipe.activations.model_copy(update={"observer": ObserverSettings(method="min_max")})
        so_far = so_far.model_copy(update={"activations": plain})
        label = "rounding only, min-max ranges, every layer"
    yield label, so_far
    so_far = so_far.model_copy(update={"rules": recipe.rules, "first_layer": recipe.first_layer})
    yield "+ rules and the first layer's precision", so_far
    if recipe.activations is not None and recipe.activations != so_far.activations:
        so_far = so_far.model_copy(update={"activations": recipe.activations})
        observer = recipe.activations.observer
        share = f" {observer.percentile:g}" if observer.method == "percentile" else ""
        yield f"+ ranges: {observer.method}{share}", so_far
    for step in recipe.steps:
        so_far = so_far.model_copy(update={"steps": (*so_far.steps, step)})
        yield f"+ {step.step}", so_far


def ablation(
    float_graph: fx.GraphModule,
    recipe: Recipe,
    calibrator_for: Callable[[Recipe], Calibrator],
    pictures: Tensor,
    final: fx.GraphModule | None = None,
    progress: Progress | None = None,
) -> list[StepEffect]:
    """Build every prefix of a recipe on at most 64 calibration pictures and measure its logits.

    Args:
        float_graph: folded. recipe: as given, with its searches still to do.
        pictures: (N, 3, H, W), best such that calibration does not see.
        final: what quantization made with all its calibration pictures; the last line.
        progress: called with ("steps", done, all).

    Raises:
        RecipeError, NumericError: as `build`.
    """
    few = recipe.calibration.model_copy(update={"images": min(IMAGES, recipe.calibration.images)})
    wanted, found = _logits(float_graph, pictures), []
    todo = list(prefixes(recipe))
    for i, (label, prefix) in enumerate(todo):
        start, prefix = time.monotonic(), prefix.model_copy(update={"calibration": few})
        graph = build(float_graph, prefix, calibrator_for(prefix)).graph
        found.append(_effect(label, wanted, _logits(graph, pictures), time.monotonic() - start))
        if progress:
            progress("steps", i + 1, len(todo))
    if final is not None:
        found.append(_effect("as written, all calibration pictures", wanted, _logits(final, pictures), None))
    return found


def held_aside(source: ImageSource, calibrator: Calibrator) -> tuple[ImageSource, str]:
    """At most 64 pictures that calibration does not use, or of all where too few are left; a note that says which."""
    # A one-shot iterator may be endless: it has no length to take from.
    if not getattr(source, "one_shot", False) and len(source) - len(calibrator.source) >= _FEWEST:
        aside = _Without(source, {name for name, _, _ in calibrator.source._entries()}).spread(IMAGES)
        return aside, f"steps were measured on {len(aside)} pictures that calibration did not use"
    some = source.spread(IMAGES)
    return some, f"steps were measured on {len(some)} of the calibration pictures: too few others were given"


class _Without(ImageSource):
    """A source less the entries of some names."""

    def __init__(self, parent: ImageSource, names: set[str]) -> None:
        super().__init__(parent.where, parent.skip_bad)
        self.class_names, self.labelled = parent.class_names, parent.labelled
        self._parent, self._names = parent, names

    def __len__(self) -> int:
        return len(self._parent) - len(self._names)

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        return (entry for entry in self._parent._entries() if entry[0] not in self._names)


@torch.no_grad()
def _logits(graph: fx.GraphModule, pictures: Tensor) -> Tensor:
    results = [graph(batch) for batch in pictures.split(_BATCH)]
    return torch.cat([result[0] if isinstance(result, (tuple, list)) else result for result in results])


def _effect(label: str, wanted: Tensor, got: Tensor, seconds: float | None) -> StepEffect:
    noise = float((got - wanted).double().square().sum())
    sqnr = 10 * math.log10(float(wanted.double().square().sum()) / noise) if noise else math.inf
    agreement = float((got.argmax(1) == wanted.argmax(1)).double().mean())
    return StepEffect(label, sqnr, agreement, seconds)
