"""Where quantizers go: which tensors get a range, and how the graph looks once every range is known."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from edgeattn.errors import RecipeError
from edgeattn.ops.registry import OpSpec, load_ops
from edgeattn.quant import weights
from edgeattn.quant.attention_products import ATTENTION, observed_inputs, product_precision
from edgeattn.quant.graph import add_attribute, aten, attribute, finish, is_call, module_path, set_input
from edgeattn.quant.quantizer import (
    activation_parameters,
    quantize_bias,
    quantize_weight,
    weight_scale_floor,
)
from edgeattn.quant.recipe import FIRST_LAYER_REASON, Recipe, WeightScheme
from edgeattn.quant.steps import Gptq

logger = logging.getLogger(__name__)

_WEIGHTED = (aten.conv2d.default, aten.linear.default)
_FUSED_ACTIVATIONS = (aten.relu.default,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe makes of a graph.

    Attributes:
        tensors: nodes whose output is quantized, in graph order.
        weighted: convolutions and linear layers with quantized weights, and the scheme of each.
        adds: residual additions computed from quantized inputs.
        products: matrix products inside attention with quantized inputs, and what each is computed in.
        attention: custom ops with int8 weights and floating-point activations.
        kept_float: module path to the reason, for layers that a rule leaves in floating point.
        activations: whether the inputs of the layers are quantized.
        float_inputs: layers whose inputs are not, although those of others are.
    """

    tensors: tuple[fx.Node, ...]
    weighted: dict[fx.Node, WeightScheme]
    adds: tuple[fx.Node, ...]
    products: dict[fx.Node, str]
    attention: tuple[tuple[fx.Node, OpSpec], ...]
    kept_float: dict[str, str]
    activations: bool
    float_inputs: frozenset[fx.Node] = frozenset()

    def summary(self, graph: fx.GraphModule) -> dict[str, int]:
        """How many compute nodes run in which precision; weights of 4 bits are not computed with in 4 bits."""
        counts: Counter[str] = Counter()
        for node, scheme in self.weighted.items():
            counts[self._label(scheme, self.activations and node not in self.float_inputs)] += 1
        counts["int8"] += len(self.adds)
        counts.update(f"attention products: {precision}" for precision in self.products.values())
        counts["attention: int8 weights, float32 activations"] = len(self.attention)
        weighted = [n for n in graph.graph.nodes if is_call(n, *_WEIGHTED)]
        counts["float32"] = len(weighted) - len(self.weighted)
        return {key: value for key, value in counts.items() if value}

    @staticmethod
    def _label(scheme: WeightScheme, activations: bool) -> str:
        if scheme.bits == 8 and activations:
            return "int8"
        inputs = "int8 inputs, computed in float32" if activations else "float32 activations"
        return f"int{scheme.bits} weights, {inputs}"


def plan(graph: fx.GraphModule, recipe: Recipe) -> Plan:
    """Decide on a folded floating-point graph what the recipe quantizes.

    Raises:
        RecipeError: a rule matches no module, or a group size does not fit.
    """
    specs = {spec.torch_op: spec for spec in load_ops().values() if spec.quantized}
    weighted: dict[fx.Node, WeightScheme] = {}
    adds: list[fx.Node] = []
    products: dict[fx.Node, str] = {}
    attention: list[tuple[fx.Node, OpSpec]] = []
    kept: dict[str, str] = {}
    float_inputs: set[fx.Node] = set()
    check_rules(graph, recipe)
    assert recipe.weights is not None
    for node in graph.graph.nodes:
        kind = _kind(graph, node, specs)
        if kind is None:
            continue
        path = module_path(node)
        rule = recipe.rule_for(path)
        if rule is not None and rule.is_float:
            kept[path] = rule.reason or f"rule {rule.modules!r}"
        elif kind == "layer" and recipe.first_layer == "float" and _reads_input(node):
            kept[path] = FIRST_LAYER_REASON
        elif kind == "attention":
            attention.append((node, specs[_torch_name(node)]))
        elif kind == "layer":
            weight = attribute(graph, node.args[1])
            assert weight is not None
            scheme = rule.weights if rule is not None and rule.weights is not None else recipe.weights
            weighted[node] = weights.resolve(scheme, weight, path)
            if rule is not None and rule.activations == "float":
                float_inputs.add(node)
        elif kind == "product":
            products[node] = str(product_precision(node))
        elif recipe.activations is not None and recipe.weights.bits == 8 and recipe.residual == "int8":
            adds.append(node)
    has_activations = recipe.activations is not None
    wanted = [node for node in weighted if node not in float_inputs]
    tensors = _quantized_tensors(graph, wanted, adds, products, recipe.weights.bits == 8) if has_activations else ()
    return Plan(
        tensors, weighted, tuple(adds), products, tuple(attention), kept, has_activations, frozenset(float_inputs)
    )


