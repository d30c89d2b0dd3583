"""A quantized ONNX file with parts of it back in floating point: candidates of a search, without tracing in torch.

What is quantized is decided on the torch graph, by `edgeattn.quant.placement` alone: `removal` says how two plans
differ, and `unquantize` makes that difference in the file. A weight that goes back has its dequantized values.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from edgeattn.errors import UnsupportedOp
from edgeattn.export.functions import float_form
from edgeattn.ops.registry import DOMAIN, load_ops, with_scales
from edgeattn.quant.graph import aten, calls, is_call, module_path
from edgeattn.quant.placement import Plan, readers

T = TypeVar("T")
Reader = str | frozenset[str]
_LINEAR = {"alpha": 1, "beta": 1, "transA": 0, "transB": 1}  # how the exporter writes x W^T + b as Gemm


@dataclasses.dataclass(frozen=True)
class Removal:
    """What of a quantized ONNX file goes back to floating point, by names of its initializers.

    Attributes:
        pairs: scales of the tensors that are not quantized any more.
        weights: codes of one weight of every layer and attention op that is float again.
        readers: scale of a tensor that stays quantized to those who still read the quantized values: a layer by the
            codes of its weight, an addition by the scales of its terms. All others read the float values.
    """

    pairs: tuple[str, ...]
    weights: tuple[str, ...]
    readers: dict[str, frozenset[Reader]]


def removal(quantized: fx.GraphModule, base: Plan, kept: Plan) -> Removal:
    """What makes the file of `quantized`, a graph behind `placement.insert` of `base`, that of another plan.

    Args:
        base, kept: plans of one graph in floating point, of which `quantized` was a copy.

    Raises:
        UnsupportedOp: `kept` is not `base` with parts left out, or `base` has 4-bit weights or quantizes products
            inside attention.
    """
    _check_parts(base, kept)
    scales, weights = _names(quantized, base)
    reading: dict[str, frozenset[Reader]] = {}
    for node in kept.tensors:
        staying = readers(node, kept)
        if staying != readers(node, base):
            reading[scales[node]] = frozenset(weights.get(user) or _terms(user, scales) for user in staying)
    attention = {node for node, _ in kept.attention}
    return Removal(
        tuple(scales[node] for node in base.tensors if node not in set(kept.tensors)),
        tuple(codes for node, codes in weights.items() if node not in kept.weighted and node not in attention),
        reading,
    )


def _check_parts(base: Plan, kept: Plan) -> None:
    parts = (
        kept.weighted.items() <= base.weighted.items(), set(kept.tensors) <= set(base.tensors),
        set(kept.adds) <= set(base.adds), {n for n, _ in kept.attention} <= {n for n, _ in base.attention},
        kept.float_inputs == base.float_inputs & set(kept.weighted), kept.activations == base.activations,
    )  # fmt: skip
    if not all(parts):
        raise UnsupportedOp("the plan is not the base plan with parts in floating point; write it through torch.")
    if base.products or any(scheme.bits != 8 for scheme in base.weighted.values()):
        raise UnsupportedOp("4-bit weights and products inside attention are not edited; write the plan through torch.")


def _names(quantized: fx.GraphModule, base: Plan) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
    """Names of the scale of every quantized tensor, and of codes of a weight of every layer and attention op."""
    ops: Any = torch.ops.edgeattn
    specs = load_ops()
    layers = [n for n in calls(quantized, aten.conv2d.default, aten.linear.default) if _stored(n) is not None]
    forms = {getattr(ops, specs[str(spec.quantized)].torch_op.split("::")[1]).default for _, spec in base.attention}
    attention = list(calls(quantized, *forms))
    pairs = list(calls(quantized, ops.quantize.default))
    # `insert` keeps the order of the nodes.
    both = [*zip(base.tensors, pairs, strict=False), *zip(base.weighted, layers, strict=False)]
    both += [(old, new) for (old, _), new in zip(base.attention, attention, strict=False)]
    counts = [len(found) for found in (pairs, layers, attention)]
    wanted = [len(found) for found in (base.tensors, base.weighted, base.attention)]
    if counts != wanted or any(module_path(old) != module_path(new) for old, new in both):
        raise UnsupportedOp(f"the graph has {counts} tensors, layers and attention ops quantized, its plan {wanted}.")
    for node, new in zip(base.tensors, pairs, strict=True):
        if len(readers(node, base)) != sum(len(values.users) for values in new.users):
            raise UnsupportedOp(f"{node.name} has other readers than its plan says; write the plan through torch.")
    scales = {node: _target(new.args[1]) for node, new in zip(base.tensors, pairs, strict=True)}
    weights = {node: _target(_stored(new)) for node, new in zip(base.weighted, layers, strict=True)}
    for (node, spec), new in zip(base.attention, attention, strict=True):
        weights[node] = _target(new.args[with_scales(spec.inputs, spec.weights).index(spec.weights[0])])
    return scales, weights


def _stored(layer: fx.Node) -> Any:
    """The codes of a layer's weight, or None."""
    weight: Any = layer.args[1]
    return weight.args[0] if is_call(weight, torch.ops.edgeattn.dequantize.default) else None


