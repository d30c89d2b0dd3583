import pytest
import torch
from torch.nn import functional

from edgeattn.errors import NumericError, RecipeError
from edgeattn.quant.methods.gptq import Hessian, convolution_inputs, gptq, gptq_grouped, round_to_nearest


def problem(seed=0, out=8, inputs=64, tokens=256):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, inputs, generator=generator, dtype=torch.float64), x


def hessian_of(x):
    hessian = Hessian()
    hessian.update(x)
    return hessian.value


def error(wq, w, x):
    return float((x @ (wq - w).T).square().mean())


@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [None, 16], ids=["rows", "groups"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_error_is_below_rounding_to_nearest(bits, group, symmetric, act_order):
    w, x = problem(bits)
    solved = gptq(w, hessian_of(x), bits, group, symmetric, act_order)
    nearest = round_to_nearest(w, bits, group, symmetric)
    assert error(solved.wq, w, x) < error(nearest.wq, w, x)
    assert torch.equal(solved.scale, nearest.scale) and solved.wq.dtype == torch.float64
    assert solved.codes.min() >= 0 and solved.codes.max() <= 2**bits - 1


def test_block_size_changes_nothing():
    w, x = problem(1)
    a, b = (gptq(w, hessian_of(x), 4, 16, act_order=True, block=block) for block in (7, 128))
    assert torch.equal(a.codes, b.codes)


def test_hessian_over_batches_is_that_of_all():
    _, x = problem()
    parts = Hessian()
    for part in x.reshape(4, 8, 8, 64):
        parts.update(part)
    torch.testing.assert_close(parts.value, 2 / len(x) * x.T @ x)


def test_independent_inputs_give_plain_rounding():
    w, _ = problem()
    assert torch.equal(gptq(w, torch.eye(64), 4, 16).wq, round_to_nearest(w, 4, 16).wq)


def test_dead_inputs_get_the_weight_zero():
    w, x = problem()
    x[:, [3, 40]] = 0
    wq = gptq(w, hessian_of(x), 4, symmetric=False).wq
    assert (wq[:, [3, 40]] == 0).all() and error(wq, w, x) < error(round_to_nearest(w, 4, symmetric=False).wq, w, x)


@pytest.mark.parametrize(
    ("groups", "channels", "out"), [(1, 6, 8), (2, 6, 8), (6, 6, 6)], ids=["full", "grouped", "depthwise"]
)
def test_convolution(groups, channels, out):
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(2, channels, 9, 9, generator=generator, dtype=torch.float64)
    x = functional.avg_pool2d(x, 3, 1, 1)
    w = torch.randn(out, channels // groups, 3, 3, generator=generator, dtype=torch.float64)
    columns = convolution_inputs(x, (3, 3), (2, 2), (1, 1), (1, 1), groups)
    rows = w.flatten(1).reshape(groups, -1, columns.shape[-1])
    reference = functional.conv2d(x, w, None, 2, 1, 1, groups)
    product = (columns @ rows.mT).permute(0, 2, 1).flatten(0, 1)
    torch.testing.assert_close(product, reference.transpose(0, 1).flatten(1))
    result = gptq_grouped(w, [hessian_of(c) for c in columns], 3, symmetric=False)
    nearest = round_to_nearest(w.flatten(1), 3, symmetric=False).wq.reshape(w.shape)
    solved, plain = (functional.conv2d(x, v, None, 2, 1, 1, groups) for v in (result.wq, nearest))
    assert result.wq.shape == w.shape and result.scale.shape == (out, 1)
    assert (solved - reference).square().sum() < (plain - reference).square().sum()


def test_errors():
    w, x = problem()
    with pytest.raises(RecipeError, match="expected \\(in, in\\)"):
        gptq(w, torch.eye(3), 4)
    with pytest.raises(RecipeError, match="group_size 24 does not divide the 64 inputs"):
        gptq(w, hessian_of(x), 4, 24)
    with pytest.raises(NumericError, match=r"not positive definite.*percdamp"):
        gptq(w, -hessian_of(x), 4)
    with pytest.raises(RecipeError, match="3 Hessians for 8 output channels"):
        gptq_grouped(w, [torch.eye(64)] * 3, 4)
    with pytest.raises(RecipeError, match="no activation was seen"):
        _ = Hessian().value
    hessian = Hessian()
    hessian.update(x)
    with pytest.raises(RecipeError, match="32 channels after batches of 64"):
        hessian.update(x[:, :32])
