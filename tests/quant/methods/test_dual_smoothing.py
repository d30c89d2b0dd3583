import itertools

import pytest
import torch

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.channel_balance import (
    incoherence,
    quantize_balanced,
    quantize_per_range,
    scale_per_range,
    static_scale,
)
from edgeattn.quant.methods.dual_smoothing import Transform, before_smoothing, dual_smooth, quantize_linear
from edgeattn.quant.methods.rotation import random_signs, rotate
from edgeattn.quant.methods.smoothing import ActivationMaximum
from edgeattn.quant.scheme import Scheme

SIGNS = random_signs(48, 5).double()
X = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[:, :2] *= 20  # special tokens
X[..., 7] *= 15  # an outlier channel
W = torch.randn(16, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
B = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
ORDERS = [(), ("smooth",), ("rotate",), ("rotate", "smooth"), ("smooth", "rotate")]


def layer(steps, bits, **settings):
    statistic = ActivationMaximum()
    statistic.update(before_smoothing(X, steps, SIGNS))
    return dual_smooth(W, B, statistic.value, SIGNS, bits, bits, steps=steps, **settings)


def error(y):
    """Of the output's energy."""
    exact = X @ W.T + B
    return float((y - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("steps", ORDERS, ids=lambda s: "_then_".join(s) or "plain")
def test_transform_keeps_the_product_and_16_bits_the_output(steps):
    transform = layer(steps, 8).transform
    torch.testing.assert_close(transform.activation(X) @ transform.weight(W).T, X @ W.T)
    assert error(layer(steps, 16)(X)) < 1e-7


def test_two_steps_beat_one_and_one_beats_none():
    plain, *single, first, second = (error(layer(steps, 4)(X)) for steps in ORDERS)
    assert max(first, second) < max(single) < plain


def test_release_scale_differs_only_by_the_weights_maximum():
    paper, release = (layer(("rotate", "smooth"), 8, release_scale=r).transform.channel_scale for r in (False, True))
    ratio = (rotate(W, SIGNS).abs().amax(0) / W.abs().amax(0)).sqrt()
    torch.testing.assert_close(release, paper * ratio)


def test_errors():
    with pytest.raises(RecipeError, match="'rotate' must come once when signs is given"):
        Transform(("rotate",))
    with pytest.raises(RecipeError, match="'smooth' must come once"):
        Transform((), None, torch.ones(3))
    with pytest.raises(RecipeError, match="need the maximum of the activation"):
        dual_smooth(W, B, None, SIGNS)
    with pytest.raises(RecipeError, match="need the signs"):
        before_smoothing(X, ("rotate", "smooth"), None)
    with pytest.raises(RecipeError, match="set dynamic=True"):
        quantize_linear(W, B, Transform(), Scheme(8, True, "channel"), Scheme(8, False, "token"))


def test_rotation_makes_outliers_disappear():
    assert incoherence(rotate(X, SIGNS)) < incoherence(X)
    assert incoherence(torch.full((3, 4), -2.0)) == 1


def test_time_ranges():
    maxima = torch.stack([part.abs().amax(0) for part in X])
    scales = scale_per_range(maxima, W, [0.1, 0.2, 0.3])
    assert torch.equal(scales[2], static_scale(maxima, W, 0.3)) and not torch.equal(scales[0], scales[1])
    aware = quantize_per_range(W, B, scales, [[0, 300], [301, 600], [601, 1000]], 16, 16)
    for timestep, scale in zip((0, 600, 999), scales, strict=True):
        assert torch.equal(aware.at(timestep).transform.channel_scale, scale)
        assert error(aware.at(timestep)(X)) < 1e-7
    with pytest.raises(RecipeError, match="time step 1001 lies in none"):
        aware.at(1001)
    with pytest.raises(RecipeError, match="3 scales for 1 time ranges"):
        quantize_per_range(W, B, scales, [[0, 1000]])
    with pytest.raises(RecipeError, match="1 values of alpha for 3 time ranges"):
        scale_per_range(maxima, W, [0.1])


def test_balanced_layer_takes_any_subset_of_steps():
    scale = static_scale(X.abs().amax((0, 1))[None], W, 0.3)
    for with_scale, with_signs in itertools.product((False, True), repeat=2):
        made = quantize_balanced(W, B, scale if with_scale else None, SIGNS if with_signs else None, 16, 16)
        assert made.transform.steps == ("smooth",) * with_scale + ("rotate",) * with_signs
        assert error(made(X)) < 1e-7
