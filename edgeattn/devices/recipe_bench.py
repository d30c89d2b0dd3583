"""What a recipe costs on this machine: milliseconds against float32 in turns, bytes, and points of top-1 lost."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from torch import fx, nn

from edgeattn import __version__
from edgeattn.data.files import atomic_file
from edgeattn.data.interface import IMAGE, LOGITS, interface_of
from edgeattn.data.source import ImageSource
from edgeattn.devices.accuracy import evaluate
from edgeattn.devices.latency import SMALLEST_BLOCK_RUNS, measure_latency
from edgeattn.devices.results import machine_facts
from edgeattn.devices.statistics import MIN_ROUNDS
from edgeattn.errors import DeviceError, UnsupportedOp
from edgeattn.export.onnx_model import save_onnx
from edgeattn.export.target import Artifact, Draft, get_target
from edgeattn.export.unquantize import removal, unquantize
from edgeattn.models.folding import fuse_attention
from edgeattn.models.sources import cache_folder
from edgeattn.quant import placement
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import Calibration, Recipe
from edgeattn.quant.sensitivity import observed_ranges
from edgeattn.runtime.bundle import Variant
from edgeattn.runtime.onnxruntime_session import available_threads
from edgeattn.runtime.session import Session

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
CACHE = "layer_latency.json"
_SCHEMA_VERSION = 1
_FILES: dict[Variant, str] = {"float32": "reference.onnx", "quantized": "model.onnx"}
TOGETHER = 3  # sessions beside the baseline in one comparison
_LEAST_RUNS = MIN_ROUNDS * SMALLEST_BLOCK_RUNS  # for an interval, however slow the model is
RUNS = 160  # of each, in blocks, are enough to see one per cent on a quiet machine
_STEADY = 1.1  # width of an interval that is kept; what was measured beside other work is measured again
_RANGE_IMAGES = 16  # ranges do not change how long a graph takes


class Measurer(Protocol):
    """Measures recipes for one model on some targets; tests have one with known answers."""

    targets: tuple[str, ...]

    def bytes(self, recipe: Recipe) -> int:
        """Of the artefact of a recipe without its steps, the largest of the targets'."""
        ...

    def timing(self, recipe: Recipe, target: str) -> tuple[float, float]:
        """Median milliseconds of float32 and of a recipe without its steps, measured in turns."""
        ...

    def outcome(self, recipe: Recipe, wanted: Collection[str]) -> dict[str, float]:
        """`size` in bytes, and where wanted `latency` in ms and `drop` in points: of the finished model, on the target
        that is worst."""
        ...


@dataclasses.dataclass(frozen=True)
class Gain:
    """Times as fast, with a 95 % interval."""

    ratio: float
    low: float
    high: float


