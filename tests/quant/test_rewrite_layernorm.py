import pytest
import torch
from torch import nn

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant.graph import aten, calls, capture
from edgeattn.quant.methods.layernorm import power_of_two_factors
from edgeattn.quant.quantize import quantize
from edgeattn.quant.rewrite import affine_of, bias_of, sampled_tokens, scalable_pairs, weight_of
from edgeattn.quant.rewrite_layernorm import power_of_two, reparameterize
from tests.quant.outliers import CHANNELS, assert_same, both_types, captured, deit_with_outliers, images, sqnr_db

STEPS = {
    "reparameterize": reparameterize,
    "power_of_two": lambda graph, x: power_of_two(graph, x, False),
    "power_of_two, int8": lambda graph, x: power_of_two(graph, x, True),
}


def norm_tokens(graph, x):
    pairs = scalable_pairs(graph)
    return list(sampled_tokens(graph, {pair.tensor: -1 for pair in pairs}, x).values())


@pytest.mark.parametrize("step", STEPS)
@both_types
def test_the_function_and_the_types_stay(step, dtype, tolerance, pictures):
    model = deit_with_outliers()
    graph, x = captured(model, dtype), images(model, pictures, dtype)
    with torch.no_grad():
        want = graph(x)
    said = STEPS[step](graph, x)
    assert "4 LayerNorms" in said and "left 1 whose output something else" in said, "the last one is read by a select"
    assert_same(graph, want, x, tolerance)
    assert {tensor.dtype for tensor in (*graph.parameters(), *graph.buffers())} == {dtype}


def test_reparameterized_channels_have_one_range_in_the_middle_of_the_grid(pictures):
    model = deit_with_outliers()
    graph, x = captured(model), images(model, pictures)
    before = [t.amax(0) - t.amin(0) for t in norm_tokens(graph, x)]
    assert min(float(r.max() / r.min()) for r in before) > 30
    assert f"{max(float(r.max() / r.min()) for r in before):.3g}-fold" in reparameterize(graph, x)
    for tokens in norm_tokens(graph, x):
        reach = torch.stack([tokens.amax(0), -tokens.amin(0)])
        assert 0 < float(reach.min()) > float(reach.max()) / 1.02, "one zero point, 128 of 0 to 255, fits them all"


def test_power_of_two_factors_are_exact_and_at_most_8(pictures):
    model = deit_with_outliers()
    graph, x = captured(model), images(model, pictures)
    with torch.no_grad():
        want, norms = graph(x), calls(graph, aten.layer_norm.default)
        before = [affine_of(graph, norm) for norm in norms]
        power_of_two(graph, x, False)
        assert torch.equal(graph(x), want), "a multiplication by a power of two rounds nothing"
    for (weight, bias), norm in list(zip(before, norms, strict=True))[:-1]:
        new_weight, new_bias = affine_of(graph, norm)
        factors = new_weight / weight
        assert set(factors.tolist()) <= {1.0, 2.0, 4.0, 8.0} and torch.equal(bias * factors, new_bias)
        assert factors[list(CHANNELS)].max() <= 2 and (factors == 8).sum() > 50


@pytest.mark.parametrize("signedness", ["uint8", "int8"])
@pytest.mark.parametrize("step, gain_db", [("reparameterize", 6), ("power_of_two", 4)])
def test_less_noise_where_channels_stand_out(step, gain_db, signedness, pictures):
    model = deit_with_outliers()
    x = images(model, pictures)
    recipe = {"name": "r", "activations": {"signedness": signedness, "observer": {"method": "min_max"}}}
    plain = quantize(model, recipe, pictures)
    helped = quantize(model, recipe | {"steps": [{"step": step}]}, pictures)
    assert any("4 LayerNorms" in note for note in helped.notes)
    got = [sqnr_db(result.float_graph, result.graph, x) for result in (plain, helped)]
    assert got[1] > got[0] + gain_db, got


