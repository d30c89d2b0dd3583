import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.quant.methods import softmax

P = torch.softmax(3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)


@given(code=st.integers(0, 15))
def test_log_grids_hold_their_own_values(code):
    codes, none = torch.tensor([float(code)], dtype=torch.float64), torch.tensor([False])
    value = softmax.log2_decode(codes, none)
    assert torch.equal(softmax.log2_encode(value)[0], codes)
    value = softmax.log_sqrt2_decode(codes, none, 0.9)
    assert torch.equal(softmax.log_sqrt2_encode(value, 0.9)[0], codes)


def test_relative_error_of_log_grids():
    for values, zeroed, bound in (
        (softmax.log2_decode(*softmax.log2_encode(P, 5)), softmax.log2_encode(P, 5)[1], 2**0.5),
        (
            softmax.log_sqrt2_decode(*softmax.log_sqrt2_encode(P, 1.0, 5), 1.0),
            softmax.log_sqrt2_encode(P, 1.0, 5)[1],
            2**0.25,
        ),
    ):
        ratio = values[~zeroed] / P[~zeroed]
        assert 1 / bound - 1e-9 <= ratio.min() and ratio.max() <= bound + 1e-9
        assert (values[zeroed] == 0).all()


def test_zero_and_one():
    codes, zeroed = softmax.log2_encode(torch.tensor([0.0, 1.0]))
    assert codes.tolist() == [15.0, 0.0] and zeroed.tolist() == [True, False]


def test_twin_selects_one_grid():
    split = 2.0**-4
    codes = softmax.twin_encode(P, split, 4)
    assert set(codes.unique().tolist()) <= set(range(16)) and torch.equal(codes >= 8, split < P)
    values = softmax.twin_decode(codes, split, 4)
    assert ((values - P).abs() <= torch.where(split >= P, split / 14, 1 / 14) + 1e-12).all()
    assert torch.equal(softmax.twin_encode(values, split, 4)[values > split], codes[values > split])


def test_twin_gelu_uses_all_codes_of_a_signed_type():
    x = torch.nn.functional.gelu(torch.linspace(-5, 5, 4001, dtype=torch.float64))
    scale = x.max() / 127
    codes = softmax.twin_gelu_encode(x, scale)
    assert codes.min() == -128 and codes.max() == 127
    off = (softmax.twin_gelu_decode(codes, scale) - x).abs()
    assert off[x < 0].max() <= 0.17 / 256 + 1e-12 and off[x >= 0].max() <= scale / 2 + 1e-12