def _kind(graph: fx.GraphModule, node: fx.Node, specs: dict[str, OpSpec]) -> str | None:
    """What a node is to a recipe: a layer with constant weights, a residual add, a product inside attention, an
    attention op of ours."""
    if node.op != "call_function":
        return None
    if is_call(node, *_WEIGHTED) and attribute(graph, node.args[1]) is not None:
        return "layer"
    if is_call(node, aten.add.Tensor) and not node.kwargs and all(_is_activation(a) for a in node.args):
        return "add"
    if product_precision(node) is not None:
        return "product"
    return "attention" if _torch_name(node) in specs else None


def check_rules(graph: fx.GraphModule, recipe: Recipe) -> None:
    """A pattern that matches no module is a mistake, unless the rule is optional.

    Raises:
        RecipeError: names the pattern and the nearest modules.
    """
    specs = {spec.torch_op: spec for spec in load_ops().values() if spec.quantized}
    nodes = [n for n in graph.graph.nodes if _kind(graph, n, specs) or is_call(n, ATTENTION)]
    paths = list(dict.fromkeys(map(module_path, nodes)))
    for rule in recipe.rules:
        if rule.optional or any(fnmatch.fnmatchcase(path, rule.modules) for path in paths):
            continue
        near = difflib.get_close_matches(rule.modules, paths, n=3, cutoff=0.3) or paths[:3]
        raise RecipeError(
            f"recipe {recipe.name!r}: rule {rule.modules!r} matches no module of this model. Near: {', '.join(near)}. "
            "Correct the pattern, or set optional: true for a rule that serves several models."
        )


def _torch_name(node: fx.Node) -> str:
    return f"{node.target.namespace}::{node.target._opname}" if hasattr(node.target, "_opname") else ""  # type: ignore[union-attr]


