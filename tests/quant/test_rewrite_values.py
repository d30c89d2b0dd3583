import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant.graph import aten, calls, capture, finish
from edgeattn.quant.layout import Flow
from edgeattn.quant.methods.rotation import random_signs, rotation
from edgeattn.quant.quantize import quantize
from edgeattn.quant.rewrite import weight_of
from edgeattn.quant.rewrite_values import rotate_values
from tests.quant.outliers import assert_same, captured, deit_with_outliers, images

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attending(nn.Module):
    """Attention over 16 tokens of 24 channels, 3 heads of 8, written in many ways."""

    def __init__(self, way):
        super().__init__()
        self.preprocessing, self.way = Preprocessing(size=(8, 8)), way
        size = 24 if way != "no matrix" else 18
        self.stem = nn.Conv2d(3, size, 2, 2)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size, bias=False)
        self.more, self.conv = nn.Linear(size, 5), nn.Conv2d(size, 3 * size, 1, groups=1 if way == "convolution" else 3)
        self.out = nn.Conv2d(size, size, 3, padding=1)
        self.kv, self.cut = nn.Linear(size, size * 2 // 3), nn.Linear(16, 7)
        self.narrow = nn.Linear(8, 7)

    def forward(self, x):
        return getattr(self, self.way.replace(" ", "_").replace(",", ""))(self.stem(x)).flatten(1)

    def heads(self, y):
        return y.unflatten(-1, (3, -1)).transpose(1, 2)

    def parts(self, x):
        return (self.heads(part) for part in self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1))

    def joined(self, o):
        return o.transpose(1, 2).flatten(2)

    def chunks(self, x):
        return self.proj(self.joined(F.scaled_dot_product_attention(*self.parts(x))))

    no_matrix = chunks

    def reshaped(self, x):
        y = self.qkv(x.flatten(2).transpose(1, 2))
        q, k, v = y.reshape(y.shape[0], 16, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape[0], 16, 24))

    def heads_inside(self, x):
        """A channel's index is place * heads + head, as in DETR-like exports."""
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (8, 3)).permute(0, 3, 1, 2) for part in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2))

    def written_out(self, x):
        q, k, v = self.parts(x)
        return self.proj(self.joined((q @ k.transpose(2, 3) / 8).softmax(-1) @ v))

    def convolution(self, x):
        q, k, v = self.conv(x).flatten(2).unflatten(1, (3, 3, 8)).transpose(3, 4).unbind(1)
        o = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, (4, 4))
        return self.out(o)

    grouped_convolution = convolution

    def shared_values(self, x):
        """One head of keys and values less than of queries: grouped-query attention."""
        x = x.flatten(2).transpose(1, 2)
        k, v = (part.unflatten(-1, (1, 8)).transpose(1, 2).expand(-1, 3, -1, -1) for part in self.kv(x).chunk(2, -1))
        return self.proj(self.joined(F.scaled_dot_product_attention(self.heads(self.more_queries(x)), k, v)))

    def more_queries(self, x):
        return self.qkv(x)[..., :24]

    def two_readers(self, x):
        o = self.joined(F.scaled_dot_product_attention(*self.parts(x)))
        return torch.cat([self.proj(o), self.more(o)], -1)

    def values_read_elsewhere(self, x):
        q, k, v = self.parts(x)
        return self.proj(self.joined(F.scaled_dot_product_attention(q, k, v))) + self.joined(v)

    def values_averaged_elsewhere(self, x):
        q, k, v = self.parts(x)
        return self.proj(self.joined(F.scaled_dot_product_attention(q, k, v))) + v.mean((1, 3)).unsqueeze(-1)

    def values_are_keys(self, x):
        q, k, _ = self.parts(x)
        return self.proj(self.joined(F.scaled_dot_product_attention(q, k, k)))

    def values_computed(self, x):
        q, k, v = self.parts(x)
        return self.proj(self.joined(F.scaled_dot_product_attention(q, k, F.gelu(v))))

    def result_computed_with(self, x):
        return self.proj(F.gelu(self.joined(F.scaled_dot_product_attention(*self.parts(x)))))

    def heads_cut(self, x):
        return self.cut(self.joined(F.scaled_dot_product_attention(*self.parts(x)))[..., 4:20])

    def heads_for_tokens(self, x):
        """The transposition is forgotten: a row holds three tokens of a head, each whole."""
        o = F.scaled_dot_product_attention(*self.parts(x))
        return self.proj(o.reshape(o.shape[0], 16, 24))

    def values_across_tokens(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        v = v.flatten(1).roll(1, 1).unflatten(1, (16, 24))
        return self.proj(self.joined(F.scaled_dot_product_attention(*map(self.heads, (q, k, v)))))

    def half_heads_twice(self, x):
        o = F.scaled_dot_product_attention(*self.parts(x))
        return self.proj(self.joined(o[..., :4].repeat(1, 1, 1, 2)))

    def crossed_heads(self, x):
        """The first half of one head with the second of another."""
        o = self.joined(F.scaled_dot_product_attention(*self.parts(x))).unflatten(-1, (3, 2, 4))
        return self.narrow(o.transpose(2, 3).flatten(2, 3)[:, :, ::4].flatten(2))

    def result_averaged(self, x):
        return self.proj(self.joined(F.scaled_dot_product_attention(*self.parts(x))).mean(1))

    def tokens_for_channels(self, x):
        o = F.scaled_dot_product_attention(*self.parts(x))
        return self.proj(o.transpose(2, 3).reshape(o.shape[0], 16, 24))


def rotated(way):
    torch.manual_seed(0)
    graph = capture(Attending(way).eval(), classifier_interface((8, 8)))
    with torch.no_grad():
        want = graph(X)
    weights = {node: weight_of(graph, node) for node in calls(graph, aten.linear.default, aten.conv2d.default)}
    count, left = rotate_values(graph, Flow(graph, X[:2]))
    finish(graph)
    assert_same(graph, want, X, 1e-5)
    changed = [node for node, weight in weights.items() if not torch.equal(weight_of(graph, node), weight)]
    return count, left, len(changed)


@pytest.mark.parametrize("way, changed", [
    ("chunks", 2), ("reshaped", 2), ("heads inside", 2), ("written out", 2), ("convolution", 2), ("shared values", 2),
    ("two readers", 3), ("heads for tokens", 2),
])  # fmt: skip
def test_the_function_stays_however_it_is_written(way, changed):
    count, left, weights = rotated(way)
    assert (count, dict(left), weights) == (1, {}, changed)


@pytest.mark.parametrize("way, reason", [
    ("values read elsewhere", "something else reads its values too"),
    ("values averaged elsewhere", "its values do not lie head by head"),
    ("values are keys", "something else reads its values too"),
    ("values computed", "its values do not come from a layer"),
    ("grouped convolution", "its values do not come from a layer"),
    ("result computed with", "something else than layers with constant weights reads its result"),
    ("heads cut", "the layer behind it does not read it head by head"),
    ("values across tokens", "its values do not lie head by head"),
    ("half heads twice", "the layer behind it does not read it head by head"),
    ("crossed heads", "the layer behind it does not read it head by head"),
    ("result averaged", "something else than layers with constant weights reads its result"),
    ("tokens for channels", "the layer behind it does not read it head by head"),
    ("no matrix", "no Hadamard matrix of size 6"),
])  # fmt: skip
def test_what_does_not_fit_is_left_with_the_reason(way, reason):
    count, left, weights = rotated(way)
    assert count == 0 and weights == 0 and left.total() == 1 and reason in next(iter(left)), left


def test_rows_and_columns_take_the_same_matrix():
    torch.manual_seed(0)
    graph = capture(Attending("chunks").eval(), classifier_interface((8, 8)))
    qkv, proj = calls(graph, aten.linear.default)
    before = weight_of(graph, qkv), weight_of(graph, proj)
    rotate_values(graph, Flow(graph, X[:2]))
    turn = torch.block_diag(*[rotation(random_signs(8, 0))] * 3)
    assert torch.equal(weight_of(graph, qkv)[:48], before[0][:48]), "queries and keys"
    torch.testing.assert_close(weight_of(graph, qkv)[48:], turn.T @ before[0][48:])
    torch.testing.assert_close(weight_of(graph, proj), before[1] @ turn)


def test_outliers_of_the_values_spread_over_the_head(pictures):
    model = deit_with_outliers()
    graph, x = captured(model), images(model, pictures)
    attention = calls(graph, aten.scaled_dot_product_attention.default)[0]
    seen = []
    for _ in range(2):
        interpreter = torch.fx.Interpreter(graph, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(x)
        values = interpreter.env[attention]
        seen.append(float(values.abs().max() / values.square().mean().sqrt()))
        rotate_values(graph, Flow(graph, x[:2]))
        finish(graph)
    assert seen[1] < seen[0] / 1.5, seen


def test_our_own_ops_are_named(tiny_model, pictures):
    notes = quantize(tiny_model, {"name": "r", "steps": [{"step": "rotate"}]}, pictures).notes
    said = "rotated the values of 0 attentions, left 3 others (3: queries, keys and values are in one op)"
    assert any(said in note for note in notes)
