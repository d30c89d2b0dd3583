"""Model-local functions: every node of an op of ours has a body of standard ops in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import helper

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import DOMAIN, DOMAIN_VERSION, OPS, OpSpec, alias, dequantize_inputs, load_ops, spec_name


def attach_functions(model: onnx.ModelProto, opset: int) -> None:
    """Give every node of ours a function body.

    A body fits one value of the op's structural attributes (its `signature`). Functions are found by name alone in
    some parsers (TensorRT's, onnx's reference evaluator ignore overloads), so a second body in one model gets a name
    of its own: the op's name with the attribute's value, which the plugin knows too.
    """
    names: dict[str, dict[tuple[Any, ...], str]] = {}
    types = tensor_types(model)
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        spec = OPS[node.op_type]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in spec.attributes}
        key = tuple(attributes[name] for name in spec.signature)
        known = names.setdefault(spec.name, {})
        if key not in known:
            known[key] = alias(spec.name, spec.signature, key) if known else spec.name
            function = spec.body(**attributes, name=known[key], dtype=types.get(node.input[0], "float32"))
            function.opset_import[0].version = opset  # must equal the model's; the bodies mean the same from 20 to 23
            model.functions.append(function)
        node.op_type = known[key]
    opsets = {entry.domain for entry in model.opset_import}
    if names and DOMAIN not in opsets:
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def float_form(
    model: onnx.ModelProto, node: onnx.NodeProto, dequantize: Callable[[str, str], str], dtype: str = "float32"
) -> None:
    """Make a node of an op with int8 weights one of its floating-point form, and add that function where it is missing.

    Args:
        dequantize: name of a weight's floating-point values from those of its codes and of its scales.

    Raises:
        UnsupportedOp: no op has the node's as its quantized form.
    """
    spec = _float_spec(node)
    function = next(f for f in model.functions if f.name == node.op_type)
    attributes: Mapping[str, Any] = {
        a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in spec.attributes
    }
    names = dequantize_inputs(node.input, spec.inputs, spec.weights, dequantize)
    # Always under the name with the attributes' values, which fits beside a body for others.
    node.op_type = alias(spec.name, spec.signature, [attributes[name] for name in spec.signature])
    node.input[:] = names
    if not any(known.name == node.op_type for known in model.functions):
        body = spec.body(**attributes, name=node.op_type, dtype=dtype)
        body.opset_import[0].version = function.opset_import[0].version
        model.functions.append(body)


def _float_spec(node: onnx.NodeProto) -> OpSpec:
    quantized = spec_name(node.op_type)
    found = [spec for spec in load_ops().values() if spec.quantized == quantized]
    if len(found) != 1:
        raise UnsupportedOp(f"{node.op_type} ({node.name}) is no op with int8 weights that has a floating-point form.")
    return found[0]


def tensor_types(model: onnx.ModelProto) -> dict[str, str]:
    """numpy's name of the type of every tensor that states one."""
    stated = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for value in stated
        if value.type.tensor_type.elem_type
    }
