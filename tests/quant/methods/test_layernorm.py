import pytest
import torch
from torch.nn import functional

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.layernorm import channel_parameters, power_of_two_factors, reparameterize
from edgeattn.quant.scheme import Scheme

X = torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(
    -1.5, 0, 12
)


def test_factors_beat_one_scale_for_the_tensor():
    grid = power_of_two_factors(X)
    assert set(grid.factor.tolist()) <= {0.0, 1.0, 2.0, 3.0} and grid.factor[0] == 0 and grid.factor.max() == 3
    plain = Scheme(8, False).fake_quantize(X)
    assert (grid.fake_quantize(X) - X).square().sum() < (plain - X).square().sum()


@pytest.mark.parametrize("integer_zero", [False, True])
def test_reparameterized_pair_is_the_same_function_on_one_grid(integer_zero):
    generator = torch.Generator().manual_seed(1)
    weight, bias, w, b = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((12,), (12,), (5, 12), (5,))
    )
    weight = weight.abs() + 0.1
    y = functional.layer_norm(X, (12,), weight, bias)
    flat = y.reshape(-1, 12)
    scale, zero = channel_parameters(flat.amin(0), flat.amax(0))
    new = reparameterize(scale, zero, weight, bias, w, b, integer_zero)
    z = functional.layer_norm(X, (12,), new.ln_weight, new.ln_bias)
    torch.testing.assert_close(functional.linear(z, new.w, new.bias), functional.linear(y, w, b))
    if integer_zero:  # codes on the common grid are those that each channel had on its own, up to ties
        common = Scheme(8, False).encode(z, new.scale, new.zero_point)
        own = Scheme(8, False, "token").encode(y, scale, zero)
        assert torch.equal(common, own)


def test_factors_for_a_grid_around_zero():
    shifted = X + 0.5 * X.abs().amax()
    grid = power_of_two_factors(shifted, symmetric=True)
    assert grid.zero == 0 and grid.symmetric
    plain = Scheme(8, True).fake_quantize(shifted)
    assert (grid.fake_quantize(shifted) - shifted).square().sum() < (plain - shifted).square().sum()
    torch.testing.assert_close(grid.scale, shifted.abs().amax() / 127 / 8)


def test_a_given_zero_point_centres_every_channel():
    generator = torch.Generator().manual_seed(2)
    flat = X.reshape(-1, 12) + torch.randn(12, generator=generator, dtype=torch.float64) * 5
    low, high = flat.amin(0), flat.amax(0)
    scale, one, w = (high - low) / 255, torch.ones(12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    new = reparameterize(scale, -low / scale, one, 0 * one, w, None, zero=128)
    moved = flat * new.ln_weight + new.ln_bias
    torch.testing.assert_close(moved.amin(0), -128 * new.scale * one)
    torch.testing.assert_close(moved.amax(0), 127 * new.scale * one)
    torch.testing.assert_close(moved @ new.w.T + new.bias, flat @ w.T)
    assert new.zero_point == 128


def test_shapes_are_checked():
    with pytest.raises(RecipeError, match="expected \\(in,\\) three times"):
        reparameterize(torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(2, 4), None)
