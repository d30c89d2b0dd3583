"""The choices of every layer, what each of them costs, and the recipe that a plan of choices stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from edgeattn.data.source import ImageSource
from edgeattn.devices.recipe_bench import Measurer, Progress
from edgeattn.errors import RecipeError
from edgeattn.quant.methods.allocation import Budget, allocate
from edgeattn.quant.recipe import PRESETS, Recipe, Rule, WeightScheme
from edgeattn.quant.sensitivity import LayerSensitivity, sensitivity
from edgeattn.quant.steps import Gptq

FLOAT, INT8, INT4 = 32, 8, 4
CODES = (FLOAT, INT8, INT4)
_NAMES = {FLOAT: "float32", INT8: "w8a8", INT4: "w4a16"}
RESIDUAL = "residual additions"  # one choice for all, as a recipe has it
_GROUPS = WeightScheme(bits=4, granularity="group", group_size="auto")


@dataclasses.dataclass(frozen=True)
class Unit:
    """What gets one choice: a module, or all residual additions. Units of one block are alike and timed together."""

    module: str
    block: str
    is_layer: bool
    codes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Costs of shape (units, choices), choices in the order of `CODES`; nothing that is not allowed counts.

    Attributes:
        kl: divergence from float32, nats per picture, each alone.
        size: bytes of the weights.
        latency: target to ms against float32, each alone, negative where it is faster; empty if not measured.
        float_ms: target to the median of float32.
        fixed_bytes: of the artefact without these weights.
    """

    base: Recipe
    units: tuple[Unit, ...]
    kl: np.ndarray
    size: np.ndarray
    latency: dict[str, np.ndarray]
    float_ms: dict[str, float]
    fixed_bytes: float

    @staticmethod
    def name(code: int) -> str:
        """A choice in words."""
        return _NAMES[code]

    @staticmethod
    def column(code: int) -> int:
        """A choice's column."""
        return CODES.index(code)

    def solve(self, limits: Mapping[str, float]) -> tuple[int, ...]:
        """The plan with the least divergence within size and latency.

        Raises:
            RecipeError: none, by these estimates.
        """
        budgets = [budget for kind, limit in limits.items() for budget in self._budgets(kind, limit)]
        return self._allocate(self.kl, budgets)

    def cheapest(self, kind: str, kl: float) -> tuple[int, ...]:
        """The plan with the least size or latency (summed over the targets) within a divergence."""
        shifted = sum(self._shifted(cost) for cost in self._costs(kind).values())
        return self._allocate(np.asarray(shifted), [Budget("divergence in nats", self.kl, kl)])

    def least(self, limits: Mapping[str, float]) -> tuple[int, ...]:
        """The plan with the least cost as a share of each limit, whatever it diverges."""
        shares = [self._shifted(c) / v for kind, v in limits.items() for c in self._costs(kind).values()]
        return self._allocate(np.asarray(sum(shares)), [])

    def uniform(self, code: int) -> tuple[int, ...]:
        """The plan that gives every unit the same."""
        return tuple(code for _ in self.units)

    def estimate(self, plan: Sequence[int]) -> dict[str, float]:
        """What a plan adds up to: kl, size, and latency (of the slowest target) if it was measured."""
        at = np.arange(len(plan)), [self.column(code) for code in plan]
        total = {"kl": float(self.kl[at].sum()), "size": self.fixed_bytes + float(self.size[at].sum())}
        if self.latency:
            total["latency"] = max(self.float_ms[t] + float(cost[at].sum()) for t, cost in self.latency.items())
        return total

    def recipe(self, plan: Sequence[int], why: Sequence[Any] = ()) -> Recipe:
        """The recipe of a plan: a rule for each layer that does not get what the base gives it."""
        chosen = dict(zip(self.units, plan, strict=True))
        name = f"{self.base.name}-budget"
        if all(code == FLOAT for unit, code in chosen.items() if unit.is_layer):
            return Recipe(name=name, weights=None, activations=None, gate=self.base.gate)
        told = f"budget {', '.join(map(str, why))}" if why else ""
        rules = [
            rule_for(unit, code, told) for unit, code in chosen.items() if code != INT8 and unit.module != RESIDUAL
        ]
        residual = {unit.module: code for unit, code in chosen.items()}.get(RESIDUAL, INT8)
        steps = self.base.steps
        if INT4 in chosen.values() and not {"gptq", "reconstruct"} & {step.step for step in steps}:
            steps = (Gptq(), *steps)
        return self.base.model_copy(update={
            "name": name, "rules": (*rules, *self.base.rules), "steps": steps, "margin": None,
            "residual": "float" if residual == FLOAT else self.base.residual,
        })  # fmt: skip

    def _allocate(self, objective: np.ndarray, budgets: Sequence[Budget]) -> tuple[int, ...]:
        allowed = {i: unit.codes for i, unit in enumerate(self.units)}
        return allocate(objective, CODES, budgets, allowed=allowed).bits

    def _costs(self, kind: str) -> dict[str, np.ndarray]:
        return {"": self.size} if kind == "size" else self.latency

    def _shifted(self, cost: np.ndarray) -> np.ndarray:
        """Costs from 0 for the least of each unit; the solver takes no negative ones."""
        return np.where(self._open, np.maximum(cost - self._least(cost)[:, None], 0), 0)

    def _least(self, cost: np.ndarray) -> np.ndarray:
        return np.where(self._open, cost, np.inf).min(axis=1)

    @property
    def _open(self) -> np.ndarray:
        return np.array([[code in unit.codes for code in CODES] for unit in self.units])

    def _budgets(self, kind: str, limit: float) -> list[Budget]:
        fixed = {"": self.fixed_bytes} if kind == "size" else self.float_ms
        return [
            Budget(f"{kind} {target}".strip(), self._shifted(cost), limit - fixed[target] - self._least(cost).sum())
            for target, cost in self._costs(kind).items()
        ]


