import numpy as np
import pytest
import torch

from edgeattn.errors import RecipeError
from edgeattn.quant.qat.lsq import LsqQuantizer, code_limits, lsq, lsq_plus, scale_shape

SHAPES = {name: scale_shape(name, tokens=3, channels=4) for name in ("tensor", "token", "channel")}


def values(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("granularity", SHAPES)
def test_gradients_are_those_of_the_straight_through_definition(granularity, signed):
    qn, qp = code_limits(3, signed)
    x, direction = values(2, 3, 4), values(2, 3, 4, seed=1)
    scale = values(*SHAPES[granularity], seed=2).abs() / 2 + 0.2
    residual = (torch.round((x / scale).clamp(qn, qp)) - (x / scale).clamp(qn, qp)).detach()

    def defined(x, scale):  # rounding replaced by the constant that it adds here
        return (((x / scale).clamp(qn, qp) + residual) * scale * direction).sum()

    given = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    to_x, to_scale = torch.autograd.grad(lsq(*given, qn, qp), given, direction)
    factor = (x.numel() / scale.numel() * qp) ** -0.5
    for got, tensor, which in ((to_x, x, 0), (to_scale / factor, scale, 1)):
        for index in np.ndindex(*tensor.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.clone(), scale.clone()]
                moved[which][index] += step
                ends.append(defined(*moved))
            assert got[index] == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_ends_of_the_range_pass_the_gradient():
    x = torch.tensor([[[-2.0, -2.1, 1.0, 1.1, 0.0]]], requires_grad=True)
    lsq(x, torch.ones(1, 1, 1), -2, 1).sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 1, 0, 1]


def test_offset_is_learned_outside_only():
    x, offset = torch.tensor([[[0.2, 9.0, -9.0]]]), torch.zeros(1, 1, 1, requires_grad=True)
    lsq_plus(x, torch.ones(1, 1, 1), offset, -2, 1).sum().backward()
    assert offset.grad.item() == pytest.approx(2 / (3 * 1) ** 0.5)


def test_first_batch_sets_the_scale_and_the_state_has_its_shape_before():
    made = LsqQuantizer(SHAPES["token"], 2, shifts=(4,))
    assert made.state_dict()["scale"].shape == (1, 3, 1) and not made.initialised
    x = values(5, 3, 4).float()
    made.train()(x)
    assert torch.allclose(made.scale, 2 * x.abs().mean((0, 2), keepdim=True))
    loaded = LsqQuantizer(SHAPES["token"], 2, shifts=(4,)).eval()
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded(x[:1]), made.eval()(x)[:1])
    loaded.train()(x * 100)  # does not start again
    assert torch.equal(loaded.scale, made.scale)


def test_starts_of_lsq_plus():
    x = values(50, 3, 4).float() + 3
    made = LsqQuantizer(SHAPES["tensor"], 4, offset=True, start="range").train()
    assert (made(x) - x).square().mean() < 0.02 * x.var()
    weights = LsqQuantizer((4, 1), 3, start="three_sigma")
    weights.initialise(torch.tensor([[1.0, 3.0]] * 4))
    assert torch.allclose(weights.scale, torch.full((4, 1), (2 + 3 * 2**0.5) / 4))


def test_scale_never_falls_below_the_floor_and_still_learns():
    scale = torch.full((1, 1, 1), -3.0, requires_grad=True)
    y = lsq(torch.ones(1, 2, 2), scale, -2, 1)
    y.sum().backward()
    assert torch.allclose(y, torch.tensor(1e-5)) and scale.grad.item() > 0


def test_refusals():
    with pytest.raises(RecipeError, match=r"LSQ with 1 bit\(s\): expected 2 to 16"):
        LsqQuantizer((1, 1), 1)
    with pytest.raises(RecipeError, match="scale was never set: run one batch in training mode"):
        LsqQuantizer((1, 1), 4).eval()(torch.ones(2, 2))
