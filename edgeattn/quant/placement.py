"""Where quantizers go: which tensors get a range, and how the graph looks once every range is known."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import torch
from torch import Tensor, fx

from edgeattn.ops.registry import OpSpec, load_ops
from edgeattn.quant.graph import add_attribute, aten, attribute, finish, is_call, module_path, set_input
from edgeattn.quant.quantizer import (
    activation_parameters,
    quantize_bias,
    quantize_weight,
    weight_scale_floor,
)
from edgeattn.quant.recipe import FIRST_LAYER_REASON, Recipe

logger = logging.getLogger(__name__)

_WEIGHTED = (aten.conv2d.default, aten.linear.default)
_FUSED_ACTIVATIONS = (aten.relu.default,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe makes of a graph.

    Attributes:
        tensors: nodes whose output is quantized, in graph order.
        weighted: convolutions and linear layers with int8 weights.
        adds: residual additions computed from quantized inputs.
        attention: custom ops with int8 weights and floating-point activations.
        kept_float: module path to the reason, for layers that a rule leaves in floating point.
    """

    tensors: tuple[fx.Node, ...]
    weighted: tuple[fx.Node, ...]
    adds: tuple[fx.Node, ...]
    attention: tuple[tuple[fx.Node, OpSpec], ...]
    kept_float: dict[str, str]

    def summary(self, graph: fx.GraphModule) -> dict[str, int]:
        """How many compute nodes run in which precision."""
        counts: Counter[str] = Counter()
        counts["int8"] = len(self.weighted) + len(self.adds)
        counts["attention: int8 weights, float32 activations"] = len(self.attention)
        weighted = [n for n in graph.graph.nodes if is_call(n, *_WEIGHTED)]
        counts["float32"] = len(weighted) - len(self.weighted)
        return {key: value for key, value in counts.items() if value}


def plan(graph: fx.GraphModule, recipe: Recipe) -> Plan:
    """Decide on a folded floating-point graph what the recipe quantizes."""
    specs = {spec.torch_op: spec for spec in load_ops().values() if spec.quantized}
    weighted: list[fx.Node] = []
    adds: list[fx.Node] = []
    attention: list[tuple[fx.Node, OpSpec]] = []
    kept: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node)
        spec = specs.get(_torch_name(node))
        is_add = is_call(node, aten.add.Tensor) and not node.kwargs and all(_is_activation(a) for a in node.args)
        is_weighted = is_call(node, *_WEIGHTED) and attribute(graph, node.args[1]) is not None
        if not (is_weighted or is_add or spec):
            continue
        rule = recipe.rule_for(path)
        if rule is not None:
            kept[path] = rule.reason or f"rule {rule.modules!r}"
        elif is_weighted and recipe.first_layer == "float" and _reads_input(node):
            kept[path] = FIRST_LAYER_REASON
        elif spec:
            attention.append((node, spec))
        else:
            (weighted if is_weighted else adds).append(node)
    tensors = _quantized_tensors(graph, [*weighted, *adds])
    return Plan(tensors, tuple(weighted), tuple(adds), tuple(attention), kept)


def _torch_name(node: fx.Node) -> str:
    return f"{node.target.namespace}::{node.target._opname}" if hasattr(node.target, "_opname") else ""  # type: ignore[union-attr]


