"""Files with parts put back in floating point are those that an export of the same plan writes."""

import copy
import operator
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgeattn.data.interface import classifier_interface, interface_of
from edgeattn.devices.placing import regions, without
from edgeattn.errors import UnsupportedOp
from edgeattn.export.onnx_model import to_onnx
from edgeattn.export.unquantize import Removal, removal, unquantize
from edgeattn.models.folding import fuse_attention
from edgeattn.ops.registry import load_ops, spec_name, with_scales
from edgeattn.quant import placement
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, calls, capture, is_call
from edgeattn.quant.recipe import Rule, WeightScheme, load_recipe
from tests.conftest import randomize
from tests.models.test_zoo import FAMILIES, tiny

RECIPE = load_recipe("w8a8").for_targets(["onnxruntime"]).model_copy(update={"steps": ()})


class Net(nn.Module):
    """Tensors with quantized and other readers, additions, and linear layers over tokens that share their input."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.q, self.k, self.out, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 5))

    def forward(self, x):
        x = self.first(self.stem(x).relu())
        x = (x + self.second(x)) * x.mean((2, 3), keepdim=True).sigmoid()
        tokens = x.flatten(2).transpose(1, 2)
        y = self.q(tokens).softmax(-1) * self.k(tokens)
        return self.head((tokens + self.out(y)).mean(1))


class Base:
    """The quantized file of a model, and what other recipes make of the same ranges."""

    def __init__(self, model, interface):
        self.interface, self.graph = interface, capture(fuse_attention(model), interface)
        fold(self.graph)
        self.plan = placement.plan(self.graph, RECIPE)
        self.quantized = self.variant(RECIPE)
        for _ in range(2):  # weights on their grid: float layers compute the same with them and with what was stored
            self.on_grid()
            self.quantized = self.variant(RECIPE)
        self.model = to_onnx(self.quantized, interface)

    def variant(self, recipe):
        graph = copy.deepcopy(self.graph)
        twin = dict(zip(self.graph.graph.nodes, graph.graph.nodes, strict=True))
        ranges = {twin[node]: (-3 - i / 99, 3 + i / 77) for i, node in enumerate(self.plan.tensors)}
        placement.insert(graph, placement.plan(graph, recipe), placement.Statistics(ranges, {}, {}), recipe)
        return graph

    def on_grid(self):
        layers = [n for n in calls(self.quantized, aten.conv2d.default, aten.linear.default) if is_quantized(n)]
        for node, layer in zip(self.plan.weighted, layers, strict=True):
            for old, new in zip(node.args[1:3], layer.args[1:3], strict=True):
                if is_call(new, torch.ops.edgeattn.dequantize.default):
                    self.store(old, *new.args[:2])
        forms = {spec.quantized for _, spec in self.plan.attention}
        ops = [getattr(torch.ops.edgeattn, load_ops()[name].torch_op.split("::")[1]).default for name in forms]
        for (node, spec), new in zip(self.plan.attention, calls(self.quantized, *ops), strict=True):
            inputs = with_scales(spec.inputs, spec.weights)
            for name in spec.weights:
                codes, scale = new.args[inputs.index(name) :][:2]
                self.store(node.args[spec.inputs.index(name)], codes, scale)

    def store(self, node, *quantized):
        codes, scale = (operator.attrgetter(arg.target)(self.quantized) for arg in quantized)
        value = torch.ops.edgeattn.dequantize(codes, scale, torch.zeros(scale.shape, dtype=codes.dtype))
        operator.attrgetter(node.target)(self.graph).data.copy_(value)

    def edited(self, recipe):
        return unquantize(self.model, removal(self.quantized, self.plan, placement.plan(self.graph, recipe)))

    def exact(self, recipe):
        return to_onnx(self.variant(recipe), self.interface)


def is_quantized(layer):
    return is_call(layer.args[1], torch.ops.edgeattn.dequantize.default)


def run(model, size):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    image = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"image": image})[0]


def op_types(model):
    return Counter(spec_name(node.op_type) for node in model.graph.node)


def assert_same(base, recipe):
    """The edited file is valid, has the nodes of an export, and computes the same."""
    edited, exact = base.edited(recipe), base.exact(recipe)
    onnx.checker.check_model(edited, full_check=True)
    assert op_types(edited) == op_types(exact) != op_types(base.model)
    assert {tensor.name for tensor in edited.graph.initializer} <= {x for node in edited.graph.node for x in node.input}
    size = base.interface.inputs[0].shape[2:]
    want = run(exact, size)
    np.testing.assert_allclose(run(edited, size), want, atol=1e-4 * want.std())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Base(Net().eval(), classifier_interface((8, 8)))


@pytest.fixture(scope="module")
def family():
    """Bases by name of the model, each made once."""
    made = {}

    def base(name):
        if name not in made:
            model = randomize(tiny(name, img_size=64))
            made[name] = Base(model, interface_of(model))
        return made[name]

    return base


def left_float(*paths, residual="int8"):
    rules = tuple(Rule(modules=path, precision="float") for path in paths)
    return RECIPE.model_copy(update={"rules": rules, "residual": residual})


@pytest.mark.parametrize(
    "paths, residual",
    [
        (("first", "k"), "int8"),
        (("second", "q", "k", "out"), "float"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((("second",), "int8"), (("q",), "int8"), ((), "float"))
        ),
    ],
    ids=str,
)
def test_edited_and_exported_files_are_the_same(net, paths, residual):
    assert_same(net, left_float(*paths, residual=residual))


def test_readers_that_are_not_quantized_read_the_float_values(net):
    """`first` gives floats that `second` and the addition read on int8's grid: the mean must not."""
    edited = net.edited(left_float("first"))
    makers = {node.output[0]: node for node in edited.graph.node}
    (mean,) = [n for n in edited.graph.node if n.op_type == "ReduceMean" and makers[n.input[0]].op_type == "Conv"]
    readers = [n.op_type for n in edited.graph.node if mean.input[0] in n.input]
    assert sorted(readers) == ["QuantizeLinear", "ReduceMean"]
    whole = {node.output[0]: node for node in net.model.graph.node}
    (mean,) = [n for n in net.model.graph.node if n.op_type == "ReduceMean" and n.output[0] == mean.output[0]]
    assert whole[mean.input[0]].op_type == "DequantizeLinear"


