"""Every op of the table against onnxruntime on a one-node model, in the variants that files have."""

import zlib

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeattn.data.interface import Interface, TensorSpec
from edgeattn.errors import UnsupportedOp
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.from_onnx.graph import build_graph
from edgeattn.models.from_onnx.node import onnx_op
from edgeattn.models.from_onnx.ops import load_onnx_ops
from edgeattn.models.from_onnx.ops_nn import LINEAR
from edgeattn.quant.graph import capture

OPSET = 21


class X:
    """An input of the model: normal, or of another type."""

    def __init__(self, *shape, dtype="float32", positive=False):
        self.shape, self.dtype, self.positive = shape, dtype, positive

    def array(self, generator):
        if self.dtype == "bool":
            return generator.random(self.shape) > 0.5
        if np.dtype(self.dtype).kind == "i":
            return generator.integers(1, 5, self.shape).astype(self.dtype)
        values = generator.standard_normal(self.shape).astype(self.dtype)
        return np.abs(values) + 0.1 if self.positive else values


class C(X):
    """The same as a constant of the model."""


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


def one_node_model(op, inputs, opset, outputs, attributes):
    generator = np.random.default_rng(zlib.crc32(f"{op}{attributes}".encode()))
    feed, constants, names = {}, [], []
    for i, given in enumerate(inputs):
        names.append("" if given is None else f"in{i}")
        if given is None:
            continue
        array = given.array(generator) if isinstance(given, X) else given
        if isinstance(given, X) and not isinstance(given, C):
            feed[f"in{i}"] = np.asarray(array)
        else:
            constants.append(numpy_helper.from_array(np.asarray(array), f"in{i}"))
    made = [f"out{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, name="the_node", **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in made]
    graph = helper.make_graph([node], "one", values, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), feed


def run_onnxruntime(model, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def run_ours(model, feed):
    graph = build_graph(model, list(feed))
    with torch.no_grad():
        found = graph(*(torch.from_numpy(value) for value in feed.values()))
    return [np.asarray(value) for value in (found if isinstance(found, tuple) else (found,))]


def case(what, op, *inputs, opset=OPSET, outputs=1, **attributes):
    return pytest.param(op, inputs, opset, outputs, attributes, id=f"{op}{'-' if what else ''}{what}".replace(" ", "_"))


IMAGE = X(2, 4, 9, 7)
UNARY = [
    *(
        [
            "Abs",
            "Neg",
            "Exp",
            "Erf",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Sin",
            "Cos",
            "Tanh",
            "Sigmoid",
            "Relu",
            "Softplus",
            "Softsign",
            "HardSwish",
        ]
    ),
    *(["Identity", "LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "Gelu", "ThresholdedRelu", "Mish"]),
]
CASES = [
    *(case("", op, X(2, 3, 5)) for op in UNARY),
    *(case("", op, X(2, 3, 5, positive=True)) for op in ("Sqrt", "Log", "Reciprocal")),
    case("alpha", "LeakyRelu", X(2, 5), alpha=0.3),
    case("alpha", "Elu", X(2, 5), alpha=0.5),
    case("alpha", "Celu", X(2, 5), alpha=0.5),
    case("both", "Selu", X(2, 5), alpha=1.5, gamma=1.1),
    case("sixth", "HardSigmoid", X(2, 50), alpha=1 / 6, beta=0.5),
    case("tanh", "Gelu", X(2, 50), approximate="tanh"),
    case("alpha", "Swish", X(2, 5), opset=24, alpha=1.5),
    case("per channel", "PRelu", X(2, 4, 3, 3), C(4, 1, 1)),
    *(case("", op, X(2, 3, 5), X(3, 1)) for op in ("Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min")),
    case("three", "Mean", X(2, 3), X(1, 3), X(2, 1)),
    case("three", "Max", X(2, 3), C(3), X(2, 1)),
    case("constant left", "Sub", C(5), X(2, 5)),
    case("scalar", "Mul", X(2, 5), np.float32(0.125)),
    case("integers", "Div", X(4, dtype="int64"), ints(-2, 3, 2, -3)),
    case("integers", "Mod", X(4, dtype="int64"), ints(-2, 3, 2, -3)),
    case("fmod", "Mod", X(4), floats(-2, 3, 2, -3), fmod=1),
    case("square", "Pow", X(2, 5), np.float32(2)),
    case("tensor", "Pow", X(2, 5, positive=True), X(5)),
    *(case("", op, X(2, 5), X(5)) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case("", op, X(2, 5, dtype="bool"), X(5, dtype="bool")) for op in ("And", "Or", "Xor")),
    case("", "Not", X(2, 5, dtype="bool")),
    case("", "Where", X(2, 1, dtype="bool"), X(2, 5), np.float32(-1)),
    case("to int", "Cast", X(2, 5), to=TensorProto.INT64),
    case("to float", "Cast", X(2, 5, dtype="bool"), to=TensorProto.FLOAT),
    case("", "CastLike", X(2, 5), X(1, dtype="int64")),
    case("both", "Clip", X(2, 50), np.float32(-0.5), np.float32(0.5)),
    case("upper", "Clip", X(2, 50), None, np.float32(0.5)),
    case("none", "Clip", X(2, 5)),
    case("attributes", "Clip", X(2, 50), opset=6 + 4, min=-0.5, max=0.5),
    *(case("", op, X(2, 3, 5)) for op in ("Softmax", "LogSoftmax")),
    case("axis 1", "Softmax", X(2, 3, 5), axis=1),
    case("flat", "Softmax", X(2, 3, 5), opset=11),
    case("flat last", "LogSoftmax", X(2, 3, 5), opset=11, axis=2),
    case("", "Dropout", X(2, 5)),
    case("ratio", "Dropout", X(2, 5), np.float32(0.5)),
    case("old", "Dropout", X(2, 5), opset=11, ratio=0.5),
    *(case("all", f"Reduce{kind}", X(2, 3, 5), opset=18)
      for kind in ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare"]),
    *(case("axes input", f"Reduce{kind}", X(2, 3, 5), ints(1, -1), opset=18, keepdims=0)
      for kind in ["Mean", "Sum", "Max", "Min", "Prod", "L2"]),
    *(case("axes attribute", f"Reduce{kind}", X(2, 3, 5), opset=11, axes=[-2], keepdims=1)
      for kind in ["Mean", "Sum", "Max", "Min", "Prod", "L2"]),
    case("noop", "ReduceSum", X(2, 3), noop_with_empty_axes=1),
    case("", "ArgMax", X(2, 3, 5), axis=1),
    case("flat", "ArgMin", X(2, 3, 5), axis=-1, keepdims=0),
    case("last", "ArgMax", X(3, 50, dtype="int32"), axis=1, select_last_index=1),
    case("", "TopK", X(3, 9), ints(4), outputs=2),
    case("smallest", "TopK", X(3, 9), ints(2), outputs=2, axis=0, largest=0),
    case("", "CumSum", X(3, 4), np.int64(1)),
    case("both", "CumSum", X(3, 4), np.int64(0), exclusive=1, reverse=1),
    case("", "LpNormalization", X(3, 4), p=1, axis=1),
    case("matmul", "Einsum", X(2, 3, 4), X(2, 5, 4), equation="bij, bkj -> bik"),
    # shapes
    case("", "Reshape", X(2, 3, 4), ints(0, -1)),
    case("allowzero", "Reshape", X(2, 0, 4), ints(0, 8), allowzero=1),
    case("0", "Flatten", X(2, 3, 4), axis=0),
    case("1", "Flatten", X(2, 3, 4)),
    case("2", "Flatten", X(2, 3, 4), axis=-1),
    case("axes", "Squeeze", X(2, 1, 4, 1), ints(1, -1)),
    case("all", "Squeeze", X(2, 1, 4, 1)),
    case("attribute", "Squeeze", X(2, 1, 4), opset=11, axes=[1]),
    case("axes", "Unsqueeze", X(2, 4), ints(-1, 1)),
    case("attribute", "Unsqueeze", X(2, 4), opset=11, axes=[0, 2]),
    case("", "Transpose", X(2, 3, 4)),
    case("perm", "Transpose", X(2, 3, 4), perm=[0, 2, 1]),
    case("", "Concat", X(2, 3), C(2, 2), X(2, 1), axis=-1),
    case("equal", "Split", X(2, 6), outputs=3, axis=1, opset=13),
    case("sizes", "Split", X(2, 6), ints(1, 5), outputs=2, axis=-1),
    case("attribute", "Split", X(2, 6), outputs=2, axis=1, opset=11, split=[4, 2]),
    case("num_outputs", "Split", X(2, 7), outputs=3, axis=1, num_outputs=3),
    case("", "Slice", X(5, 6), ints(1, -4), ints(4, 2**62), ints(0, 1), ints(1, 2)),
    case("no axes", "Slice", X(5, 6), ints(1, 2), ints(-1, 4)),
    case("backwards", "Slice", X(5, 6), ints(-1, 4), ints(-(2**62), 0), ints(0, 1), ints(-1, -2)),
    case("attribute", "Slice", X(5, 6), opset=9, starts=[1], ends=[100], axes=[1]),
    case("scalar", "Gather", X(3, 4, 5), np.int64(-1), axis=1),
    case("table", "Gather", C(7, 4), X(2, 3, dtype="int64")),
    case("constant", "Gather", X(3, 4), np.array([[0, 3], [-1, 1]], np.int64), axis=1),
    case("", "GatherElements", X(3, 4), np.array([[0, -1], [1, 1], [2, 3]], np.int64), axis=1),
    case("", "GatherND", X(3, 4, 2), np.array([[0, -1], [2, 1]], np.int64)),
    case("", "Expand", X(3, 1), ints(2, 1, 4)),
    case("smaller", "Expand", X(2, 3, 4), ints(3, 1)),
    case("", "Tile", X(2, 3), ints(2, 3)),
    case("", "Pad", IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 0)),
    case("value", "Pad", X(2, 3), ints(1, 0, 0, 2), np.float32(-2)),
    case("crop", "Pad", X(2, 5), ints(0, -1, 0, -2)),
    case("axes", "Pad", IMAGE, ints(1, 2), None, ints(3)),
    case("reflect", "Pad", IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 1), mode="reflect"),
    case("edge", "Pad", IMAGE, ints(0, 0, 0, 2, 0, 0, 0, 1), mode="edge"),
    case("wrap", "Pad", X(2, 3, 6), ints(0, 0, 2, 0, 0, 1), mode="wrap"),
    case("attribute", "Pad", X(2, 3), opset=10, pads=[0, 1, 0, 2], value=3.0),
    case("", "Trilu", X(4, 5)),
    case("lower", "Trilu", X(4, 5), np.int64(1), upper=0),
    case("DCR", "DepthToSpace", X(2, 8, 3, 5), blocksize=2),
    case("CRD", "DepthToSpace", X(2, 8, 3, 5), blocksize=2, mode="CRD"),
    case("", "SpaceToDepth", X(2, 3, 4, 6), blocksize=2),
    # networks
    case("", "Conv", IMAGE, C(6, 4, 3, 3), C(6)),
    case("strides dilations groups", "Conv", IMAGE, C(6, 2, 3, 2), None, strides=[2, 1], dilations=[1, 2], group=2,
         pads=[1, 1, 1, 1]),
    case("uneven", "Conv", IMAGE, C(6, 4, 3, 3), C(6), pads=[0, 1, 2, 0]),
    case("same upper", "Conv", IMAGE, C(6, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("same lower", "Conv", IMAGE, C(6, 4, 4, 3), auto_pad="SAME_LOWER", strides=[3, 2]),
    case("valid", "Conv", IMAGE, C(6, 4, 3, 3), auto_pad="VALID"),
    case("1d", "Conv", X(2, 4, 9), C(6, 4, 3), C(6), pads=[1, 1]),
    case("3d", "Conv", X(2, 2, 4, 5, 6), C(3, 2, 2, 2, 2)),
    case("weight computed", "Conv", IMAGE, X(6, 4, 3, 3)),
    case("", "ConvTranspose", IMAGE, C(4, 3, 3, 3), C(3)),
    case("strides", "ConvTranspose", IMAGE, C(4, 3, 3, 3), strides=[2, 3], pads=[1, 0, 1, 0], output_padding=[1, 1]),
    case("uneven", "ConvTranspose", IMAGE, C(4, 3, 3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    case("same upper", "ConvTranspose", IMAGE, C(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("same lower", "ConvTranspose", IMAGE, C(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    case("output shape", "ConvTranspose", IMAGE, C(4, 3, 3, 3), strides=[2, 2], output_shape=[18, 14]),
    case("1d groups", "ConvTranspose", X(2, 4, 9), C(4, 3, 3), group=2, dilations=[2]),
    case("", "Gemm", X(3, 4), C(4, 5), C(5)),
    case("transB", "Gemm", X(3, 4), C(5, 4), C(1, 5), transB=1),
    case("factors", "Gemm", X(3, 4), C(4, 5), C(5), alpha=0.5, beta=2.0),
    case("factors transB", "Gemm", X(3, 4), C(5, 4), np.float32(2), alpha=0.5, beta=2.0, transB=1),
    case("no bias", "Gemm", X(3, 4), C(4, 5)),
    case("transA", "Gemm", X(4, 3), C(4, 5), C(5), transA=1),
    case("wide bias", "Gemm", X(3, 4), C(4, 5), C(3, 5), beta=0.5),
    case("computed", "Gemm", X(3, 4), X(5, 4), X(5), transB=1, alpha=2.0),
    case("constant", "MatMul", X(2, 3, 4), C(4, 5)),
    case("computed", "MatMul", X(2, 3, 4), X(2, 4, 5)),
    case("vector", "MatMul", X(2, 3, 4), C(4)),
    case("", "BatchNormalization", IMAGE, C(4), C(4), C(4), C(4, positive=True), epsilon=1e-3),
    case("old", "BatchNormalization", IMAGE, C(4), C(4), C(4), C(4, positive=True), opset=9, momentum=0.9),
    case("", "LayerNormalization", X(2, 3, 8), C(8), C(8)),
    case("two axes", "LayerNormalization", X(2, 3, 8), C(3, 8), axis=1, epsilon=1e-3),
    case("broadcast", "LayerNormalization", X(2, 3, 8), C(8), C(8), axis=1),
    case("", "RMSNormalization", X(2, 3, 8), C(8), opset=23),
    case("", "InstanceNormalization", IMAGE, C(4), C(4), epsilon=1e-3),
    case("18", "GroupNormalization", IMAGE, C(2), C(2), opset=18, num_groups=2),
    case("21", "GroupNormalization", IMAGE, C(4), C(4), num_groups=2),
    case("", "LRN", IMAGE, size=3, alpha=0.01, bias=2.0),
    case("", "GlobalAveragePool", IMAGE),
    case("", "GlobalMaxPool", IMAGE),
    case("", "MaxPool", IMAGE, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1]),
    case("ceil", "MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    case("dilations", "MaxPool", IMAGE, kernel_shape=[3, 3], dilations=[2, 1]),
    case("uneven", "MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("wide padding", "MaxPool", IMAGE, kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
    case("same", "MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("1d", "MaxPool", X(2, 3, 9), kernel_shape=[3]),
    case("", "AveragePool", IMAGE, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1]),
    case("include", "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("ceil", "AveragePool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("same", "AveragePool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("uneven", "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[0, 1, 2, 0]),
    case("uneven include", "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[0, 1, 2, 0], count_include_pad=1),
    case("1d", "AveragePool", X(2, 3, 9), kernel_shape=[3], strides=[2]),
    *(case(f"nearest {how} {rounding}", "Resize", X(1, 2, 5, 6), None, floats(1, 1, scale, scale), mode="nearest",
           coordinate_transformation_mode=how, nearest_mode=rounding)
      for how in ("half_pixel", "asymmetric", "pytorch_half_pixel") for rounding in ("floor", "round_prefer_floor")
      for scale in (2, 0.6)),
    case("nearest corners", "Resize", X(1, 2, 5, 6), None, None, ints(1, 2, 8, 9),
         coordinate_transformation_mode="align_corners", nearest_mode="round_prefer_ceil"),
    case("nearest ceil", "Resize", X(1, 2, 5, 6), None, floats(1, 1, 1.5, 2), nearest_mode="ceil"),
    case("opset 10", "Resize", X(1, 2, 5, 6), floats(1, 1, 2, 3), opset=10, mode="nearest"),
    *(case(f"{mode} {how}", "Resize", X(1, 2, 5, 6), None, floats(1, 1, 1.7, 2), mode=mode,
           coordinate_transformation_mode=how)
      for mode in ("linear", "cubic") for how in ("half_pixel", "align_corners", "pytorch_half_pixel")),
    case("linear down sizes", "Resize", X(1, 2, 9, 8), None, None, ints(1, 2, 4, 5), mode="linear"),
    case("cubic sizes", "Resize", X(1, 2, 9, 8), None, None, ints(1, 2, 4, 15), mode="cubic"),
    case("linear antialias", "Resize", X(1, 2, 9, 8), None, None, ints(1, 2, 4, 5), mode="linear", antialias=1,
         exclude_outside=1),
    case("cubic antialias", "Resize", X(1, 2, 9, 8), None, None, ints(1, 2, 4, 5), mode="cubic", antialias=1,
         exclude_outside=1, cubic_coeff_a=-0.5),
    case("axes", "Resize", X(1, 2, 5, 6), None, floats(2, 3), axes=[2, 3], opset=18),
    case("1d", "Resize", X(1, 2, 5), None, floats(1, 1, 2), mode="linear"),
    *(case(mode, "GridSample", X(2, 3, 5, 6), X(2, 4, 4, 2), mode=mode) for mode in ("linear", "nearest", "cubic")),
    case("border corners", "GridSample", X(2, 3, 5, 6), X(2, 4, 4, 2), opset=16, mode="bilinear", align_corners=1,
         padding_mode="border"),
    case("", "Attention", X(2, 3, 5, 8), X(2, 3, 7, 8), X(2, 3, 7, 8), opset=23),
    case("mask scale", "Attention", X(2, 3, 5, 8), X(2, 3, 7, 8), X(2, 3, 7, 8), X(5, 7), opset=23, scale=0.2),
    case("bool mask", "Attention", X(2, 3, 5, 8), X(2, 3, 5, 8), X(2, 3, 5, 8), np.tri(5, dtype=bool), opset=23),
    case("causal", "Attention", X(2, 3, 5, 8), X(2, 3, 5, 8), X(2, 3, 5, 8), opset=23, is_causal=1),
    case("packed", "Attention", X(2, 5, 24), X(2, 7, 24), X(2, 7, 24), opset=23, q_num_heads=3, kv_num_heads=3),
    case("shared heads", "Attention", X(2, 4, 5, 8), X(2, 2, 5, 8), X(2, 2, 5, 8), opset=23),
]  # fmt: skip


@pytest.mark.parametrize("op, inputs, opset, outputs, attributes", CASES)
def test_op_computes_what_onnxruntime_computes(op, inputs, opset, outputs, attributes):
    model, feed = one_node_model(op, inputs, opset, outputs, attributes)
    wanted = run_onnxruntime(model, feed)
    for found, want in zip(run_ours(model, feed), wanted, strict=True):
        assert found.shape == want.shape and found.dtype == want.dtype
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


SIZES = [
    ("Shape", "Size", "ConstantOfShape", "Range", "Constant"),  # in the chains of test_host.py
    (LINEAR,),  # made of Gemm and MatMul, tested as these
]


def test_every_op_has_a_case():
    tested = {case.values[0] for case in CASES} | {name for group in SIZES for name in group}
    assert set(load_onnx_ops()[0]) <= tested


def test_ops_cannot_be_registered_twice():
    load_onnx_ops()
    with pytest.raises(ValueError, match="'Relu' is registered twice"):
        onnx_op("Relu")(lambda node, x: x)


REFUSED = [
    ("Resize", (X(1, 2, 5, 6), None, floats(1, 1, 2, 2)), 21,
     dict(mode="linear", coordinate_transformation_mode="asymmetric"),
     "coordinate_transformation_mode 'asymmetric' with mode 'linear' is not handled; expected half_pixel"),
    ("Resize", (X(1, 2, 5, 6), None, floats(1, 1, 2, 2)), 21, dict(mode="cubic", cubic_coeff_a=-0.5),
     "cubic_coeff_a -0.5 is not handled; expected -0.75"),
    ("Resize", (X(1, 2, 5, 6), None, floats(1, 1, 2, 2)), 21, dict(mode="linear", antialias=1), "exclude_outside 0"),
    ("Resize", (X(1, 2, 5, 6), None, floats(2, 1, 2, 2)), 21, {}, "resizing axis 0"),
    ("Resize", (X(1, 2, 5, 6), floats(*range(8)), floats(1, 1, 2, 2)), 21,
     dict(coordinate_transformation_mode="tf_crop_and_resize"), "'tf_crop_and_resize' is not handled"),
    ("Attention", (X(1, 1, 2, 4), X(1, 1, 2, 4), X(1, 1, 2, 4)), 23, dict(softcap=2.0), "softcap 2.0 is not handled"),
    ("BatchNormalization", (X(2, 3, 4, 4), C(3), C(3), C(3), C(3)), 15, dict(training_mode=1), "training_mode 1"),
    ("AveragePool", (X(1, 2, 9, 9),), 19, dict(kernel_shape=[2, 2], dilations=[2, 2]), r"dilations \[2, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize("op, inputs, opset, attributes, said", REFUSED, ids=[f"{r[0]}-{r[4][:20]}" for r in REFUSED])
def test_options_that_are_not_handled_are_named(op, inputs, opset, attributes, said):
    model, feed = one_node_model(op, inputs, opset, 1, attributes)
    with pytest.raises(UnsupportedOp, match=rf"node 'the_node' \({op}, opset {opset}\): .*{said}"):
        run_ours(model, feed)


def written_again(model, feed):
    """The model captured and exported as the pipeline does it, all sizes fixed."""
    specs = tuple(TensorSpec(name, value.shape, value.dtype.name, 5 if value.dtype.kind == "i" else 0)
                  for name, value in feed.items())  # fmt: skip
    interface = Interface(specs, tuple(value.name for value in model.graph.output))
    return to_onnx(capture(build_graph(model, list(feed)), interface), interface)


FIRST = {case.values[0]: case for case in reversed(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("op, inputs, opset, outputs, attributes", FIRST.values())
def test_every_op_can_be_exported_again(op, inputs, opset, outputs, attributes):
    model, feed = one_node_model(op, inputs, opset, outputs, attributes)
    wanted = run_onnxruntime(model, feed)
    for found, want in zip(run_onnxruntime(written_again(model, feed), feed), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)
