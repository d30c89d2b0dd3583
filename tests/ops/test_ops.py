"""Every op, every lowering, against the float64 reference."""

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

OPS = load_ops()
# batch, channels, grid, heads, key width, window, kernel
CASES = {
    "one-window": (1, 32, (7, 7), 4, 16, (7, 7), 5),
    "windows": (2, 24, (14, 14), 3, 8, (7, 7), 7),
    "padded-window": (1, 24, (9, 16), 2, 16, (7, 7), 3),
    "rectangular-window": (2, 20, (5, 3), 2, 4, (5, 3), 3),
    "one-token": (3, 8, (1, 1), 1, 4, (1, 1), 1),
    "odd-width": (1, 15, (4, 4), 3, 5, (4, 4), 3),
}
# Rounding grows with the length of the longest sum; outputs are of order one.
TOLERANCE = 2e-5


def make_case(batch, channels, grid, heads, key_dim, window, kernel, seed=0):
    rng = np.random.default_rng(seed)
    value, tokens = channels // heads, window[0] * window[1]
    width = heads * (2 * key_dim + value)
    inputs = {
        "x": rng.normal(size=(batch, channels, *grid)),
        "qkv_weight": rng.normal(size=(width, value, 1, 1)) / value**0.5, "qkv_bias": rng.normal(size=width) * 0.1,
        "dw_weight": rng.normal(size=(heads * key_dim, 1, kernel, kernel)) / kernel,
        "dw_bias": rng.normal(size=heads * key_dim) * 0.1, "attention_bias": rng.normal(size=(heads, tokens, tokens)),
        "proj_weight": rng.normal(size=(channels, channels, 1, 1)) / channels**0.5,
        "proj_bias": rng.normal(size=channels) * 0.1,
    }  # fmt: skip
    attributes = {"num_heads": heads, "key_dim": key_dim, "window": list(window), "scale": key_dim**-0.5}
    return {k: v.astype(np.float32) for k, v in inputs.items()}, attributes


# batch, channels, grid, key width
SINGLE_HEAD_CASES = {
    "square": (1, 48, (14, 14), 16), "rectangle": (2, 66, (5, 9), 16), "odd-width": (1, 75, (4, 4), 16),
    "one-token": (3, 8, (1, 1), 4), "narrow": (2, 3, (7, 2), 5),
}  # fmt: skip


def make_single_head_case(batch, channels, grid, key_dim, seed=0):
    rng = np.random.default_rng(seed)
    width = 2 * key_dim + channels
    inputs = {
        "x": rng.normal(size=(batch, channels, *grid)) * 3 + 1,
        "qkv_weight": rng.normal(size=(width, channels, 1, 1)) / channels**0.5,
        "qkv_bias": rng.normal(size=width) * 0.1,
    }  # fmt: skip
    attributes = {"key_dim": key_dim, "scale": key_dim**-0.5, "epsilon": 1e-5}
    return {k: v.astype(np.float32) for k, v in inputs.items()}, attributes


# Every op of the table needs its cases here: an op without them fails the tests below.
CASES_OF = {
    "CascadedGroupAttention": {name: make_case(*case) for name, case in CASES.items()},
    "SingleHeadAttention": {name: make_single_head_case(*case) for name, case in SINGLE_HEAD_CASES.items()},
}
EVERY = [(op, case) for op in OPS for case in CASES_OF[op.removeprefix("Q")]]


def inputs_for(spec, plain):
    """Inputs of the op's quantized form from those of the plain one."""
    values = []
    for name in spec.inputs:
        weight = plain.get(name.replace("scale", "weight"))
        if name.endswith("_scale") or (spec.name.startswith("Q") and name.endswith("_weight")):
            codes, scale = quantize_weight(torch.from_numpy(weight))
            values.append((scale if name.endswith("_scale") else codes).numpy())
        else:
            values.append(plain[name])
    return values


