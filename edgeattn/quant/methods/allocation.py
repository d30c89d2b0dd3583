"""Bit-widths per layer under budgets: metric-decoupled mixed precision (after ViDiT-Q, arXiv 2406.02540).

A multiple-choice knapsack, solved exactly by integer programming. Sensitivities are not additive when several layers
of one branch drop: measure the plan once end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy import optimize, sparse

from edgeattn.errors import RecipeError

_OBJECTIVE_SCALE = 1e5  # the solver's absolute gap is 1e-6 of the objective it is given
_WITHIN = 1e-9  # relative; a plan over its limit by more than this is refused


@dataclasses.dataclass(frozen=True)
class Budget:
    """sum over layers of cost[layer, chosen width] <= limit; `name` has the unit in it ("weights in bytes")."""

    name: str
    cost: np.ndarray
    limit: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The optimum: bits per layer, the sum of its sensitivities, and what each budget's cost comes to."""

    bits: tuple[int, ...]
    objective: float
    cost: Mapping[str, float]


def size_budget(size: Sequence[int] | np.ndarray, bits: Sequence[int], limit_bits: float) -> Budget:
    """The budget of sum size * bits <= limit, in bits, for layers of `size` weights each."""
    return Budget("weights in bits", np.multiply.outer(np.asarray(size, np.float64), np.asarray(bits)), limit_bits)


def normalise(sensitivity: np.ndarray, group: Sequence[int] | np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """sensitivity (layers, widths) over the largest value of its metric group at the lowest width.

    Groups then need no common unit. group is (layers,).

    Raises:
        RecipeError: a group's largest value is 0, so that it has no unit.
    """
    result, group = np.array(sensitivity, np.float64), np.asarray(group)
    for one in np.unique(group):
        top = result[group == one, int(np.argmin(bits))].max()
        if top <= 0:
            raise RecipeError(
                f"metric group {one} has no sensitivity at {min(bits)} bits (largest: {top:g}): measure it anew, or "
                "leave its layers out at the lowest width."
            )
        result[group == one] /= top
    return result


def allocate(
    sensitivity: np.ndarray,
    bits: Sequence[int],
    budgets: Sequence[Budget],
    tied: Sequence[Collection[int]] = (),
    allowed: Mapping[int, Collection[int]] | None = None,
) -> Plan:
    """The choice of one width for each layer with the least sum of sensitivities within all budgets.

    sensitivity and each budget's cost are (layers, widths) in the order of `bits`; `tied` are sets of layers that
    share one width (q, k and v of a fused layer); `allowed` limits the widths of single layers.

    Raises:
        RecipeError: a value is negative or not finite, shapes or layers do not fit, or no plan fits the budgets: the
            smallest limit that works is named for each.
    """
    sensitivity = np.asarray(sensitivity, np.float64)
    choices = _choices(sensitivity, bits, budgets, tied, dict(allowed or {}))
    found = _solve(sensitivity, budgets, choices)
    if found is None:
        raise RecipeError(_explain(budgets, choices))
    rows = np.arange(len(found))
    costs = {b.name: float(np.asarray(b.cost)[rows, found].sum()) for b in budgets}
    return Plan(tuple(int(bits[i]) for i in found), float(sensitivity[rows, found].sum()), costs)


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Which (unit, width) may be chosen; the layers of a unit share their width."""

    unit: np.ndarray
    open: np.ndarray

    def per_unit(self, table: np.ndarray) -> np.ndarray:
        """A table (layers, widths) summed over the layers of each unit."""
        total = np.zeros(self.open.shape)
        np.add.at(total, self.unit, np.asarray(table, np.float64))
        return total


def _choices(
    sensitivity: np.ndarray,
    bits: Sequence[int],
    budgets: Sequence[Budget],
    tied: Sequence[Collection[int]],
    allowed: dict[int, Collection[int]],
) -> _Choices:
    layers = len(sensitivity)
    for name, table in [("sensitivity", sensitivity), *((b.name, np.asarray(b.cost, np.float64)) for b in budgets)]:
        if table.shape != (layers, len(bits)):
            raise RecipeError(f"{name}: a table of {table.shape}; expected ({layers} layers, {len(bits)} widths).")
        wrong = np.argwhere(~np.isfinite(table) | (table < 0))
        if len(wrong):
            row, column = wrong[0]
            raise RecipeError(
                f"{name} of layer {row} at {bits[column]} bits is {table[row, column]}: expected 0 or more."
            )
    unknown = sorted({i for group in [*tied, allowed] for i in group if not 0 <= i < layers})
    if unknown:
        raise RecipeError(f"layers {unknown} in tied or allowed: there are {layers}, numbered from 0.")
    root = np.arange(layers)
    for group in tied:
        for other in group:
            root[np.isin(root, root[other])] = root[next(iter(group))]
    _, unit = np.unique(root, return_inverse=True)
    open_ = np.ones((unit.max(initial=-1) + 1, len(bits)), bool)
    for layer, widths in allowed.items():
        open_[unit[layer]] &= np.isin(bits, list(widths))
    shut = np.flatnonzero(open_.sum(axis=1)[unit] == 0).tolist()
    if shut:
        raise RecipeError(f"layers {shut} may have none of the widths {list(bits)}: check allowed and tied.")
    return _Choices(unit, open_)


def _solve(objective: np.ndarray, budgets: Sequence[Budget], choices: _Choices) -> np.ndarray | None:
    """Index of the chosen width of every layer, or None when the budgets cannot be kept."""
    value = choices.per_unit(objective)
    top = value[choices.open].max(initial=0.0)
    units, widths = value.shape
    one_each = sparse.kron(sparse.eye(units), np.ones((1, widths)))
    rows = [choices.per_unit(b.cost).ravel() for b in budgets]
    limits = np.array([float(b.limit) for b in budgets])
    slack = np.zeros(len(budgets))
    for _ in range(5):
        constraints = [optimize.LinearConstraint(one_each, 1, 1)]
        for row, limit in zip(rows, limits - slack, strict=True):
            unit = max(row.max(initial=0.0), 1e-300)
            constraints.append(optimize.LinearConstraint(row[None] / unit, -np.inf, limit / unit))
        answer = optimize.milp(
            value.ravel() * (_OBJECTIVE_SCALE / top if top > 0 else 1.0),
            integrality=np.ones(value.size), bounds=optimize.Bounds(0, choices.open.ravel().astype(float)),
            constraints=constraints, options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if answer.x is None:
            return None
        chosen = answer.x.reshape(units, widths).argmax(1)
        over = [row.reshape(units, widths)[np.arange(units), chosen].sum() for row in rows] - limits
        if (over <= _WITHIN * np.abs(limits)).all():
            return chosen[choices.unit]
        # The solver keeps a limit only to its tolerance: ask for as much less as it went over.
        slack += 2 * np.maximum(over, 0)
    return None


def _explain(budgets: Sequence[Budget], choices: _Choices) -> str:
    lines = []
    for budget in budgets:
        others = [b for b in budgets if b is not budget]
        chosen = _solve(np.asarray(budget.cost, np.float64), others, choices)
        if chosen is None:
            lines.append(f"{budget.name}: no limit helps while the others stay")
            continue
        least = float(np.asarray(budget.cost)[np.arange(len(chosen)), chosen].sum())
        if least > budget.limit:
            lines.append(f"{budget.name}: limit {budget.limit:.12g}, smallest that works {least:.12g}")
    if not lines:
        lines = [f"{b.name}: limit {b.limit:.12g}" for b in budgets]
    return f"no choice of bit-widths fits the budgets ({'; '.join(lines)}). Raise the limit or allow fewer bits."
