import pytest
import torch

from edgeattn.errors import RecipeError
from edgeattn.quant import weights
from edgeattn.quant.recipe import WeightScheme
from edgeattn.quant.steps import Gptq

AUTO = WeightScheme(bits=4, granularity="group", group_size="auto")


def groups(size):
    return WeightScheme(bits=4, granularity="group", group_size=size)


@pytest.mark.parametrize(
    "shape, bits, size",
    [((8, 96), 4, 32), ((8, 48), 4, 16), ((8, 68), 8, None), ((8, 64, 1, 1), 4, 32), ((8, 64, 3, 3), 8, None),
     ((64, 1, 1, 1), 8, None)],
)  # fmt: skip
def test_automatic_groups_fit_the_layer_or_leave_it_at_8_bits(shape, bits, size):
    got = weights.resolve(AUTO, torch.ones(shape), "x")
    assert (got.bits, got.group_size) == (bits, size)


def test_a_given_group_size_must_divide():
    with pytest.raises(RecipeError, match=r"group_size 32 does not divide the 68 inputs of layer a\.b\. Use 17 or 34"):
        weights.resolve(groups(32), torch.ones(4, 68), "a.b")


def test_codes_fit_their_bits_and_values_their_grid():
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * torch.rand(24, 1)
    for scheme in (WeightScheme(), groups(16), groups(64), WeightScheme(bits=4)):
        stored = weights.quantize(weight, scheme, None, None, None)
        low, high = (-128, 127) if scheme.bits == 8 else (-8, 7)
        assert stored.codes.dtype == torch.int8 and low <= stored.codes.min() and stored.codes.max() <= high
        assert stored.values.shape == weight.shape
        step = stored.scale.reshape(24, -1, 1)
        error = (stored.values - weight).reshape(24, step.shape[1], -1)
        # A range that was shrunk clips; without that no error is above half a step.
        assert (error.abs() > step / 2 + 1e-6).float().mean() < 0.05
        assert stored.size_bytes == weight.numel() * scheme.bits // 8 + 4 * stored.scale.numel()


def test_smaller_groups_are_more_exact_and_gptq_more_so_for_the_outputs():
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    x = torch.randn(500, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(500, 128)
    hessian = 2 / len(x) * x.T @ x

    def error(scheme, method=None):
        stored = weights.quantize(weight, scheme, None, hessian, method)
        return float((x @ (stored.values - weight).T).square().mean())

    assert error(groups(16)) < error(groups(128))
    assert error(groups(32), Gptq()) < 0.7 * error(groups(32))


def test_a_convolution_keeps_its_shape():
    weight = torch.randn(8, 32, 1, 1)
    stored = weights.quantize(weight, groups(16), None, None, None)
    assert stored.codes.shape == weight.shape and stored.scale.shape == (8, 2)
    assert (stored.values - weight).abs().max() < stored.scale.max()


def test_correction_restores_the_mean():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 40), torch.randn(1000, 40) + 3
    stored = weights.quantize(weight, groups(20), None, None, None)
    change = weights.correction(weight, stored, x.mean(0))
    assert torch.allclose((x @ stored.values.T + change).mean(0), (x @ weight.T).mean(0), atol=1e-3)
