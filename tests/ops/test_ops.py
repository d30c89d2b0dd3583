"""Every op, every type, every lowering, against the float64 reference."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import DOMAIN, DOMAIN_VERSION, OPSET, PLUGIN_ATTRIBUTES, load_ops, register_op
from edgeattn.quant.quantizer import quantize_weight
from tests.ops import cases

OPS = load_ops()
EVERY = [(op, case) for op in OPS for case in cases.MAKERS[cases.plain_name(op)][1]]
# Rounding grows with the length of the longest sum; outputs are of order one. float16 has 11 bits, bfloat16 has 8.
TOLERANCE = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 8e-2}
_CONSTANT = ("weight", "bias", "scale")  # endings of the inputs that models store; the others are activations


def values_of(op, case, dtype="float32"):
    """The op's inputs in order; weights of a quantized form are int8 followed by their scale."""
    spec = OPS[op]
    plain, attributes = cases.case_of(op, case, dtype)
    values = []
    for name in spec.inputs:
        weight = plain.get(name.replace("scale", "weight"))
        if name.endswith("_scale") or (spec.name not in cases.MAKERS and name.endswith("_weight")):
            codes, scale = quantize_weight(torch.from_numpy(weight.astype(np.float32)))
            values.append(scale.numpy().astype(dtype) if name.endswith("_scale") else codes.numpy())
        else:
            values.append(plain[name])
    return values, attributes


def one_node_model(spec, values, attributes):
    node = helper.make_node(spec.name, spec.inputs, spec.outputs, domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES)
    dtype = next(value.dtype for value in values if value.dtype.kind == "f")
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    (result,) = spec.infer_shape(*(value.shape for value in values), **attributes)
    pairs = list(zip(spec.inputs, values, strict=True))
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, kind, ["b", *v.shape[1:]]) for n, v in pairs if not n.endswith(_CONSTANT)],
        [helper.make_tensor_value_info(spec.outputs[0], kind, ["b", *result[1:]])],
        [numpy_helper.from_array(v, n) for n, v in pairs if n.endswith(_CONSTANT)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    body = spec.body(**attributes, dtype=dtype.name)
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def feeds(spec, values):
    return {n: v for n, v in zip(spec.inputs, values, strict=True) if not n.endswith(_CONSTANT)}


def torch_op(spec):
    return getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1])


def numpy_reference(spec, values, attributes):
    return spec.reference(*values, **attributes)[0]


def torch_eager(spec, values, attributes):
    return torch_op(spec)(*map(torch.from_numpy, values), *attributes.values()).numpy()


def torch_export(spec, values, attributes):
    given = [not name.endswith(_CONSTANT) for name in spec.inputs]
    tensors = list(map(torch.from_numpy, values))

    class Wrapped(torch.nn.Module):
        def forward(self, *activations):
            rest = iter(activations)
            arguments = [next(rest) if g else t for g, t in zip(given, tensors, strict=True)]
            return torch_op(spec)(*arguments, *attributes.values())

    activations = tuple(t for t, g in zip(tensors, given, strict=True) if g)
    return torch.export.export(Wrapped(), activations).module()(*activations).numpy()


def onnx_reference(spec, values, attributes):
    model = one_node_model(spec, values, attributes)
    return onnx.reference.ReferenceEvaluator(model).run(None, feeds(spec, values))[0]


def onnxruntime_inlined(spec, values, attributes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(one_node_model(spec, values, attributes).SerializeToString(), options)
    return session.run(None, feeds(spec, values))[0]


def openvino_inlined(spec, values, attributes):
    import openvino

    core = openvino.Core()
    model = core.read_model(inline_local_functions(one_node_model(spec, values, attributes)).SerializeToString())
    model.reshape({name: list(value.shape) for name, value in feeds(spec, values).items()})
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds(spec, values))[0]


LOWERINGS = [numpy_reference, torch_eager, torch_export, onnx_reference, onnxruntime_inlined, openvino_inlined]


@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name, case", EVERY, ids=lambda value: value)
def test_lowering_equals_reference(name, case, dtype, lowering):
    spec = OPS[name]
    values, attributes = values_of(name, case, dtype)
    wide = [v.astype(np.float64) if v.dtype.kind == "f" else v for v in values]
    (want,) = spec.reference(*wide, **attributes)
    assert spec.infer_shape(*(v.shape for v in values), **attributes) == (want.shape,)
    got = lowering(spec, values, attributes)
    assert got.dtype == (np.float64 if lowering is numpy_reference else np.dtype(dtype))
    tolerance = TOLERANCE[dtype] * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got.astype(np.float64), want, atol=tolerance, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", [op for op in OPS if op in cases.MAKERS])
def test_bfloat16_in_torch(name):
    values, attributes = values_of(name, next(iter(cases.MAKERS[name][1])))
    halves = [torch.from_numpy(v).bfloat16() for v in values]
    (want,) = OPS[name].reference(*(h.double().numpy() for h in halves), **attributes)
    got = torch_op(OPS[name])(*halves, *attributes.values())
    assert got.dtype == torch.bfloat16
    tolerance = TOLERANCE["bfloat16"] * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got.double().numpy(), want, atol=tolerance)


