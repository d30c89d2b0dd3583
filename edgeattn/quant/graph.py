"""The torch graph that quantization and export share: captured once with torch.export, then rewritten in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeattn.errors import UnsupportedOp

aten = torch.ops.aten


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace a model in evaluation mode with a free batch axis; parameters become attributes of the graph module.

    Args:
        example: (B, ...) input with B >= 2, so that the batch axis is not specialised to one.

    Raises:
        UnsupportedOp: torch.export cannot trace the model; its own reason is kept.
    """
    try:
        program = torch.export.export(
            model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},), strict=False
        )
    except Exception as error:  # torch.export raises many classes
        raise UnsupportedOp(
            f"torch.export cannot trace {type(model).__name__} on an input of {tuple(example.shape)}: {error}. "
            "Data-dependent Python control flow in forward() is the usual cause."
        ) from error
    return program.module(check_guards=False)


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


def first_nonfinite(graph: fx.GraphModule, x: Tensor) -> str | None:
    """Module path (or name of the weight) of the first node whose output holds NaN or infinity for input x, or None."""

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
        scan.run(x)
    return scan.found


def calls(graph: fx.GraphModule, *targets: Any) -> Iterable[fx.Node]:
    """All nodes that call one of the targets, in order; safe against edits while walking."""
    return [node for node in graph.graph.nodes if is_call(node, *targets)]
