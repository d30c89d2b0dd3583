import torch

from edgeattn.quant.methods import integer

SCALE = 1 / 32
X = torch.randint(-127, 128, (20, 48), generator=torch.Generator().manual_seed(0)).double()


def test_shiftmax_is_near_softmax_in_whole_steps():
    values, scale = integer.shiftmax(X, SCALE)
    assert torch.equal(values, values.round())
    # The reference gives 0.025 for its inputs; 2^r by a line and rounding down to 1/128 add up to no more than 0.05.
    assert (values * scale - torch.softmax(X * SCALE, -1)).abs().max() < 0.05


def test_shift_gelu_is_near_gelu():
    values, scale = integer.shift_gelu(X, SCALE)
    x = X * SCALE
    # 1 - r/2 for 2^-r is up to 6 % off, rounding down to 1/128 adds 1 %; the sigmoid multiplies x.
    assert ((values * scale - x * torch.sigmoid(1.702 * x)).abs() <= 0.07 * x.abs()).all()


def test_layernorm():
    weight, bias = torch.linspace(0.5, 2, 48).double(), torch.linspace(-1, 1, 48).double()
    values, scale = integer.integer_layernorm(X, weight, bias)
    reference = torch.nn.functional.layer_norm(X, (48,), weight, bias, eps=0.0)
    assert torch.equal(values, values.round()) and (values * scale - reference).abs().max() < 0.02


def test_layernorm_of_a_constant_row_is_the_bias():
    values, scale = integer.integer_layernorm(torch.full((1, 16), 7.0), torch.ones(16), torch.full((16,), 0.5))
    torch.testing.assert_close(values * scale, torch.full((1, 16), 0.5, dtype=torch.float64))


def test_log_int_softmax_within_an_octave():
    codes, values = integer.log_int_softmax(X, SCALE, bits=8)
    ratio = values / torch.softmax(X * SCALE, -1)
    assert ratio.min() > 0.5 and ratio.max() < 2
    assert torch.equal(values, torch.exp2(-codes))
    assert (integer.log_int_softmax(torch.tensor([[0.0, -4000.0]]), SCALE)[1] == torch.tensor([[1.0, 0.0]])).all()
