"""What of a float graph float16 cannot compute: values, sums and divisors beyond its range, inside attention too.

float16 ends at 65504, is normal from 6.1e-5 on and keeps 11 bits. Every node's output is compared with that as seen on
real pictures, and so are the parts of a node that a device computes in the node's own type: the ops that hide a product
(attention, norms, reductions) run a second time with every inner tensor in sight. Sums inside one product or
convolution are taken to run in float32, as they do on GPUs, NPUs and in the CPU runtimes. Not a hazard: probabilities
of a softmax that underflow while one does not; they add up to less than 1e-3.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.errors import NumericError
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.float16_limits import (
    KINDS,
    LARGEST,
    MOST,
    Inside,
    is_bad,
    largest_of,
    op_name,
    own_ops,
    transparent,
    worse,
)  # fmt: skip
from edgeattn.quant.graph import attribute, module_path

# What moves values without changing them; a value beyond float16 stays that behind it.
_MOVES = (
    "transpose", "permute", "reshape", "view", "_unsafe_view", "flatten", "unflatten", "contiguous", "clone", "chunk",
    "split", "split_with_sizes", "select", "slice", "squeeze", "unsqueeze", "expand", "cat", "stack", "flip", "pad",
    "constant_pad_nd", "repeat", "roll", "unbind", "to", "_to_copy", "alias", "detach", "movedim",
)  # fmt: skip
_PROBED = (
    "scaled_dot_product_attention", "layer_norm", "group_norm", "gelu", "mean", "sum", "avg_pool2d", "softmax",
)  # fmt: skip
# Parts that an op of ours computes in float32 in its float16 form; None: all of them.
_HANDLED: dict[str, tuple[str, ...] | None] = {
    "elu_linear_attention": None, "single_head_attention": ("variance", "epsilon"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hazard:
    """One node that float16 cannot compute.

    Attributes:
        path: of its module, the model's own names.
        kind: a key of `KINDS`.
        bound: the worst value seen; limit: of float16, with room for pictures that were not seen.
        handled: the op's own float16 form computes that part in float32, so that nothing is to be done.
        spread: nodes whose output float16 cannot hold because of this one; the node itself is among them if its is.
    """

    node: fx.Node
    path: str
    kind: str
    bound: float
    limit: float
    reason: str
    remedy: str
    handled: bool = False
    spread: tuple[fx.Node, ...] = ()

    def __str__(self) -> str:
        side = "below" if KINDS[self.kind].is_small else "beyond"
        return f"{self.path}: {self.reason}, {side} float16 ({self.limit:.4g}); {self.remedy}"


def analyse(graph: fx.GraphModule, calibrator: Calibrator) -> list[Hazard]:
    """Hazards of a folded float graph, in graph order, from one pass over the pictures.

    Raises:
        NumericError: NaN in a tensor; the layer is named.
    """
    seen = _Seen(graph)
    calibrator.run(graph, seen.watch(), "float16 hazards")
    return list(seen.hazards())


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves, cuts or copies values."""
    return node.target is operator.getitem or op_name(node) in _MOVES