def _target(node: Any) -> str:
    return str(node.target)


def _terms(node: fx.Node, scales: dict[fx.Node, str]) -> frozenset[str]:
    return frozenset(scales[term] for term in node.all_input_nodes)


def unquantize(model: onnx.ModelProto, removed: Removal) -> onnx.ModelProto:
    """A copy of a quantized model with parts of it in floating point.

    Raises:
        UnsupportedOp: something is not in the model exactly once, as where the exporter made one of two equal constants
            or nodes, or it is not in the form that the exporter gives it.
    """
    edit = _Edit(model)
    pairs = {scale: edit.pair(scale) for scale in removed.pairs}
    for codes in removed.weights:
        edit.dequantize(codes)
    for scale, staying in removed.readers.items():
        edit.restrict(scale, staying)
    for quantize, dequantize in pairs.values():
        edit.redirect(dequantize.output[0], quantize.input[0])
    return edit.finished()


def _one(found: Sequence[T], what: str) -> T:
    if len(found) != 1:
        raise UnsupportedOp(f"{what}: {len(found)} in the quantized ONNX file, expected one; write it through torch.")
    return found[0]


class _Edit:
    """A copy of a model, with who makes and who reads every value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.outputs = {value.name for value in graph.output}
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.info = {value.name: value for value in graph.value_info}
        self.made: set[str] = set()  # names of new constants
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in set(node.input):
                self.readers[name].append(node)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
            raise UnsupportedOp("the weights are in a file of their own; write the plan through torch.")
        if any(a.HasField("g") or a.graphs for node in self.nodes for a in node.attribute):
            raise UnsupportedOp("a node with a graph inside may read any value; write the plan through torch.")

    def pair(self, scale: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
        """QuantizeLinear and DequantizeLinear of a tensor."""
        what = f"pair with {scale}"
        quantize = _one([node for node in self.readers[scale] if node.op_type == "QuantizeLinear"], what)
        dequantize = _one(self.readers[quantize.output[0]], what)
        given = [*dequantize.input, *quantize.input[1:]]
        wanted = [quantize.output[0], *[scale, *quantize.input[2:]] * 2]
        if dequantize.op_type != "DequantizeLinear" or given != wanted or len(self.readers[scale]) != 2:
            raise UnsupportedOp(f"{what} is not two nodes behind each other; write the plan through torch.")
        if {quantize.output[0], dequantize.output[0]} & self.outputs:
            raise UnsupportedOp(f"{what} gives an output of the model; write the plan through torch.")
        return quantize, dequantize

    def redirect(self, old: str, new: str, nodes: Sequence[onnx.NodeProto] | None = None) -> None:
        """Let nodes (None: all readers) read another value."""
        for node in list(self.readers[old] if nodes is None else nodes):
            node.input[:] = [new if name == old else name for name in node.input]
            self.readers[old] = [reader for reader in self.readers[old] if reader is not node]
            self.readers[new].append(node)

    def dequantize(self, codes: str) -> None:
        """Put the layer or the attention op back in floating point whose weight has these codes."""
        reader = _one(self.readers[codes], f"reader of {codes}")
        if reader.domain == DOMAIN:
            self._float_attention(reader)
            return
        layer = _one(self.readers[reader.output[0]], f"layer with {codes}")
        if layer.op_type not in ("Conv", "Gemm") or list(layer.input).index(reader.output[0]) != 1:
            raise UnsupportedOp(f"{codes} is the weight of no Conv or Gemm; write the plan through torch.")
        bias = self.maker.get(layer.input[2]) if len(layer.input) > 2 else None
        for node in (reader, bias):
            if node is not None:
                self.redirect(node.output[0], self._values(node), [layer])
        if layer.op_type == "Gemm":
            self._unflatten(layer)

    def _values(self, node: onnx.NodeProto) -> str:
        """Name of a constant with what a DequantizeLinear makes of constants, per tensor or along axis 0."""
        if node.op_type != "DequantizeLinear" or not set(node.input) <= set(self.stored):
            raise UnsupportedOp(f"{node.output[0]} is not dequantized from constants; write the plan through torch.")
        if any(a.name == "axis" and a.i != 0 for a in node.attribute):
            raise UnsupportedOp(f"{node.output[0]} has no scales along axis 0; write the plan through torch.")
        name = f"{node.output[0]}_values"  # layers with equal biases share the node
        return name if name in self.made else self._constant(name, self._dequantized(*node.input))

    def _dequantized(self, codes: str, scale: str, zero_point: str | None = None) -> np.ndarray:
        names = [codes, scale] if zero_point is None else [codes, scale, zero_point]
        arrays = [numpy_helper.to_array(self.stored[name]) for name in names]
        scales, *zeros = (a.reshape([-1, *[1] * (arrays[0].ndim - 1)]) if a.ndim else a for a in arrays[1:])
        return (arrays[0] - zeros[0] if zeros else arrays[0]).astype(np.float32) * scales

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.stored[self._free(name)] = numpy_helper.from_array(value, name)
        self.made.add(name)
        return name

    def _free(self, name: str) -> str:
        if name in self.stored or name in self.maker:
            raise UnsupportedOp(f"the name {name} is taken; write the plan through torch.")
        return name

    def _unflatten(self, gemm: onnx.NodeProto) -> None:
        """MatMul and Add for Reshape, Gemm, Reshape: the form of a linear layer over tokens in floating point."""
        before = self.maker.get(gemm.input[0])
        if before is None or before.op_type != "Reshape":
            return
        after = _one(self.readers[gemm.output[0]], f"reader of {gemm.output[0]}")
        given, weight = self._shape(before.input[0]), numpy_helper.to_array(self.stored[gemm.input[1]])
        sides = self.stored.get(after.input[1]) if after.op_type == "Reshape" else None
        attributes = {a.name: helper.get_attribute_value(a) for a in gemm.attribute}
        # A side of 0 is that of the input, which has another rank now.
        copied = sides is None or 0 in numpy_helper.to_array(sides)
        if attributes != _LINEAR or given[-1] != weight.shape[1] or copied:
            raise UnsupportedOp(f"{gemm.output[0]} is no linear layer over tokens; write the plan through torch.")
        tokens = None not in given and self._shape(after.output[0]) == [*given[:-1], weight.shape[0]]
        values, bias = (after if tokens else gemm).output[0], list(gemm.input[2:])
        product = self._free(f"{gemm.output[0]}_product") if bias else values
        transposed = self._constant(f"{gemm.input[1]}_transposed", weight.T.copy())
        nodes = [helper.make_node("MatMul", [before.input[0], transposed], [product], gemm.name)]
        nodes += [helper.make_node("Add", [product, *bias], [values], f"{gemm.name}_bias")] if bias else []
        self._replace(gemm, nodes)
        if tokens:  # else the exporter has made one Reshape of this and the model's own
            self._replace(after, [])
        self.info.pop(gemm.output[0], None)

    def _replace(self, old: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes in the place of one; who makes and reads their values is brought up to date."""
        position = next(i for i, node in enumerate(self.nodes) if node is old)
        self.nodes[position : position + 1] = nodes
        for name in set(old.input):
            self.readers[name] = [reader for reader in self.readers[name] if reader is not old]
        for node in nodes:
            self.maker[node.output[0]] = node
            for name in set(node.input):
                self.readers[name].append(node)

    def _shape(self, name: str) -> list[int | str | None]:
        """Sides by number or name; None where they are not stated."""
        sides = self.info[name].type.tensor_type.shape.dim if name in self.info else ()
        return [side.dim_param or (side.dim_value if side.HasField("dim_value") else None) for side in sides] or [None]

    def _float_attention(self, node: onnx.NodeProto) -> None:
        """The op's form with float weights, and its function."""
        float_form(self.model, node, lambda w, s: self._constant(f"{w}_values", self._dequantized(w, s)))

    def restrict(self, scale: str, staying: frozenset[Reader]) -> None:
        """Let all but some readers of a quantized tensor read its float values."""
        quantize, dequantize = self.pair(scale)
        found: list[Reader] = []
        for node in list(self.readers[dequantize.output[0]]):
            # A linear layer over tokens reads through a Reshape, which several may share.
            ends = self.readers[node.output[0]] if node.op_type == "Reshape" else [node]
            names = [name for end in ends if (name := self._reader(end)) in staying]
            if names and len(names) < len(ends):
                raise UnsupportedOp(f"{node.output[0]} has quantized and float readers; write the plan through torch.")
            if not names:
                self.redirect(dequantize.output[0], quantize.input[0], [node])
            found += [name for name in names if name is not None]
        if len(found) != len(staying) or set(found) != staying:
            raise UnsupportedOp(f"{len(found)} of {len(staying)} readers of {scale} found; write it through torch.")

    def _reader(self, node: onnx.NodeProto) -> Reader | None:
        """What `Removal.readers` calls a layer or an addition."""
        makers = [self.maker.get(name) for name in node.input]
        stored = [m.input for m in makers if m is not None and m.op_type == "DequantizeLinear"]
        if node.op_type == "Add":
            return frozenset(inputs[1] for inputs in stored)
        return next((inputs[0] for inputs in stored if inputs[0] in self.stored), None)

    def finished(self) -> onnx.ModelProto:
        """The model with what its outputs need."""
        graph, needed, kept = self.model.graph, set(self.outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        made = needed | {name for node in kept for name in node.output}
        functions = {node.op_type for node in kept if node.domain == DOMAIN}
        for field, values in (
            (graph.node, kept[::-1]),
            (graph.initializer, [tensor for name, tensor in self.stored.items() if name in needed]),
            (graph.value_info, [value for name, value in self.info.items() if name in made]),
            (self.model.functions, [function for function in self.model.functions if function.name in functions]),
        ):
            del field[:]
            field.extend(values)
        return self.model