class Net(nn.Module):
    """LayerNorms with every kind of affine, read by one layer, by three, by one and an addition; one dead channel."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.plain, self.unbiased = nn.LayerNorm(12, elementwise_affine=False), nn.LayerNorm(12, bias=False)
        self.shared, self.kept = nn.LayerNorm(12), nn.LayerNorm(12)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 12, bias=False), nn.Linear(12, 4)
        self.c, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = x.flatten(2).unflatten(2, (4, 16)).permute(0, 3, 1, 2).flatten(2)
        y = y + self.a(self.plain(y))
        y = y + self.b(self.unbiased(y))
        z = self.shared(y)
        y = self.k(z) + torch.cat([self.q(z), self.v(z)], -1)
        z = self.kept(y)
        return self.head(z + self.c(z)).mean(1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.shared.weight.copy_(torch.logspace(-2, 1, 12))
        model.shared.weight[5] = 0
        model.shared.bias.normal_(0, 3)
        model.unbiased.weight.copy_(torch.logspace(0, 2, 12))
    return model


@pytest.mark.parametrize("step", STEPS)
def test_any_affine_shared_readers_and_a_constant_channel(step, net):
    x = torch.randn(16, 3, 8, 8)
    graph = capture(net, classifier_interface((8, 8)))
    with torch.no_grad():
        want = graph(x)
    said = STEPS[step](graph, x)
    assert "3 LayerNorms" in said and "left 1 whose" in said
    assert_same(graph, want, x, 1e-5)
    shared = calls(graph, aten.layer_norm.default)[2]
    assert all(torch.isfinite(value).all() for value in affine_of(graph, shared))
    biases = [bias_of(graph, reader) for reader in shared.users]
    assert sum(bias is None for bias in biases) == (0 if step == "reparameterize" else 1), "k gets one for the shift"


def test_all_readers_take_the_same_factors(net):
    x = torch.randn(16, 3, 8, 8)
    graph = capture(net, classifier_interface((8, 8)))
    readers = list(calls(graph, aten.layer_norm.default)[2].users)
    before = [weight_of(graph, reader) for reader in readers]
    reparameterize(graph, x)
    ratios = [weight_of(graph, reader) / old for reader, old in zip(readers, before, strict=True)]
    assert len(ratios) == 3 and ratios[0].std(0).max() < 1e-5, "one factor for a column"
    for ratio in ratios[1:]:
        torch.testing.assert_close(ratio[0], ratios[0][0])
    assert ratios[0][0].max() / ratios[0][0].min() > 100


def test_factors_are_for_the_grid_of_the_activations(net):
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        net.shared.weight.clamp_(max=2)
        net.shared.bias.fill_(0.1)[0] = 20
    found = []
    for symmetric in (False, True):
        graph = capture(net, classifier_interface((8, 8)))
        norm = calls(graph, aten.layer_norm.default)[2]
        tokens, before = sampled_tokens(graph, {norm: -1}, x)[norm], affine_of(graph, norm)[1]
        power_of_two(graph, x, symmetric)
        factor = power_of_two_factors(tokens, symmetric=symmetric).factor
        assert torch.equal(affine_of(graph, norm)[1] / before, torch.exp2(factor.max() - factor))
        found.append(factor)
    assert not torch.equal(*found)


class Between(nn.Module):
    """A LayerNorm whose readers stand behind a ReLU, and one that is read by a layer with a computed bias."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.norm, self.other, self.layer = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)
        nn.init.uniform_(self.norm.weight, 0.1, 9)
        nn.init.uniform_(self.other.weight, 0.1, 9)

    def forward(self, x):
        y = self.other(self.layer(self.norm(x).relu()))
        return nn.functional.linear(y, self.layer.weight, x.mean((0, 1, 2))).mean((1, 2))


@pytest.mark.parametrize("step, count", [("reparameterize", 0), ("power_of_two", 2)])
def test_a_shift_goes_neither_through_relu_nor_into_a_computed_bias(step, count):
    torch.manual_seed(0)
    graph, x = capture(Between().eval(), classifier_interface((8, 8))), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        want = graph(x)
    said = STEPS[step](graph, x)
    assert f"{count} LayerNorms" in said
    assert_same(graph, want, x, 1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_nothing_to_do_is_said(step, tiny_model):
    graph = captured(tiny_model)
    said = STEPS[step](graph, torch.randn(2, 3, 64, 64))
    assert "0 LayerNorms: of 0 none has an output that only linear layers read" in said


def test_nan_is_left_to_calibration_which_names_the_layer(net):
    x = torch.randn(16, 3, 8, 8)
    x[3] = float("nan")
    graph = capture(net, classifier_interface((8, 8)))
    reparameterize(graph, x)
    assert all(torch.isfinite(tensor).all() for tensor in (*graph.parameters(), *graph.buffers()))
