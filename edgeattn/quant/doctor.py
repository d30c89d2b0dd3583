"""Calibration doctor: whether the pictures that set the ranges are fit for it, and what the ranges make of the tensors.

One pass over the pictures through the float graph as the recipe's steps rewrite it; nothing is quantized.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeattn.data.interface import interface_of
from edgeattn.data.source import ImageSource, Sample, open_source
from edgeattn.errors import NumericError, RecipeError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import placement
from edgeattn.quant.build import rewritten
from edgeattn.quant.calibration import Calibrator, Progress, is_constant
from edgeattn.quant.calibration_report import FIRST_CHECK, OUTLIER_FACTOR, CalibrationReport, TensorReport, findings
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture, module_path
from edgeattn.quant.observers import Histogram, Observer
from edgeattn.quant.quantizer import activation_parameters
from edgeattn.quant.recipe import ObserverSettings, Recipe, load_recipe

_ORDER_SEED = 20240301
_DRIFT = 0.05  # of the final range's width; a range that moves less counts as settled
# Parameters that hold tokens put in front of the patches, in the order in which models put them.
_TOKENS = {
    "cls_token": "class token", "camera_token": "camera token", "dist_token": "distillation token",
    "reg_token": "register token", "register_token": "register token", "register_tokens": "register token",
}  # fmt: skip


def diagnose(
    model: nn.Module, data: Any, *, validation: Any = None, recipe: str | Recipe | dict[str, Any] = "w8a8",
    targets: list[str] | None = None, skip_bad: bool = False, progress: Progress | None = None,
) -> CalibrationReport:  # fmt: skip
    """Look at the pictures that `quantize` would calibrate on, and at the ranges that they give.

    Args:
        data, validation: folder, .npz, or iterable of pictures; overlap between them is an error of the report.
        targets: what the result will run on; decides the signedness of activations.
        progress: called with (stage, done, total).

    Raises:
        DataError: no or unreadable pictures, or every picture is of one colour. RecipeError: nothing to calibrate.
        NumericError: NaN or infinity in the input or an activation; the layer is named.
    """
    chosen = load_recipe(recipe).for_targets(targets or ["onnxruntime"])
    model = getattr(model, "for_export", lambda: model)()
    name, interface = getattr(model, "name", type(model).__name__), interface_of(model)
    if chosen.weights is None or not interface.is_classifier:
        raise RecipeError(
            f"recipe {chosen.name!r} calibrates nothing on pictures for {name}. Take a classifier and a recipe that "
            "quantizes, for example w8a8."
        )
    source = open_source(data, skip_bad).spread(chosen.calibration.images)
    pictures = _Pictures(source)
    graph = capture(fuse_attention(model), interface)
    fold(graph)
    first = Calibrator(source, chosen, model.preprocessing)  # type: ignore[arg-type]
    _Checked(graph).run(first.sample(FIRST_CHECK))  # steps would hide where NaN begins
    graph, _ = rewritten(graph, chosen, first)
    studies, calibrator = _study(graph, chosen, pictures, model, progress)
    tensors = tuple(study.report() for study in studies)
    shown = {} if validation is None else _digests(open_source(validation, skip_bad), progress)
    overlap = tuple((own, shown[digest]) for own, digest in pictures.digests.items() if digest in shown)
    enough = max((t.settled for t in tensors if t.settled), default=None)
    is_settled = calibrator.images >= 2 * FIRST_CHECK and all(t.settled for t in tensors)
    report = CalibrationReport(
        model=name, recipe=chosen.name, source=pictures.where, images=calibrator.images,
        skipped=tuple(pictures.skipped), tensors=tensors, findings=(), overlap=overlap,
        duplicates=pictures.duplicates(), constant=tuple(pictures.constant),
        enough=enough if is_settled else None,
    )  # fmt: skip
    return dataclasses.replace(report, findings=tuple(findings(report)))


def digest_of(pixels: np.ndarray) -> str:
    """SHA-256 of decoded pixels and their shape: equal for equal pictures whatever the file's name and format."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _digests(source: ImageSource, progress: Progress | None) -> dict[str, str]:
    """Digest to name of every validation picture."""
    found: dict[str, str] = {}
    for i, sample in enumerate(source):
        found.setdefault(digest_of(np.asarray(sample.image)), sample.name)
        if progress:
            progress("validation pictures", i + 1, len(source))
    return found


