"""Which parts of a model a target runs faster in integers, by measurement: the others stay in floating point.

Integers do not pay everywhere: a runtime may have no fast kernel for a kind of layer, or spend on conversions around it
what it gains inside. So parts of the graph are left in floating point in turn, each finished graph is timed beside the
plain one, and what is faster without is left out. In the end the artefact itself has to beat float32.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn

from edgeattn.data.source import ImageSource
from edgeattn.devices.budget_table import RESIDUAL
from edgeattn.devices.latency import SpeedupResult, measure_latency
from edgeattn.devices.recipe_bench import RUNS, TOGETHER, Bench, Gain
from edgeattn.export.placer import Placed
from edgeattn.export.target import Artifact
from edgeattn.quant import placement
from edgeattn.quant.graph import aten, attribute, is_call, module_path
from edgeattn.quant.recipe import Recipe, Rule
from edgeattn.runtime.bundle import PlacementEntry

_FINALISTS = 3
_FINAL_RUNS = 3 * RUNS  # timed anew: the best of many noisy results looks better than it is
_LOST = 0.97  # a kind certainly slower than this as a whole is not taken apart
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Region:
    """Layers of one kind at one size of their output, as identical blocks have them: measured and decided together."""

    kind: str
    size: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """For notes: "depthwise convolutions of 7x7"."""
        return f"{self.kind} of {self.size}" if self.size else self.kind


class MeasuredPlacer:
    """The `edgeattn.export.placer.Placer` of this machine.

    Args:
        threads: of the runtimes; None: all processors.
        seconds: time budget of each candidate, and ten times that of the final comparison.
        most_seconds: time budget of the search for all targets, without the whole recipe's export and that of the few
            that are compared in the end; what was not tried by then stays as the recipe has it,
            which is said. Timings are kept, so the same export goes on from there.
        cache: file of timings; None: in the user's cache folder.
    """

    def __init__(
        self, *, threads: int | None = None, seconds: float = 0.8, most_seconds: float = 45.0,
        cache: Path | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._threads, self._seconds, self._most, self._cache = threads, seconds, most_seconds, cache
        self._progress = progress

    def place(self, model: nn.Module, recipe: Recipe, source: ImageSource, targets: Sequence[str]) -> dict[str, Placed]:
        """See `Placer`."""
        with Bench(
            model, source, recipe, targets, threads=self._threads, seconds=self._seconds, cache=self._cache
        ) as bench:
            # Writes the whole recipe, once: that is no part of a comparison, nor of the time for them.
            bench.speedups(recipe.model_copy(update={"steps": ()}), {}, targets[0])
            end, searches = time.monotonic() + self._most, {}
            for i, target in enumerate(targets):
                share = (end - time.monotonic()) / (len(targets) - i)
                searches[target] = _Search(bench, recipe, target, time.monotonic() + share, self._progress)
                searches[target].screen()
            return {target: search.best() for target, search in searches.items()}

    def judge(
        self, plain: Artifact, quantized: Artifact, inputs: Mapping[str, np.ndarray], placed: Placed, margin: float
    ) -> PlacementEntry:
        """See `Placer`."""
        sessions = {"float32": plain.open(), "quantized": quantized.open()}
        try:
            measured = measure_latency(sessions, inputs, seconds=10 * self._seconds).speedups[0]
        finally:
            for session in sessions.values():
                session.close()
        return decide(measured, placed, margin)


def decide(measured: SpeedupResult, placed: Placed, margin: float) -> PlacementEntry:
    """The quantized artefact if all of its speed-up's interval is above the margin, else float32."""
    interval = measured.interval
    pays = interval is not None and interval.low > margin
    told = "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    speed = f"the quantized model is {measured.ratio:.2f}{told} times as fast as float32"
    wanted = f"{speed}, and the recipe asks for more than {margin:g} for certain"
    return PlacementEntry(
        ships="quantized" if pays else "float32", speedup=measured.ratio,
        interval=None if interval is None else (interval.low, interval.high), left_float=list(placed.left_float),
        reason=f"{speed}; {placed.reason}" if pays else f"{wanted}; {placed.reason}",
    )  # fmt: skip


def regions(graph: fx.GraphModule, recipe: Recipe) -> list[Region]:
    """What a recipe quantizes of a folded graph, by kind of layer and size of its output."""
    plan = placement.plan(graph, recipe)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in plan.weighted:
        found[_kind(graph, node), _size(graph, node)].append(module_path(node))
    for node, _ in plan.attention:
        found["attention", _size(graph, node)].append(module_path(node))
    if plan.adds:
        found[RESIDUAL, ""] = []
    return [Region(kind, size, tuple(dict.fromkeys(paths))) for (kind, size), paths in found.items()]


def _kind(graph: fx.GraphModule, node: fx.Node) -> str:
    if is_call(node, aten.linear.default):
        return "linear layers"
    weight = attribute(graph, node.args[1])
    assert weight is not None
    if weight.shape[1] == 1 and weight.shape[0] > 1:
        return "depthwise convolutions"
    return "1x1 convolutions" if weight.shape[2:].numel() == 1 else "convolutions"


