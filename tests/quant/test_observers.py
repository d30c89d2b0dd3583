import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.errors import NumericError
from edgeattn.quant.observers import Observer, mse_factor
from edgeattn.quant.quantizer import activation_parameters
from edgeattn.quant.recipe import ObserverSettings


def watch(batches, symmetric=False, **settings):
    observer = Observer("some.layer", ObserverSettings(**settings), symmetric)
    for batch in batches:
        observer.see(batch)
    return observer


BATCHES = list(torch.distributions.StudentT(4).sample((8, 5000)) + 0.7)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_streaming_agrees_with_all_values_at_once(method, symmetric):
    values = torch.cat(BATCHES).numpy().astype(np.float64)
    low, high = watch(BATCHES, symmetric, method=method, percentile=99.9).range()
    if method == "percentile":
        # In ranks, because neighbouring values in the tail lie far apart; one bin holds a few of 40,000 values there.
        beyond = np.abs(values) > high if symmetric else values > high
        assert abs(beyond.mean() - 0.001) < 3 / len(values) and (
            low == -high or abs((values < low).mean() - 0.001) < 1e-4
        )
        return
    top = np.abs(values).max()
    bounds = (-top, top) if symmetric else (values.min(), values.max())
    factor = mse_factor(values, np.ones_like(values), *bounds, symmetric)
    one_grid_step = 0.011 * (bounds[1] - bounds[0])
    assert abs(low - bounds[0] * factor) <= one_grid_step and abs(high - bounds[1] * factor) <= one_grid_step


def test_min_max_and_moving_average():
    batches = [torch.tensor([0.0, 1.0]), torch.tensor([-2.0, 5.0])]
    assert watch(batches, method="min_max").range() == (-2.0, 5.0)
    assert watch(batches, method="moving_average", momentum=0.9).range() == pytest.approx((-0.2, 1.4))


def test_order_and_batching_do_not_matter():
    one = watch([torch.cat(BATCHES)]).range()
    assert watch(BATCHES[::-1]).range() == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("method", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_constant_and_zero_tensors_have_a_range(method):
    for value in (0.0, 3.0, -2.0):
        low, high = watch([torch.full((10,), value)], method=method).range()
        scale, _ = activation_parameters(low, high, "uint8")
        assert low <= high and torch.isfinite(scale) and scale > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_activation_names_the_layer(bad):
    with pytest.raises(NumericError, match=r"layer some\.layer hold 1 NaN or infinite value\(s\) of 3"):
        watch([torch.tensor([1.0, bad, 2.0])])


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_ranges_always_hold_zero_exactly(a, b):
    for signedness in ("uint8", "int8"):
        scale, zero_point = activation_parameters(min(a, b), max(a, b), signedness)
        codes = torch.ops.edgeattn.quantize(torch.zeros(1), scale, zero_point)
        assert torch.ops.edgeattn.dequantize(codes, scale, zero_point).item() == 0
