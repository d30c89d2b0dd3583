import copy
from collections import Counter

import pytest
import torch
from torch import nn

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UnsupportedOp
from edgeattn.export.onnx_model import to_onnx
from edgeattn.quant.graph import capture, module_path
from edgeattn.quant.quantize import quantize
from tests.conftest import randomize

SIZE = (64, 64)


class Net(nn.Module):
    """A user's network, written in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.preprocessing = in_place, Preprocessing(size=SIZE)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 4, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.relu, self.gate = nn.ReLU(inplace=in_place), nn.Hardtanh(0, 6, inplace=in_place)
        self.silu, self.dropout = nn.SiLU(inplace=in_place), nn.Dropout(0.5, inplace=in_place)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = x.mul_(2) if self.in_place else x * 2
        x = self.relu(self.norm(self.stem(x)))
        y = self.gate(self.point(self.depthwise(x)))
        if self.in_place:
            x += y
            x.mul_(0.5)
        else:
            x = (x + y) * 0.5
        return self.head(self.dropout(self.silu(x)).mean((2, 3)))


@pytest.fixture
def twins():
    torch.manual_seed(0)
    plain = randomize(Net(False))
    written = Net(True).eval()
    written.load_state_dict(plain.state_dict())
    return plain, written


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "float32"])
def test_what_is_written_in_place_is_quantized_like_its_functional_twin(twins, pictures, recipe):
    plain, written = (quantize(model, recipe, pictures) for model in twins)
    assert plain.precision == written.precision
    assert plain.notes == written.notes and "folded: 1 conv_bn" in written.notes
    x = torch.stack([torch.from_numpy(plain.preprocessing.normalize(p)) for p in pictures])
    given = x.clone()
    for name in ("float_graph", "graph"):
        results = [getattr(model, name)(x) for model in (plain, written)]
        assert torch.equal(*results), name
    assert torch.equal(x, given), "the exported graph leaves its input alone"
    kinds = [Counter(n.op_type for n in to_onnx(m.graph, m.interface).graph.node) for m in (plain, written)]
    assert kinds[0] == kinds[1]


def test_captured_nodes_keep_their_modules_and_values(twins):
    graph = capture(copy.deepcopy(twins[1]), classifier_interface(SIZE))
    paths = {module_path(node): node for node in graph.graph.nodes if node.op == "call_function"}
    assert {"stem", "norm", "relu", "depthwise", "gate", "head"} <= set(paths)
    assert all("val" in paths[name].meta for name in ("norm", "relu", "gate"))
    assert not [n for n in graph.graph.nodes if n.op == "call_function" and "_." in str(n.target)]


class Aliased(nn.Module):
    """Writes into views of what it reads afterwards."""

    def forward(self, x):
        rows = x.flatten(2)
        rows.mul_(2)
        x[:, 0] = 0.25
        rows[:, 1, ::2] += x[:, 2].flatten(1)[:, ::2]
        return x.mean((2, 3))


def test_writing_into_a_view_changes_what_it_is_a_view_of():
    x = torch.randn(4, 3, *SIZE)
    graph = capture(Aliased(), classifier_interface(SIZE))
    assert torch.equal(graph(x), Aliased()(x.clone()))


class Counting(nn.Module):
    """Counts its calls; `used`: the result depends on that."""

    def __init__(self, used):
        super().__init__()
        self.used, self.head = used, nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        x = x.mean((2, 3))
        self.calls += 1
        self.last.copy_(x[0])
        return self.head(x) * (self.calls if self.used else 1)


def test_state_is_left_out_or_refused():
    x, model = torch.randn(4, 3, *SIZE), Counting(False).eval()
    graph = capture(model, classifier_interface(SIZE))
    assert torch.allclose(graph(x), model(x)) and torch.equal(graph(x), graph(x))
    assert not dict(graph.named_buffers())
    with pytest.raises(UnsupportedOp, match=r"Counting keeps state: .* the buffer calls, and its result .*"):
        capture(Counting(True), classifier_interface(SIZE))
