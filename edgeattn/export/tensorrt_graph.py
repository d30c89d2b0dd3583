"""The ONNX form that TensorRT's parser takes: strongly typed, symmetric int8, nothing but standard operators.

Quantization is decided before; here it is only written the way the parser wants it: biases in floating point, weights
of our ops dequantized where they come in, functions inlined. What it cannot take is refused by name.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

from edgeattn.errors import UnsupportedOp
from edgeattn.export.functions import float_form, tensor_types
from edgeattn.ops.registry import DOMAIN, load_ops, spec_name

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_WEAK = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


def to_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an exported model for a parser without our plugin.

    Raises:
        UnsupportedOp: asymmetric or unsigned quantization, or an operator that leaves the types to the builder.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _dequantize_weights(made)
    if made.functions:
        made = inline_local_functions(made)
    _float_biases(made)
    _check_pairs(made)
    return made


def _dequantize_weights(model: onnx.ModelProto) -> None:
    """Our ops with int8 weights in floating point behind a DequantizeLinear of each: bodies slice the weights by heads,
    and the parser takes int8 constants nowhere but in front of that operator."""
    types, quantized = tensor_types(model), {spec.quantized for spec in load_ops().values()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.domain == DOMAIN and spec_name(node.op_type) in quantized:

            def dequantized(codes: str, scale: str) -> str:
                name = f"{codes}_values"
                nodes.append(helper.make_node(_PAIR[1], [codes, scale], [name], name=f"node_{name}", axis=0))
                return name

            float_form(model, node, dequantized, types.get(node.input[0], "float32"))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(functions)


def _float_biases(model: onnx.ModelProto) -> None:
    """Constants behind DequantizeLinear that are int32 become floating-point constants."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        codes = stored.get(node.input[0]) if node.op_type == _PAIR[1] else None
        if codes is None or codes.data_type != onnx.TensorProto.INT32:
            continue
        scale = numpy_helper.to_array(stored[node.input[1]])
        values = (numpy_helper.to_array(codes).astype(np.float64) * scale).astype(scale.dtype)
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for name in set(stored) - read:
        model.graph.initializer.remove(stored[name])


def _check_pairs(model: onnx.ModelProto) -> None:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _WEAK:
            raise UnsupportedOp(
                f"{node.op_type} ({node.name}): TensorRT takes strongly typed graphs, int8 as QuantizeLinear and "
                "DequantizeLinear pairs with constant scales. Export the model with `edgeattn export` instead."
            )
        if node.op_type not in _PAIR or len(node.input) < 3:
            continue
        zero_point = stored.get(node.input[2])
        values = None if zero_point is None else numpy_helper.to_array(zero_point)
        if values is None or values.any() or values.dtype == np.uint8:
            found = "computed" if values is None else f"{values.dtype} {values.reshape(-1)[0]}"
            raise UnsupportedOp(
                f"{node.name}: its zero point is {found}; TensorRT quantizes symmetrically, int8 with zero point 0. "
                "Export with activations: {signedness: int8} in the recipe, which every target runs."
            )