def one_node_model(spec, values, attributes):
    kinds = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("int8"): TensorProto.INT8}
    node = helper.make_node(spec.name, spec.inputs, spec.outputs, domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES)
    shape = list(values[0].shape)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(spec.inputs[0], kinds[values[0].dtype], ["b", *shape[1:]])],
        [helper.make_tensor_value_info(spec.outputs[0], TensorProto.FLOAT, ["b", *shape[1:]])],
        [numpy_helper.from_array(v, n) for n, v in zip(spec.inputs[1:], values[1:], strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[spec.body(**attributes)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def torch_eager(spec, values, attributes):
    op = getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1])
    return op(*map(torch.from_numpy, values), *attributes.values()).numpy()


def torch_export(spec, values, attributes):
    op = getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1])

    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return op(x, *map(torch.from_numpy, values[1:]), *attributes.values())

    x = torch.from_numpy(values[0])
    return torch.export.export(Wrapped(), (x,)).module()(x).numpy()


def onnx_reference(spec, values, attributes):
    model = one_node_model(spec, values, attributes)
    return onnx.reference.ReferenceEvaluator(model).run(None, {spec.inputs[0]: values[0]})[0]


def onnxruntime_inlined(spec, values, attributes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(one_node_model(spec, values, attributes).SerializeToString(), options)
    return session.run(None, {spec.inputs[0]: values[0]})[0]


def openvino_inlined(spec, values, attributes):
    import openvino

    core = openvino.Core()
    model = core.read_model(inline_local_functions(one_node_model(spec, values, attributes)).SerializeToString())
    model.reshape(list(values[0].shape))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values[0])[0]


LOWERINGS = [torch_eager, torch_export, onnx_reference, onnxruntime_inlined, openvino_inlined]


@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name, case", EVERY, ids=lambda value: value)
def test_lowering_equals_reference(name, case, lowering):
    spec = OPS[name]
    plain, attributes = CASES_OF[name.removeprefix("Q")][case]
    values = inputs_for(spec, plain)
    (want,) = spec.reference(*values, **attributes)
    np.testing.assert_allclose(lowering(spec, values, attributes), want, atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4), value=st.integers(1, 9), key_dim=st.integers(1, 9), height=st.integers(1, 12),
    width=st.integers(1, 12), side=st.integers(1, 7), kernel=st.sampled_from([1, 3, 5, 7]), batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_runs_in_onnxruntime(heads, value, key_dim, height, width, side, kernel, batch, seed):
    spec = OPS["CascadedGroupAttention"]
    window = (min(side, height), min(side, width))
    plain, attributes = make_case(batch, heads * value, (height, width), heads, key_dim, window, kernel, seed)
    values = inputs_for(spec, plain)
    (want,) = spec.reference(*values, **attributes)
    assert spec.infer_shape(*(v.shape for v in values), **attributes) == (want.shape,)
    np.testing.assert_allclose(onnxruntime_inlined(spec, values, attributes), want, atol=1e-4, rtol=1e-4)


def test_single_head_shape_rule_names_the_wrong_input():
    plain, attributes = CASES_OF["SingleHeadAttention"]["square"]
    with pytest.raises(UnsupportedOp, match=r"qkv_bias is \(79,\), expected \(80,\)"):
        torch_eager(OPS["SingleHeadAttention"], [*list(plain.values())[:2], plain["qkv_bias"][:-1]], attributes)


def test_shape_rule_names_the_wrong_input():
    plain, attributes = make_case(*CASES["windows"])
    plain["dw_bias"] = plain["dw_bias"][:-1]
    with pytest.raises(UnsupportedOp, match=r"dw_bias is \(23,\), expected \(24,\)"):
        torch_eager(OPS["CascadedGroupAttention"], list(plain.values()), attributes)


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
    if spec.quantized:
        assert set(spec.weights) <= set(spec.inputs) and spec.quantized in OPS


@pytest.mark.parametrize("name", OPS)
def test_torch_op_passes_torchs_own_checks(name):
    plain, attributes = next(iter(CASES_OF[name.removeprefix("Q")].values()))
    spec = OPS[name]
    op = getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1]).default
    arguments = (*map(torch.from_numpy, inputs_for(spec, plain)), *attributes.values())
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