def _reads_input(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _is_activation(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op in ("call_function", "placeholder")


def _quantized_tensors(
    graph: fx.GraphModule, weighted: list[fx.Node], adds: list[fx.Node], products: Iterable[fx.Node], outputs: bool
) -> tuple[fx.Node, ...]:
    """Inputs of the quantized nodes; where `outputs`, also what convolutions and additions give (behind its ReLU, if
    that is all that reads it): they compute in int8 only then. Matrix products give floats from integers for free.
    """
    output = next(n for n in graph.graph.nodes if n.op == "output")
    chosen: set[fx.Node] = set()
    for node in [*weighted, *adds]:
        data = node.args[:1] if node in weighted else node.args[:2]
        chosen.update(arg for arg in data if isinstance(arg, fx.Node))
        if outputs and not is_call(node, aten.linear.default):
            chosen.add(after_activation(node))
    chosen.update(arg for node in products for arg in observed_inputs(node))
    # Logits stay in float: the last layer's integer result is scaled once, without another rounding.
    return tuple(n for n in graph.graph.nodes if n in chosen and set(n.users) != {output})


def after_activation(node: fx.Node) -> fx.Node:
    """The ReLU behind a node if that is all that reads it, else the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], *_FUSED_ACTIVATIONS) else node


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration saw of a plan's nodes.

    Attributes:
        ranges: (low, high) of every tensor of the plan.
        input_means: mean of each input channel per layer, where bias correction is wanted.
        hessians: of each layer's inputs, where GPTQ is wanted.
        stored: weights that a step has put on their grid already.
    """

    ranges: Mapping[fx.Node, tuple[float, float]]
    input_means: Mapping[fx.Node, Tensor]
    hessians: Mapping[fx.Node, Tensor]
    stored: Mapping[fx.Node, weights.QuantizedWeight] = dataclasses.field(default_factory=dict)


def insert(graph: fx.GraphModule, chosen: Plan, seen: Statistics, recipe: Recipe) -> None:
    """Rewrite the graph in place: quantize/dequantize pairs on tensors, weights on their grid, int32 biases."""
    scales: dict[fx.Node, Tensor] = {}
    for node in chosen.tensors:
        assert recipe.activations is not None
        parameters = activation_parameters(*seen.ranges[node], recipe.activations.signedness)
        _insert_pair(graph, node, chosen, parameters, scales)
    method = next((step for step in recipe.steps if isinstance(step, Gptq)), None)
    for node, scheme in chosen.weighted.items():
        _quantize_layer(graph, node, scheme, {} if node in chosen.float_inputs else scales, seen, method)
    for node, spec in chosen.attention:
        _quantize_custom(graph, node, spec)
    finish(graph)


def readers(node: fx.Node, chosen: Plan) -> set[fx.Node]:
    """Who reads the dequantized values of a quantized tensor; its other users read the float values.

    Of a tensor that is computed in int8 that is everybody: a reader of its float form would keep the runtime from
    computing it so. Of others it is the quantized nodes.
    """
    source = node.args[0] if is_call(node, *_FUSED_ACTIVATIONS) else node
    quantized = {*chosen.weighted, *chosen.adds, *chosen.products} - chosen.float_inputs
    return {user for user in node.users if source in quantized or user in quantized}


def _insert_pair(
    graph: fx.GraphModule, node: fx.Node, chosen: Plan, parameters: tuple[Tensor, Tensor], scales: dict[fx.Node, Tensor]
) -> None:
    """Quantize and dequantize a tensor for its `readers`."""
    (scale, zero_point), reading, after = parameters, readers(node, chosen), node.next
    scale_node = add_attribute(graph, f"{node.name}_scale", scale, after)
    zero_node = add_attribute(graph, f"{node.name}_zero_point", zero_point, after)
    with graph.graph.inserting_before(after):
        codes = graph.graph.call_function(torch.ops.edgeattn.quantize.default, (node, scale_node, zero_node))
        values = graph.graph.call_function(torch.ops.edgeattn.dequantize.default, (codes, scale_node, zero_node))
    node.replace_all_uses_with(values, delete_user_cb=lambda user: user in reading)
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


def rounded(
    graph: fx.GraphModule, node: fx.Node, scheme: WeightScheme, input_scale: Tensor | None,
    hessian: Tensor | None, method: Gptq | None,
) -> weights.QuantizedWeight:  # fmt: skip
    """A layer's weight on its grid; `input_scale` is that of its quantized input, if it has one."""
    weight = attribute(graph, node.args[1])
    bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
    assert weight is not None
    has_integer_bias = scheme.bits == 8 and input_scale is not None and bias is not None
    floor = weight_scale_floor(bias, input_scale) if has_integer_bias else None  # type: ignore[arg-type]
    return weights.quantize(weight, scheme, floor, hessian, method)


def _quantize_layer(
    graph: fx.GraphModule, node: fx.Node, scheme: WeightScheme, scales: dict[fx.Node, Tensor],
    seen: Statistics, method: Gptq | None,
) -> None:  # fmt: skip
    weight = attribute(graph, node.args[1])
    bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
    input_scale = scales.get(node.args[0])  # type: ignore[arg-type]
    assert weight is not None
    stored = seen.stored.get(node) or rounded(graph, node, scheme, input_scale, seen.hessians.get(node), method)
    if node in seen.input_means:
        change = weights.correction(weight, stored, seen.input_means[node])
        bias = change if bias is None else bias.detach() + change
        set_input(node, 2, add_attribute(graph, f"{module_path(node)}_bias", bias, node))
    store(graph, node, stored, input_scale if scheme.bits == 8 else None)


def store(graph: fx.GraphModule, node: fx.Node, stored: weights.QuantizedWeight, input_scale: Tensor | None) -> None:
    """Put a layer's stored weight into the graph; with the scale of its int8 inputs it computes in int8."""
    path = module_path(node)
    if stored.bits == 4:
        _attach_int4(graph, node, stored, path)
        return
    set_input(node, 1, _dequantized(graph, f"{path}_weight_int8", stored.codes, stored.scale, node))
    if input_scale is None:
        return
    bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
    if bias is not None:
        bias_codes, bias_scale = quantize_bias(bias, input_scale, stored.scale)
        set_input(node, 2, _dequantized(graph, f"{path}_bias_int32", bias_codes, bias_scale, node))
    _flatten_tokens(graph, node)


def _attach_int4(graph: fx.GraphModule, node: fx.Node, stored: weights.QuantizedWeight, path: str) -> None:
    """Replace a layer's weight by 4-bit codes. A linear layer becomes x @ W^T with W^T stored, as runtimes fuse it."""
    codes, scale = stored.codes, stored.scale.reshape(len(stored.codes), -1)
    block = stored.group or codes.shape[1]
    is_linear = is_call(node, aten.linear.default)
    axis = 0 if is_linear else 1
    if is_linear:
        codes, scale = codes.T.contiguous(), scale.T.contiguous()
    else:
        scale = scale[..., None, None]
    names = (f"{path}_weight_int4", codes), (f"{path}_weight_int4_scale", scale)
    arguments = [add_attribute(graph, name, value, node) for name, value in names]
    with graph.graph.inserting_before(node):
        weight = graph.graph.call_function(
            torch.ops.edgeattn.dequantize_int4.default, (*arguments, axis, block)
        )  # fmt: skip
        if not is_linear:
            set_input(node, 1, weight)
            return
        new = graph.graph.call_function(aten.matmul.default, (node.args[0], weight))
        if len(node.args) > 2 and node.args[2] is not None:
            new.meta = dict(node.meta)
            new = graph.graph.call_function(aten.add.Tensor, (new, node.args[2]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


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
