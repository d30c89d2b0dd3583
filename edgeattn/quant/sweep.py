"""The float and the quantized model side by side, one unit of layers after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant import placement
from edgeattn.quant.graph import aten, attribute, is_call, module_path
from edgeattn.quant.sensitivity import StandIn


@dataclasses.dataclass(frozen=True)
class Unit:
    """Neighbouring nodes whose layers are learned together.

    Attributes:
        nodes: in graph order, from the first layer to the unit's last node.
        layers: those with weights to round.
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]


def units(graph: fx.GraphModule, plan: placement.Plan, kind: str) -> list[Unit]:
    """Units in graph order: every layer, or the layers under one numbered module that holds a residual addition."""
    order = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    sums = [module_path(node) for node in order if is_call(node, aten.add.Tensor)]
    groups: list[tuple[str, list[fx.Node]]] = []
    for node in (n for n in order if n in plan.weighted):
        key = _block(module_path(node), sums) if kind == "block" else ""
        if key and groups and groups[-1][0] == key:
            groups[-1][1].append(node)
        else:
            groups.append((key, [node]))
    found = []
    for i, (key, layers) in enumerate(groups):
        stop = place[groups[i + 1][1][0]] if i + 1 < len(groups) else len(order)
        inside = [n for n in order[place[layers[-1]] : stop] if key and f"{module_path(n)}.".startswith(f"{key}.")]
        last = max([place[layers[-1]], *(place[n] for n in inside)])
        found.append(Unit(tuple(order[place[layers[0]] : last + 1]), tuple(layers)))
    return found


def _block(path: str, sums: Sequence[str]) -> str:
    """The innermost numbered module around a layer that holds a residual addition; "" without one."""
    parts = path.split(".")
    numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
    holding = [prefix for prefix in numbered if any(f"{add}.".startswith(f"{prefix}.") for add in sums)]
    return holding[-1] if holding else ""


class Sweep:
    """Values of the float and of the quantized model at one place of the graph, for all batches.

    Only what nodes from there on read is held. `stands` may change for nodes that are still to come.
    """

    def __init__(self, graph: fx.GraphModule, stands: dict[fx.Node, StandIn], batches: Sequence[Tensor]) -> None:
        self.graph, self.stands = graph, stands
        self.plain: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.quantized: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._order, self._done = list(graph.graph.nodes), 0
        self._place = {node: i for i, node in enumerate(self._order)}
        picture = next(node for node in self._order if node.op == "placeholder")
        for values in (self.plain, self.quantized):
            for known, batch in zip(values, batches, strict=True):
                known[picture] = batch

    @torch.no_grad()
    def advance(self, to: fx.Node) -> None:
        """Compute all nodes in front of one, which must not lie behind the present place."""
        nodes = self._order[self._done : self._place[to]]
        for values, stands in ((self.plain, {}), (self.quantized, self.stands)):
            for known in values:
                self.run(nodes, known, stands)
        self._done = self._place[to]

    def run(self, nodes: Sequence[fx.Node], known: dict[fx.Node, Any], stands: Mapping[fx.Node, StandIn]) -> None:
        """Add the nodes' values to the known ones, and drop what no later node reads."""
        for node in nodes:
            if node.op == "get_attr":
                known[node] = attribute(self.graph, node)
            elif node in stands:
                known[node] = _output(stands[node], known)
            elif node.op == "call_function":
                arguments, options = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                value = node.target(*arguments, **options)  # type: ignore[operator]
                known[node] = on_grid(value, grid) if (grid := _result_grid(node, stands)) else value
            for arg in node.all_input_nodes:
                if max(self._place[user] for user in arg.users) <= self._place[node]:
                    known.pop(arg, None)


def _result_grid(node: fx.Node, stands: Mapping[fx.Node, StandIn]) -> tuple[Tensor, Tensor] | None:
    """The grid of a ReLU that a stand-in's layer is followed by."""
    source = node.args[0] if node.args else None
    stand = stands.get(source) if isinstance(source, fx.Node) else None
    return stand.grids.get(node) if stand and placement.after_activation(stand.node) is node else None


def _output(stand: StandIn, known: Mapping[fx.Node, Any]) -> Tensor:
    """What a stand-in gives, with a gradient through its grids."""
    inputs = {n: on_grid(known[n], stand.grids[n]) for n in stand.node.all_input_nodes if n in stand.grids}
    result = dataclasses.replace(stand, grids={}).output({**known, **inputs})
    return on_grid(result, stand.grids[stand.node]) if stand.node in stand.grids else result


def on_grid(x: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
    """x as its codes hold it; the gradient is that of x inside the range and 0 outside."""
    exact = torch.ops.edgeattn.dequantize(torch.ops.edgeattn.quantize(x.detach(), *grid), *grid)
    if not x.requires_grad:
        return exact
    limits = torch.iinfo(grid[1].dtype)
    low, high = ((limit - grid[1].float()) * grid[0] for limit in (limits.min, limits.max))
    clipped = x.clamp(low, high)
    return clipped + (exact - clipped).detach()
