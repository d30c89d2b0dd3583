import pytest
import torch
from torch import nn

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant import placement
from edgeattn.quant.graph import aten, calls, capture
from edgeattn.quant.methods.smoothing import awq_search
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import WeightScheme, load_recipe
from edgeattn.quant.rewrite import affine_of, sampled_tokens, weight_of
from edgeattn.quant.rewrite_awq import awq
from edgeattn.quant.scheme import Scheme
from tests.quant.outliers import assert_same, both_types, captured, deit_with_outliers, images, plain_deit, sqnr_db

INT4 = {"bits": 4, "granularity": "group", "group_size": "auto"}
GROUPS, ROWS = WeightScheme(bits=4, granularity="group", group_size=16), WeightScheme(bits=4)


def schemes(graph, **changes):
    recipe = load_recipe({"name": "r", "weights": INT4, "activations": None, "first_layer": "int8"} | changes)
    return placement.plan(graph, recipe).weighted


@pytest.mark.parametrize("weights", [INT4, {"bits": 4}, {"bits": 8}], ids=["groups", "rows", "int8"])
@both_types
def test_the_function_and_the_types_stay(weights, dtype, tolerance, pictures):
    model = deit_with_outliers()
    graph, x = captured(model, dtype), images(model, pictures, dtype)
    with torch.no_grad():
        want = graph(x)
    said = awq(graph, x, schemes(graph, weights=weights))
    assert said.startswith("AWQ scaled 4 tensors (exponents 0.")
    assert_same(graph, want, x, tolerance)
    assert {tensor.dtype for tensor in (*graph.parameters(), *graph.buffers())} == {dtype}


@pytest.mark.parametrize("activations", [None, {}], ids=["w4a16", "w4a8"])
def test_less_noise_where_channels_stand_out(activations, pictures):
    model = deit_with_outliers()
    x = images(model, pictures)
    recipe = {"name": "r", "weights": INT4, "activations": activations}
    plain, helped = (quantize(model, recipe | {"steps": s}, pictures) for s in ([], [{"step": "awq"}]))
    got = [sqnr_db(result.float_graph, result.graph, x) for result in (plain, helped)]
    assert any(note.startswith("AWQ scaled 4 tensors") for note in helped.notes)
    assert got[1] > got[0] + 2, got


class Shared(nn.Module):
    """One LayerNorm in front of three layers, a chain of convolutions behind ReLU, and a dense 3x3 one."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.stem, self.dw, self.pw = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, groups=32),
            nn.Conv2d(32, 32, 1),
        )
        self.point, self.full = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 8), nn.Linear(32, 8, bias=False), nn.Linear(32, 64)

    def forward(self, x):
        y = self.pw(self.dw(self.stem(x).relu())).relu()
        y = self.full(self.point(y))
        z = self.norm(y.flatten(2).transpose(1, 2))
        return (torch.cat([self.q(z), self.k(z)], -1).repeat(1, 1, 4) + self.v(z)).mean(1)


@pytest.fixture
def shared():
    torch.manual_seed(1)
    model = Shared().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.logspace(-1, 1, 32)[torch.randperm(32)])
    return capture(model, classifier_interface((8, 8)))


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_readers_of_one_tensor_are_searched_together_each_on_its_own_grid(shared):
    norm = calls(shared, aten.layer_norm.default)[0]
    q, k, v = norm.users
    tokens = sampled_tokens(shared, {norm: -1}, X)[norm]
    weights = {node: weight_of(shared, node) for node in (q, k, v)}
    groups, rows = Scheme(4, True, "group", 16), Scheme(4, True, "channel")
    losses = {
        node: len(weights[node]) * awq_search(tokens, weights[node], grid).loss
        for node, grid in ((q, groups), (k, groups), (v, rows))
    }
    best = int(sum(losses.values()).argmin()) / 20
    alone = {int(loss.argmin()) / 20 for loss in losses.values()}
    assert alone != {best}, "each layer for itself would take another exponent"
    before = affine_of(shared, norm)[0]
    said = awq(shared, X, {q: GROUPS, k: GROUPS, v: ROWS})
    assert said == f"AWQ scaled 1 tensors (exponents {best:g} to {best:g})"
    scale = before / affine_of(shared, norm)[0]
    for node, weight in weights.items():
        torch.testing.assert_close(weight_of(shared, node), weight * scale)


def test_float_readers_take_the_scale_without_a_say(shared):
    norm = calls(shared, aten.layer_norm.default)[0]
    q, _, v = norm.users
    tokens = sampled_tokens(shared, {norm: -1}, X)[norm]
    found = awq_search(tokens, weight_of(shared, q), Scheme(4, True, "group", 16))
    before, other = affine_of(shared, norm)[0], weight_of(shared, v)
    with torch.no_grad():
        want = shared(X)
    awq(shared, X, {q: GROUPS})
    assert_same(shared, want, X, 1e-5)
    scale = before / affine_of(shared, norm)[0]
    torch.testing.assert_close(scale, found.scale)
    torch.testing.assert_close(weight_of(shared, v), other * scale)


def test_convolutions_too_but_not_in_front_of_a_dense_kernel(shared):
    with torch.no_grad():
        want = shared(X)
    convolutions = calls(shared, aten.conv2d.default)
    before = {node: weight_of(shared, node) for node in convolutions}
    said = awq(shared, X, {node: scheme for node, scheme in schemes(shared).items() if node in before})
    assert_same(shared, want, X, 1e-5)
    changed = [not torch.equal(weight_of(shared, node), weight) for node, weight in before.items()]
    # dw's rounding does not depend on the scale of its inputs, full's products are not with single tokens.
    assert changed == [False, True, True, True, False] and said.startswith("AWQ scaled 2 tensors")


def test_what_cannot_gain_is_left_and_said(shared, tiny_model):
    assert awq(shared, X, {}) == (
        "AWQ scaled 0 tensors: no LayerNorm or layer has an output that only layers, one of them quantized, read"
    )
    norm = calls(shared, aten.layer_norm.default)[0]
    with torch.no_grad():
        for node in norm.users:
            shared.get_parameter(str(node.args[1].target)).zero_()
    before = affine_of(shared, norm)[0]
    said = awq(shared, X, dict.fromkeys(norm.users, GROUPS))
    assert said == "AWQ scaled 0 tensors, 1 are best as they are" and torch.equal(affine_of(shared, norm)[0], before)


def test_nan_is_left_to_calibration_which_names_the_layer(shared):
    awq(shared, X * float("nan"), schemes(shared))
    assert all(torch.isfinite(tensor).all() for tensor in (*shared.parameters(), *shared.buffers()))


@pytest.mark.parametrize("first", ["awq", "revert"])
def test_the_stored_recipe_finds_the_same_scales_again(first, pictures):
    """Reverted layers change the schemes that the search is for."""
    steps = [{"step": "awq"}, {"step": "revert", "goal_db": 60, "most": 0.4, "least": 1e-6, "images": 8}]
    steps = steps if first == "awq" else steps[::-1]
    recipe = {"name": "r", "weights": INT4, "activations": {}, "steps": steps, "calibration": {"images": 16}}
    done = quantize(plain_deit(), recipe, pictures)
    assert any(rule.reason.startswith("without it") for rule in done.recipe.rules)
    again = quantize(plain_deit(), done.recipe, pictures)
    assert [step.step for step in again.recipe.steps] == ["awq", "prescale"]
    assert sum(note.startswith("AWQ scaled") for note in done.notes) == 1
    for (name, a), (_, b) in zip(done.graph.named_buffers(), again.graph.named_buffers(), strict=True):
        assert torch.equal(a, b), name