def _size(graph: fx.GraphModule, node: fx.Node) -> str:
    """Height and width of an image; of matrix products the number of rows and both widths. Free axes by name."""
    value: Any = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    if not is_call(node, aten.linear.default):
        return "x".join(str(side) for side in value.shape[2:])
    weight = attribute(graph, node.args[1])
    assert weight is not None
    return "x".join(str(side) for side in (*value.shape[1:-1], weight.shape[1], weight.shape[0]))


def without(recipe: Recipe, left: Iterable[Region], reason: str) -> Recipe:
    """The recipe with regions left in floating point."""
    left = list(left)
    rules = [Rule(modules=path, precision="float", reason=reason) for region in left for path in region.modules]
    residual = "float" if any(region.kind == RESIDUAL for region in left) else recipe.residual
    return recipe.model_copy(update={"rules": (*rules, *recipe.rules), "residual": residual})


class _Search:
    """Of one model on one target."""

    def __init__(self, bench: Bench, recipe: Recipe, target: str, end: float, progress: Progress | None) -> None:
        self.bench, self.target, self._end, self._progress = bench, target, end, progress
        self._longest = 0.0  # seconds of one comparison: none is begun that would not end in time
        self.recipe, self.base = recipe, recipe.model_copy(update={"steps": ()})
        self.regions = regions(bench.graph, self.base)
        self._gains: dict[frozenset[Region], Gain] = {}
        self._tried = ""

    def screen(self) -> None:
        """Time what the search has time for, from files that are edited, not exported."""
        kinds, single = self._candidates()
        gains = self._measured(kinds)
        worth = [left for left in single if all(gains[k].high > _LOST for k in kinds if left <= k and k in gains)]
        gains |= self._measured([left for left in worth if left not in gains])
        self._gains = gains
        self._tried = f"{len(gains)} of {len(dict.fromkeys([*kinds, *worth]))} placements timed"

    def best(self) -> Placed:
        """The fastest of what was tried, if it is for certain faster than the plain recipe when both are exported."""
        gains, tried = self._gains, self._tried
        better = [left for left, gain in gains.items() if gain.low > 1]
        together = frozenset().union(*(left for left in better if len({r.kind for r in left}) == 1))
        last = sorted(better, key=lambda left: -gains[left].ratio)[:_FINALISTS]
        final = self._timed([x for x in dict.fromkeys([together, *last]) if x and self._leaves_layers(x)], final=True)
        best = max(final, key=lambda left: final[left].ratio, default=frozenset[Region]())
        if not best or final[best].low <= 1:
            return Placed(self.recipe, (), f"{tried}, none faster than the whole recipe")
        names = tuple(sorted(region.name for region in best))
        gain = final[best]
        reason = f"faster in floating point on {self.target}, by measurement"
        told = f"{gain.ratio:.2f} [{gain.low:.2f}, {gain.high:.2f}] times as fast as the whole recipe"
        return Placed(without(self.recipe, best, reason), names, f"{tried}; without {', '.join(names)} {told}")

    def _candidates(self) -> tuple[list[frozenset[Region]], list[frozenset[Region]]]:
        """Sets of regions to leave in floating point: kinds, and all but the matrix products; then single regions.

        What pays least often comes first: the time may not be enough for all.
        """
        kinds: dict[str, list[Region]] = defaultdict(list)
        for region in self.regions:
            kinds[region.kind].append(region)
        products = [r for r in self.regions if r.kind in ("linear layers", "1x1 convolutions", "convolutions")]
        sets = [frozenset(self.regions) - frozenset(products)]
        sets += [frozenset(group) for group in sorted(kinds.values(), key=lambda group: group[0] in products)]
        sets += [frozenset(self.regions) - frozenset(kinds["linear layers"])]
        single = [frozenset([region]) for region in self.regions]
        fit = [[left for left in dict.fromkeys(x) if left and self._leaves_layers(left)] for x in (sets, single)]
        return fit[0], fit[1]

    def _leaves_layers(self, left: frozenset[Region]) -> bool:
        """Whether some layer is still quantized; a recipe that quantizes none is refused."""
        return any(r.kind not in (RESIDUAL, "attention") for r in set(self.regions) - left)

    def _measured(self, candidates: Sequence[frozenset[Region]]) -> dict[frozenset[Region], Gain]:
        found: dict[frozenset[Region], Gain] = {}
        for i in range(0, len(candidates), TOGETHER):
            self._report(i, len(candidates))
            started = time.monotonic()
            if started + self._longest < self._end:
                found |= self._timed(candidates[i : i + TOGETHER])
                self._longest = max(self._longest, time.monotonic() - started)
        self._report(len(candidates), len(candidates))
        return found

    def _report(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(f"{self.target}: placements", done, total)

    def _timed(self, candidates: Sequence[frozenset[Region]], *, final: bool = False) -> dict[frozenset[Region], Gain]:
        named = {str(i): left for i, left in enumerate(candidates)}
        recipes = {name: without(self.base, left, "") for name, left in named.items()}
        found = self.bench.speedups(self.base, recipes, self.target, _FINAL_RUNS if final else RUNS, exact=final)
        return {named[name]: gain for name, gain in found.items()}