class _Seen:
    """The largest outputs of all nodes, and the worst inner values of those that hide some."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._largest: dict[fx.Node, float] = {}
        self._smallest: dict[fx.Node, float] = {}  # of divisors
        self._inside: dict[fx.Node, dict[str, float]] = {}
        self._kept: dict[fx.Node, tuple[Any, int]] = {}  # a value, and how many probes still want it
        own = own_ops()
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self._probes = [node for node in calls if op_name(node) in (*_PROBED, *own)]
        self._divisors = {source for node in calls for source in _divisor(node)}

    def watch(self) -> dict[fx.Node, list[Callable[[Any], None]]]:
        wanted: dict[fx.Node, int] = {}
        for node in self._probes:
            for source in node.all_input_nodes:
                wanted[source] = wanted.get(source, 0) + 1
        watch: dict[fx.Node, list[Callable[[Any], None]]] = {}
        for node in self._graph.graph.nodes:
            if node.op in ("call_function", "placeholder"):
                watch[node] = [self._output_watcher(node)]
            if node in wanted:
                watch.setdefault(node, []).append(self._keeper(node, wanted[node]))
        for node in self._probes:
            watch[node].append(self._prober(node))
        return watch

    def _output_watcher(self, node: fx.Node) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
                return
            if torch.isnan(value).any():
                raise NumericError(
                    f"layer {module_path(node) or node.name} gives NaN in float32 already. Check the checkpoint."
                )
            self._largest[node] = max(self._largest.get(node, 0.0), largest_of(value))
            if node in self._divisors:
                self._smallest[node] = min(self._smallest.get(node, torch.inf), float(value.abs().min()))

        return see

    def _keeper(self, node: fx.Node, count: int) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            self._kept[node] = value, count

        return see

    def _take(self, node: fx.Node) -> Any:
        value, count = self._kept[node]
        self._kept[node] = value, count - 1
        if count == 1:
            del self._kept[node]
        return value

    def _prober(self, node: fx.Node) -> Callable[[Any], None]:
        def see(_: Any) -> None:
            values = {source: self._take(source) for source in node.all_input_nodes}
            args: Any = fx.map_arg(node.args, values.__getitem__)
            kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
            with torch.no_grad(), Inside() as inside:
                transparent(node)(*args, **kwargs)
            known = self._inside.setdefault(node, inside.worst)
            for kind, value in inside.worst.items():
                known[kind] = worse(kind, known.get(kind, value), value)

        return see

    def hazards(self) -> Iterator[Hazard]:
        roots = self._roots()
        for node in self._graph.graph.nodes:
            found = {kind: value for kind, value in self._inside.get(node, {}).items() if is_bad(kind, value)}
            if is_bad("normaliser", self._smallest.get(node, torch.inf)):
                found["normaliser"] = self._smallest[node]
            for source in node.all_input_nodes:
                constant = attribute(self._graph, source)
                if constant is not None and constant.is_floating_point() and largest_of(constant) > LARGEST:
                    found["weight"] = largest_of(constant)
            if node in roots:
                found.setdefault(_product_kind(node), self._largest[node])
            if found:
                kind = next(kind for kind in ("scores", "kv_sum", *KINDS) if kind in found)
                # A divisor that small is no longer itself in float16, so whatever divides by it reads float32.
                spread = roots.get(node, (node,) if "normaliser" in found and node in self._smallest else ())
                yield _hazard(node, kind, found[kind], spread)

    def _roots(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """First nodes with outputs that are too large, and all whose outputs are so because of theirs."""
        root_of: dict[fx.Node, fx.Node] = {}
        for node, largest in self._largest.items():
            if largest > MOST:
                before = [root_of[source] for source in node.all_input_nodes if source in root_of]
                root_of[node] = before[0] if before else node
        return {root: tuple(n for n in root_of if root_of[n] is root) for root in root_of.values()}


def _hazard(node: fx.Node, kind: str, bound: float, spread: tuple[fx.Node, ...]) -> Hazard:
    known = KINDS[kind]
    parts = _HANDLED.get(op_name(node), ())
    handled = not spread and (parts is None or kind in parts)
    path = module_path(node) or node.name
    return Hazard(node, path, kind, bound, known.limit, known.reason.format(bound=bound), known.remedy, handled, spread)


def _divisor(node: fx.Node) -> Iterator[fx.Node]:
    """The node that makes what a division divides by, behind what only moves it."""
    index = {"div": 1, "rsqrt": 0, "reciprocal": 0}.get(op_name(node))
    source = node.args[index] if index is not None else None
    while isinstance(source, fx.Node) and is_move(source):
        source = source.all_input_nodes[0]
    if isinstance(source, fx.Node) and source.op == "call_function":
        yield source


def _product_kind(node: fx.Node) -> str:
    """What a product's output is: scores if a softmax reads it, a sum over tokens if that is its longest axis."""
    if op_name(node) not in ("matmul", "bmm", "mm", "einsum"):
        return "overflow"
    readers, front = set(), list(node.users)
    while front:
        user = front.pop()
        if op_name(user) in ("mul", "add", "div", *_MOVES, "masked_fill"):
            front += [u for u in user.users if u not in readers]
        readers.add(user)
    if any(op_name(user) in ("softmax", "_softmax") for user in readers):
        return "scores"
    shapes = [list(getattr(n.meta.get("val"), "shape", [])) for n in (node.all_input_nodes[0], node)]
    sides = [side for side in (*shapes[0][-1:], *shapes[1][-2:]) if isinstance(side, int)]
    return "kv_sum" if len(sides) == 3 and sides[0] > max(sides[1:]) else "overflow"
