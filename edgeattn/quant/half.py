"""A typed float16 graph: float16 weights and activations, float32 islands only where float16 cannot compute.

Inputs and outputs of the model stay float32. An island is one node between casts; where what it makes is beyond float16
itself, the nodes that read it belong to the island too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.ops.registry import load_ops
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.float16_limits import op_name
from edgeattn.quant.graph import add_attribute, aten, attribute, finish, is_call, module_path
from edgeattn.quant.hazards import Hazard, analyse, is_move
from edgeattn.quant.recipe import Recipe

_WIDE, _HALF = torch.float32, torch.float16
# Measured with ONNX Runtime 1.31 and OpenVINO 2026.4 on x86: the optimised graphs hold float32 nodes and Casts only.
_RUNTIME_NOTES = {
    "onnxruntime": "onnxruntime: its CPU kernels compute float16 nodes in float32, between casts; the file is smaller, "
    "the model no faster",
    "openvino": "openvino: weights are stored in float16; its CPU sessions compute in float32 "
    "(inference_precision_hint f32)",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HalfGraph:
    """What `to_half` made.

    Attributes:
        precision: compute nodes by type; what only moves values is not counted.
        notes: one line for every island, and for every hazard that an op avoids by itself.
    """

    graph: fx.GraphModule
    precision: dict[str, int]
    notes: list[str]


def build(graph: fx.GraphModule, recipe: Recipe, calibrator: Calibrator, targets: Sequence[str]) -> HalfGraph:
    """The float16 variant of a folded float graph: hazards found on the pictures, rules and targets obeyed.

    Raises:
        NumericError: NaN in an activation; the layer is named.
    """
    kept: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        rule = recipe.rule_for(module_path(node)) if node.op == "call_function" else None
        if rule is not None and rule.is_float and not is_move(node):
            kept[node] = rule.reason or f"rule {rule.modules!r}"
    made = to_half(graph, analyse(graph, calibrator), kept)
    return dataclasses.replace(made, notes=made.notes + [_RUNTIME_NOTES[t] for t in targets if t in _RUNTIME_NOTES])


def to_half(graph: fx.GraphModule, hazards: Sequence[Hazard], kept: Mapping[fx.Node, str] | None = None) -> HalfGraph:
    """A float16 copy of a folded float graph, without its hazards.

    Args:
        hazards: of this graph, from `analyse`.
        kept: further nodes to compute in float32, with the reason.
    """
    reasons = dict(kept or {})
    reasons.update({hazard.node: str(hazard) for hazard in hazards if not hazard.handled})
    wide = {node for hazard in hazards if not hazard.handled for node in hazard.spread}
    _spread(graph, reasons, wide)
    notes = [f"float32 island: {module_path(node) or node.name} ({reason})" for node, reason in reasons.items()
             if node.op == "call_function" and not is_move(node)]  # fmt: skip
    notes += [f"float32 inside: {hazard}" for hazard in hazards if hazard.handled]
    made = copy.deepcopy(graph)
    copies = dict(zip(graph.graph.nodes, list(made.graph.nodes), strict=True))
    _Typing(made, {copies[node] for node in reasons}, {copies[node] for node in wide}).rewrite()
    compute = [node for node in graph.graph.nodes if node.op == "call_function" and _is_compute(node)]
    islands = sum(node in reasons for node in compute)
    counts = {"float16": len(compute) - islands, "float32": islands}
    return HalfGraph(made, {name: count for name, count in counts.items() if count}, list(dict.fromkeys(notes)))


def _spread(graph: fx.GraphModule, reasons: dict[fx.Node, str], wide: set[fx.Node]) -> None:
    """Add what has to be float32 because of other nodes: readers of values beyond float16, and nodes of one op of ours
    with equal structure, which share a function body and with it a type."""
    while True:
        before = len(reasons), len(wide)
        for node in graph.graph.nodes:
            source = next((s for s in node.all_input_nodes if s in wide), None)
            if node.op != "call_function" or source is None:
                continue
            reasons.setdefault(node, f"reads {module_path(source) or source.name}, which float16 cannot hold")
            if is_move(node):
                wide.add(node)
        bodies = {_body(node): node for node in reasons if _body(node)}
        for node in graph.graph.nodes:
            if node not in reasons and _body(node) in bodies:
                reasons[node] = f"shares its ONNX function with {module_path(bodies[_body(node)])}"
        if before == (len(reasons), len(wide)):
            return


def _onnx_name(node: fx.Node) -> str:
    """ONNX name of an op of ours, "" for anything else."""
    return next((spec.name for spec in load_ops().values() if spec.torch_op == f"edgeattn::{op_name(node)}"), "")


def _body(node: fx.Node) -> tuple[Any, ...]:
    """What the ONNX function of a node of ours depends on; () for other nodes."""
    spec = load_ops().get(_onnx_name(node))
    if spec is None:
        return ()
    attributes = dict(zip(spec.attributes, node.args[len(spec.inputs) :], strict=True))
    return (spec.name, *(attributes[name] for name in spec.signature))


def _is_float(node: Any) -> bool:
    """Whether a node makes floating-point tensors."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_compute(node: fx.Node) -> bool:
    return _is_float(node) and not is_move(node)


