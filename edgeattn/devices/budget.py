"""A recipe for a budget: which layers get how many bits so that size, latency or lost accuracy stay within limits.

What every choice costs is measured layer by layer, the best plan is solved exactly, and what it really comes to is
measured once more, because neither sensitivities nor latencies simply add up.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from edgeattn.data.source import open_source
from edgeattn.devices.budget_table import INT8, Table, measure_table
from edgeattn.devices.recipe_bench import Bench, Measurer, Progress
from edgeattn.errors import DataError, RecipeError, UsageError
from edgeattn.quant.qat.exported import recipe_for
from edgeattn.quant.recipe import Recipe

logger = logging.getLogger(__name__)

Kind = Literal["size", "latency", "drop"]
_UNITS: dict[str, dict[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "KB": 1e3, "KiB": 2**10, "MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30},
    "latency": {"us": 1e-3, "ms": 1, "s": 1e3}, "drop": {"": 1, "%": 1, "points": 1},
}  # fmt: skip
_TIGHTENINGS = 3
_WITHIN = 1 + 1e-9  # sums of milliseconds are rounded
_LEAST_STEP = 0.005  # of a limit: a plan that misses it by less is still replaced by another
_SIZES = 6  # plans whose file is written before one is finished
_BISECTIONS = 6
_DECADES = 4  # of divergence that the search for a drop covers, below that of the fastest plan


@dataclasses.dataclass(frozen=True)
class Limit:
    """One budget: bytes, milliseconds (median, batch 1), or points of top-1 below float32."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={shown(self.kind, self.value)}"


def shown(kind: str, value: float) -> str:
    """A value with its unit."""
    if kind == "size":
        return f"{value / 1e6:.4g} MB"
    return f"{value:.4g} ms" if kind == "latency" else f"{value:.4g} points"


