"""The graph of an ONNX file as a torch module: constants folded, one layer per node, sizes computed beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgeattn.errors import UnsupportedOp, UsageError
from edgeattn.models.from_onnx.node import Node, Op, call
from edgeattn.models.from_onnx.ops import load_onnx_ops
from edgeattn.models.from_onnx.ops_nn import LINEAR

_FOLDED_ELEMENTS = 1 << 20  # a constant made of constants may be this large, or as large as they are together
_HOST_ELEMENTS = 64  # constants beside sizes in their arithmetic are short lists
MOST_INPUTS = 6
_SIZES = ("Shape", "Size")
_MAKERS = ("ConstantOfShape", "Range", "Expand", "Tile")  # of tensors, unless sizes are computed from their result

Watch = Callable[[Node, Sequence[Any]], None]


@dataclasses.dataclass(frozen=True)
class Step:
    """One node in order.

    Attributes:
        layer: path of the module that runs it; None: `fixed` and host values go through a host op.
        reads: names of the values that it takes, "" where a constant or nothing stands.
        fixed: constants by index of the input, for host ops.
        frees: names that no later step reads.
    """

    node: Node
    layer: str | None
    reads: tuple[str, ...]
    fixed: Mapping[int, np.ndarray]
    frees: tuple[str, ...]


class Layer(nn.Module):
    """A node on tensors, with its constants: parameters and buffers, or host values."""

    def __init__(self, node: Node, op: Op, tensors: Mapping[int, Tensor], fixed: Mapping[int, np.ndarray]) -> None:
        super().__init__()
        self.node, self.op, self.fixed = node, op, dict(fixed)
        self.slots: dict[int, str] = {}
        for index, tensor in tensors.items():
            name = self.slots[index] = op.names.get(index, f"input{index}")
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, *given: Any) -> Any:
        """The node's inputs in order, None where a constant or nothing stands."""
        values = [
            getattr(self, self.slots[i]) if i in self.slots else self.fixed.get(i, value)
            for i, value in enumerate(given)
        ]
        return call(self.op, self.node, values)

    def extra_repr(self) -> str:
        return self.node.op