class _Pictures(ImageSource):
    """A source in random order (seeded) that remembers what it has shown: digest by name, pictures of one colour.

    The order of a folder is by class, and the first 16 pictures would say nothing about the ranges of 16 mixed ones.
    The stretches between the checks of the ranges are walked one after the other, so that nothing is kept in memory.
    """

    def __init__(self, inner: ImageSource) -> None:
        super().__init__(inner.where, inner.skip_bad)
        self._inner = inner
        self.digests: dict[str, str] = {}
        self.constant: list[str] = []

    def __len__(self) -> int:
        return len(self._inner)

    def spread(self, limit: int) -> ImageSource:
        """Itself: it holds what the recipe wants already."""
        return self

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        order = np.random.default_rng(_ORDER_SEED).permutation(len(self)).tolist()
        start, end = 0, FIRST_CHECK
        while start < len(order):
            chosen = set(order[start:end])
            yield from (entry for i, entry in enumerate(self._inner._entries()) if i in chosen)
            start, end = end, 2 * end

    def __iter__(self) -> Iterator[Sample]:
        self.digests, self.constant = {}, []
        for sample in super().__iter__():
            pixels = np.asarray(sample.image)
            self.digests[sample.name] = digest_of(pixels)
            if is_constant(pixels):
                self.constant.append(sample.name)
            yield sample

    def duplicates(self) -> tuple[tuple[str, ...], ...]:
        """Groups of pictures with equal pixels."""
        groups: dict[str, list[str]] = {}
        for name, digest in self.digests.items():
            groups.setdefault(digest, []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


@dataclasses.dataclass
class _Clock:
    """Images seen, and whether the ranges are to be noted after this batch: at 16, 32, 64, ... images."""

    images: int = 0
    due: bool = False
    following: int = FIRST_CHECK

    def tick(self, x: Tensor) -> None:
        self.images += len(x)
        self.due = self.images >= self.following
        while self.images >= self.following:
            self.following *= 2


class _Study:
    """Everything about one tensor, batch by batch."""

    def __init__(self, name: str, settings: ObserverSettings, signedness: str, clock: _Clock, tokens: list[str]):
        self.observer = Observer(name, settings, signedness == "int8")
        self.histogram = self.observer.histogram or Histogram()
        self._signedness, self._clock, self._tokens = signedness, clock, tokens
        self._channels: Tensor | None = None
        self._places: Tensor | None = None
        self._ranges: dict[int, tuple[float, float]] = {}

    def see(self, x: Tensor) -> None:
        self.observer.see(x)
        size = x.abs()
        if self.observer.histogram is None:
            self.histogram.add(x, float(size.max()))
        channels = size.movedim(1 if x.dim() == 4 else -1, 0).flatten(1).amax(1)
        self._channels = channels if self._channels is None else torch.maximum(self._channels, channels)
        if x.dim() == 3:
            places = size.amax((0, 2))
            self._places = places if self._places is None else torch.maximum(self._places, places)
        if self._clock.due:
            self._ranges[self._clock.images] = self.observer.range()

    def report(self) -> TensorReport:
        low, high = self._ranges[self._clock.images] = self.observer.range()
        codes, clipped = self._codes(low, high)
        shares = codes[codes > 0] / codes.sum()
        tokens = {} if self._places is None else _outliers(self._places, self._tokens)
        assert self._channels is not None
        return TensorReport(
            self.observer.where, low, high, self.observer.minimum, self.observer.maximum,
            coverage=len(shares) / 256, effective_bits=max(0.0, float(-(shares * np.log2(shares)).sum())),
            saturation=clipped, outlier_channels=_outliers(self._channels, []), outlier_tokens=tokens,
            ranges=dict(self._ranges), settled=settled(self._ranges),
        )  # fmt: skip

    def _codes(self, low: float, high: float) -> tuple[np.ndarray, float]:
        """Counts of the 256 codes, and the share of values outside their range; bins count as filled evenly."""
        scale, zero = (float(value) for value in activation_parameters(low, high, self._signedness))
        first = -128 if self._signedness == "int8" else 0
        edges, counts = self.histogram.bins(absolute=False)
        borders = (np.arange(first, first + 257) - 0.5 - zero) * scale
        ends = np.append(edges, edges[-1] + self.histogram.bin_width)
        below = np.interp(borders, ends, np.concatenate([[0], np.cumsum(counts)]))
        inside = np.diff(below)
        inside[[0, -1]] += below[0], counts.sum() - below[-1]
        return inside, float((below[0] + counts.sum() - below[-1]) / counts.sum())


def settled(ranges: dict[int, tuple[float, float]]) -> int | None:
    """Images from which both ends stay within 5 % of the final width; None when only the last check does."""
    low, high = ranges[max(ranges)]
    width = max(high, 0.0) - min(low, 0.0) or 1.0
    first = max(ranges)
    for images in sorted(ranges, reverse=True):
        if max(abs(ranges[images][0] - low), abs(ranges[images][1] - high)) > _DRIFT * width:
            break
        first = images
    return None if first == max(ranges) else first


def _outliers(largest: Tensor, names: list[str]) -> dict[str, float]:
    """Name (or index) to maximum over the median of the maxima that are not zero, for those above the factor."""
    alive = largest[largest > 0]
    if not len(alive):
        return {}
    ratios = (largest / alive.median()).tolist()
    names = names if len(names) < len(ratios) else []  # a tensor with fewer places has no such tokens
    return {(names[i] if i < len(names) else str(i)): r for i, r in enumerate(ratios) if r > OUTLIER_FACTOR}


def special_tokens(model: nn.Module) -> list[str]:
    """Names of the tokens in front of the patches, in order."""
    found = {name.rpartition(".")[2]: parameter for name, parameter in model.named_parameters()}
    counts = [(label, found[key].shape[-2]) for key, label in _TOKENS.items() if key in found]
    return [label if count == 1 else f"{label} {i}" for label, count in counts for i in range(count)]


def _study(
    graph: fx.GraphModule, recipe: Recipe, pictures: _Pictures, model: nn.Module, progress: Progress | None
) -> tuple[list[_Study], Calibrator]:
    clock, tokens = _Clock(), special_tokens(model)
    watch: dict[fx.Node, list[Callable[[Tensor], None]]] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            watch[node] = [clock.tick, _finite(node)]
        elif node.op == "call_function":
            watch[node] = [_finite(node)]
    studies = []
    for node in placement.plan(graph, recipe).tensors:
        assert recipe.activations is not None
        settings, signedness = recipe.activations.observer, recipe.activations.signedness
        studies.append(_Study(module_path(node) or node.name, settings, signedness, clock, tokens))
        watch[node].append(studies[-1].see)
    calibrator = Calibrator(pictures, recipe, model.preprocessing, progress)  # type: ignore[arg-type]
    calibrator.run(graph, watch, "calibration pictures")
    return studies, calibrator


class _Checked(fx.Interpreter):
    """Refuses what `_finite` refuses, on a few pictures."""

    def run(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("placeholder", "call_function"):
            _finite(n)(value)
        return value


def _finite(node: fx.Node) -> Callable[[Any], None]:
    where = f"layer {module_path(node) or node.name}"
    if node.op == "placeholder":
        where = "the model's input (check the preprocessing)"

    def see(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise NumericError(
                f"{where} holds {int((~torch.isfinite(value)).sum())} NaN or infinite value(s) of {value.numel()}. "
                "Check the checkpoint and the preprocessing before you calibrate."
            )

    return see
