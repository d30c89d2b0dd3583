"""Where a tensor's entries go: through operations that move or average them, up to the nodes that compute with them.

An operation is followed by running it on marks, tensors that hold indices in place of values. So reshapes, permutations
and splits of any kind are understood, without a pattern for each way to write them.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import aten

_MOVES = frozenset({
    operator.getitem, aten.alias.default, aten.chunk.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default, aten.dropout.default, aten.expand.default, aten.flatten.using_ints, aten.flip.default,
    aten.index_select.default, aten.movedim.int, aten.movedim.intlist, aten.narrow.default, aten.permute.default,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.reshape.default, aten.roll.default, aten.select.int,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.swapaxes.default, aten.t.default, aten.transpose.int, aten.unbind.int,
    aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
})  # fmt: skip
_AVERAGES = frozenset({aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim})
SHAPE_ONLY = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})  # read no entry


@dataclasses.dataclass(frozen=True)
class Read:
    """A node that computes with what a tensor holds.

    Attributes:
        index: which of the node's arguments it is; None for one inside a list or given by name.
        marks: as they arrive there; float64.
        averaged: whether entries were averaged on the way.
    """

    node: fx.Node
    index: int | None
    marks: tuple[Tensor, ...]
    averaged: bool


class Flow:
    """The sizes that a graph's tensors have for some pictures, (N, 3, H, W), and where entries go.

    Attributes:
        shapes: of all nodes that give one tensor.
    """

    def __init__(self, graph: fx.GraphModule, pictures: Tensor) -> None:
        shapes: dict[fx.Node, tuple[int, ...]] = {}
        numbers: dict[fx.Node, Any] = {}

        class Record(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    shapes[n] = tuple(value.shape)
                elif not isinstance(value, (list, tuple)):
                    numbers[n] = value
                return value

        with torch.no_grad():
            Record(graph).run(pictures)
        self.shapes, self._numbers = shapes, numbers

    def marks(self, node: fx.Node, axis: int) -> tuple[Tensor, Tensor]:
        """(index along the axis, index of the vector along it) of every entry of a node."""
        shape = self.shapes[node]
        axis %= len(shape)
        along = torch.arange(shape[axis], dtype=torch.float64).reshape([-1] + [1] * (len(shape) - axis - 1))
        others = [1 if i == axis else side for i, side in enumerate(shape)]
        vectors = torch.arange(math.prod(others), dtype=torch.float64).reshape(others)
        return along.expand(shape), vectors.expand(shape)

    def source(self, node: fx.Node) -> fx.Node | None:
        """The tensor that a node only moves or averages, or None where it computes."""
        if node.op != "call_function" or node.target not in _MOVES | _AVERAGES:
            return None
        tensors = [arg for arg in node.all_input_nodes if arg not in self._numbers]
        return tensors[0] if len(tensors) == 1 else None

    def moved(self, node: fx.Node, marks: Any) -> Any:
        """What a node that moves its source makes of the source's marks."""
        source = self.source(node)

        def given(arg: fx.Node) -> Any:
            return marks if arg is source else self._numbers[arg]

        return node.target(*fx.map_arg(node.args, given), **fx.map_arg(node.kwargs, given))  # type: ignore[operator]

    def reads(self, start: fx.Node, *marks: Tensor) -> list[Read]:
        """All nodes that compute with a tensor's entries, and which of them."""
        found: list[Read] = []
        todo: list[tuple[fx.Node, tuple[Any, ...], bool]] = [(start, marks, False)]
        while todo:
            node, held, averaged = todo.pop()
            for user in node.users:
                if self.source(user) is node:
                    moved = tuple(self.moved(user, mark) for mark in held)
                    todo.append((user, moved, averaged or user.target in _AVERAGES))
                    continue
                if user.target in SHAPE_ONLY:
                    continue
                places: list[int | None] = [i for i, arg in enumerate(user.args) if arg is node]
                found += [Read(user, place, held, averaged) for place in places or [None]]
        return found
