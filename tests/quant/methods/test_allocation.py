import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.allocation import Budget, allocate, normalise, size_budget

BITS = (2, 4, 8)


def best_of_all(sensitivity, budgets, tied=(), allowed=None):
    """(objective, least cost of the first budget while the others are kept), by trying everything."""
    best, least = np.inf, np.inf
    rows = np.arange(len(sensitivity))
    for choice in itertools.product(range(len(BITS)), repeat=len(sensitivity)):
        index = np.array(choice)
        if any(len(set(index[list(group)])) > 1 for group in tied):
            continue
        if any(BITS[index[layer]] not in widths for layer, widths in (allowed or {}).items()):
            continue
        costs = [b.cost[rows, index].sum() for b in budgets]
        if all(c <= b.limit for c, b in zip(costs[1:], budgets[1:], strict=True)):
            least = min(least, costs[0])
            if costs[0] <= budgets[0].limit:
                best = min(best, sensitivity[rows, index].sum())
    return best, least


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6), tightness=st.floats(0.2, 1.0), latency=st.booleans())
@settings(max_examples=40, deadline=None)
def test_optimal_or_infeasible_as_brute_force_says(seed, layers, tightness, latency):
    random = np.random.default_rng(seed)
    sensitivity = -np.sort(-(random.random((layers, 3)) ** 4), 1)
    size = random.integers(1, 30, layers)
    budgets = [size_budget(size, BITS, int(tightness * 8 * size.sum()))]
    if latency:
        budgets.append(Budget("latency in ms", random.random((layers, 3)), 0.6 * layers))
    tied = [(0, layers - 1)] if seed % 2 else []
    allowed = {layers // 2: (4, 8)} if seed % 3 == 0 else None
    objective, least = best_of_all(sensitivity, budgets, tied, allowed)
    if np.isfinite(objective):
        plan = allocate(sensitivity, BITS, budgets, tied, allowed)
        assert plan.objective == pytest.approx(objective, rel=1e-9)
        assert all(plan.cost[b.name] <= b.limit * (1 + 1e-9) for b in budgets)
        return
    with pytest.raises(RecipeError, match="no choice of bit-widths fits") as caught:
        allocate(sensitivity, BITS, budgets, tied, allowed)
    if np.isfinite(least):
        assert f"smallest that works {least:.12g}" in str(caught.value)


def test_the_limit_that_the_message_names_works():
    sensitivity, size = np.array([[3.0, 1, 0], [5, 2, 0]]), [10, 20]
    with pytest.raises(RecipeError) as caught:
        allocate(sensitivity, BITS, [size_budget(size, BITS, 59)])
    found = re.search(r"weights in bits: limit 59, smallest that works (\d+)", str(caught.value))
    assert found and found[1] == "60"
    assert allocate(sensitivity, BITS, [size_budget(size, BITS, 60)]).bits == (2, 2)


def test_exact_budget_of_millions_of_weights():
    size = np.array([589824, 1769472, 2359296, 2359297])
    budget = size_budget(size, BITS, int(4 * size[:3].sum() + 8 * size[3]))
    plan = allocate(np.array([[9.0, 1, 0.9], [9, 1, 0.9], [9, 1, 0.9], [9, 5, 0]]), BITS, [budget])
    assert plan.bits == (4, 4, 4, 8) and plan.cost == {"weights in bits": budget.limit}


def test_tiny_sensitivities_still_decide():
    sensitivity = np.array([[3e-12, 1e-12], [3e-12, 0.5e-12]])
    assert allocate(sensitivity, (4, 8), [size_budget([1, 1], (4, 8), 12)]).bits == (4, 8)


def test_tied_layers_share_and_allowed_widths_hold():
    sensitivity = np.tile([9.0, 4, 1], (4, 1))
    plan = allocate(sensitivity, BITS, [size_budget([1] * 4, BITS, 22)], tied=[(0, 1), (1, 2)], allowed={3: (4,)})
    assert plan.bits == (4, 4, 4, 4)


def test_groups_lose_their_unit():
    sensitivity = np.array([[8.0, 2, 1], [4, 1, 0], [800, 80, 8]])
    a = normalise(sensitivity, [0, 0, 1], BITS)
    assert a[:, 0].tolist() == [1, 0.5, 1]
    assert np.allclose(a, normalise(sensitivity * [[1], [1], [1e-5]], [0, 0, 1], BITS))
    assert np.array_equal(a[:, ::-1], normalise(sensitivity[:, ::-1], [0, 0, 1], BITS[::-1]))


def test_errors():
    sensitivity, budget = np.ones((2, 3)), size_budget([1, 1], BITS, 16)
    with pytest.raises(RecipeError, match="sensitivity of layer 1 at 4 bits is nan"):
        allocate(np.array([[1, 1, 1], [1, np.nan, 1]]), BITS, [budget])
    with pytest.raises(RecipeError, match=r"weights in bits: a table of \(2, 3\); expected \(3 layers"):
        allocate(np.ones((3, 3)), BITS, [budget])
    with pytest.raises(RecipeError, match=r"layers \[7\] in tied or allowed"):
        allocate(sensitivity, BITS, [budget], tied=[(0, 7)])
    with pytest.raises(RecipeError, match=r"layers \[0, 1\] may have none of the widths"):
        allocate(sensitivity, BITS, [budget], tied=[(0, 1)], allowed={0: (2,), 1: (8,)})
    with pytest.raises(RecipeError, match="metric group 1 has no sensitivity at 2 bits"):
        normalise(np.array([[1.0, 0, 0], [0, 0, 0]]), [0, 1], BITS)
    slow = Budget("latency in ms", np.ones((2, 3)), 1)
    with pytest.raises(RecipeError, match="latency in ms: limit 1, smallest that works 2"):
        allocate(sensitivity, BITS, [budget, slow])