class Bench:
    """The `Measurer` of this machine. Use it in a `with` block: it keeps files in a temporary folder.

    Args:
        source: calibration pictures; labels for `drop`.
        base: recipe whose ranges are used; every recipe that is timed quantizes no other tensors. Files of recipes that
            only leave parts of it out are made from its file.
        threads: of the runtimes; None: all processors.
        seconds: time budget of each comparison.
        cache: file of timings; None: in the user's cache folder.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        base: Recipe,
        targets: Sequence[str],
        *,
        threads: int | None = None,
        seconds: float = 3.0,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.targets = tuple(targets)
        self._model, self._source, self._seconds, self._progress = model, source, seconds, progress
        self._profile = {"threads": threads}
        self._compilers = {name: get_target(name) for name in self.targets}
        self._cache = TimingCache(cache or cache_folder() / CACHE)
        exported: Any = getattr(model, "for_export", lambda: model)()
        self._interface, self._preprocessing = interface_of(exported), exported.preprocessing
        self.graph = capture(fuse_attention(exported), self._interface)
        fold(self.graph)
        few = base.model_copy(update={"calibration": Calibration(images=_RANGE_IMAGES)})
        calibrator = Calibrator(source, few, self._preprocessing)
        self._ranges = observed_ranges(self.graph, placement.plan(self.graph, base), base, calibrator)
        self._images, self._base = base.calibration.images, base.model_copy(update={"steps": ()})
        self._folder = tempfile.TemporaryDirectory(prefix="edgeattn-budget-")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @functools.cached_property
    def _draft(self) -> Draft:
        """With the float32 model, for comparisons with it."""
        draft = Draft(Path(self._folder.name), _FILES, self._interface)
        save_onnx(self.graph, self._interface, draft.folder / _FILES["float32"])
        return draft

    def bytes(self, recipe: Recipe) -> int:
        """See `Measurer`."""
        variant: Variant = "float32" if recipe.is_float else "quantized"
        if variant == "quantized":
            save_onnx(self._variant(recipe), self._interface, self._draft.folder / _FILES[variant])
        return max(_size(self._compile(self._draft, target, variant)) for target in self.targets)

    def timing(self, recipe: Recipe, target: str) -> tuple[float, float]:
        """See `Measurer`. Kept in the cache under the digest of both graphs and of what they ran on."""
        self._save(recipe, self._draft.folder / _FILES["quantized"], self._edited(recipe))
        key = self._key(target, [self._draft.folder / name for name in _FILES.values()])
        known = self._cache.get(key)
        if known is None:
            known = self._in_turns(self._draft, target, list(_FILES))
            self._cache.put(key, known)
        return known[0], known[-1]

    def speedups(
        self, base: Recipe, others: Mapping[str, Recipe], target: str, runs: int = RUNS, *, exact: bool = True
    ) -> dict[str, Gain]:
        """How many times as fast as a recipe others are, by name, all without their steps.

        Measured in turns, and kept in the cache: what a recipe makes of the same weights and ranges is the same. What
        is too slow for an interval within the time is left out. Where the others' files need not be `exact`, they are
        made from that of the bench's base in a hundredth of the time (the same nodes, float weights as they were
        rounded) and timed some at a time.
        """
        first = self._written(base)
        how = [runs, "exact" if exact else "edited"]
        keys = {name: self._key(target, [_model(first)], recipe.to_yaml(), *how) for name, recipe in others.items()}
        found = {name: self._cache.get(key) for name, key in keys.items()}
        missing = [name for name, values in found.items() if values is None]
        drafts = {name: self._written(others[name], None if exact else self._edited(others[name])) for name in missing}
        # Of many sessions in a process the last opened look 2 to 3 % faster: what decides is timed with the base alone.
        at_once = 1 if exact else TOGETHER
        for names in (missing[i : i + at_once] for i in range(0, len(missing), at_once)):
            with contextlib.ExitStack() as stack:
                sessions: dict[str, Session] = {}
                for name, draft in [("", first), *((name, drafts[name]) for name in names)]:
                    sessions[name] = self._compile(draft, target, "quantized").open()
                    stack.callback(sessions[name].close)
                seconds = self._seconds * len(sessions) * runs / RUNS
                done = measure_latency(sessions, self._picture(), seconds=seconds, min_runs=_LEAST_RUNS, max_runs=runs)
            for one in done.speedups:
                if one.interval is not None:
                    found[one.candidate] = values = [one.ratio, one.interval.low, one.interval.high]
                    if one.interval.high < _STEADY * one.interval.low:
                        self._cache.put(keys[one.candidate], values)
        return {name: Gain(*values) for name, values in found.items() if values is not None}

    def _written(self, recipe: Recipe, edited: onnx.ModelProto | None = None) -> Draft:
        """The graph of a recipe in a folder of its own, once for all targets."""
        name = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]
        path = Path(self._folder.name) / (name if edited is None else f"{name}-edited")
        draft = Draft(path, {"quantized": _FILES["quantized"]}, self._interface)
        if not path.exists():
            path.mkdir()
            self._save(recipe, _model(draft), edited)
        return draft

    def _save(self, recipe: Recipe, path: Path, edited: onnx.ModelProto | None) -> None:
        if edited is None:
            save_onnx(self._variant(recipe), self._interface, path)
        else:
            path.write_bytes(edited.SerializeToString())

    def _edited(self, recipe: Recipe) -> onnx.ModelProto | None:
        """The base's ONNX with what a recipe leaves out in floating point; None: that needs an export of its own."""
        if recipe.activations != self._base.activations:
            return None
        try:
            removed = removal(*self._base_graph, placement.plan(self.graph, recipe))
            return unquantize(self._base_file, removed)
        except UnsupportedOp as error:
            logger.info("the ONNX file of a recipe is not made from that of %s: %s", self._base.name, error)
            return None

    @functools.cached_property
    def _base_graph(self) -> tuple[fx.GraphModule, placement.Plan]:
        return self._variant(self._base), placement.plan(self.graph, self._base)

    @functools.cached_property
    def _base_file(self) -> onnx.ModelProto:
        return onnx.load(_model(self._written(self._base)), load_external_data=False)

    def _key(self, target: str, files: Sequence[Path], *how: Any) -> str:
        """Digest of what a timing depends on."""
        place = [
            __version__, target, _version(target), machine_facts()["cpu"],
            self._profile["threads"] or available_threads(),
        ]  # fmt: skip
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return hashlib.sha256(json.dumps([*digests, *place, *how]).encode()).hexdigest()

    def _picture(self) -> dict[str, np.ndarray]:
        return {IMAGE: self._preprocessing(next(iter(self._source)).image)[None]}

    def _variant(self, recipe: Recipe) -> fx.GraphModule:
        """The graph with what a recipe quantizes on the grid of the ranges that were seen; nodes keep their order."""
        graph = copy.deepcopy(self.graph)
        twin = dict(zip(self.graph.graph.nodes, graph.graph.nodes, strict=True))
        ranges = {twin[node]: value for node, value in self._ranges.items()}
        plan = placement.plan(graph, recipe)
        placement.insert(graph, plan, placement.Statistics(ranges, {}, {}), recipe)
        return graph

    def outcome(self, recipe: Recipe, wanted: Collection[str]) -> dict[str, float]:
        """See `Measurer`: quantized, written and compiled as `export` does it."""
        made = quantize(self._model, recipe, self._source, targets=list(self.targets), progress=self._progress)
        variants: list[Variant] = ["float32", "quantized"] if recipe.has_variant else ["float32"]
        found: dict[str, list[float]] = {name: [] for name in ("size", "latency", "drop") if name in {*wanted, "size"}}
        with tempfile.TemporaryDirectory(prefix="edgeattn-budget-") as folder:
            draft = Draft(Path(folder), _FILES, made.interface)
            for variant in variants:
                graph = made.float_graph if variant == "float32" else made.graph
                save_onnx(graph, made.interface, draft.folder / _FILES[variant])
            for target in self.targets:
                found["size"].append(_size(self._compile(draft, target, variants[-1])))
                if "latency" in wanted:
                    found["latency"].append(self._in_turns(draft, target, variants)[-1])
                if "drop" in wanted:
                    found["drop"].append(self._drop(draft, target, variants, made.class_names))
        return {name: max(values) for name, values in found.items()}

    def _in_turns(self, draft: Draft, target: str, variants: Sequence[Variant]) -> list[float]:
        with self._sessions(draft, target, variants) as sessions:
            done = measure_latency(sessions, self._picture(), seconds=self._seconds)
        return [float(np.median(done.results[variant].samples_ms)) for variant in variants]

    def _drop(self, draft: Draft, target: str, variants: Sequence[Variant], names: tuple[str, ...] | None) -> float:
        if len(variants) == 1:
            return 0.0
        with self._sessions(draft, target, variants) as sessions:
            results = evaluate(
                sessions, self._source.spread(self._images), self._preprocessing, input_name=IMAGE, output_name=LOGITS,
                class_names=names, progress=self._progress,
            )  # fmt: skip
        paired = results[variants[-1]].paired
        assert paired is not None
        return paired.drop_points

    @contextlib.contextmanager
    def _sessions(self, draft: Draft, target: str, variants: Sequence[Variant]) -> Any:
        with contextlib.ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for variant in variants:
                sessions[variant] = self._compile(draft, target, variant).open()
                stack.callback(sessions[variant].close)
            yield sessions

    def _compile(self, draft: Draft, target: str, variant: Variant) -> Artifact:
        return self._compilers[target].compile(draft, variant, self._profile)


