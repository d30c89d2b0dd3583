import pytest
import torch
from torch import nn

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant import rewrite
from edgeattn.quant.graph import aten, calls, capture


class Net(nn.Module):
    """Chains with ReLU, depthwise, a LayerNorm, and a concatenation that nothing in front of can be scaled."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.stem, self.dw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.mix, self.norm, self.head = nn.Conv2d(16, 12, 1), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        y = self.pw(self.dw(self.stem(x).relu()))
        y = self.mix(torch.cat([y.sigmoid(), self.side(y) * 30], 1))
        return self.head(self.norm(y.flatten(2).transpose(1, 2))).mean(1)


@pytest.fixture
def graph():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.dw.weight[0] *= 50
        net.stem.weight[0] /= 10
        net.norm.weight[3] = 40
        net.mix.weight[:, 8:] /= 30
    return capture(net, classifier_interface((8, 8)))


PICTURES = torch.randn(16, 3, 8, 8)


def ranges(weight, axis):
    return weight.detach().abs().movedim(axis, 0).flatten(1).amax(1)


def test_equalize_keeps_the_function_and_evens_out_the_weights(graph):
    with torch.no_grad():
        before = graph(PICTURES)
        assert rewrite.equalize(graph) == "equalized 2 pairs of layers"
        assert torch.allclose(graph(PICTURES), before, atol=1e-4 * float(before.abs().max()))
    stem, dw, pw = (rewrite._weight(graph, node) for node in calls(graph, aten.conv2d.default)[:3])
    assert torch.allclose(ranges(stem, 0), ranges(dw, 0), rtol=0.05)
    assert torch.allclose(ranges(dw, 0), ranges(pw, 1), rtol=0.05)


def test_smooth_moves_range_through_norms_and_layers(graph):
    pairs = rewrite.scalable_pairs(graph)
    assert len(pairs) == 3, "stem to dw, dw to pw, norm to head; pw is read by a sigmoid too"
    head = pairs[-1]
    with torch.no_grad():
        before = graph(PICTURES)
        spread = ranges(rewrite._weight(graph, head.consumers[0]), 1)
        rewrite.smooth(graph, PICTURES, 0.5)
        assert torch.allclose(graph(PICTURES), before, atol=1e-4 * float(before.abs().max()))
    after = ranges(rewrite._weight(graph, head.consumers[0]), 1)
    assert after[3] / after.median() > 2 * spread[3] / spread.median(), "the channel with a gain of 40 moved its range"


def test_prescale_multiplies_only_where_channels_are_uneven(graph):
    count = len(calls(graph, aten.mul.Tensor))
    with torch.no_grad():
        before = graph(PICTURES)
        said = rewrite.prescale(graph, PICTURES, 0.75, 0.9)
        assert torch.allclose(graph(PICTURES), before, atol=1e-4 * float(before.abs().max()))
    added = len(calls(graph, aten.mul.Tensor)) - count
    assert added >= 1 and said.startswith(f"scaled the channels of {added} tensors")
    assert rewrite.prescale(graph, PICTURES, 0.75, 1e-6).startswith("scaled the channels of 0")
