import torch

from edgeattn.quant.methods.rounding import (
    beta_at,
    hard_weight,
    initial_v,
    rectified_sigmoid,
    regularizer,
    soft_weight,
)
from edgeattn.quant.scheme import Scheme

W = torch.randn(6, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_start_is_the_float_weight_on_any_grid():
    for scheme in (Scheme(4, False, "group", 8), Scheme(3, False, "channel"), Scheme(8, False)):
        scale, zero = scheme.parameters(W)
        h = rectified_sigmoid(initial_v(W, scheme, scale))
        soft = soft_weight(W, h, scheme, scale, zero)
        low, high = (scheme.decode(torch.full_like(W, float(code)), scale, zero) for code in scheme.limits)
        torch.testing.assert_close(soft, W.clamp(low, high))


def test_hard_weight_of_the_start_is_rounding_to_nearest():
    scheme = Scheme(4, True, "channel")
    scale, zero = scheme.parameters(W)
    v = initial_v(W, scheme, scale)
    torch.testing.assert_close(hard_weight(W, v, scheme, scale), scheme.fake_quantize(W, scale, zero))
    assert regularizer(torch.tensor([0.0, 1.0]), 2.0) == 0 and regularizer(torch.tensor([0.5]), 20.0) == 1


def test_gradient_reaches_v_inside_the_stretch_only():
    v = torch.tensor([-4.0, 0.0, 4.0], requires_grad=True)
    rectified_sigmoid(v).sum().backward()
    assert v.grad is not None and (v.grad != 0).tolist() == [False, True, False]


def test_schedule():
    assert beta_at(19, 100) is None
    assert [beta_at(step, 100) for step in (20, 60, 100)] == [20.0, 11.0, 2.0]