class OnnxGraph(nn.Module):
    """The inputs of an ONNX graph in order to its output, or the tuple of its outputs."""

    # Named here so that no layer can take these names.
    name: str = ""
    config: Mapping[str, Any] = {}
    preprocessing: Any = None
    class_names: Any = None
    interface: Any = None
    num_classes: int | None = None
    notes: Sequence[str] = ()

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.steps: tuple[Step, ...] = ()

    # torch.export takes no *inputs with free axes.
    def forward(
        self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None,
        e: Tensor | None = None, f: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return self.run([tensor for tensor in (a, b, c, d, e, f) if tensor is not None])

    def run(self, inputs: Sequence[Tensor], watch: Watch | None = None) -> Any:
        """`forward`; `watch` is shown every node with its outputs."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            given = [values[name] if name else None for name in step.reads]
            if step.layer is None:
                hosted = [step.fixed.get(i, value) for i, value in enumerate(given)]
                results = load_onnx_ops()[1][step.node.op](step.node, *hosted)
            else:
                results = self.get_submodule(step.layer)(*given)
            results = results if isinstance(results, (tuple, list)) else (results,)
            values.update(zip(step.node.outputs, results, strict=False))
            if watch:
                watch(step.node, results)
            for name in step.frees:
                values.pop(name, None)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


def nodes_of(model: onnx.ModelProto) -> list[Node]:
    """The graph's nodes in order, without constants."""
    opset = standard_opset(model)
    found = []
    for i, proto in enumerate(model.graph.node):
        attributes = {a.name: _attribute(onnx.helper.get_attribute_value(a)) for a in proto.attribute}
        name = proto.name or f"{proto.op_type}_{next(filter(None, proto.output), i)}"
        found.append(Node(proto.op_type, name, tuple(proto.input), tuple(proto.output), attributes, opset))
    return found


def standard_opset(model: onnx.ModelProto) -> int:
    """The opset of the standard domain."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def build_graph(model: onnx.ModelProto, inputs: Sequence[str]) -> OnnxGraph:
    """The module of a graph whose op types are all in the table. Empties the model of its initializers.

    Raises:
        UnsupportedOp: an option of an op is not handled, or sizes depend on what a picture shows.
        UsageError: an output does not depend on the inputs.
    """
    constants: dict[str, np.ndarray] = {}
    while model.graph.initializer:  # taken out one by one, so that weights are not held twice
        tensor = model.graph.initializer.pop()
        constants[tensor.name] = np.array(numpy_helper.to_array(tensor))
    outputs = [value.name for value in model.graph.output]
    nodes = _folded(nodes_of(model), constants)
    nodes = _with_linear(nodes, constants, outputs)
    made = {name for node in nodes for name in node.outputs} | set(inputs)
    lost = [name for name in outputs if name not in made]
    if lost:
        raise UsageError(f"output {lost[0]!r} is a constant; expected one computed from the inputs. Remove it.")
    graph = OnnxGraph(inputs, outputs)
    _add_steps(graph, _needed(nodes, outputs), constants)
    return graph.eval()


def _folded(nodes: list[Node], constants: dict[str, np.ndarray]) -> list[Node]:
    """The nodes that depend on an input; what the others compute is added to the constants."""
    ops, _ = load_onnx_ops()
    left = []
    for node in nodes:
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node)
            continue
        if not node.inputs or not all(name in constants for name in node.inputs if name):
            left.append(node)
            continue
        values = [constants[name] if name else None for name in node.inputs]
        op = ops[node.op]
        tensors = [_shared(v) if v is not None and i not in op.host | op.either else v for i, v in enumerate(values)]
        with torch.no_grad():
            results = call(op, node, tensors)
        results = results if isinstance(results, tuple) else (results,)
        arrays = [np.array(r.numpy() if isinstance(r, Tensor) else r) for r in results]
        if sum(a.size for a in arrays) > max(_FOLDED_ELEMENTS, sum(v.size for v in values if v is not None)):
            left.append(node)
        else:
            constants.update(zip(node.outputs, arrays, strict=False))
    return left


def _constant(node: Node) -> np.ndarray:
    kind, value = next(iter(node.attributes.items()), ("", None))
    types = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if kind == "value":
        return np.array(value)
    if kind not in types:
        raise node.refuse(f"a constant with attribute {kind!r}", "a tensor, whole or floating-point numbers")
    return np.array(value, types[kind])


def _shared(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _with_linear(nodes: list[Node], constants: dict[str, np.ndarray], outputs: Sequence[str]) -> list[Node]:
    """Gemm and MatMul with constant weights as linear layers, with the bias of an Add that follows."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    merged: set[str] = set()
    found = []
    for node in nodes:
        if node.outputs[0] in merged:
            continue
        weight = constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            found.append(node)
        elif node.op == "Gemm":
            found.append(_gemm_as_linear(node, weight, constants))
        elif node.op == "MatMul":
            after = readers.get(node.outputs[0], [])
            add = after[0] if len(after) == 1 and node.outputs[0] not in outputs else None
            bias = _bias_of(add, node, weight.shape[1], constants)
            if bias:
                assert add is not None
                merged.update(add.outputs)
                node = dataclasses.replace(node, outputs=add.outputs)
            found.append(_linear(node, _transposed(node.inputs[1], constants), bias))
        else:
            found.append(node)
    return found


def _bias_of(add: Node | None, node: Node, size: int, constants: dict[str, np.ndarray]) -> str:
    """The vector that an Add adds to a node's result, by name; "" if it does not."""
    if add is None or add.op != "Add":
        return ""
    others = [name for name in add.inputs if name != node.outputs[0]]
    fits = len(others) == 1 and others[0] in constants and constants[others[0]].shape == (size,)
    return others[0] if fits else ""


def _transposed(name: str, constants: dict[str, np.ndarray], factor: float = 1.0) -> str:
    """Name of the transposed constant; the same for the same one."""
    made = f"{name}:transposed:{factor}"
    if made not in constants:
        value = constants[name].T if factor == 1 else constants[name].T * np.float32(factor)
        constants[made] = np.ascontiguousarray(value)
    return made


def _gemm_as_linear(node: Node, weight: np.ndarray, constants: dict[str, np.ndarray]) -> Node:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    kept = bool(node.get("transB", 0))
    size = weight.shape[0] if kept else weight.shape[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    value = constants.get(bias)
    fits = not bias or (
        value is not None and value.ndim <= 2 and value.size in (1, size) and value.shape[:-1] in ((), (1,))
    )
    if node.get("transA", 0) or not fits:
        return node
    if value is not None and (value.shape != (size,) or beta != 1):
        constants[f"{node.name}:bias"] = np.ascontiguousarray(
            np.broadcast_to(value.reshape(-1) * np.float32(beta), (size,))
        )
        bias = f"{node.name}:bias"
    name = node.inputs[1]
    if not kept:
        name = _transposed(name, constants, alpha)
    elif alpha != 1:
        constants[f"{name}:{alpha}"] = constants[name] * np.float32(alpha)
        name = f"{name}:{alpha}"
    return _linear(node, name, bias)


def _linear(node: Node, weight: str, bias: str) -> Node:
    return Node(LINEAR, node.name, (node.inputs[0], weight, bias), node.outputs, {}, node.opset)


def _needed(nodes: list[Node], outputs: Sequence[str]) -> list[Node]:
    """The nodes that an output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(filter(None, node.inputs))
            kept.append(node)
    return kept[::-1]


def _host_names(nodes: list[Node], constants: Mapping[str, np.ndarray]) -> set[str]:
    """Names of the values that are host values: sizes, and what is computed from them alone."""
    ops, host_ops = load_onnx_ops()
    wanted: set[str] = set()
    for node in reversed(nodes):
        slots = ops[node.op].host
        wanted.update(name for i, name in enumerate(node.inputs) if name and i in slots)
        if node.op in host_ops and wanted.intersection(node.outputs):
            wanted.update(filter(None, node.inputs))
    found: set[str] = set()
    for node in nodes:
        given = [name for name in node.inputs if name]
        free = {name for name in given if name not in constants}
        short = all(
            constants[name].ndim < 2 and constants[name].size <= _HOST_ELEMENTS for name in given if name in constants
        )
        computed = node.op in host_ops and free and free <= found and short
        if node.op in _SIZES or (computed and (node.op not in _MAKERS or wanted.intersection(node.outputs))):
            found.update(node.outputs)
    return found


def _add_steps(graph: OnnxGraph, nodes: list[Node], constants: Mapping[str, np.ndarray]) -> None:
    """Give the graph a step for every node, and a layer where it works on tensors."""
    ops, _ = load_onnx_ops()
    hosts = _host_names(nodes, constants)
    makers = {name: node for node in nodes for name in node.outputs}
    last = {name: i for i, node in enumerate(nodes) for name in node.inputs}
    kept = set(graph.outputs)
    tensors: dict[str, Tensor] = {}
    steps = []
    for i, node in enumerate(nodes):
        op = ops[node.op]
        on_host = node.op not in _SIZES and node.outputs[0] in hosts
        fixed: dict[int, np.ndarray] = {}
        own: dict[int, Tensor] = {}
        for index, name in enumerate(node.inputs):
            if index in op.host and name and name not in constants and name not in hosts:
                raise _sizes_from_values(node, name, makers.get(name))
            if name not in constants:
                continue
            if on_host or index in op.host or (index in op.either and constants[name].ndim == 0):
                fixed[index] = constants[name]
            else:
                own[index] = _stored(name, constants[name], op.names.get(index, ""), tensors)
        reads = tuple("" if name in constants else name for name in node.inputs)
        frees = tuple(name for name in set(reads) if name and last[name] == i and name not in kept)
        path = None if on_host else _add_layer(graph, node, Layer(node, op, own, fixed))
        steps.append(Step(node, path, reads, fixed if on_host else {}, frees))
    graph.steps = tuple(steps)


def _stored(name: str, value: np.ndarray, role: str, tensors: dict[str, Tensor]) -> Tensor:
    """The tensor of a constant, one for all nodes that read it: a parameter unless it is a statistic or a number."""
    if name not in tensors:
        tensor = _shared(value)
        is_weight = tensor.is_floating_point() and tensor.numel() > 1 and not role.startswith("running")
        tensors[name] = nn.Parameter(tensor, requires_grad=False) if is_weight else tensor
    return tensors[name]


def _sizes_from_values(node: Node, name: str, maker: Node | None) -> UnsupportedOp:
    source = f"{maker.op} node {maker.name!r}" if maker else "an input"
    return UnsupportedOp(
        f"node {node.name!r} ({node.op}) takes {name!r} as sizes, which {source} computes from values. Expected sizes "
        "that follow from the input's shape alone. Cut the model in front of that node, or export it without that step."
    )


def _add_layer(graph: OnnxGraph, node: Node, layer: Layer) -> str:
    """Add the layer under its name, nested at dots as in the network that was exported; returns its path."""
    *parents, leaf = _name_parts(node, layer)
    parent: nn.Module = graph
    path = []
    for part in parents:
        part = _free_name(parent, part)
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
        path.append(part)
    base = leaf = _free_name(parent, leaf)
    number = 1
    while leaf in parent._modules:
        number += 1
        leaf = f"{base}_{number}"
    parent.add_module(leaf, layer)
    return ".".join([*path, leaf])


def _name_parts(node: Node, layer: Layer) -> list[str]:
    """What recipes call the layer: the place of its weight ("layer1.0.conv1.weight") if that is known, else the node.

    Exporters write one or both: module paths as scopes of node names ("/layer1/layer1.0/conv1/Conv"), or weights under
    their own names beside nodes that are only numbered.
    """
    weight = node.inputs[1].split(":")[0] if layer.slots.get(1) == "weight" else ""
    name = weight.removesuffix(".weight") if re.fullmatch(r"[\w.]+\.weight", weight) else node.name
    parts = [re.sub(r"\W", "_", part).strip("_") for part in re.split(r"[/.:]+", name)]
    return [part for part in parts if part] or [node.op]


def _free_name(parent: nn.Module, name: str) -> str:
    """The name, or with an underscore where it is an attribute of the module that is none."""
    while hasattr(parent, name) and name not in parent._modules:
        name += "_"
    return name
