import pytest
import torch

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.smoothing import (
    ActivationMaximum,
    awq_clip,
    awq_scale,
    awq_search,
    smoothquant_scale,
    weight_maximum,
)
from edgeattn.quant.scheme import Scheme

X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(-1, 1, 32)
W = torch.randn(12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GROUPS = Scheme(3, False, "group", 16)


def output_error(wq):
    return float((X @ (wq - W).T).square().mean())


def test_first_batch_initialises_the_average():
    statistic = ActivationMaximum()
    with pytest.raises(RecipeError, match="no activation was seen"):
        _ = statistic.value
    statistic.update(torch.tensor([[[1.0, -4.0], [-2.0, 0.0]], [[4.0, 0.0], [0.0, 2.0]]]))
    assert statistic.value.tolist() == [3.0, 3.0]
    statistic.update(torch.zeros(1, 1, 2))
    torch.testing.assert_close(statistic.value, torch.full((2,), 0.95 * 3))
    with pytest.raises(RecipeError, match="a batch of 5 channels after batches of 2"):
        statistic.update(torch.zeros(1, 5))


def test_smoothing_moves_range_and_keeps_the_product():
    scale = smoothquant_scale(X.abs().amax((0, 1)), weight_maximum(W), 0.5)
    torch.testing.assert_close((X / scale) @ (W * scale).T, X @ W.T)
    torch.testing.assert_close((X / scale).abs().amax((0, 1)), weight_maximum(W * scale))


def test_dead_channels_get_the_floor():
    scale = smoothquant_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert scale[0] == 1e-5 and torch.isfinite(scale).all()


def test_awq_is_no_worse_than_rounding():
    found = awq_search(X, W, GROUPS)
    assert found.loss[0] >= found.loss.min() == output_error(found.wq)
    assert output_error(found.wq) < output_error(GROUPS.fake_quantize(W))
    assert found.ratio == int(found.loss.argmin()) / 20 and torch.equal(found.scale, awq_scale(X, found.ratio))


@pytest.mark.parametrize("scheme", [GROUPS, Scheme(3, True, "channel")], ids=["groups", "rows"])
def test_clip_search(scheme):
    share, wq = awq_clip(X, W, scheme)
    assert share.shape == scheme.parameters(W)[0].shape
    assert 0.5 <= share.min() < 1 >= share.max()
    torch.testing.assert_close(wq, scheme.fake_quantize(W, *scheme.parameters(W, share)))
    if scheme.granularity == "channel":  # a row is all of an output, so its own error is what was minimised
        assert output_error(wq) < output_error(scheme.fake_quantize(W))


def test_errors():
    with pytest.raises(RecipeError, match="expected 'group' or 'channel'"):
        awq_clip(X, W, Scheme(4))
    with pytest.raises(RecipeError, match="32 channels for a weight of 16"):
        awq_search(X, W[:, :16], GROUPS)
    with pytest.raises(RecipeError, match=r"alpha 1\.5"):
        smoothquant_scale(torch.ones(2), torch.ones(2), 1.5)
    with pytest.raises(RecipeError, match="differ"):
        smoothquant_scale(torch.ones(2), torch.ones(3))
    with pytest.raises(RecipeError, match="expected \\(batch"):
        ActivationMaximum().update(torch.ones(3))