SHAPES = {
    "CascadedGroupAttention": st.tuples(
        st.integers(1, 2), st.integers(1, 9), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(1, 4),
        st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 3, 5, 7]),
    ).map(lambda s: (s[0], s[1] * s[3], s[2], s[3], s[4], (min(s[5], s[2][0]), min(s[5], s[2][1])), s[6])),
    "SingleHeadAttention": st.tuples(
        st.integers(1, 2), st.integers(2, 20), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(1, 9)
    ),
    "EluLinearAttention": st.tuples(
        st.integers(1, 2), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(1, 4), st.integers(1, 9)
    ),
    "HiLoAttention": st.tuples(
        st.integers(1, 2), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3), st.integers(1, 3),
        st.integers(1, 3), st.integers(1, 9),
    ).map(lambda s: (s[0], (s[1][0] * s[2], s[1][1] * s[2]), *s[2:])),
}  # fmt: skip


@pytest.mark.parametrize("name", cases.MAKERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_runs_in_onnxruntime(name, data):
    spec, (maker, _) = OPS[name], cases.MAKERS[name]
    plain, attributes = maker(*data.draw(SHAPES[name]), seed=data.draw(st.integers(0, 99)))
    values = [value.astype(np.float32) for value in plain.values()]
    (want,) = spec.reference(*values, **attributes)
    assert spec.infer_shape(*(v.shape for v in values), **attributes) == (want.shape,)
    np.testing.assert_allclose(onnxruntime_inlined(spec, values, attributes), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, case, wrong, message",
    [
        ("SingleHeadAttention", "square", {"qkv_bias": (79,)}, r"qkv_bias is \(79,\), expected \(80,\)"),
        ("CascadedGroupAttention", "windows", {"dw_bias": (23,)}, r"dw_bias is \(23,\), expected \(24,\)"),
        (
            "EluLinearAttention",
            "square",
            {"qk": (1, 63, 14, 14)},
            r"qk is \(1, 63, 14, 14\), expected \(1, 64, 14, 14\)",
        ),
        ("EluLinearAttention", "square", {"v": (1, 33, 14, 14)}, r"v is .* channels a multiple of 2"),
        ("HiLoAttention", "rectangle", {"lo_kv": (2, 60, 48)}, r"lo_kv is \(2, 60, 48\), expected \(2, 15, 48\)"),
        ("HiLoAttention", "rectangle", {"hi_qkv": (2, 60, 23)}, r"hi_qkv is \(2, 60, 23\)"),
        ("HiLoAttention", "rectangle", {"lo_q": (2, 59, 24)}, r"lo_q is \(2, 59, 24\); expected \(B, 60, heads \* 8\)"),
    ],
)
def test_shape_rule_names_the_wrong_input(name, case, wrong, message):
    plain, attributes = cases.case_of(name, case)
    plain |= {key: np.zeros(shape, np.float32) for key, shape in wrong.items()}
    with pytest.raises(UnsupportedOp, match=message):
        torch_eager(OPS[name], list(plain.values()), attributes)


def test_window_that_does_not_divide_the_grid_is_refused():
    plain, attributes = cases.case_of("HiLoAttention", "rectangle")
    with pytest.raises(UnsupportedOp, match="windows of 4 do not divide the grid 6x10"):
        torch_eager(OPS["HiLoAttention"], list(plain.values()), {**attributes, "window": 4})


def test_linear_attention_sums_in_float32():
    """4096 tokens of 100: the plain sum of k v would pass 65504, the largest float16."""
    qk, v = np.full((1, 8, 64, 64), 10, np.float16), np.full((1, 4, 64, 64), 100, np.float16)
    for lowering in (torch_eager, onnxruntime_inlined):
        got = lowering(OPS["EluLinearAttention"], [qk, v], {"num_heads": 1, "epsilon": 1e-6})
        np.testing.assert_allclose(got.astype(np.float32), 100, rtol=2e-3)


def test_table_refuses_duplicates():
    with pytest.raises(ValueError, match="registered twice"):
        register_op(OPS["CascadedGroupAttention"])


@pytest.mark.parametrize("name", OPS)
def test_contract(name):
    spec = OPS[name]
    body = spec.body(**spec.attributes)
    assert name not in {s.name for s in onnx.defs.get_all_schemas()}, "op names are ours alone"
    assert {*spec.attributes, *PLUGIN_ATTRIBUTES} <= set(body.attribute)
    assert {n.domain for n in body.node} == {""} and all(n.name for n in body.node)
    assert list(body.input) == list(spec.inputs)
    assert not any(a.type == TensorProto.UNDEFINED for n in body.node for a in n.attribute)
    if spec.quantized:
        assert set(spec.weights) <= set(spec.inputs) and spec.quantized in OPS


@pytest.mark.parametrize("name", OPS)
def test_body_has_no_dead_node(name):
    body = OPS[name].body(**OPS[name].attributes)
    used = {i for node in body.node for i in node.input} | set(body.output)
    assert not [node.name for node in body.node if not used & set(node.output)]


@pytest.mark.parametrize("name", OPS)
def test_torch_op_passes_torchs_own_checks(name):
    values, attributes = values_of(name, next(iter(cases.MAKERS[cases.plain_name(name)][1])))
    arguments = (*map(torch.from_numpy, values), *attributes.values())
    torch.library.opcheck(torch_op(OPS[name]).default, arguments, test_utils=("test_schema", "test_faketensor"))
