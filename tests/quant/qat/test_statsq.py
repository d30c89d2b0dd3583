import numpy as np
import pytest
import torch

from edgeattn.errors import RecipeError
from edgeattn.quant.qat.statsq import StatsQuantizer, codes, export_grid, scale_of, statsq


def weight(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_odd_multiples_and_there_is_no_zero(bits):
    w = weight(6, 400)
    odd = statsq(w, bits) / (scale_of(w) / 2**bits)
    assert torch.allclose(odd, odd.round()) and (odd.round() % 2 == 1).all()
    assert odd.abs().max().round() == 2**bits - 1
    assert codes(w, bits).min() == -(2 ** (bits - 1)) and codes(w, bits).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_exported_grid_is_exact(bits):
    w = weight(5, 64, seed=bits)
    grid, scale, zero_point = export_grid(w, bits)
    assert torch.allclose((grid.double() - zero_point) * scale, statsq(w, bits), rtol=1e-12)
    if bits == 4:
        assert (int(grid.min()), int(grid.max()), zero_point) == (0, 15, 7.5)
    elif bits < 4:
        assert zero_point == 0 and grid.abs().max() <= 7 and (grid % 2 != 0).all()


def test_clipped_weights_keep_to_the_last_level_also_in_float32():
    w = torch.tensor([[-9.0, -1.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    assert codes(w, 3).tolist()[0] == [-4, -1, 0, 3] and statsq(w, 3)[1].abs().max() < 1e-30


def test_scale_of_three_axes_is_shared_by_heads():
    w = weight(3, 4, 5)
    assert scale_of(w).shape == (1, 4, 1)
    assert torch.allclose(scale_of(w)[0, :, 0], 2 * w.abs().mean((0, 2)))


@pytest.mark.parametrize("clipped", [False, True])
def test_gradient_is_that_of_the_straight_through_definition(clipped):
    w, direction = weight(4, 9).requires_grad_(), weight(4, 9, seed=1)
    got = torch.autograd.grad(statsq(w, 2, clipped), w, direction)[0]
    scale, residual, step = scale_of(w), (statsq(w, 2) - w).detach(), 1e-6

    def defined(values):  # rounding replaced by the constant that it adds here, the scale held
        return values.clamp(-scale, scale) if clipped else values + residual

    w = w.detach()
    slopes = (defined(w + step) - defined(w - step)) / (2 * step)
    assert torch.allclose(got, direction * slopes, atol=1e-8)


def test_refusals():
    with pytest.raises(RecipeError, match=r"StatsQ with 1 bit\(s\): expected 2 to 8; at 1 bit its rounding leaves"):
        StatsQuantizer(1)
    with pytest.raises(RecipeError, match="expected 2 to 8"):
        statsq(weight(2, 2), 9)
    with pytest.raises(RecipeError, match=r"weight of \(2, 2, 2, 2\): expected \(out, in\) or \(heads, dim, in\)"):
        scale_of(weight(2, 2, 2, 2))