def rule_for(unit: Unit, code: int, reason: str = "") -> Rule:
    """The rule that gives a module float32, 8 bits, or 4 bits with float32 inputs."""
    if code == FLOAT:
        return Rule(modules=unit.module, precision="float", reason=reason)
    if code == INT8:
        return Rule(modules=unit.module, weights=WeightScheme(), reason=reason)
    return Rule(modules=unit.module, weights=_GROUPS, activations="float", reason=reason)


def measure_table(
    model: nn.Module,
    source: ImageSource,
    base: Recipe,
    measurer: Measurer,
    *,
    timed: bool,
    images: int,
    progress: Progress | None,
) -> Table:
    """Measure what every choice costs: divergence and bytes layer by layer, latency once for all units of a block."""
    in_int8 = sensitivity(model, source, base, images=images, progress=progress)
    in_int4: list[LayerSensitivity] = []
    if _runs_int4(measurer.targets):
        narrow = base.model_copy(update={"weights": _GROUPS, "activations": None})
        in_int4 = sensitivity(model, source, narrow, images=images, progress=progress)
    groups: dict[str, list[tuple[LayerSensitivity, LayerSensitivity | None]]] = {}
    four = _by_occurrence(in_int4)
    for key, layer in _by_occurrence(in_int8).items():
        groups.setdefault(RESIDUAL if layer.kind == "add" else layer.module, []).append((layer, four.get(key)))
    units, kl, size = [], [], []
    for module, group in groups.items():
        narrows = [narrow for _, narrow in group if narrow and narrow.weights.startswith("int4")]
        codes = CODES if len(narrows) == len(group) else CODES[:2]
        block = "+".join(sorted({layer.block for layer, _ in group}))
        units.append(Unit(module, block, any(layer.kind in ("conv", "linear") for layer, _ in group), codes))
        kl.append([0.0, sum(layer.kl for layer, _ in group), sum(narrow.kl for narrow in narrows)])
        sizes = [sum(layer.float_bytes for layer, _ in group), sum(layer.size_bytes for layer, _ in group)]
        size.append([*sizes, sum(narrow.size_bytes for narrow in narrows)])
    sizes_ = np.array(size, float)
    latency, float_ms = _timings(base, units, measurer, progress) if timed else ({}, {})
    fixed = measurer.bytes(PRESETS["float32"]) - sizes_[:, 0].sum()
    return Table(base, tuple(units), np.array(kl), sizes_, latency, float_ms, float(fixed))


def _by_occurrence(layers: Sequence[LayerSensitivity]) -> dict[tuple[str, str, int], LayerSensitivity]:
    """Layers by module, kind and how often that was seen before, which is the same in both recipes' lists."""
    found: dict[tuple[str, str, int], LayerSensitivity] = {}
    for layer in layers:
        count = sum(key[:2] == (layer.module, layer.kind) for key in found)
        found[layer.module, layer.kind, count] = layer
    return found


def _runs_int4(targets: Sequence[str]) -> bool:
    try:
        PRESETS["w4a16"].for_targets(list(targets))
    except RecipeError:
        return False
    return True


def _timings(
    base: Recipe, units: Sequence[Unit], measurer: Measurer, progress: Progress | None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """ms against float32 per target, unit and choice, from graphs in which one block's layers alone have that choice;
    the median of float32 over all of them."""
    jobs = [(block, code) for block in dict.fromkeys(u.block for u in units) for code in (INT8, INT4)]
    latency = {target: np.zeros((len(units), len(CODES))) for target in measurer.targets}
    plain: dict[str, list[float]] = {target: [] for target in measurer.targets}
    for done, (block, code) in enumerate(jobs):
        members = [i for i, unit in enumerate(units) if unit.block == block and code in unit.codes]
        if progress:
            progress("latency of layers", done, len(jobs))
        for target in measurer.targets if members else ():
            recipes = _isolating(base, [units[i] for i in members], code)
            times = [measurer.timing(recipe, target) for recipe in recipes]
            plain[target].append(times[0][0])
            gain = times[0][1] - (times[1][1] if len(times) > 1 else times[0][0])
            latency[target][members, CODES.index(code)] = gain / len(members)
    if progress:
        progress("latency of layers", len(jobs), len(jobs))
    return latency, {target: float(np.median(times)) for target, times in plain.items()}


def _isolating(base: Recipe, units: Sequence[Unit], code: int) -> list[Recipe]:
    """The recipe that gives these units alone a choice. Residual additions: all in 8 bits, with and without them,
    since they are in integers only between layers that are."""
    plain = {"steps": (), "name": "timing"}
    if units[0].module == RESIDUAL:
        return [base.model_copy(update=plain), base.model_copy(update={**plain, "residual": "float"})]
    rules = (*(rule_for(unit, code) for unit in units), Rule(modules="*", precision="float", optional=True))
    return [base.model_copy(update={**plain, "rules": rules, "residual": "float"})]
