"""The torch graph that quantization and export share: captured once with torch.export, then rewritten in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeattn.data.interface import EVEN_BATCH, Interface
from edgeattn.errors import UnsupportedOp

aten = torch.ops.aten
# Axes that are free in steps: pictures by 32 pixels, the stride of every network that takes any size; guided batches.
_STEPS = {"height": 32, "width": 32, EVEN_BATCH: 2}
_MOST_STEPS = 4096


def _dimension(axis: str) -> Any:
    if axis in _STEPS:
        return _STEPS[axis] * torch.export.Dim(f"{axis}_steps", min=2, max=_MOST_STEPS)
    return torch.export.Dim(axis, max=_MOST_STEPS)


def capture(model: nn.Module, interface: Interface) -> fx.GraphModule:
    """Trace a model in evaluation mode with free axes; parameters become attributes of the graph module.

    Nothing in the graph writes into a tensor: what the model does in place is made functional.

    Raises:
        UnsupportedOp: torch.export cannot trace the model, its own reason is kept; or the model keeps state.
    """
    try:
        program = traced(model.eval(), interface)
        in_place = any(_writes(node) for node in program.graph.nodes)
        graph = (program.run_decompositions({}) if in_place else program).module(check_guards=False)
    except Exception as error:  # torch.export raises many classes
        shapes = ", ".join(f"{spec.name} {spec.shape}" for spec in interface.inputs)
        raise UnsupportedOp(
            f"torch.export cannot trace {type(model).__name__} on {shapes}: {error}. "
            "Data-dependent Python control flow in forward() is the usual cause."
        ) from error
    return _functional(graph, type(model).__name__) if in_place else graph


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functional(graph: fx.GraphModule, what: str) -> fx.GraphModule:
    """The graph behind torch's functionalization without its last traces, in place: what it would write back into
    inputs and buffers, and BatchNorm as the op that it makes of it.

    Raises:
        UnsupportedOp: an output depends on a buffer that every call changes.
    """
    written: set[str] = set()
    for node in calls(graph, aten.copy_.default):
        written |= {str(source.target) for source in node.all_input_nodes[:1] if source.op == "get_attr"}
        graph.graph.erase_node(node)
    for node in calls(graph, aten._native_batch_norm_legit_no_training.default):
        values, numbers = node.args[:5], node.args[5:]
        with graph.graph.inserting_before(node):
            norm = graph.graph.call_function(aten.batch_norm.default, (*values, False, *numbers, False))
        for result in list(node.users):  # its second and third are empty in evaluation, and nobody reads them
            norm.meta = dict(result.meta)
            result.replace_all_uses_with(norm)
    finish(graph)
    if state := sorted(written & {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}):
        raise UnsupportedOp(
            f"{what} keeps state: forward() changes the buffer {', '.join(state)}, and its result depends on that. An "
            "exported model computes every input alike; make the state an input, or leave it out in evaluation mode."
        )
    return graph


def traced(model: nn.Module, interface: Interface) -> torch.export.ExportedProgram:
    """torch.export of a model with the interface's free axes free."""
    # torch.export would fix an axis of size one, and one that equals another by chance.
    sizes = {axis: _STEPS.get(axis, 1) * (2 + i) for i, axis in enumerate(interface.free_axes)}
    dims = {axis: _dimension(axis) for axis in interface.free_axes}
    examples = tuple(torch.from_numpy(value) for value in interface.examples(sizes).values())
    shapes = tuple(
        {i: dims[side] for i, side in enumerate(spec.shape) if isinstance(side, str)} for spec in interface.inputs
    )
    return torch.export.export(
        model, examples, dynamic_shapes=shapes, strict=False,
        # Inequalities between products of free sizes that it cannot prove become checks, not refusals.
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip


def module_path(node: fx.Node) -> str:
    """Dotted path of the torch module that the node came from, the model's own names; "" when unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else str(node.meta.get("module_path", ""))


def is_call(node: Any, *targets: Any) -> bool:
    """Whether node calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def attribute(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor of a get_attr node, or None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return operator.attrgetter(str(node.target))(graph)


def add_attribute(graph: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register a tensor under a free name derived from `name` and return a get_attr node for it."""
    base = name.replace(".", "_")
    name, i = base, 0
    while hasattr(graph, name):
        i += 1
        name = f"{base}_{i}"
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    node.meta["val"] = value
    return node


def set_input(node: fx.Node, index: int, value: Any) -> None:
    """Replace one positional argument, appending defaults where the call was shorter."""
    args = list(node.args) + [None] * (index + 1 - len(node.args))
    args[index] = value
    node.args = tuple(args)


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and tensors nobody reads, check the graph, and recompile."""
    graph.graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(parent), leaf)
    graph.graph.lint()
    graph.recompile()
    return graph


def first_nonfinite(graph: fx.GraphModule, *inputs: Tensor) -> str | None:
    """Module path (or name of the weight) of the first node whose output holds NaN or infinity, or None."""

    class Scan(fx.Interpreter):
        found: str | None = None

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            bad = isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
            if bad and self.found is None:
                self.found = str(n.target) if n.op == "get_attr" else module_path(n) or n.name
            return value

    scan = Scan(graph)
    with torch.no_grad():
        scan.run(*inputs)
    return scan.found


def calls(graph: fx.GraphModule, *targets: Any) -> Iterable[fx.Node]:
    """All nodes that call one of the targets, in order; safe against edits while walking."""
    return [node for node in graph.graph.nodes if is_call(node, *targets)]
