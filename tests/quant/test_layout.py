import torch
from torch import nn

from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.quant.graph import aten, calls, capture
from edgeattn.quant.layout import Flow


class Moving(nn.Module):
    """One layer's output on its way through reshapes, a split and an average to four places."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(4, 4))
        self.layer, self.next = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        y = self.layer(x.flatten(2).transpose(1, 2))
        first, second, third = y.reshape(y.shape[0], 16, 3, 4).permute(2, 0, 1, 3).unbind(0)
        return torch.relu(first[:, 0]) + self.next(second.mean(1)).sum(1, keepdim=True) + third[:, 1] * first[:, 2]


def test_marks_arrive_where_the_entries_do():
    graph = capture(Moving().eval(), classifier_interface((4, 4)))
    (layer, following) = calls(graph, aten.linear.default)
    with graph.graph.inserting_after(layer):
        graph.graph.call_function(aten.sym_size.int, (layer, 1))
    flow = Flow(graph, torch.randn(2, 3, 4, 4))
    channels, tokens = flow.marks(layer, -1)
    assert channels.shape == tokens.shape == flow.shapes[layer] == (2, 16, 12)
    reads = {read.node: read for read in flow.reads(layer, channels, tokens)}
    relu, product = calls(graph, aten.relu.default)[0], calls(graph, aten.mul.Tensor)[0]
    assert set(reads) == {relu, following, product}, "the size of an axis is no entry"
    assert reads[relu].marks[0].tolist() == [[0, 1, 2, 3]] * 2
    assert reads[relu].marks[1].tolist() == [[0] * 4, [16] * 4]
    assert reads[following].index == 0 and reads[following].averaged and not reads[relu].averaged
    assert reads[following].marks[0].tolist() == [[4, 5, 6, 7]] * 2
    assert reads[following].marks[1].tolist() == [[7.5] * 4, [23.5] * 4]
    both = [read for read in flow.reads(layer, channels) if read.node is product]
    assert {read.index: read.marks[0][0].tolist() for read in both} == {0: [8, 9, 10, 11], 1: [0, 1, 2, 3]}


def test_marks_of_any_axis():
    graph = capture(Moving().eval(), classifier_interface((4, 4)))
    flow = Flow(graph, torch.randn(2, 3, 4, 4))
    node = calls(graph, aten.flatten.using_ints)[0]
    for axis in (0, 1, 2, -1, -2):
        along, vectors = flow.marks(node, axis)
        assert along.movedim(axis, -1).flatten(0, -2).eq(torch.arange(along.shape[axis])).all()
        rows = vectors.movedim(axis, -1).flatten(0, -2)
        assert (rows == rows[:, :1]).all() and len(rows[:, 0].unique()) == len(rows)


def test_only_what_moves_one_tensor_has_a_source():
    graph = capture(Moving().eval(), classifier_interface((4, 4)))
    flow = Flow(graph, torch.randn(2, 3, 4, 4))
    reshape = calls(graph, aten.reshape.default)[0]
    assert flow.source(reshape) is calls(graph, aten.linear.default)[0], "the size that it takes is no tensor"
    assert flow.source(calls(graph, aten.relu.default)[0]) is None
    assert flow.source(next(iter(graph.graph.nodes))) is None