def _size(artifact: Artifact) -> int:
    """Bytes of an artefact's files, as a bundle counts them."""
    return sum((artifact.folder / name).stat().st_size for name in artifact.entry.files)


def _model(draft: Draft) -> Path:
    """The quantized model of a draft."""
    return draft.folder / draft.onnx["quantized"]


def _version(target: str) -> str:
    try:
        return importlib.metadata.version(target)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class TimingCache:
    """A JSON file of measured milliseconds; one that is damaged or cannot be written costs time, nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: str) -> list[float] | None:
        """What was kept under a key."""
        return self._read().get(key)

    def put(self, key: str, values: list[float]) -> None:
        """Keep values; what others wrote in the meantime stays."""
        entries = {**self._read(), key: values}
        try:
            with atomic_file(self.path) as temporary:
                temporary.write_text(json.dumps({"schema_version": _SCHEMA_VERSION, "entries": entries}, indent=1))
        except DeviceError as error:
            logger.warning("timings are not kept for the next time: %s", error)

    def _read(self) -> dict[str, list[float]]:
        if not self.path.is_file():
            return {}
        try:
            stored: Mapping[str, Any] = json.loads(self.path.read_text())
            return dict(stored["entries"]) if stored["schema_version"] == _SCHEMA_VERSION else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); its timings are measured again.", self.path, error)
            return {}
