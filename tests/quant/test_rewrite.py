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
    stem, dw, pw = (rewrite.weight_of(graph, node) for node in calls(graph, aten.conv2d.default)[:3])
    assert torch.allclose(ranges(stem, 0), ranges(dw, 0), rtol=0.05)
    assert torch.allclose(ranges(dw, 0), ranges(pw, 1), rtol=0.05)


def test_smooth_moves_range_through_norms_and_layers(graph):
    pairs = rewrite.scalable_pairs(graph)
    assert len(pairs) == 3, "stem to dw, dw to pw, norm to head; pw is read by a sigmoid too"
    head = pairs[-1]
    with torch.no_grad():
        before = graph(PICTURES)
        spread = ranges(rewrite.weight_of(graph, head.consumers[0]), 1)
        rewrite.smooth(graph, PICTURES, 0.5)
        assert torch.allclose(graph(PICTURES), before, atol=1e-4 * float(before.abs().max()))
    after = ranges(rewrite.weight_of(graph, head.consumers[0]), 1)
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


class Sideways(nn.Module):
    """Layers that read another axis than the one that the layer in front scales, and LayerNorms over two axes."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.conv, self.row = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.norm, self.map = nn.LayerNorm(8), nn.Conv2d(8, 8, 1)
        self.both, self.head = nn.LayerNorm([8, 8]), nn.Linear(8, 5)
        self.own = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        y = self.map(self.norm(self.row(self.conv(x)).relu()))
        y = self.head(self.both(y))
        z = nn.functional.linear(x, self.own.weight, x.mean((0, 1, 2)))
        return (y + self.head(z).mean(1, keepdim=True)).mean((1, 2))


def test_only_the_same_channels_make_a_pair():
    torch.manual_seed(0)
    graph = capture(Sideways().eval(), classifier_interface((8, 8)))
    assert rewrite.scalable_pairs(graph) == [], "a bias that is computed cannot be scaled either"


def test_a_norm_without_weights_gets_what_it_takes():
    torch.manual_seed(0)
    net = Net().eval()
    net.norm = nn.LayerNorm(12, elementwise_affine=False)
    graph = capture(net, classifier_interface((8, 8)))
    with torch.no_grad():
        before = graph(PICTURES)
        assert rewrite.smooth(graph, PICTURES, 0.5) == "smoothed 3 tensors (alpha 0.5)"
        assert torch.allclose(graph(PICTURES), before, atol=1e-4 * float(before.abs().max()))
    weight, bias = rewrite.affine_of(graph, calls(graph, aten.layer_norm.default)[0])
    assert (weight != 1).any() and (bias == 0).all()


def test_sampled_tokens_are_of_all_pictures_and_always_the_same(graph):
    node = calls(graph, aten.conv2d.default)[0]
    pictures = torch.randn(80, 3, 8, 8)
    first, again = (rewrite.sampled_tokens(graph, {node: 1}, pictures)[node] for _ in range(2))
    assert first.shape == (2045, 8) and torch.equal(first, again)
    with torch.no_grad():
        rows = torch.fx.Interpreter(graph, garbage_collect_values=False)
        rows.run(pictures)
    every = rows.env[node].permute(0, 2, 3, 1).reshape(-1, 8)
    places = [int((every == token).all(1).nonzero()[0]) for token in first[::16]]
    assert len({place // 64 for place in places}) > 40, "pictures"
    assert len({place % 8 for place in places}) == 8, "columns"
