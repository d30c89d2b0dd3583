import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeattn import create_model
from edgeattn.errors import UnsupportedOp
from edgeattn.export.onnx_model import to_onnx
from edgeattn.export.tensorrt_graph import to_tensorrt
from edgeattn.quant.quantize import quantize
from tests.conftest import randomize

SYMMETRIC = {"name": "mine", "activations": {"signedness": "int8"}}


def run(model, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"image": x})[0]


def exported(model, recipe, pictures):
    made = quantize(model, recipe, pictures)
    return to_onnx(made.graph, made.interface)


@pytest.mark.parametrize("family", ["efficientvit", "deit"])
def test_the_typed_form_computes_the_same_without_what_the_parser_refuses(tiny_model, pictures, family):
    model = tiny_model
    if family == "deit":
        sizes = {"num_classes": 10, "img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model = randomize(create_model("deit_tiny", **sizes))
        model.preprocessing = tiny_model.preprocessing
    before = exported(model, SYMMETRIC, pictures)
    typed = to_tensorrt(before)
    onnx.checker.check_model(typed, full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 3, 64, 64)).astype(np.float32)
    assert np.abs(run(typed, x) - run(before, x)).max() < 1e-4 * np.abs(run(before, x)).max()
    assert not typed.functions and {node.domain for node in typed.graph.node} == {""}
    assert not [t.name for t in typed.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    codes = {t.name for t in typed.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims)}
    readers = {node.op_type for node in typed.graph.node if codes & set(node.input)}
    assert len(codes) > 5 and readers == {"DequantizeLinear"}


def test_a_bias_keeps_its_values():
    codes = numpy_helper.from_array(np.array([3, -7], np.int32), "b")
    scale, zero = (numpy_helper.from_array(v, n) for v, n in ((np.array([0.5, 0.25], np.float32), "s"),
                                                              (np.zeros(2, np.int32), "z")))  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s", "z"], ["bias"], axis=0),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], [codes, scale, zero])
    typed = to_tensorrt(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert [node.op_type for node in typed.graph.node] == ["Add"] and len(typed.graph.initializer) == 1
    assert ReferenceEvaluator(typed).run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [1.5, -1.75]


def test_what_is_not_symmetric_is_refused(tiny_model, pictures):
    unsigned = exported(tiny_model, {"name": "mine", "activations": {"signedness": "uint8"}}, pictures)
    with pytest.raises(UnsupportedOp, match=r"its zero point is uint8 \d+; .* symmetrically.*signedness: int8"):
        to_tensorrt(unsigned)


def test_types_left_to_the_builder_are_refused():
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="dynamic")
    kinds = {"y": onnx.TensorProto.UINT8, "s": onnx.TensorProto.FLOAT, "z": onnx.TensorProto.UINT8}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [4])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    with pytest.raises(UnsupportedOp, match=r"DynamicQuantizeLinear \(dynamic\): TensorRT takes strongly typed graphs"):
        to_tensorrt(model)
