import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, calls, capture, finish
from edgeattn.quant.layout import Flow
from edgeattn.quant.rewrite import affine_of, weight_of
from edgeattn.quant.rewrite_stream import rotate_streams
from tests.quant.outliers import assert_same, captured, images, plain_deit

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def rotated(graph, x):
    with torch.no_grad():
        want = graph(x)
    count, left = rotate_streams(graph, Flow(graph, x[:2]))
    finish(graph)
    return want, count, left


@pytest.mark.parametrize("name", ["plain", "distilled"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_the_function_and_the_types_stay(name, dtype, tolerance, pictures):
    model = plain_deit(distilled=name == "distilled")
    graph, x = captured(model, dtype), images(model, pictures, dtype)
    weights = [weight_of(graph, node) for node in calls(graph, aten.linear.default)]
    want, count, left = rotated(graph, x)
    assert (count, left.total()) == (1, 0)
    assert_same(graph, want, x, tolerance)
    assert {tensor.dtype for tensor in (*graph.parameters(), *graph.buffers())} == {dtype}
    after = [weight_of(graph, node) for node in calls(graph, aten.linear.default)]
    assert not any(torch.allclose(a, b) for a, b in zip(weights, after, strict=True)), "every layer reads or writes it"
    for norm in calls(graph, aten.layer_norm.default):
        weight, bias = affine_of(graph, norm)
        assert (weight == 1).all() and (bias == 0).all(), "both are in the next layers"


class Blocks(nn.Module):
    """A pre-norm transformer over 16 tokens of 12 channels, whose parts a way changes."""

    def __init__(self, way):
        super().__init__()
        self.preprocessing, self.way = Preprocessing(size=(8, 8)), way
        size = 22 if way == "no matrix" else 12
        self.stem, self.table = nn.Conv2d(3, size, 2, 2), nn.Parameter(torch.randn(16, size))
        self.norms = nn.ModuleList([nn.LayerNorm(size) for _ in range(3)])
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)
        self.mix, self.up, self.down = nn.Linear(size, size), nn.Linear(size, 20, bias=False), nn.Linear(20, size)
        self.head, self.direct = nn.Linear(size, 5), nn.Linear(size, size)
        self.side, self.gate = nn.Conv2d(size, size, 3, padding=1), nn.Linear(size, 1)
        self.tokens, self.token_norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        y = self.stem(x).flatten(2).transpose(1, 2)
        if self.way == "nonlinear writer":
            y = F.gelu(y)
        if self.way == "other layout":  # channels first in the additions, and a window roll
            y = (y.transpose(1, 2) + self.table.T).unflatten(2, (4, 4)).roll((1, 1), (2, 3)).flatten(2).transpose(1, 2)
        else:
            y = y + (self.table[:, :1] if self.way == "one number for all channels" else self.table)
        y = y + self.mixed(self.norms[0](y))
        z = self.down(F.gelu(self.up(self.norms[1](y))))
        y = self.norms[1](y + z) if self.way == "norm behind" else y + z
        return self.ended(y, x)

    def mixed(self, y):
        if self.way == "norm read by more":
            return self.mix(y) + y
        return self.mix(y) * self.table[0] if self.way == "layer scale" else self.mix(y)

    def ended(self, y, x):
        if self.way == "direct readers":  # one reads and writes it, a convolution with a border reads it as a map
            y = y + self.direct(y) + self.side(y.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
        if self.way == "one channel writes":
            y = y + self.gate(y)
        if self.way == "tokens written":
            y = y + self.tokens(self.stem(x).flatten(2)).transpose(1, 2)
        if self.way == "tokens read":
            return self.head(self.norms[2](y)).mean(1) + self.tokens(y.transpose(1, 2)).mean((1, 2))[:, None]
        if self.way == "norm over tokens":
            y = y + self.direct(self.token_norm(y.transpose(1, 2)).transpose(1, 2))
        if self.way == "channels joined":
            y = torch.cat([y[..., :6], y[..., 6:]], -1)
        if self.way == "read by something else":
            return self.head(self.norms[2](y)).mean(1) + y.relu().mean((1, 2))[:, None]
        if self.way == "norm of the mean":
            return self.head(self.norms[2](y.mean(1)))
        y = self.norms[2](y)
        return self.head(y[:, 0] if self.way == "one token" else y.mean(1))


def built(way):
    torch.manual_seed(0)
    graph = capture(Blocks(way).eval(), classifier_interface((8, 8)))
    fold(graph)
    return graph


@pytest.mark.parametrize("way", ["mean of the norm", "norm of the mean", "one token", "other layout", "direct readers"])
def test_the_function_stays_in_other_pre_norm_models(way):
    graph = built(way)
    want, count, left = rotated(graph, X)
    assert (count, dict(left)) == (1, {})
    assert_same(graph, want, X, 1e-5)
    assert all((affine_of(graph, norm)[0] == 1).all() for norm in calls(graph, aten.layer_norm.default))


@pytest.mark.parametrize("way, reason", [
    ("nonlinear writer", "op gelu writes to it"),
    ("layer scale", "op mul writes to it"),
    ("one number for all channels", "a constant for all channels is added to it"),
    ("norm behind", "op layer_norm writes to it"),
    ("norm read by more", "op add reads it behind a LayerNorm"),
    ("one channel writes", "its channels change places"),
    ("tokens written", "op linear writes to it"),
    ("tokens read", "op linear reads it"),
    ("norm over tokens", "op layer_norm reads it"),
    ("channels joined", "its channels change places"),
    ("read by something else", "op relu reads it"),
    ("no matrix", "no Hadamard matrix of size 22"),
])  # fmt: skip
def test_what_does_not_fit_is_left_as_it_is_with_the_reason(way, reason):
    graph = built(way)
    before = {name: value.clone() for name, value in (*graph.named_parameters(), *graph.named_buffers())}
    _, count, left = rotated(graph, X)
    assert count == 0 and any(reason in found for found in left), left
    after = dict((*graph.named_parameters(), *graph.named_buffers()))
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_an_outlier_of_the_stream_spreads_over_all_channels(pictures):
    model = plain_deit()
    with torch.no_grad():
        model.pos_embed[..., 5] += 50
    graph, x = captured(model), images(model, pictures)
    shares = []
    for _ in range(2):
        interpreter = torch.fx.Interpreter(graph, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(x)
        stream = interpreter.env[calls(graph, aten.layer_norm.default)[0].args[0]]
        shares.append(float(stream.abs().max() / stream.square().mean().sqrt()))
        rotated(graph, x)
    assert shares[0] > 7 and shares[1] < 4, shares