class _Typing:
    """Gives every floating-point node of a graph its type, in place.

    Args:
        islands: nodes to compute in float32; `wide`: those whose output stays float32.
    """

    def __init__(self, graph: fx.GraphModule, islands: set[fx.Node], wide: set[fx.Node]) -> None:
        self._graph, self._islands, self._wide = graph, islands, wide
        self._types: dict[fx.Node, torch.dtype] = {}
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def rewrite(self) -> None:
        """Insert the casts, retype constants and arguments, and recompile."""
        for node in list(self._graph.graph.nodes):
            if is_call(node, aten._assert_tensor_metadata.default):  # would insist on float32
                self._graph.graph.erase_node(node)
            elif node.op == "output":
                node.args = fx.map_arg(node.args, lambda source: self._as(source, _WIDE))
            elif node.op in ("placeholder", "get_attr"):
                self._types[node] = _WIDE
            elif node.op == "call_function":
                self._retype(node)
        finish(self._graph)

    def _retype(self, node: fx.Node) -> None:
        dtype = _WIDE if node in self._islands else _HALF
        if (
            is_move(node)
            and isinstance(node.args[0], fx.Node)
            and isinstance(node.args[0].meta.get("val"), (list, tuple))
        ):  # a part of several
            self._types[node] = self._types[node.args[0]]
            return
        node.args = fx.map_arg(node.args, lambda source: self._as(source, dtype))
        node.kwargs = fx.map_arg(node.kwargs, lambda source: self._as(source, dtype))
        if dtype is _HALF:
            node.args = fx.node.map_aggregate(node.args, _narrow)  # type: ignore[assignment]
            node.kwargs = fx.node.map_aggregate(node.kwargs, _narrow)  # type: ignore[assignment]
        self._types[node] = dtype

    def _as(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node's value in a type: itself, a constant of that type, or a cast right behind it."""
        if not _is_float(source) or self._types[source] is dtype:
            return source
        if (source, dtype) not in self._casts:
            self._casts[source, dtype] = self._cast(source, dtype)
        return self._casts[source, dtype]

    def _cast(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        constant = attribute(self._graph, source)
        if constant is not None:
            return add_attribute(self._graph, f"{source.target}_half", constant.detach().to(dtype), source)
        with self._graph.graph.inserting_after(_last_of_block(source)):
            cast = self._graph.graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta["module_path"] = module_path(source)
        cast.meta["val"] = source.meta["val"].to(dtype)
        return cast


def _narrow(value: Any) -> Any:
    return _HALF if value is _WIDE else value


def _last_of_block(node: fx.Node) -> fx.Node:
    """The node itself, or the last placeholder: inputs come first."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