def test_linear_layers_that_share_an_input_go_back_one_by_one(net):
    edited = net.edited(left_float("q"))
    counts = op_types(edited)
    assert counts["MatMul"] == 1 and counts["Gemm"] == op_types(net.model)["Gemm"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_region_of_every_family(family, name):
    base = family(name)
    found = regions(base.graph, RECIPE)
    kinds = [[region for region in found if region.kind == kind] for kind in {region.kind for region in found}]
    for left in [left for left in (*kinds, found[::2], found[1::2]) if len(left) < len(found)]:
        assert_same(base, without(RECIPE, left, ""))


def test_what_the_plan_does_not_only_leave_out_is_refused(net):
    four_bits = WeightScheme(bits=4, granularity="group", group_size=8)
    more = left_float().model_copy(update={"first_layer": "int8"})
    other = RECIPE.model_copy(update={"rules": (Rule(modules="q", weights=four_bits),)})
    for recipe in (more, other, left_float().model_copy(update={"activations": None})):
        with pytest.raises(UnsupportedOp, match="not the base plan"):
            net.edited(recipe)
    narrow = placement.plan(net.graph, other)
    with pytest.raises(UnsupportedOp, match="4-bit"):
        removal(net.quantized, narrow, narrow)


def test_a_graph_of_another_plan_is_refused(net):
    left = placement.plan(net.graph, left_float("first"))
    with pytest.raises(UnsupportedOp, match="its plan"):
        removal(net.variant(left_float("first")), net.plan, left)


def renamed(model, old, new):
    """A model whose constant `old` goes by the name of another, as the exporter does with equal ones."""
    model = copy.deepcopy(model)
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return model


def names_of(base, op_type, index, ends):
    nodes = [node for node in base.model.graph.node if node.op_type == op_type]
    return [node.input[index] for node in nodes if node.input[index].endswith(ends)]


def test_constants_that_the_exporter_merged_are_refused(net):
    scales, codes = names_of(net, "QuantizeLinear", 1, "_scale"), names_of(net, "DequantizeLinear", 0, "_weight_int8")
    for name in scales[:2]:
        with pytest.raises(UnsupportedOp, match=name):
            unquantize(renamed(net.model, scales[0], scales[1]), Removal((name,), (), {}))
        with pytest.raises(UnsupportedOp, match=name):
            unquantize(renamed(net.model, scales[0], scales[1]), Removal((), (), {name: frozenset()}))
    for name in codes[:2]:
        with pytest.raises(UnsupportedOp, match=name):
            unquantize(renamed(net.model, codes[0], codes[1]), Removal((), (name,), {}))


def test_a_reader_that_is_not_found_is_refused(net):
    scale = names_of(net, "QuantizeLinear", 1, "_scale")[0]
    with pytest.raises(UnsupportedOp, match=f"readers of {scale}"):
        unquantize(net.model, Removal((), (), {scale: frozenset(["head_weight_int8"])}))


def test_a_name_that_is_taken_is_refused(net):
    model = copy.deepcopy(net.model)
    node = next(n for n in model.graph.node if n.input[0].endswith("_weight_int8"))
    codes, taken = node.input[0], f"{node.output[0]}_values"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), taken))
    with pytest.raises(UnsupportedOp, match="is taken"):
        unquantize(model, Removal((), (codes,), {}))


def test_weights_in_a_file_of_their_own_are_refused(net):
    model = copy.deepcopy(net.model)
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(UnsupportedOp, match="file of their own"):
        unquantize(model, Removal((), (), {}))


def test_the_model_that_is_edited_stays_as_it_was(net):
    before = net.model.SerializeToString()
    net.edited(left_float("first", "q"))
    assert net.model.SerializeToString() == before