def parse_budget(text: str) -> Limit:
    """`size=1.2MB`, `latency=0.8ms` or `drop=0.5`.

    Raises:
        UsageError: anything else; the units are named.
    """
    kind, _, rest = text.partition("=")
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)\s*", rest)
    try:
        value = float(found[1]) * _UNITS[kind.strip()][found[2]] if found else math.nan
    except (KeyError, ValueError):
        value = math.nan
    name = kind.strip()
    if not math.isfinite(value) or value < 0 or (value == 0 and name != "drop"):
        units = ", ".join(filter(None, _UNITS.get(name, {})))
        hint = f" Units of {name}: {units}." if units else ""
        raise UsageError(f"budget {text!r}: expected size=1.2MB, latency=0.8ms or drop=0.5 (points of top-1).{hint}")
    return Limit(name, value)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What a module gets, and what was measured of it alone; latency in ms against float32, by target."""

    module: str
    block: str
    choice: str
    kl: float
    size_bytes: int
    latency_ms: dict[str, float]


@dataclasses.dataclass(frozen=True)
class BudgetResult:
    """A recipe that keeps its budgets.

    Attributes:
        estimated: what the choices add up to; kl, and size and latency where they were limited.
        measured: of the finished model: size, and latency and drop where they were limited.
        verified: finished models that were measured on the way.
    """

    recipe: Recipe
    limits: tuple[Limit, ...]
    layers: tuple[LayerChoice, ...]
    estimated: dict[str, float]
    measured: dict[str, float]
    verified: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"), "budgets": {one.kind: one.value for one in self.limits},
            "layers": [dataclasses.asdict(layer) for layer in self.layers], "estimated": self.estimated,
            "measured": self.measured, "verified": self.verified,
        }  # fmt: skip

    def __str__(self) -> str:
        counts = {
            c: sum(layer.choice == c for layer in self.layers) for c in dict.fromkeys(x.choice for x in self.layers)
        }
        lines = [f"{one.kind}: {shown(one.kind, self.measured[one.kind])}, budget {one}" for one in self.limits]
        return "\n".join([*lines, "layers: " + ", ".join(f"{n} {choice}" for choice, n in counts.items())])


def recipe_for_budget(
    model: nn.Module, data: Any, targets: Sequence[str], budgets: Sequence[str | Limit], **options: Any
) -> Recipe:
    """The recipe of `plan_budget`."""
    return plan_budget(model, data, targets, budgets, **options).recipe


def plan_budget(
    model: nn.Module,
    data: Any,
    targets: Sequence[str],
    budgets: Sequence[str | Limit],
    *,
    recipe: str | Recipe | dict[str, Any] | None = None,
    minimise: str = "latency",
    threads: int | None = None,
    seconds: float = 3.0,
    images: int = 32,
    skip_bad: bool = False,
    progress: Progress | None = None,
    measurer: Measurer | None = None,
) -> BudgetResult:
    """The recipe that loses least within budgets; with `drop` alone, the fastest (or smallest) one within it.

    Layers get float32, what `recipe` gives them, or 4-bit weights in groups with float32 inputs, where the targets
    run that. What `recipe` keeps in floating point stays there.

    Args:
        model, data: as `quantize`; `drop` needs labels.
        minimise: what a `drop` without another budget is spent on.
        seconds: time budget of each latency measurement; timings are kept in the user's cache folder.
        images: that the divergence of each choice is measured on.
        progress: called with (stage, done, total). measurer: None: this machine.

    Raises:
        UsageError: a budget that is none. DataError: no data, or no labels for `drop`.
        RecipeError: no plan keeps the budgets; the smallest that was reached is named.
    """
    limits = tuple(parse_budget(one) if isinstance(one, str) else one for one in budgets)
    if not limits or len({one.kind for one in limits}) < len(limits):
        raise UsageError(f"{len(limits)} budgets ({', '.join(map(str, limits))}): give one or more, each kind once.")
    if minimise not in ("latency", "size"):
        raise UsageError(f"minimise {minimise!r}: expected latency or size.")
    source = open_source(data, skip_bad)
    if not source.labelled and any(one.kind == "drop" for one in limits):
        raise DataError(f"{source.where} has no labels, and a budget for drop is about right answers. Give labels.")
    base = recipe_for(model, recipe).for_targets(list(targets))
    if base.activations is None or base.weights is None or base.weights.bits != 8:
        raise UsageError(f"recipe {base.name!r}: a budget starts from 8-bit weights and activations, such as w8a8.")
    base = base.model_copy(update={"steps": tuple(step for step in base.steps if step.step != "revert")})
    kinds = {one.kind for one in limits}
    timed = "latency" in kinds or (kinds == {"drop"} and minimise == "latency")

    def run(measures: Measurer) -> BudgetResult:
        table = measure_table(model, source, base, measures, timed=timed, images=images, progress=progress)
        search = _Search(table, measures, limits, progress)
        return search.least_drop(minimise) if kinds == {"drop"} else search.within()

    if measurer is not None:
        return run(measurer)
    with Bench(model, source, base, targets, threads=threads, seconds=seconds, progress=progress) as bench:
        return run(bench)


class _Search:
    """Plans that were finished and measured, until one keeps the limits."""

    def __init__(self, table: Table, measurer: Measurer, limits: tuple[Limit, ...], progress: Progress | None) -> None:
        self.table, self._measurer, self.limits, self._progress = table, measurer, limits, progress
        self.asked: dict[str, float] = {one.kind: one.value for one in limits}
        self.tried: dict[tuple[int, ...], dict[str, float]] = {}

    def within(self) -> BudgetResult:
        """The least divergence within size and latency; a plan that misses them when measured is solved anew, with
        limits lower by as much as it went over."""
        solvable = {kind: value for kind, value in self.asked.items() if kind != "drop"}
        tight = dict(solvable)
        for _ in range(1 + _TIGHTENINGS):
            try:
                plan = self._small_enough(tight)
            except RecipeError as error:
                logger.info("estimates leave no plan: %s", error)
                break
            got = self._measured(plan)
            over = {kind: got[kind] - limit for kind, limit in solvable.items() if got[kind] > limit * _WITHIN}
            if not over:
                if self._fits(got):
                    return self._result(plan)
                raise self._impossible()
            for kind, excess in over.items():
                tight[kind] -= max(excess, _LEAST_STEP * solvable[kind])
        # What adds up from single layers can be wrong either way: the extreme plans are measured before giving up.
        for plan in (self.table.least(solvable), self.table.uniform(INT8)):
            if self._fits(self._measured(plan)):
                return self._result(plan)
        raise self._impossible()

    def _small_enough(self, tight: dict[str, float]) -> tuple[int, ...]:
        """The best plan whose file, quantizers included, is within the size; lowers that limit until one is."""
        plan = self.table.solve(tight)
        for _ in range(_SIZES if "size" in tight else 0):
            excess = self._measurer.bytes(self.table.recipe(plan)) - self.asked["size"]
            if excess <= 0:
                break
            tight["size"] -= max(excess, _LEAST_STEP * self.asked["size"])
            plan = self.table.solve(tight)
        return plan

    def least_drop(self, minimise: str) -> BudgetResult:
        """The cheapest plan within a drop, by bisection over the divergence that is allowed."""
        best = None
        high = self.table.estimate(self.table.least({minimise: 1.0}))["kl"]
        low = high * 10**-_DECADES
        limit = high
        for _ in range(1 + _BISECTIONS):
            plan = self.table.cheapest(minimise, limit)
            if self._fits(self._measured(plan)):
                best, low = plan, limit
            else:
                high = limit
            if best is not None and low >= high:
                break
            limit = math.sqrt(low * high)
        if best is None:
            raise self._impossible()
        return self._result(best)

    def _measured(self, plan: Sequence[int]) -> dict[str, float]:
        key = tuple(plan)
        if key not in self.tried:
            if self._progress:
                self._progress("budget: plans measured", len(self.tried), 2 + _TIGHTENINGS)
            self.tried[key] = self._measurer.outcome(self.table.recipe(plan, self.limits), set(self.asked))
        return self.tried[key]

    def _fits(self, got: dict[str, float]) -> bool:
        return all(got[kind] <= limit * _WITHIN for kind, limit in self.asked.items())

    def _impossible(self) -> RecipeError:
        reached = []
        for one in self.limits:
            smallest = min(got[one.kind] for got in self.tried.values())
            missed = "" if smallest <= one.value else ", which misses it"
            reached.append(f"{one.kind} {shown(one.kind, smallest)}{missed}")
        together = "" if len(self.limits) == 1 else " (each for itself)"
        return RecipeError(
            f"no plan keeps the budget {', '.join(map(str, self.limits))}: the smallest that was reached is "
            f"{', '.join(reached)}{together}, in {len(self.tried)} plans measured on "
            f"{', '.join(self._measurer.targets)}. Raise the budget, or take a smaller model."
        )

    def _result(self, plan: Sequence[int]) -> BudgetResult:
        table = self.table
        layers = tuple(
            LayerChoice(
                unit.module, unit.block, table.name(code), float(table.kl[i, table.column(code)]),
                int(table.size[i, table.column(code)]),
                {target: float(cost[i, table.column(code)]) for target, cost in table.latency.items()},
            )
            for i, (unit, code) in enumerate(zip(table.units, plan, strict=True))
        )  # fmt: skip
        recipe, measured = table.recipe(plan, self.limits), self._measured(plan)
        return BudgetResult(recipe, self.limits, layers, table.estimate(plan), measured, len(self.tried))
