import pytest
import torch
from torch.nn import functional

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.equalization import absorb_high_bias, bias_correction, equalize


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_relu_net_unchanged_and_ranges_equal():
    w1, b1, w2, x = (
        draw(9, 14) * torch.logspace(-2, 2, 9)[:, None],
        draw(9, seed=1),
        draw(5, 9, seed=2),
        draw(20, 14, seed=3),
    )
    new1, bias, new2, _ = equalize(w1, b1, w2)
    torch.testing.assert_close((x @ new1.T + bias).relu() @ new2.T, (x @ w1.T + b1).relu() @ w2.T)
    torch.testing.assert_close(new1.abs().amax(1), new2.abs().amax(0))


def test_chain_of_pointwise_depthwise_pointwise_convolutions():
    x, b1 = draw(2, 4, 6, 6), draw(8, seed=1)
    w1, w2, w3 = (
        draw(8, 4, 1, 1, seed=2),
        draw(8, 1, 3, 3, seed=3) * torch.logspace(-1, 1, 8).view(-1, 1, 1, 1),
        draw(3, 8, 1, 1, seed=4),
    )

    def net(a, b, c, d):
        hidden = functional.conv2d(functional.conv2d(x, a, b).relu(), c, None, padding=1, groups=8).relu()
        return functional.conv2d(hidden, d)

    before = net(w1, b1, w2, w3)
    for _ in range(60):
        w1, b1, w2, s1 = equalize(w1, b1, w2)
        w2, _, w3, s2 = equalize(w2, None, w3)
    torch.testing.assert_close(net(w1, b1, w2, w3), before)
    torch.testing.assert_close(torch.cat([s1, s2]), torch.ones(16, dtype=torch.float64), rtol=1e-3, atol=0)


def test_dead_channels_keep_their_scale():
    w1, w2 = draw(3, 4), draw(2, 3, seed=1)
    w1[0], w2[:, 1] = 0, 0
    assert equalize(w1, None, w2)[3][:2].tolist() == [1.0, 1.0]


def test_high_bias_absorption_is_exact_for_values_above_the_constant():
    w1, w2, x = draw(6, 5) * 0.1, draw(4, 6, seed=1), draw(50, 5, seed=2).clamp(-2, 2)
    b1, b2 = torch.full((6,), 9.0, dtype=torch.float64), draw(4, seed=3)
    new1, new2 = absorb_high_bias(b1, b1, torch.full((6,), 1.0), w2, b2)
    assert (new1 == 3).all()
    torch.testing.assert_close((x @ w1.T + new1).relu() @ w2.T + new2, (x @ w1.T + b1).relu() @ w2.T + b2)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_bias_correction_restores_the_mean(groups):
    x, w = draw(3, 6, 4, 4) + 1, draw(6, 6 // groups, 1, 1, seed=1)
    wq = torch.round(w)
    off = functional.conv2d(x, wq, None, groups=groups) - functional.conv2d(x, w, None, groups=groups)
    corrected = off.mean((0, 2, 3)) + bias_correction(w, wq, x.mean((0, 2, 3)))
    torch.testing.assert_close(corrected, torch.zeros(6, dtype=torch.float64))


def test_errors():
    with pytest.raises(RecipeError, match="8 outputs before a weight of \\(8, 2"):
        equalize(draw(8, 4), None, draw(8, 2, 3, 3))
    with pytest.raises(RecipeError, match="means of 5 input channels"):
        bias_correction(draw(4, 6), draw(4, 6), draw(5))