def _reads_input(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _is_activation(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op in ("call_function", "placeholder")


def _quantized_tensors(graph: fx.GraphModule, quantized: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Inputs and outputs of the quantized nodes; an output that only feeds a ReLU is quantized after it."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    chosen: set[fx.Node] = set()
    for node in quantized:
        data = node.args[:1] if is_call(node, *_WEIGHTED) else node.args[:2]
        chosen.update(arg for arg in data if isinstance(arg, fx.Node))
        chosen.add(_after_activation(node))
    # Logits stay in float: the last layer's integer result is scaled once, without another rounding.
    return tuple(n for n in graph.graph.nodes if n in chosen and set(n.users) != {output})


def _after_activation(node: fx.Node) -> fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], *_FUSED_ACTIVATIONS) else node


def insert(graph: fx.GraphModule, chosen: Plan, ranges: dict[fx.Node, tuple[float, float]], signedness: str) -> None:
    """Rewrite the graph in place: quantize/dequantize pairs on tensors, int8 weights, int32 biases."""
    scales: dict[fx.Node, Tensor] = {}
    for node in chosen.tensors:
        _insert_pair(graph, node, *ranges[node], signedness, scales)
    for node in chosen.weighted:
        _quantize_layer(graph, node, scales)
        _flatten_tokens(graph, node)
    for node, spec in chosen.attention:
        _quantize_custom(graph, node, spec)
    finish(graph)


def _insert_pair(
    graph: fx.GraphModule, node: fx.Node, low: float, high: float, signedness: str, scales: dict[fx.Node, Tensor]
) -> None:
    scale, zero_point = activation_parameters(low, high, signedness)
    after = node.next
    scale_node = add_attribute(graph, f"{node.name}_scale", scale, after)
    zero_node = add_attribute(graph, f"{node.name}_zero_point", zero_point, after)
    with graph.graph.inserting_before(after):
        codes = graph.graph.call_function(torch.ops.edgeattn.quantize.default, (node, scale_node, zero_node))
        values = graph.graph.call_function(torch.ops.edgeattn.dequantize.default, (codes, scale_node, zero_node))
    node.replace_all_uses_with(values, delete_user_cb=lambda user: user is not codes)
    values.meta["val"] = node.meta.get("val")
    values.meta["module_path"] = codes.meta["module_path"] = module_path(node)
    scales[values] = scale


def _dequantized(graph: fx.GraphModule, name: str, codes: Tensor, scale: Tensor, before: fx.Node) -> fx.Node:
    nodes = [
        add_attribute(graph, name, codes, before),
        add_attribute(graph, f"{name}_scale", scale, before),
        add_attribute(graph, f"{name}_zero_point", torch.zeros(scale.shape, dtype=codes.dtype), before),
    ]
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(torch.ops.edgeattn.dequantize.default, tuple(nodes))


def _quantize_layer(graph: fx.GraphModule, node: fx.Node, scales: dict[fx.Node, Tensor]) -> None:
    weight = attribute(graph, node.args[1])
    bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
    input_scale = scales[node.args[0]]  # type: ignore[index]
    assert weight is not None
    path = module_path(node)
    floor = None if bias is None else weight_scale_floor(bias, input_scale)
    codes, scale = quantize_weight(weight, floor)
    set_input(node, 1, _dequantized(graph, f"{path}_weight_int8", codes, scale, node))
    if bias is not None:
        bias_codes, bias_scale = quantize_bias(bias, input_scale, scale)
        set_input(node, 2, _dequantized(graph, f"{path}_bias_int32", bias_codes, bias_scale, node))


def _flatten_tokens(graph: fx.GraphModule, node: fx.Node) -> None:
    """Run a linear layer over (B, N, C) tokens as one over (B * N, C), so that it exports as Gemm.

    That takes the int8 weight as it is stored and the int32 bias; MatMul would want a transposed copy and a float bias.
    """
    value = node.meta.get("val")
    if not is_call(node, aten.linear.default) or value is None or value.dim() <= 2:
        return
    sides = list(value.shape[1:])
    if not all(isinstance(side, int) for side in sides):
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with graph.graph.inserting_before(node):
        flat = graph.graph.call_function(aten.reshape.default, (source, [-1, source.meta["val"].shape[-1]]))
    set_input(node, 0, flat)
    with graph.graph.inserting_after(node):
        back = graph.graph.call_function(aten.reshape.default, (node, [-1, *sides]))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    flat.meta["module_path"] = back.meta["module_path"] = module_path(node)


def _quantize_custom(graph: fx.GraphModule, node: fx.Node, spec: OpSpec) -> None:
    """Replace a custom op by its int8-weight form: every weight argument is followed by its scale."""
    assert spec.quantized is not None
    target = load_ops()[spec.quantized].torch_op.split("::")[1]
    args: list[object] = []
    for index, arg in enumerate(node.args):
        name = spec.inputs[index] if index < len(spec.inputs) else ""
        if name not in spec.weights:
            args.append(arg)
            continue
        weight = attribute(graph, arg)
        assert weight is not None
        codes, scale = quantize_weight(weight)
        base = f"{module_path(node)}_{name}"
        args += [add_attribute(graph, f"{base}_int8", codes, node), add_attribute(graph, f"{base}_scale", scale, node)]
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(getattr(torch.ops.edgeattn, target).default, tuple(args))  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
